//! Which tokens may be drawn.

use mlx_engine_core::GenerateParams;
use mlx_engine_kernels::{argmax, at_least, draw, draw_among, log_sum_exp, top_k};

use super::isa;

/// Temperature and filters of a request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Filter {
    pub(super) temperature: f32,
    /// The likeliest tokens that have this much of the probability together; 1 takes all.
    pub(super) top_p: f32,
    /// So many of the likeliest; 0 takes all.
    pub(super) top_k: usize,
    /// Those that have this part of the probability of the likeliest; 0 takes all.
    pub(super) min_p: f32,
}

/// Up to here the likeliest are found without sorting all.
const FEW: usize = 4096;

impl Filter {
    pub(super) fn new(params: &GenerateParams) -> Self {
        Self {
            temperature: if params.is_greedy() {
                0.0
            } else {
                params.temperature
            },
            top_p: params.top_p,
            top_k: params.top_k as usize,
            min_p: params.min_p,
        }
    }

    pub(super) fn is_greedy(&self) -> bool {
        self.temperature <= 0.0
    }

    /// Whether all tokens may be drawn.
    pub(super) fn keeps_all(&self) -> bool {
        self.top_p >= 1.0 && self.top_k == 0 && self.min_p <= 0.0
    }

    /// The likeliest token, or one that is drawn with the numbers of this seed.
    pub(super) fn choose(&self, logits: &[f32], seed: u64) -> u32 {
        let token = if self.is_greedy() {
            argmax(isa(), logits)
        } else if self.keeps_all() {
            draw(isa(), logits, self.temperature, seed)
        } else {
            let kept = self.kept(logits);
            draw_among(&kept, self.temperature, seed).unwrap_or(0)
        };
        token as u32
    }

    /// Tokens and logits that the filters leave, likeliest first; ties keep the order of the ids.
    fn kept(&self, logits: &[f32]) -> Vec<(usize, f32)> {
        let likeliest = logits.get(argmax(isa(), logits)).copied().unwrap_or(0.0);
        let least = if self.min_p > 0.0 {
            likeliest + self.min_p.ln()
        } else {
            f32::NEG_INFINITY
        };
        let all = (self.top_p < 1.0).then(|| log_sum_exp(isa(), logits));
        let mut kept = match all {
            _ if (1..=FEW).contains(&self.top_k) => top_k(isa(), logits, self.top_k),
            Some(all) => self.likely(logits, likeliest, least, all),
            None => at_least(isa(), logits, least),
        };
        if let Some(all) = all {
            let mut mass = 0.0;
            let needed = kept.iter().position(|(_, logit)| {
                mass += (f64::from(*logit) - all).exp();
                mass >= f64::from(self.top_p)
            });
            kept.truncate(needed.map_or(kept.len(), |last| last + 1));
        }
        kept.retain(|(_, logit)| *logit >= least);
        if self.top_k > 0 {
            kept.truncate(self.top_k);
        }
        kept
    }

    /// The tokens of at least this logit, or fewer that have enough of the probability for top-p.
    fn likely(&self, logits: &[f32], likeliest: f32, least: f32, all: f64) -> Vec<(usize, f32)> {
        // All that are less likely than these together have less than top-p leaves out.
        let bound = all + (f64::from(1.0 - self.top_p) / logits.len() as f64).ln();
        for nearer in [4.0, 8.0] {
            let nearer = likeliest - nearer;
            if nearer > least && f64::from(nearer) > bound {
                let some = at_least(isa(), logits, nearer);
                let mass: f64 = some
                    .iter()
                    .map(|(_, logit)| (f64::from(*logit) - all).exp())
                    .sum();
                if mass >= f64::from(self.top_p) {
                    return some;
                }
            }
        }
        at_least(isa(), logits, least.max((bound - 0.1) as f32))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::Value;

    use super::*;

    /// What mlx-lm keeps: logits, filters, and the tokens that are left.
    pub(in super::super) fn of_mlx_lm() -> Vec<(Vec<f32>, Filter, Vec<usize>)> {
        let groups: Vec<Value> =
            serde_json::from_str(include_str!("../../tests/fixtures/sampling.json")).expect("JSON");
        let array = |value: &Value| value.as_array().cloned().expect("an array");
        let number = |value: &Value| value.as_f64().expect("a number") as f32;
        let mut cases = Vec::new();
        for group in groups {
            let scale = number(&group["scale"]);
            let logits: Vec<f32> = array(&group["steps"]).iter().map(|x| number(x) * scale).collect();
            for case in array(&group["cases"]) {
                let filter = Filter {
                    temperature: 0.7,
                    top_p: number(&case["top_p"]),
                    top_k: number(&case["top_k"]) as usize,
                    min_p: number(&case["min_p"]),
                };
                let kept = array(&case["kept"])
                    .iter()
                    .map(|id| number(id) as usize)
                    .collect();
                cases.push((logits.clone(), filter, kept));
            }
        }
        assert!(cases.len() > 20);
        cases
    }

    #[test]
    fn what_is_kept_is_what_mlx_lm_keeps() {
        for (logits, filter, expected) in of_mlx_lm() {
            let mut kept: Vec<_> = filter.kept(&logits).into_iter().map(|(token, _)| token).collect();
            assert!(kept.is_sorted_by(|a, b| logits[*a] > logits[*b]), "{filter:?}");
            kept.sort_unstable();
            assert_eq!(kept, expected, "{filter:?}");
            assert!(
                expected.contains(&(filter.choose(&logits, 3) as usize)),
                "{filter:?}"
            );
        }
    }

    #[test]
    fn ties_keep_the_order_of_the_ids_and_masked_tokens_stay_out() {
        let filter = Filter {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 2,
            min_p: 0.0,
        };
        let logits = [f32::NEG_INFINITY, 1.0, 2.0, 1.0, 1.0];
        assert_eq!(filter.kept(&logits), [(2, 2.0), (1, 1.0)]);
        let one = [f32::NEG_INFINITY, f32::NEG_INFINITY, -3.0];
        for top_p in [0.5, 1.0] {
            assert!((0..100).all(|seed| Filter { top_p, ..filter }.choose(&one, seed) == 2));
        }
    }
}
