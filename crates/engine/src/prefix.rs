//! Sequences that are kept after their request, for the next one that begins alike.

/// A sequence that nobody runs.
#[derive(Debug)]
struct Kept<S> {
    tokens: Vec<u32>,
    sequence: S,
}

/// The most recent sequences, the latest last.
#[derive(Debug)]
pub(crate) struct PrefixCache<S> {
    kept: Vec<Kept<S>>,
    capacity: usize,
}

impl<S> PrefixCache<S> {
    pub(crate) fn new(capacity: usize) -> Self {
        Self {
            kept: Vec::new(),
            capacity,
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

    /// Keeps a sequence that has seen `tokens`, and gives up the oldest beyond the capacity.
    pub(crate) fn keep(&mut self, tokens: Vec<u32>, sequence: S) {
        if self.capacity == 0 || tokens.is_empty() {
            return;
        }
        self.kept.push(Kept { tokens, sequence });
        if self.kept.len() > self.capacity {
            self.kept.remove(0);
        }
    }

    /// Lengths of the sequences in tokens.
    pub(crate) fn lengths(&self) -> impl Iterator<Item = usize> {
        self.kept.iter().map(|kept| kept.tokens.len())
    }

    /// Gives the oldest up; `false` where there is none.
    pub(crate) fn drop_oldest(&mut self) -> bool {
        let some = !self.kept.is_empty();
        self.kept.drain(..usize::from(some));
        some
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
        let mut cache = PrefixCache::new(3);
        cache.keep(vec![1, 2], "short");
        cache.keep(vec![1, 2, 3, 4], "long");
        cache.keep(vec![9], "other");
        assert_eq!(cache.take(&[1, 2, 3, 4]), Some(("long", 3)));
        assert_eq!(cache.take(&[1, 2, 3, 4]), Some(("short", 2)));
        assert_eq!(cache.take(&[1, 2, 3, 4]), None);
        assert_eq!(cache.take(&[9]), None);
        assert_eq!(cache.take(&[]), None);
    }

    #[test]
    fn the_oldest_goes_first() {
        let mut cache = PrefixCache::new(2);
        for (token, name) in [(1, "a"), (2, "b"), (3, "c")] {
            cache.keep(vec![token, 0], name);
        }
        assert_eq!(cache.take(&[1, 0]), None);
        assert_eq!(cache.take(&[2, 0]), Some(("b", 1)));
        cache.clear();
        assert_eq!(cache.take(&[3, 0]), None);
        let mut none = PrefixCache::new(0);
        none.keep(vec![1, 2], "a");
        assert_eq!(none.take(&[1, 2]), None);
    }
}
