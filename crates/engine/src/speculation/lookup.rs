//! Guesses from what was said before.

use super::LookupConfig;

/// What followed when the sequence last went as it goes now: at most `most` tokens, none where it never did.
///
/// Of several places that one is taken where more of the last tokens were there, up to
/// [`max_ngram`](LookupConfig::max_ngram), and of equals the last. What runs into the end goes on with itself, as a repetition does.
pub(crate) fn look_up(tokens: &[u32], config: &LookupConfig, most: usize) -> Vec<u32> {
    let mut best = (config.min_ngram - 1, 0);
    for end in (1..tokens.len()).rev() {
        if best.0 >= config.max_ngram {
            break;
        }
        let alike = tokens[..end]
            .iter()
            .rev()
            .zip(tokens.iter().rev())
            .take(config.max_ngram)
            .take_while(|(before, now)| before == now)
            .count();
        if alike > best.0 {
            best = (alike, end);
        }
    }
    match best.1 {
        0 => Vec::new(),
        from => tokens[from..].iter().copied().cycle().take(most).collect(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(text: &str, most: usize, expected: &str) {
        let tokens: Vec<u32> = text.chars().map(u32::from).collect();
        let guess = look_up(&tokens, &LookupConfig::default(), most);
        let guess: String = guess.into_iter().filter_map(char::from_u32).collect();
        assert_eq!(guess, expected, "{text}");
    }

    #[test]
    fn what_followed_the_last_tokens_is_guessed() {
        check("the cat sat, the ", 4, "cat ");
        check("the cow sat", 4, "");
        // One token is too little, two are enough.
        check("xa, ya, z, qa", 4, "");
        check("xab, z, qab", 3, ", z");
        // More that is alike comes before what is nearer, and what is nearer before what is not.
        check("xbcd1 cd2 bcd", 3, "1 c");
        check("ab1 ab2 ab", 1, "2");
        // A repetition goes on.
        check("ababab", 5, "ababa");
        check("zzz", 4, "zzzz");
        check("", 4, "");
        check("ab", 4, "");
    }

    proptest! {
        #[test]
        fn a_guess_follows_the_longest_match_as_a_slow_search_finds_it(
            tokens in prop::collection::vec(0_u32..4, 0..60),
            most in 1_usize..10,
            min_ngram in 1_usize..4,
            more in 0_usize..4,
        ) {
            let config = LookupConfig { max_tokens: most, min_ngram, max_ngram: min_ngram + more, always: false };
            let mut expected = Vec::new();
            'found: for length in (min_ngram..=config.max_ngram).rev() {
                for start in (0..tokens.len().saturating_sub(length)).rev() {
                    if tokens[start..].starts_with(&tokens[tokens.len() - length..]) {
                        let mut whole = tokens.clone();
                        for next in start + length..start + length + most {
                            whole.push(whole[next]);
                        }
                        expected = whole[tokens.len()..].to_vec();
                        break 'found;
                    }
                }
            }
            prop_assert_eq!(look_up(&tokens, &config, most), expected);
        }
    }
}
