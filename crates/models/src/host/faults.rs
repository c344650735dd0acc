//! What went wrong in the steps of a sequence.
//!
//! MLX hands an error of a CPU stream to whoever waits on that stream next, whatever it waits for, and what has failed passes
//! for computed from then on. So the decoder tells MLX of none: a step that fails writes down for which of its sequences, and
//! whoever has waited for the step looks there.

use std::sync::{Arc, Mutex, PoisonError};

use mlx_engine_kernels::KernelError;

use crate::ModelError;

/// Why a step failed.
#[derive(Clone, Debug)]
pub(super) enum StepFault {
    Kernel(KernelError),
    NotFinite,
    Panicked(String),
}

impl From<KernelError> for StepFault {
    fn from(error: KernelError) -> Self {
        Self::Kernel(error)
    }
}

impl From<StepFault> for ModelError {
    fn from(fault: StepFault) -> Self {
        match fault {
            StepFault::Kernel(error) => Self::Kernel(error),
            StepFault::NotFinite => Self::NotFinite,
            StepFault::Panicked(message) => Self::StepPanicked { message },
        }
    }
}

/// The first position that steps failed to compute, and why.
#[derive(Debug, Default)]
struct First(Mutex<Option<(usize, StepFault)>>);

impl First {
    /// The fault of a position that is below `end`.
    fn below(&self, end: usize) -> Option<StepFault> {
        let first = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (_, fault) = first.as_ref().filter(|(position, _)| *position < end)?;
        Some(fault.clone())
    }
}

/// What went wrong in the steps of one sequence. A clone is what a step takes along.
#[derive(Clone, Debug, Default)]
pub(crate) struct Faults {
    now: Arc<First>,
    /// Those of steps that were begun before the sequence was cut, and the length that it was cut to: what they computed
    /// below still counts.
    before: Vec<(Arc<First>, usize)>,
}

impl Faults {
    /// A step failed that computes positions from this one on.
    pub(super) fn note(&self, position: usize, fault: StepFault) {
        let mut first = self.now.0.lock().unwrap_or_else(PoisonError::into_inner);
        if first.as_ref().is_none_or(|(known, _)| position < *known) {
            *first = Some((position, fault));
        }
    }

    /// Why a position below `end` is not there, where it is known not to be.
    pub(super) fn below(&self, end: usize) -> Option<StepFault> {
        let before = self.before.iter().map(|(first, len)| first.below(end.min(*len)));
        before.chain([self.now.below(end)]).flatten().next()
    }

    /// The sequence is cut. What was wrong behind that is forgotten, also what steps in flight will find.
    pub(crate) fn cut(&mut self, len: usize) {
        self.before.push((std::mem::take(&mut self.now), len));
        // One that nobody can write to any more and that knows of nothing says nothing.
        self.before.retain_mut(|(first, end)| {
            *end = len.min(*end);
            *end > 0 && (Arc::strong_count(first) > 1 || first.below(*end).is_some())
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(faults: &Faults, end: usize) -> bool {
        faults.below(end).is_some()
    }

    #[test]
    fn a_fault_counts_from_its_position_on() {
        let faults = Faults::default();
        faults.clone().note(7, StepFault::NotFinite);
        faults.note(9, StepFault::NotFinite);
        assert!(!fault(&faults, 7) && fault(&faults, 8) && fault(&faults, 100));
    }

    #[test]
    fn cutting_forgets_what_is_behind_and_keeps_what_is_below() {
        let mut faults = Faults::default();
        let in_flight = faults.clone();
        faults.cut(8);
        in_flight.note(8, StepFault::NotFinite);
        assert!(!fault(&faults, 100), "a step that no longer counts");
        in_flight.note(5, StepFault::NotFinite);
        assert!(!fault(&faults, 5) && fault(&faults, 6), "a step that still does");
        faults.cut(5);
        assert!(!fault(&faults, 100));
        drop(in_flight);
        faults.cut(4);
        assert!(faults.before.is_empty(), "what says nothing is not kept");
    }
}
