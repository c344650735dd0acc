//! What was perhaps meant by a reference that names nothing.

/// Past this many, a list helps nobody.
const MOST: usize = 3;

/// The labels of the candidates nearest to `reference`, nearest first, then in the order of the labels.
///
/// A candidate is a label and the keys it goes by. A key is near when it takes few edits, at most a third of the
/// reference's characters, or when it contains the reference. Everything is compared as it is given.
pub(crate) fn nearest<'a>(
    reference: &str,
    candidates: impl IntoIterator<Item = (&'a str, Vec<String>)>,
) -> Vec<String> {
    let reference: Vec<char> = reference.chars().collect();
    let mut near: Vec<(usize, &str)> = candidates
        .into_iter()
        .filter_map(|(label, keys)| {
            let distance = keys.iter().filter_map(|key| nearness(&reference, key)).min()?;
            Some((distance, label))
        })
        .collect();
    near.sort_unstable();
    near.into_iter()
        .take(MOST)
        .map(|(_, label)| label.to_owned())
        .collect()
}

fn nearness(reference: &[char], key: &str) -> Option<usize> {
    /// Shorter references are contained in too many keys.
    const SHORTEST_PART: usize = 3;

    let key: Vec<char> = key.chars().collect();
    let most = reference.len().div_ceil(3);
    // The distance is at least the difference in length, so a long reference costs nothing.
    if key.len().abs_diff(reference.len()) <= most {
        let distance = edit_distance(reference, &key);
        if distance <= most {
            return Some(distance);
        }
    }
    let is_part =
        reference.len() >= SHORTEST_PART && key.windows(reference.len()).any(|part| part == reference);
    is_part.then(|| key.len() - reference.len())
}

/// The Levenshtein distance: insertions, deletions and substitutions, by the Wagner-Fischer recurrence in one row.
fn edit_distance(from: &[char], to: &[char]) -> usize {
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (i, a) in from.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, b) in to.iter().enumerate() {
            let substitution = diagonal + usize::from(a != b);
            diagonal = row[j + 1];
            row[j + 1] = substitution.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[to.len()]
}

/// As the Levenshtein distance, where two neighbours that changed places are one edit and not two: the optimal string
/// alignment distance.
pub(crate) fn typing_distance(from: &str, to: &str) -> usize {
    let from: Vec<char> = from.chars().collect();
    let to: Vec<char> = to.chars().collect();
    let mut before: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=to.len()).collect();
    for i in 1..=from.len() {
        let mut row = vec![i];
        for j in 1..=to.len() {
            let substitution = last[j - 1] + usize::from(from[i - 1] != to[j - 1]);
            let mut least = substitution.min(last[j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && from[i - 1] == to[j - 2] && from[i - 2] == to[j - 1] {
                least = least.min(before[j - 2] + 1);
            }
            row.push(least);
        }
        before = std::mem::replace(&mut last, row);
    }
    last[to.len()]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn distance(from: &str, to: &str) -> usize {
        let chars = |text: &str| text.chars().collect::<Vec<_>>();
        edit_distance(&chars(from), &chars(to))
    }

    #[test]
    fn distances_are_those_of_the_textbook() {
        for (from, to, expect) in [
            ("", "", 0),
            ("", "abc", 3),
            ("abc", "", 3),
            ("kitten", "sitting", 3),
            ("saturday", "sunday", 3),
            ("qwen", "qewn", 2),
            ("é", "e", 1),
        ] {
            assert_eq!(distance(from, to), expect, "{from} to {to}");
        }
    }

    #[test]
    fn neighbours_that_changed_places_are_one_edit() {
        for (from, to, expect) in [
            ("qewn", "qwen", 1),
            ("", "ab", 2),
            ("ca", "abc", 3),
            ("same", "same", 0),
        ] {
            assert_eq!(typing_distance(from, to), expect, "{from} to {to}");
        }
    }

    #[test]
    fn the_nearest_come_first_and_few() {
        let candidates = || {
            ["llama-1b", "llama-3b", "llama-8b", "llama-70b", "gemma"]
                .into_iter()
                .rev()
                .map(|label| (label, vec![label.to_owned()]))
        };
        for (reference, expect) in [
            ("lama-3b", &["llama-3b", "llama-1b", "llama-8b"][..]),
            ("gema", &["gemma"]),
            ("70b", &["llama-70b"]),
            ("llama", &["llama-1b", "llama-3b", "llama-8b"]),
            ("zephyr", &[]),
            ("", &[]),
        ] {
            assert_eq!(nearest(reference, candidates()), expect, "{reference}");
        }
    }

    /// The fewest edits from one text to another, found by trying: two neighbours that changed places are one where they may
    /// be swapped.
    fn tried(from: &[char], to: &[char], swaps: bool) -> usize {
        let (Some((a, rest)), Some((b, left))) = (from.split_last(), to.split_last()) else {
            return from.len().max(to.len());
        };
        let mut least = (tried(rest, to, swaps) + 1)
            .min(tried(from, left, swaps) + 1)
            .min(tried(rest, left, swaps) + usize::from(a != b));
        if let (true, Some((c, rest)), Some((d, left))) = (swaps, rest.split_last(), left.split_last())
            && (a, c) == (d, b)
        {
            least = least.min(tried(rest, left, swaps) + 1);
        }
        least
    }

    #[test]
    fn near_is_a_third_of_the_letters_or_a_part() {
        let near =
            |reference: &str, key: &str| !nearest(reference, [("it", vec![key.to_owned()])]).is_empty();
        for (reference, key, expect) in [
            ("abc", "abx", true),
            ("abc", "axx", false),
            ("abcd", "abxx", true),
            ("abcdef", "abcdxx", true),
            ("abcdef", "abcxxx", false),
            ("abc", "abcx", true),
            ("abc", "abcxx", true),
            ("abc", "xxxxabcxxxx", true),
            // Two letters are a part of too much.
            ("ab", "xxxxabxxxx", false),
            ("ab", "abc", true),
            ("ab", "abcd", false),
        ] {
            assert_eq!(near(reference, key), expect, "{reference} and {key}");
        }
    }

    #[test]
    fn the_nearest_of_several_keys_decides_and_labels_do_where_they_are_as_near() {
        let candidates = [
            ("far", vec!["abcxxxxx".to_owned()]),
            ("z", vec!["nothing".to_owned(), "abcx".to_owned()]),
            ("exact", vec!["abcxx".to_owned(), "abc".to_owned()]),
            ("a", vec!["abcy".to_owned()]),
            ("never", vec!["unlike".to_owned()]),
        ];
        assert_eq!(nearest("abc", candidates.clone()), ["exact", "a", "z"]);
        let few = candidates.into_iter().filter(|(label, _)| *label != "exact");
        assert_eq!(nearest("abc", few), ["a", "z", "far"]);
    }

    proptest! {
        #[test]
        fn distances_are_the_fewest_edits_that_there_are(from in "[abé]{0,5}", to in "[abé]{0,5}") {
            let chars = |text: &str| text.chars().collect::<Vec<_>>();
            prop_assert_eq!(distance(&from, &to), tried(&chars(&from), &chars(&to), false));
            prop_assert_eq!(typing_distance(&from, &to), tried(&chars(&from), &chars(&to), true));
        }

        #[test]
        fn the_distance_is_a_metric(a in ".{0,12}", b in ".{0,12}", c in ".{0,12}") {
            prop_assert_eq!(distance(&a, &b), distance(&b, &a));
            prop_assert_eq!(distance(&a, &b) == 0, a == b);
            prop_assert!(distance(&a, &c) <= distance(&a, &b) + distance(&b, &c));
        }
    }
}
