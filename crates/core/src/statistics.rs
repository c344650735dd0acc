//! What an engine says of its inside at a moment.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

/// What an engine says of its inside at a moment. The numbers are read one after the other while it works, so that they
/// need not be of one instant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct EngineStatistics {
    /// Requests that wait to be run.
    pub queued: u64,
    /// Requests that are run: their prompt is fed, or their answer decoded.
    pub running: u64,
    /// Answers that the last turn took a token further together.
    pub batch_size: u64,
    /// How many answers each turn took further together, since the model was loaded.
    pub batch_sizes: BatchSizes,
    /// Turns since the model was loaded: a chunk of one prompt at most, and a token of each answer.
    pub turns: u64,
    /// Tokens of answers since the model was loaded.
    pub generated_tokens: u64,
    /// Tokens that were guessed and verified since the model was loaded; 0 where nothing is guessed.
    pub drafted_tokens: u64,
    /// Those of them that were right.
    pub accepted_tokens: u64,
    /// How long the turn that runs has taken so far, in seconds; `None` between turns. One that does not end is a hang.
    pub turn_s: Option<f64>,
    /// Bytes that the keys and values of all that runs may come to take.
    pub kv_reserved_bytes: u64,
    /// Bytes of the keys and values that are only kept, for requests that begin alike.
    pub prefix_cache_bytes: u64,
    /// Sequences of which they are.
    pub prefix_cache_sequences: u64,
    /// Bytes of the weights.
    pub weight_bytes: u64,
    /// Steps that were run again for one answer alone, as the step of several had failed.
    pub redone_steps: u64,
    /// How often the worker went on after a panic outside a step.
    pub worker_restarts: u64,
    /// What is allocated; `None` for a backend that allocates nothing.
    pub memory: Option<DeviceMemory>,
    /// Resident memory of the engine's process, in bytes; `None` where that is this process, or the system does not say.
    pub process_memory_bytes: Option<u64>,
    /// Which load of this process it was that brought the model, from 1; 0 where the engine does not say. A model that is loaded
    /// again has another number.
    pub load: u64,
    /// Seconds that the load took; `None` where the engine does not say.
    pub load_s: Option<f64>,
}

/// How many answers turns took a token further together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct BatchSizes {
    /// Turns by the number of their answers: those of 1 to 16 each by itself, those of 17 to 32, of 33 to 64, and of more. A turn
    /// without answers is none of them.
    pub turns: [u64; BatchSizes::CLASSES],
    /// Answers of all these turns together.
    pub answers: u64,
}

impl BatchSizes {
    /// Classes that turns are counted in.
    pub const CLASSES: usize = 19;

    /// The most answers of a turn of each class.
    pub const MOST: [u64; Self::CLASSES] = [
        1,
        2,
        3,
        4,
        5,
        6,
        7,
        8,
        9,
        10,
        11,
        12,
        13,
        14,
        15,
        16,
        32,
        64,
        u64::MAX,
    ];

    /// The class of a turn of so many answers; none where there are none.
    pub fn class(answers: u64) -> Option<usize> {
        Self::MOST.iter().position(|&most| (1..=most).contains(&answers))
    }

    /// Turns that took an answer further.
    pub fn count(&self) -> u64 {
        self.turns.iter().sum()
    }

    /// The mean number of answers of a turn; `None` where there was none.
    pub fn mean(&self) -> Option<f64> {
        let count = self.count();
        (count > 0).then(|| self.answers as f64 / count as f64)
    }

    /// What was counted since an earlier look at the same engine.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let mut turns = self.turns;
        for (turns, earlier) in turns.iter_mut().zip(earlier.turns) {
            *turns = turns.saturating_sub(earlier);
        }
        Self {
            turns,
            answers: self.answers.saturating_sub(earlier.answers),
        }
    }
}

/// A number for [`EngineStatistics::load`] that no other load of this process has.
pub fn next_load() -> u64 {
    static LOADS: AtomicU64 = AtomicU64::new(0);
    LOADS.fetch_add(1, Ordering::Relaxed) + 1
}

/// Memory that models of this process have allocated, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DeviceMemory {
    /// In use.
    pub active_bytes: u64,
    /// Not in use, and not given back to the system, so that the next arrays are had sooner.
    pub cache_bytes: u64,
    /// The most that was in use at once.
    pub peak_bytes: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_is_in_the_class_of_its_answers() {
        for (answers, class) in [
            (0, None),
            (1, Some(0)),
            (16, Some(15)),
            (17, Some(16)),
            (32, Some(16)),
            (33, Some(17)),
            (64, Some(17)),
            (65, Some(18)),
            (u64::MAX, Some(18)),
        ] {
            assert_eq!(BatchSizes::class(answers), class, "{answers}");
        }
        assert!(BatchSizes::MOST.is_sorted());
        assert_eq!(BatchSizes::default().mean(), None);
        let mut sizes = BatchSizes::default();
        (sizes.turns[0], sizes.turns[3], sizes.answers) = (3, 1, 7);
        assert_eq!((sizes.count(), sizes.mean()), (4, Some(1.75)));
        let mut later = sizes;
        (later.turns[3], later.answers) = (2, 11);
        let since = later.since(&sizes);
        assert_eq!((since.turns[0], since.turns[3], since.answers), (0, 1, 4));
        let text = serde_json::to_string(&later).unwrap();
        assert_eq!(serde_json::from_str::<BatchSizes>(&text).unwrap(), later);
    }
}
