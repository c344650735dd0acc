//! Stop strings across the borders of pieces.

/// Finds the first stop string in text that comes in pieces.
///
/// Text that may be the beginning of a stop string is held back until it is known.
#[derive(Clone, Debug, Default)]
pub struct StopMatcher {
    stops: Vec<String>,
    held: String,
    stopped: bool,
}

/// What a piece of text made certain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StopOutcome {
    /// Text that belongs to the answer.
    pub text: String,
    /// Whether a stop string was found; nothing follows then.
    pub stopped: bool,
}

impl StopMatcher {
    /// A matcher of these strings; empty ones are never found.
    pub fn new(stops: impl IntoIterator<Item = String>) -> Self {
        Self {
            stops: stops.into_iter().filter(|stop| !stop.is_empty()).collect(),
            held: String::new(),
            stopped: false,
        }
    }

    /// Takes the next piece and returns what is certain. The stop string that is complete first wins, of several the
    /// longest; it is dropped with what follows it.
    pub fn push(&mut self, piece: &str) -> StopOutcome {
        if self.stopped {
            return StopOutcome {
                text: String::new(),
                stopped: true,
            };
        }
        self.held.push_str(piece);
        if let Some(at) = first_stop(&self.stops, &self.held) {
            self.stopped = true;
            self.held.truncate(at);
            return StopOutcome {
                text: std::mem::take(&mut self.held),
                stopped: true,
            };
        }
        let certain = self.held.len() - self.open_tail();
        let rest = self.held.split_off(certain);
        StopOutcome {
            text: std::mem::replace(&mut self.held, rest),
            stopped: false,
        }
    }

    /// The text that was held back, at the end of the answer.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Length of the longest end of the held text that begins a stop string.
    fn open_tail(&self) -> usize {
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let from = self.held.len().saturating_sub(longest.saturating_sub(1));
        (from..self.held.len())
            .filter(|&at| self.held.is_char_boundary(at))
            .find(|&at| self.stops.iter().any(|stop| stop.starts_with(&self.held[at..])))
            .map_or(0, |at| self.held.len() - at)
    }
}

/// Where the stop string begins that is complete first.
fn first_stop(stops: &[String], text: &str) -> Option<usize> {
    let found = stops
        .iter()
        .filter_map(|stop| text.find(stop.as_str()).map(|start| (start + stop.len(), start)));
    found.min().map(|(_, start)| start)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(stops: &[String], pieces: &[String]) -> (String, bool) {
        let mut matcher = StopMatcher::new(stops.iter().cloned());
        let mut text = String::new();
        for piece in pieces {
            let outcome = matcher.push(piece);
            text.push_str(&outcome.text);
            if outcome.stopped {
                assert_eq!(
                    matcher.push("more"),
                    StopOutcome {
                        text: String::new(),
                        stopped: true
                    }
                );
                return (text, true);
            }
        }
        text.push_str(&matcher.finish());
        (text, false)
    }

    #[test]
    fn text_is_held_back_only_while_it_may_be_a_stop() {
        let mut matcher = StopMatcher::new(["</s>".to_owned()]);
        assert_eq!(matcher.push("a<").text, "a");
        assert_eq!(matcher.push("b").text, "<b");
        assert_eq!(matcher.push("</").text, "");
        assert_eq!(matcher.finish(), "</");
    }

    #[test]
    fn nothing_is_held_back_without_stops() {
        let mut matcher = StopMatcher::new([String::new()]);
        assert_eq!(matcher.push("anything").text, "anything");
    }

    proptest! {
        #[test]
        fn any_split_gives_what_the_whole_gives(
            stops in prop::collection::vec("[abß]{1,4}", 0..3),
            pieces in prop::collection::vec("[abß]{0,3}", 0..12),
        ) {
            let whole = pieces.concat();
            // One character after the other, as nobody could know more.
            let ends = whole.char_indices().map(|(at, character)| at + character.len_utf8());
            let mut first = ends.filter_map(|end| {
                let starts = stops.iter().filter(|stop| whole[..end].ends_with(stop.as_str()));
                starts.map(|stop| end - stop.len()).min()
            });
            let first = first.next();
            let expected = first.map_or((whole.clone(), false), |at| (whole[..at].to_owned(), true));
            prop_assert_eq!(run(&stops, &pieces), expected);
        }
    }
}
