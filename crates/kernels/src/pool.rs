//! Threads that share the work of one kernel after another.
//!
//! A token takes some hundred kernels of a few microseconds. Between two of them the threads spin, for a fraction of a
//! millisecond, and then sleep, so that an idle engine costs nothing. A thread that spins reads ahead what it will need of the
//! next kernel's weights, where it has been [told](Pool::announce): a token waits for memory, which would idle meanwhile.

mod ahead;

use std::any::Any;
use std::fmt;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle, Thread};

use ahead::Announced;
pub use ahead::Reading;
pub(crate) use ahead::prefetch_to_write;

/// Rounds of waiting before a thread sleeps, about 0.2 ms.
const SPINS: u32 = 4000;

/// Bits of the gate that count the workers inside a job.
const INSIDE: u64 = 0xffff;
/// The bit of the gate that lets workers in.
const OPEN: u64 = 1 << 16;
/// What numbers jobs in the gate.
const NEXT: u64 = 1 << 17;

/// A pool of threads. Work is done by the thread that asks for it and by the others; one job runs at a time, and jobs
/// from several threads wait for each other.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    sleepers: Vec<Arc<Sleeper>>,
    turn: Mutex<()>,
}

/// A job: what to call with ranges that cover `0..len`.
#[derive(Clone, Copy)]
struct Job<'a> {
    call: &'a (dyn Fn(Range<usize>) + Sync),
    len: usize,
    order: Order,
}

/// Who does which part of a job.
#[derive(Clone, Copy)]
enum Order {
    /// Whoever is free takes the next one.
    Queue,
    /// Each thread has a share, and takes of the others' when it is done with that.
    Shares,
}

impl Job<'_> {
    /// What a thread of so many begins with.
    fn share(&self, thread: usize, threads: usize) -> Range<usize> {
        match self.order {
            Order::Queue if thread == 0 => 0..self.len,
            Order::Queue => self.len..self.len,
            Order::Shares => thread * self.len / threads..(thread + 1) * self.len / threads,
        }
    }
}

/// A place in a share, alone in its cache lines.
#[repr(align(128))]
struct Place(AtomicUsize);

struct Shared {
    /// The number of the job, whether workers may still join it, and how many are inside.
    gate: AtomicU64,
    /// The job while the gate is open or somebody is inside.
    job: AtomicPtr<Job<'static>>,
    /// For each thread, the caller first, the next of its share that nobody has taken.
    next: Vec<Place>,
    stop: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// A worker as the pool wakes it.
struct Sleeper {
    asleep: AtomicBool,
    thread: Mutex<Option<Thread>>,
    ahead: Announced,
}

impl Pool {
    /// A pool of `threads` threads, the caller of [`run`](Self::run) included. A thread that the system does not give
    /// is done without.
    pub fn new(threads: usize) -> Self {
        let threads = threads.clamp(1, INSIDE as usize);
        let shared = Arc::new(Shared {
            gate: AtomicU64::new(0),
            job: AtomicPtr::new(std::ptr::null_mut()),
            next: (0..threads).map(|_| Place(AtomicUsize::new(0))).collect(),
            stop: AtomicBool::new(false),
            panic: Mutex::new(None),
        });
        let mut workers = Vec::new();
        let mut sleepers = Vec::new();
        for number in 1..threads {
            let sleeper = Arc::new(Sleeper {
                asleep: AtomicBool::new(false),
                thread: Mutex::new(None),
                ahead: Announced::default(),
            });
            let (shared, own) = (Arc::clone(&shared), Arc::clone(&sleeper));
            let spawned = thread::Builder::new()
                .name(format!("mlx-engine-cpu-{number}"))
                .spawn(move || work(&shared, &own, number));
            let Ok(worker) = spawned else { break };
            *lock(&sleeper.thread) = Some(worker.thread().clone());
            workers.push(worker);
            sleepers.push(sleeper);
        }
        Self {
            shared,
            workers,
            sleepers,
            turn: Mutex::new(()),
        }
    }

    /// One thread for each physical core that this process may use.
    pub fn physical_cores() -> usize {
        let allowed = thread::available_parallelism().map_or(1, usize::from);
        physical_cores()
            .map_or(allowed, |cores| cores.min(allowed))
            .max(1)
    }

