//! How speeds change with what they depend on: streams, context, threads.

use serde_json::{Value, json};

use super::llama::Llama;
use super::ours::Ours;
use super::report::median;
use crate::error::Result;

/// Streams that are answered together, with a short prompt each.
const STREAMS: [u32; 4] = [1, 2, 4, 8];
const SHORT_PROMPT: u32 = 64;
/// Tokens before an answer, and of a prompt that is fed at once. The test model's context is 2048.
const CONTEXTS: [u32; 4] = [128, 512, 1024, 1792];
/// Tokens of each answer.
const ANSWER: u32 = 64;
/// Tokens of the prompt that threads share.
const PROMPT: u32 = 512;

/// One speed over one thing, of ours and of llama.cpp, round by round at each place.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Curve {
    /// The speed, such as `decode`.
    pub(crate) speed: &'static str,
    /// What it is measured against, such as `streams`.
    pub(crate) against: &'static str,
    pub(crate) at: Vec<u32>,
    pub(crate) ours: Vec<Vec<f64>>,
    pub(crate) llama: Vec<Vec<f64>>,
}

impl Curve {
    pub(crate) fn new(speed: &'static str, against: &'static str, at: &[u32]) -> Self {
        Self {
            speed,
            against,
            at: at.to_vec(),
            ours: vec![Vec::new(); at.len()],
            llama: vec![Vec::new(); at.len()],
        }
    }

    pub(crate) fn json(&self) -> Value {
        let medians = |rounds: &[Vec<f64>]| rounds.iter().map(|rounds| median(rounds)).collect::<Vec<_>>();
        json!({"speed": self.speed, "against": self.against, "at": self.at, "unit": "tok/s",
               "ours": medians(&self.ours), "llama.cpp": medians(&self.llama),
               "ours_rounds": self.ours, "llama.cpp_rounds": self.llama})
    }
}

/// All curves, without points yet: prefill and decode in turn.
pub(crate) fn empty(threads: u32) -> [Curve; 6] {
    let threads = counts(threads);
    [
        Curve::new("prefill", "streams", &STREAMS),
        Curve::new("decode", "streams", &STREAMS),
        Curve::new("prefill", "tokens of the prompt", &CONTEXTS),
        Curve::new("decode", "tokens before it", &CONTEXTS),
        Curve::new("prefill", "threads", &threads),
        Curve::new("decode", "threads", &threads),
    ]
}

/// 1, 2, 4 and so on, and all of them.
fn counts(threads: u32) -> Vec<u32> {
    let doubled = std::iter::successors(Some(1u32), |count| count.checked_mul(2));
    let mut counts: Vec<u32> = doubled.take_while(|count| *count < threads).collect();
    counts.push(threads.max(1));
    counts
}

/// Adds a round of each curve, ours and llama.cpp in turn.
pub(crate) fn round(curves: &mut [Curve; 6], ours: &Ours, llama: &Llama, threads: u32) -> Result<()> {
    let [
        prefill_streams,
        decode_streams,
        prefill_length,
        decode_depth,
        prefill_threads,
        decode_threads,
    ] = curves;
    let mine = ours.together(SHORT_PROMPT, ANSWER, &STREAMS)?;
    let theirs = llama.together(SHORT_PROMPT, ANSWER, &STREAMS)?;
    for (at, (mine, theirs)) in mine.into_iter().zip(theirs).enumerate() {
        add(prefill_streams, at, mine.prefill, theirs.prefill);
        add(decode_streams, at, mine.decode, theirs.decode);
    }
    for (at, &context) in CONTEXTS.iter().enumerate() {
        let mine = ours.one(context, ANSWER, threads, 1)?;
        add(
            prefill_length,
            at,
            mine.prefill,
            llama.prefill(context, threads, 1)?,
        );
        add(
            decode_depth,
            at,
            mine.decode,
            llama.decode(context, ANSWER, threads, 1)?,
        );
    }
    for (at, count) in prefill_threads.at.clone().into_iter().enumerate() {
        add(
            prefill_threads,
            at,
            ours.one(PROMPT, ANSWER, count, 1)?.prefill,
            llama.prefill(PROMPT, count, 1)?,
        );
        add(
            decode_threads,
            at,
            ours.one(1, ANSWER, count, 1)?.decode,
            llama.decode(0, ANSWER, count, 1)?,
        );
    }
    Ok(())
}

fn add(curve: &mut Curve, at: usize, ours: f64, llama: f64) {
    curve.ours[at].push(ours);
    curve.llama[at].push(llama);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_double_up_to_all_of_them() {
        assert_eq!(counts(1), [1]);
        assert_eq!(counts(2), [1, 2]);
        assert_eq!(counts(6), [1, 2, 4, 6]);
        assert_eq!(counts(0), [1]);
    }

    #[test]
    fn the_report_of_a_curve_has_medians_and_rounds() {
        let mut curve = Curve::new("decode", "streams", &[1, 8]);
        for (ours, llama) in [(3.0, 1.0), (5.0, 2.0), (4.0, 9.0)] {
            add(&mut curve, 0, ours, llama);
        }
        let told = curve.json();
        assert_eq!(told["ours"][0], 4.0);
        assert_eq!(told["llama.cpp"][0], 2.0);
        assert!(told["ours"][1].is_null());
        assert_eq!(told["ours_rounds"][0][1], 5.0);
    }
}
