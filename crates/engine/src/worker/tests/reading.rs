//! Prompts whose beginning is on disk, with a disk that answers when the test says so.

use std::fs;
use std::path::Path;
use std::sync::mpsc as blocking;
use std::sync::{Condvar, Mutex};

use super::*;
use crate::config::DiskCacheConfig;
use crate::disk::Access;

/// How many files may be read.
type Gate = Arc<(Mutex<usize>, Condvar)>;

/// Has a worker write down all that it may.
fn save(worker: &mut Worker<MockModel, ManualClock>) {
    loop {
        match worker.save() {
            Saved::Some => {}
            Saved::Nothing => return,
            Saved::Later => futures::executor::block_on(worker.disk.as_ref().unwrap().room()),
        }
    }
}

/// A folder with what a worker has computed, and a way to it that the test holds.
struct Disk {
    folder: tempfile::TempDir,
    gate: Gate,
    /// Told of each file before it is read; closed when nobody will read any more.
    reads: blocking::Receiver<()>,
}

/// A prompt of three chunks and a rest.
fn prompt() -> String {
    "the words of a long prompt, ".repeat(30)[..800].to_owned()
}

impl Disk {
    /// A worker that finds the first three chunks of the [`prompt`] on a disk that gives nothing yet.
    fn held(script: MockScript, config: &EngineConfig) -> (Self, Bench) {
        let folder = tempfile::tempdir().unwrap();
        let settings = DiskCacheConfig {
            min_free_bytes: 0,
            ..DiskCacheConfig::new(folder.path())
        };
        let mut first = Bench::new(MockScript::default(), config);
        first.worker.disk = Some(DiskCache::open(&settings, "mock").unwrap());
        first.submit(&prompt(), params(1)).unwrap();
        first.finish();
        save(&mut first.worker);
        drop(first);
        let gate = Gate::default();
        let (told, reads) = blocking::channel();
        let held = Arc::clone(&gate);
        let read = move |path: &Path| {
            let _ = told.send(());
            let (files, opened) = &*held;
            let mut files = opened
                .wait_while(files.lock().unwrap(), |files| *files == 0)
                .unwrap();
            *files -= 1;
            fs::read(path)
        };
        let mut bench = Bench::new(script, config);
        let access = Access {
            read: Box::new(read),
            ..Access::default()
        };
        bench.worker.disk = Some(DiskCache::open_with(&settings, "mock", access).unwrap());
        (Self { folder, gate, reads }, bench)
    }

    /// Lets so many files be read.
    fn give(&self, files: usize) {
        *self.gate.0.lock().unwrap() += files;
        self.gate.1.notify_all();
    }
}

/// Waits until so many blocks have come for a request, or all that will.
fn wait(bench: &mut Bench, id: Id, blocks: usize) {
    let active = bench.worker.active.iter_mut().find(|active| active.id == id);
    let reading = active.and_then(|active| active.reading.as_mut());
    let fetch = &mut reading.expect("it reads").fetch;
    while !fetch.is_over() && fetch.len() < blocks {
        fetch.wait(Duration::from_mins(1));
    }
}

/// The end of the prompt, which is what the mock answers.
fn answer(prompt: &str, most: usize) -> &str {
    &prompt[prompt.len() - 64..][..most]
}

#[test]
fn answers_go_on_while_a_prompt_is_read() {
    let (disk, bench) = Disk::held(MockScript::default(), &config());
    // Seconds, so that the prompt would not have been computed meanwhile.
    let mut bench = bench.with_pace((2000, 0));
    let running = bench.submit("the answer that runs", params(20)).unwrap();
    (0..3).for_each(|_| bench.turn());
    bench.submit(&prompt(), params(9)).unwrap();
    for turn in 0..12 {
        let before = bench.requests[running].text.len();
        bench.turn();
        assert_eq!(bench.requests[running].text.len(), before + 1, "turn {turn}");
    }
    disk.reads.recv().unwrap();
    assert!(!bench.worker.scheduler.waits_for_disk());
    bench.finish_one(running);
    bench.turn();
    assert!(
        bench.worker.scheduler.waits_for_disk(),
        "there is nothing else to do"
    );
    assert_eq!(bench.requests[1].cached, None);
    disk.give(3);
    wait(&mut bench, 1, 3);
    bench.finish();
    let sent = &bench.requests[1];
    assert_eq!((sent.cached, &*sent.text), (Some(768), answer(&prompt(), 9)));
    assert_eq!(sent.tokens.len(), 9);
    let fed: usize = bench.worker.model.fed.iter().flatten().sum();
    assert!(fed < 100, "{fed} tokens were fed");
}