    /// Threads, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task` with each number below `tasks`, from 0 up, on any thread, and returns when all calls have.
    ///
    /// # Panics
    ///
    /// Where a task panics, with its panic, after all others have ended.
    pub fn run(&self, tasks: usize, task: impl Fn(usize) + Sync) {
        self.work_off(Job {
            call: &|range| range.for_each(&task),
            len: tasks,
            order: Order::Queue,
        });
    }

    /// Calls `task` with ranges that cover `0..len`, and returns when all calls have. Each thread begins with a share of its own, which
    /// is the same each time, so that it finds what it has [read ahead](Self::announce). The ranges become shorter toward the
    /// end of a share (guided self-scheduling, Polychronopoulos and Kuck, 1987), and who is done takes of what is left of the
    /// others', so that the threads end together whatever the system takes away from one of them.
    ///
    /// # Panics
    ///
    /// As [`run`](Self::run).
    pub fn split(&self, len: usize, task: impl Fn(Range<usize>) + Sync) {
        self.work_off(Job {
            call: &task,
            len,
            order: Order::Shares,
        });
    }

    /// Says what the next [`split`](Self::split) will read, to be said before the job that comes before it. Threads that wait
    /// meanwhile read their shares ahead, as far as fits their second cache.
    pub fn announce(&self, reading: Reading<'_>) {
        let threads = self.shared.next.len();
        for (thread, sleeper) in (1..).zip(&self.sleepers) {
            sleeper.ahead.set(reading.share(thread, threads));
        }
    }

    fn work_off(&self, job: Job<'_>) {
        if job.len <= 1 || self.workers.is_empty() {
            if job.len > 0 {
                (job.call)(0..job.len);
            }
            return;
        }
        let _turn = lock(&self.turn);
        let shared = &*self.shared;
        for (thread, next) in shared.next.iter().enumerate() {
            let share = job.share(thread, shared.next.len());
            next.0.store(share.start, Ordering::Relaxed);
        }
        shared
            .job
            .store((&raw const job).cast_mut().cast(), Ordering::Relaxed);
        // The count inside is 0: the last job ended only when everybody had left it.
        let number = shared.gate.load(Ordering::Relaxed) & !(NEXT - 1);
        shared
            .gate
            .store(number.wrapping_add(NEXT) | OPEN, Ordering::SeqCst);
        for sleeper in &self.sleepers {
            if sleeper.asleep.load(Ordering::SeqCst)
                && let Some(thread) = &*lock(&sleeper.thread)
            {
                thread.unpark();
            }
        }
        shared.take_part(job, 0);
        shared.gate.fetch_and(!OPEN, Ordering::AcqRel);
        while shared.gate.load(Ordering::Acquire) & INSIDE != 0 {
            std::hint::spin_loop();
        }
        if let Some(panic) = lock(&shared.panic).take() {
            resume_unwind(panic);
        }
    }
}

impl Shared {
    /// Runs tasks until none is left. A panic is kept for the caller, and the tasks that nobody began are dropped.
    fn take_part(&self, job: Job<'_>, thread: usize) {
        let ran = catch_unwind(AssertUnwindSafe(|| {
            while let Some(range) = self.take(job, thread) {
                (job.call)(range);
            }
        }));
        if let Err(panic) = ran {
            for next in &self.next {
                next.0.store(job.len, Ordering::Relaxed);
            }
            lock(&self.panic).get_or_insert(panic);
        }
    }

    /// The next range of a job, of the thread's own share as long as there is one.
    fn take(&self, job: Job<'_>, thread: usize) -> Option<Range<usize>> {
        let threads = self.next.len();
        (thread..threads).chain(0..thread).find_map(|thread| {
            let (next, end) = (&self.next[thread].0, job.share(thread, threads).end);
            let mut start = next.load(Ordering::Relaxed);
            loop {
                let left = end.checked_sub(start).filter(|left| *left > 0)?;
                let taken = match job.order {
                    Order::Queue => 1,
                    Order::Shares => left.div_ceil(2),
                };
                let end = start + taken;
                match next.compare_exchange_weak(start, end, Ordering::Relaxed, Ordering::Relaxed) {
                    Ok(_) => return Some(start..end),
                    Err(now) => start = now,
                }
            }
        })
    }
}

fn work(shared: &Shared, own: &Sleeper, thread: usize) {
    let mut seen = 0;
    loop {
        let Some(gate) = wait(shared, own, seen) else {
            return;
        };
        seen = gate & !(NEXT - 1);
        // Joins only while the caller still waits for whoever is inside.
        let joined = shared
            .gate
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |gate| {
                (gate & !(NEXT - 1) == seen && gate & OPEN != 0).then_some(gate + 1)
            });
        if joined.is_err() {
            continue;
        }
        #[expect(
            unsafe_code,
            reason = "the job borrows from the stack of who called `work_off`"
        )]
        // SAFETY: the gate was open for the job when this thread was counted in, so that `work_off` has stored the pointer
        // before (the gate's release and acquire order it) and does not return before the count is given back.
        let job = unsafe { *shared.job.load(Ordering::Relaxed) };
        shared.take_part(job, thread);
        shared.gate.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Waits for a job that this worker has not seen. `None` at the end.
