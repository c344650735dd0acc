//! Sequences that are kept after their request, for the next one that begins alike.

/// A sequence that nobody runs.
#[derive(Debug)]
struct Kept<S> {
    tokens: Vec<u32>,
    sequence: S,
    bytes: u64,
}

/// The most recent sequences, the latest last.
#[derive(Debug)]
pub(crate) struct PrefixCache<S> {
    kept: Vec<Kept<S>>,
    max_bytes: u64,
}

impl<S> PrefixCache<S> {
    pub(crate) fn new(max_bytes: u64) -> Self {
        Self {
            kept: Vec::new(),
            max_bytes,
        }
    }

    /// Takes the sequence that shares the longest beginning with `tokens`, and says how long that is. The last token
    /// has to be fed in any case, as its logits are needed. `None` where none shares anything.
    pub(crate) fn take(&mut self, tokens: &[u32]) -> Option<(S, usize)> {
        let usable = &tokens[..tokens.len().saturating_sub(1)];
        let shared = |kept: &Kept<S>| kept.tokens.iter().zip(usable).take_while(|(a, b)| a == b).count();
        let (index, len) = (0..self.kept.len())
            .map(|i| (i, shared(&self.kept[i])))
            .max_by_key(|(_, len)| *len)?;
        (len > 0).then(|| (self.kept.remove(index).sequence, len))
    }

    /// Keeps a sequence that has seen `tokens`, and gives up the oldest beyond the budget.
    pub(crate) fn keep(&mut self, tokens: Vec<u32>, sequence: S, bytes: u64) {
        if tokens.is_empty() || bytes > self.max_bytes || self.max_bytes == 0 {
            return;
        }
        self.kept.push(Kept {
            tokens,
            sequence,
            bytes,
        });
        self.shrink(self.max_bytes);
    }

    /// Gives the oldest up until all take so many bytes at most.
    pub(crate) fn shrink(&mut self, bytes: u64) {
        let mut held: u64 = self.kept.iter().map(|kept| kept.bytes).sum();
        let mut over = 0;
        while held > bytes {
            held -= self.kept[over].bytes;
            over += 1;
        }
        self.kept.drain(..over);
    }

    /// Gives all up, where memory is short.
    pub(crate) fn clear(&mut self) {
        self.kept.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_beginning_wins_and_the_last_token_is_left_to_feed() {
        let mut cache = PrefixCache::new(30);
        cache.keep(vec![1, 2], "short", 10);
        cache.keep(vec![1, 2, 3, 4], "long", 10);
        cache.keep(vec![9], "other", 10);
        assert_eq!(cache.take(&[1, 2, 3, 4]), Some(("long", 3)));
        assert_eq!(cache.take(&[1, 2, 3, 4]), Some(("short", 2)));
        assert_eq!(cache.take(&[1, 2, 3, 4]), None);
        assert_eq!(cache.take(&[9]), None);
        assert_eq!(cache.take(&[]), None);
    }

    #[test]
    fn the_oldest_goes_first() {
        let mut cache = PrefixCache::new(20);
        for (token, name) in [(1, "a"), (2, "b"), (3, "c")] {
            cache.keep(vec![token, 0], name, 10);
        }
        assert_eq!(cache.take(&[1, 0]), None);
        assert_eq!(cache.take(&[2, 0]), Some(("b", 1)));
        cache.clear();
        assert_eq!(cache.take(&[3, 0]), None);
        let mut none = PrefixCache::new(0);
        none.keep(vec![1, 2], "a", 0);
        assert_eq!(none.take(&[1, 2]), None);
    }
}