#[test]
fn what_comes_late_is_computed() {
    for come in 0..3 {
        let (disk, mut bench) = Disk::held(MockScript::default(), &config());
        bench.submit(&prompt(), params(9)).unwrap();
        bench.turn();
        disk.give(come);
        wait(&mut bench, 0, come);
        bench.turn();
        assert_eq!(bench.requests[0].cached, None, "there is time yet");
        // As long as 768 tokens are thought to take.
        bench.clock.advance(7680);
        bench.finish();
        let sent = &bench.requests[0];
        assert_eq!(
            (sent.cached, &*sent.text),
            (Some(256 * come as u32), answer(&prompt(), 9))
        );
        disk.give(9);
    }
}

#[test]
fn a_damaged_file_ends_what_is_read() {
    let (disk, mut bench) = Disk::held(MockScript::default(), &config());
    bench.submit(&prompt(), params(9)).unwrap();
    bench.turn();
    disk.reads.recv().unwrap();
    for file in fs::read_dir(disk.folder.path()).unwrap() {
        fs::write(file.unwrap().path(), "damaged").unwrap();
    }
    disk.give(9);
    wait(&mut bench, 0, 3);
    bench.finish();
    let sent = &bench.requests[0];
    assert_eq!((sent.cached, &*sent.text), (Some(0), answer(&prompt(), 9)));
}

#[test]
fn callers_and_times_win_over_the_disk() {
    let ends = |params: GenerateParams, wait: u64, drops: bool| {
        let (disk, mut bench) = Disk::held(MockScript::default(), &config());
        bench.submit(&prompt(), params).unwrap();
        bench.turn();
        disk.reads.recv().unwrap();
        bench.clock.advance(wait);
        if drops {
            bench.requests[0].events = None;
        }
        bench.turn();
        assert!(bench.worker.is_idle());
        assert_eq!(bench.worker.model.alive(), 0);
        assert_eq!(bench.worker.scheduler.reserved(), 0);
        // The files that were not begun are not read any more.
        disk.give(9);
        drop(bench.worker);
        assert!(disk.reads.recv().is_err());
        bench.requests.remove(0).ends.pop().map(|(end, _)| end)
    };
    assert!(ends(params(9), 0, true).is_none());
    for limited in [params(9).with_timeout_s(2.0), params(9).with_queue_timeout_s(2.0)] {
        let Some(Err(EngineError::DeadlineExceeded { limit })) = ends(limited, 2000, false) else {
            panic!("its time is over")
        };
        assert_eq!(limit, Duration::from_secs(2));
    }
}

#[test]
fn what_two_prompts_have_in_common_is_read_once() {
    let (disk, mut bench) = Disk::held(MockScript::default().with_batch_limit(4), &config());
    let other = format!(
        "{}and another end of it, which is longer than the answer that is given",
        prompt()
    );
    bench.submit(&prompt(), params(9)).unwrap();
    bench.submit(&other, params(9)).unwrap();
    bench.turn();
    disk.give(9);
    wait(&mut bench, 0, 3);
    bench.finish();
    assert_eq!(disk.reads.try_iter().count(), 3);
    for (sent, (prompt, cached)) in bench.requests.iter().zip([(prompt(), 768), (other, 800)]) {
        let said = answer(&prompt, 9);
        assert_eq!((sent.cached, &*sent.text), (Some(cached), said));
    }
}

