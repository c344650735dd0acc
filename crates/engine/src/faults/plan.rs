//! What is to go wrong, and where.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use mlx_engine_core::EngineError;

/// Where a fault comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Point {
    /// A chunk of a prompt that is not its end.
    Prefill,
    /// The token of this number is begun.
    Step(u64),
    /// A token is read.
    Read,
    /// The token of this number is read.
    ReadAt(u64),
    /// A sequence is cut for the cache, which is no step of a request.
    Truncate,
    /// The bytes of a request are asked for, before it is in the queue.
    Bytes,
}

/// What it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    Device,
    OutOfMemory,
    Panic,
    /// Nothing comes until the gate opens, and then an error.
    Hang,
    /// Nothing comes until the gate opens, and then all goes on.
    Pause,
    /// A function inside MLX's graph fails, and the graph is evaluated.
    #[cfg(feature = "mlx")]
    HostOp,
    #[cfg(feature = "mlx")]
    HostOpPanic,
    /// A function inside MLX's graph does not return until the gate opens, and then fails.
    #[cfg(feature = "mlx")]
    HostOpHang,
}

/// Holds who comes to it until somebody opens it, once for each time that it is opened.
#[derive(Debug, Default)]
pub(super) struct Gate {
    opened: Mutex<u32>,
    changed: Condvar,
}

impl Gate {
    pub(super) fn open(&self) {
        *self.opened.lock().expect("not poisoned") += 1;
        self.changed.notify_one();
    }

    fn pass(&self) {
        let opened = self.opened.lock().expect("not poisoned");
        let mut opened = self
            .changed
            .wait_while(opened, |opened| *opened == 0)
            .expect("not poisoned");
        *opened -= 1;
    }
}

/// The parameters of a request that is to fail have this seed.
pub(super) const VICTIM: u64 = 666;

/// What is to happen, and what did.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub(super) fault: Mutex<Option<(Point, Fault)>>,
    /// Whether the fault stays until the model is loaded again.
    pub(super) stays: AtomicBool,
    /// Whether nobody can tell whose fault it is where several are fed.
    pub(super) hides: AtomicBool,
    /// Whether nothing that a step has left can be taken back.
    pub(super) forgets: AtomicBool,
    pub(super) loads: Mutex<u32>,
    pub(super) gate: Arc<Gate>,
    /// Told when something hangs.
    pub(super) hangs: tokio::sync::Notify,
}

impl Plan {
    pub(super) fn until_reload(point: Point, fault: Fault) -> Arc<Self> {
        Arc::new(Self {
            fault: Mutex::new(Some((point, fault))),
            stays: AtomicBool::new(true),
            ..Self::default()
        })
    }

    /// Plans a fault in place of another.
    pub(super) fn set(&self, point: Point, fault: Fault, stays: bool) {
        self.stays.store(stays, Ordering::Relaxed);
        *self.fault.lock().expect("not poisoned") = Some((point, fault));
    }

    /// Plans nothing any more.
    pub(super) fn clear(&self) {
        *self.fault.lock().expect("not poisoned") = None;
    }

    /// Ends what hangs.
    pub(super) fn open(&self) {
        self.gate.open();
    }

    /// Until the gate opens.
    fn wait(&self) {
        self.hangs.notify_one();
        self.gate.pass();
    }

    /// The fault of this point, if there is one.
    pub(super) fn due(&self, here: Point) -> Option<Fault> {
        let mut planned = self.fault.lock().expect("not poisoned");
        let (point, fault) = (*planned)?;
        if point != here {
            return None;
        }
        if !self.stays.load(Ordering::Relaxed) {
            *planned = None;
        }
        Some(fault)
    }

    pub(super) fn meet(&self, here: Point) -> Result<(), EngineError> {
        match self.due(here) {
            None => Ok(()),
            Some(Fault::Device) => Err(EngineError::device("told to", "fail")),
            Some(Fault::OutOfMemory) => Err(EngineError::OutOfMemory),
            Some(Fault::Panic) => panic!("told to panic"),
            Some(Fault::Hang) => {
                self.wait();
                Err(EngineError::device("told to", "hang"))
            }
            Some(Fault::Pause) => {
                self.wait();
                Ok(())
            }
            #[cfg(feature = "mlx")]
            Some(Fault::HostOp) => Err(in_a_host_op(|| {})),
            #[cfg(feature = "mlx")]
            Some(Fault::HostOpPanic) => Err(in_a_host_op(|| panic!("told to panic"))),
            #[cfg(feature = "mlx")]
            Some(Fault::HostOpHang) => {
                self.hangs.notify_one();
                let gate = Arc::clone(&self.gate);
                Err(in_a_host_op(move || gate.pass()))
            }
        }
    }
}

/// The error of a graph whose node does something and then fails.
#[cfg(feature = "mlx")]
fn in_a_host_op(does: impl Fn() + Send + Sync + 'static) -> EngineError {
    let error = mlx_engine_models::fail_in_a_node(does).expect_err("the node fails");
    crate::mlx::run_error(error)
}
