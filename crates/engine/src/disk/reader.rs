//! Files that are read on a thread of their own: no answer waits for a disk.

use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use super::chain::Name;
use super::file;
use super::store::Store;

/// Chunks that somebody waits for.
struct Order {
    wanted: Vec<(Name, Vec<u32>)>,
    blocks: Sender<Vec<u8>>,
    /// Alive while somebody does.
    waits: Weak<()>,
}

/// What the thread is at.
#[derive(Default)]
struct Doing {
    /// A file is being read, and nobody knows how long that takes.
    reads: bool,
    /// The next file is not begun.
    closing: bool,
}

/// The thread, which ends with this.
pub(super) struct Reader {
    orders: Option<Sender<Order>>,
    doing: Arc<Mutex<Doing>>,
    thread: Option<JoinHandle<()>>,
}

/// Blocks on their way from the disk, in order. Dropping it gives up those that were not begun.
#[derive(Debug)]
pub(crate) struct Fetch {
    incoming: Receiver<Vec<u8>>,
    blocks: Vec<Vec<u8>>,
    _waits: Arc<()>,
}

impl Reader {
    pub(super) fn start(store: Arc<Store>) -> io::Result<Self> {
        let (orders, receiver) = channel();
        let doing = Arc::<Mutex<Doing>>::default();
        let told = Arc::clone(&doing);
        let thread = std::thread::Builder::new()
            .name("mlx-engine-read".to_owned())
            .spawn(move || serve(&store, &told, &receiver))?;
        Ok(Self {
            orders: Some(orders),
            doing,
            thread: Some(thread),
        })
    }

    /// Has chunks read, up to the first that is not what it should be.
    pub(super) fn fetch(&self, wanted: Vec<(Name, Vec<u32>)>) -> Fetch {
        let (blocks, incoming) = channel();
        let waits = Arc::new(());
        let order = Order {
            wanted,
            blocks,
            waits: Arc::downgrade(&waits),
        };
        if let Some(orders) = &self.orders {
            // Where the thread is gone nothing will come, which is a miss.
            let _ = orders.send(order);
        }
        Fetch {
            incoming,
            blocks: Vec::new(),
            _waits: waits,
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        drop(self.orders.take());
        let reads = {
            let mut doing = lock(&self.doing);
            doing.closing = true;
            doing.reads
        };
        // A disk that does not answer holds up nobody: the thread ends when it does, and has nothing but the folder.
        if let Some(thread) = self.thread.take().filter(|_| !reads) {
            // It has no result, and nobody to tell of a panic.
            let _ = thread.join();
        }
    }
}

impl Fetch {
    /// Takes what has come, and says whether that is all that will.
    pub(crate) fn is_over(&mut self) -> bool {
        loop {
            match self.incoming.try_recv() {
                Ok(block) => self.blocks.push(block),
                Err(TryRecvError::Empty) => return false,
                Err(TryRecvError::Disconnected) => return true,
            }
        }
    }

    /// Waits for something to come, so long at most.
    pub(crate) fn wait(&mut self, limit: Duration) {
        match self.incoming.recv_timeout(limit) {
            Ok(block) => self.blocks.push(block),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
        }
    }

    /// How many blocks have come.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.blocks.len()
    }

    /// What has come.
    pub(crate) fn into_blocks(self) -> Vec<Vec<u8>> {
        self.blocks
    }
}

fn lock(doing: &Mutex<Doing>) -> MutexGuard<'_, Doing> {
    doing.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads until nobody orders anything.
fn serve(store: &Store, doing: &Mutex<Doing>, orders: &Receiver<Order>) {
    for Order {
        wanted,
        blocks,
        waits,
    } in orders
    {
        for (name, tokens) in wanted {
            if waits.strong_count() == 0 {
                break;
            }
            {
                let mut doing = lock(doing);
                if doing.closing {
                    return;
                }
                doing.reads = true;
            }
            let block = read(store, &name, &tokens);
            lock(doing).reads = false;
            let Some(block) = block else { break };
            if blocks.send(block).is_err() {
                break;
            }
        }
    }
}

/// The block of a chunk, where its file is whole.
fn read(store: &Store, name: &Name, tokens: &[u32]) -> Option<Vec<u8>> {
    if !store.has(name) {
        return None;
    }
    let file = store.read(name).map_err(|error| error.to_string());
    match file.and_then(|bytes| file::decode(&bytes, name, tokens)) {
        Ok(block) => {
            store.touch(name);
            Some(block)
        }
        Err(reason) => {
            tracing::warn!(file = %name, reason, "a kept prefix is damaged and is given up");
            store.remove(name);
            None
        }
    }
}