/// Sends a request to a worker on a thread of its own, whose disk gives nothing yet.
fn on_a_thread() -> (
    Disk,
    mpsc::Sender<Command>,
    Arc<AtomicBool>,
    Events,
    std::thread::JoinHandle<()>,
) {
    let (disk, bench) = Disk::held(MockScript::default(), &config());
    let (commands, receiver) = mpsc::channel(4);
    let abort = Arc::<AtomicBool>::default();
    let told = Arc::clone(&abort);
    let worker = bench.worker;
    let thread = std::thread::spawn(move || worker.run(receiver, &told));
    let (events, answers) = mpsc::unbounded_channel();
    let (taken, queued) = tokio::sync::oneshot::channel();
    let request = Box::new(Request {
        tokens: prompt().bytes().map(u32::from).collect(),
        params: params(9),
        walk: None,
        parser: None,
        events,
        submitted: bench.clock.now(),
    });
    commands
        .blocking_send(Command::Generate { request, taken })
        .unwrap();
    queued.blocking_recv().unwrap().unwrap();
    disk.reads.recv().unwrap();
    (disk, commands, abort, answers, thread)
}

#[test]
fn an_engine_that_is_unloaded_does_not_wait_for_the_disk() {
    let (disk, commands, abort, mut answers, thread) = on_a_thread();
    abort.store(true, Ordering::Release);
    drop(commands);
    thread.join().unwrap();
    let end = answers.try_recv().unwrap();
    assert!(matches!(end, Err(EngineError::NotLoaded { .. })), "{end:?}");
    // The thread that reads ends when the disk lets it, and reads nothing more.
    disk.give(9);
    assert!(disk.reads.recv().is_err());
}

#[test]
fn an_engine_that_drains_waits_for_the_disk() {
    let (disk, commands, _, mut answers, thread) = on_a_thread();
    drop(commands);
    disk.give(3);
    thread.join().unwrap();
    let mut cached = None;
    while let Ok(event) = answers.try_recv() {
        match event.unwrap() {
            GenerationEvent::Finished(summary) => cached = Some(summary.usage.cached_tokens),
            _ => assert_eq!(cached, None),
        }
    }
    assert_eq!(cached, Some(768));
}

/// A disk that writes nothing holds up nobody: neither who asks next nor who unloads.
#[test]
fn nobody_waits_for_a_disk_that_does_not_write() {
    let folder = tempfile::tempdir().unwrap();
    let settings = DiskCacheConfig {
        min_free_bytes: 0,
        ..DiskCacheConfig::new(folder.path())
    };
    let (told, writes) = blocking::channel();
    let (opens, opened) = blocking::channel::<()>();
    let (told, opened) = (Mutex::new(told), Mutex::new(opened));
    let free = move |_: &Path| {
        let _ = told.lock().unwrap().send(());
        // Until the test lets go of the other end.
        let _ = opened.lock().unwrap().recv();
        Ok(u64::MAX)
    };
    let access = Access {
        free: Box::new(free),
        patience: Duration::ZERO,
        ..Access::default()
    };
    let mut bench = Bench::new(MockScript::default(), &config());
    bench.worker.disk = Some(DiskCache::open_with(&settings, "mock", access).unwrap());
    // Six chunks, of which the first is being written for ever and two more were handed over.
    bench.submit(&prompt().repeat(2), params(1)).unwrap();
    bench.finish();
    let (commands, receiver) = mpsc::channel(4);
    let abort = Arc::<AtomicBool>::default();
    let told = Arc::clone(&abort);
    let worker = bench.worker;
    let thread = std::thread::spawn(move || worker.run(receiver, &told));
    writes.recv().unwrap();
    for _ in 0..3 {
        let (reply, report) = tokio::sync::oneshot::channel();
        let command = Command::Prefixes(PrefixCommand::Report(reply));
        commands.blocking_send(command).unwrap();
        assert_eq!(report.blocking_recv().unwrap().entries.len(), 1);
    }
    abort.store(true, Ordering::Release);
    drop(commands);
    thread.join().unwrap();
    drop(opens);
}