fn wait(shared: &Shared, own: &Sleeper, seen: u64) -> Option<u64> {
    let new = |gate: u64| gate & OPEN != 0 && gate & !(NEXT - 1) != seen;
    let mut ahead = own.ahead.get();
    for _ in 0..SPINS {
        let gate = shared.gate.load(Ordering::Acquire);
        if new(gate) {
            return Some(gate);
        }
        if !ahead.read() {
            std::hint::spin_loop();
        }
    }
    loop {
        own.asleep.store(true, Ordering::SeqCst);
        // Looked at after the flag was set: whoever opens the gate later sees the flag and wakes this thread.
        let gate = shared.gate.load(Ordering::SeqCst);
        let stop = shared.stop.load(Ordering::SeqCst);
        if stop || new(gate) {
            own.asleep.store(false, Ordering::SeqCst);
            return (!stop).then_some(gate);
        }
        thread::park();
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches the panics of its tasks.
            let _ = worker.join();
        }
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("threads", &self.threads())
            .finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Counts the cores of which the system numbers the hardware threads. `None` where it does not say.
fn physical_cores() -> Option<usize> {
    let mut cores = std::collections::HashSet::new();
    for entry in std::fs::read_dir("/sys/devices/system/cpu").ok()?.flatten() {
        let topology = entry.path().join("topology");
        let read = |name: &str| std::fs::read_to_string(topology.join(name)).ok();
        if let Some(id) = read("physical_package_id").zip(read("core_id")) {
            cores.insert(id);
        }
    }
    (!cores.is_empty()).then_some(cores.len())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    #[test]
    fn every_task_runs_once_whatever_the_threads() {
        for threads in [1, 2, 3, 8] {
            let pool = Pool::new(threads);
            assert_eq!(pool.threads(), threads);
            for tasks in [0, 1, 2, 7, 1000] {
                let counts: Vec<AtomicU32> = (0..tasks).map(|_| AtomicU32::new(0)).collect();
                for _ in 0..50 {
                    pool.run(tasks, |task| {
                        counts[task].fetch_add(1, Ordering::Relaxed);
                    });
                }
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 50));
            }
        }
    }

    #[test]
    fn ranges_cover_the_whole_once() {
        for threads in [1, 3] {
            let pool = Pool::new(threads);
            for len in [0, 1, 3, 64, 1001] {
                let counts: Vec<AtomicU32> = (0..len).map(|_| AtomicU32::new(0)).collect();
                pool.split(len, |range| {
                    assert!(!range.is_empty());
                    for index in range {
                        counts[index].fetch_add(1, Ordering::Relaxed);
                    }
                });
                assert!(
                    counts.iter().all(|count| count.load(Ordering::Relaxed) == 1),
                    "{len}"
                );
            }
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(2);
        let panic = catch_unwind(AssertUnwindSafe(|| {
            pool.run(100, |task| assert_ne!(task, 50, "task"));
        }))
        .unwrap_err();
        assert!(panic.downcast_ref::<String>().unwrap().contains("task"));
        let sum = AtomicUsize::new(0);
        pool.run(100, |task| {
            sum.fetch_add(task, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 4950);
    }

    #[test]
    fn jobs_of_several_threads_do_not_mix() {
        let pool = Pool::new(2);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        let sum = AtomicUsize::new(0);
                        pool.run(20, |task| {
                            sum.fetch_add(task, Ordering::Relaxed);
                        });
                        assert_eq!(sum.into_inner(), 190);
                    }
                });
            }
        });
    }
}
