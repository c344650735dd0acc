//! Which keys and values are kept, and how: what a configuration makes of a decoder.

use mlx_engine_core::KvConfig;

use crate::{DecoderSpec, ModelError};

/// How many of the last tokens of a sequence can always be taken back, also where layers see a window.
pub const TAKEN_BACK: usize = SLACK;

/// Positions by which a window's memory is longer than what is seen, so that the last tokens can be taken back.
pub(crate) const SLACK: usize = 64;

/// What is kept of the layers that have one kind of attention.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KvRule {
    /// Layers of the kind.
    pub(crate) layers: usize,
    /// A token sees this many positions, itself included; all where `None`.
    pub(crate) window: Option<usize>,
    /// First positions that are seen beside the window.
    pub(crate) keep: usize,
    /// Bits and group size, from which position on.
    pub(crate) integers: Option<KvIntegersFrom>,
}

/// Integers from a position on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct KvIntegersFrom {
    pub(crate) bits: usize,
    pub(crate) group_size: usize,
    /// A multiple of 64.
    pub(crate) from: usize,
}

impl KvRule {
    /// The first position beside the kept ones that is seen from `position` on.
    pub(crate) fn start(&self, position: usize) -> usize {
        self.window
            .map_or(0, |window| (position + 1).saturating_sub(window))
    }

    /// The first position beside the kept ones whose memory is there once a step has begun at `position`.
    pub(crate) fn released(&self, position: usize) -> usize {
        self.start(position).saturating_sub(SLACK)
    }
}

/// What is kept of each kind of attention, and where each layer is among those of its kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KvPlan {
    pub(crate) rules: Vec<KvRule>,
    /// For each layer its kind and its number among the layers of that kind.
    pub(crate) places: Vec<(usize, usize)>,
}

impl KvPlan {
    /// # Errors
    ///
    /// For what [`KvConfig::validate`] refuses, and for groups that do not make whole heads.
    pub(crate) fn new(spec: &DecoderSpec, config: &KvConfig) -> Result<Self, ModelError> {
        config
            .validate()
            .map_err(|error| ModelError::config(error.to_string()))?;
        let integers = config.bits.map(|bits| KvIntegersFrom {
            bits: bits as usize,
            group_size: config.group_size as usize,
            from: config.quantized_from.next_multiple_of(SLACK),
        });
        if let Some(KvIntegersFrom { group_size, .. }) = integers
            && !spec.head_dim.is_multiple_of(group_size)
        {
            let message = format!(
                "`kv.group_size` is {group_size}, which does not make whole heads of {}",
                spec.head_dim
            );
            return Err(ModelError::config(message));
        }
        let mut rules: Vec<KvRule> = spec
            .attention
            .iter()
            .map(|attention| {
                let rotating = config
                    .max_positions
                    .filter(|&most| attention.window.is_none_or(|window| window > most));
                KvRule {
                    layers: 0,
                    window: rotating.map(|most| most - config.keep).or(attention.window),
                    keep: rotating.map_or(0, |_| config.keep),
                    integers,
                }
            })
            .collect();
        let places = (0..spec.layers)
            .map(|layer| {
                let kind = spec.attention_kind(layer);
                rules[kind].layers += 1;
                (kind, rules[kind].layers - 1)
            })
            .collect();
        Ok(Self { rules, places })
    }

    /// The first position beside the kept ones, for each kind, whose memory is there once a step has begun at `position`
    /// and some were gone before.
    pub(crate) fn release(&self, position: usize, released: &mut [usize]) {
        for (rule, released) in self.rules.iter().zip(released) {
            *released = (*released).max(rule.released(position));
        }
    }

    /// Whether what a token at position `len` sees is still there.
    pub(crate) fn can_go_on_at(&self, len: usize, released: &[usize]) -> bool {
        let mut rules = self.rules.iter().zip(released);
        len == 0 || rules.all(|(rule, &released)| rule.start(len) >= released)
    }

    /// The same for the layers of one kind of attention, as if there were no others.
    pub(crate) fn of_kind(&self, kind: usize) -> Self {
        let mut plan = self.clone();
        for (other, rule) in plan.rules.iter_mut().enumerate() {
            if other != kind {
                rule.layers = 0;
            }
        }
        plan
    }

    /// Refuses what MLX's operations do not compute: integers in layers that do not keep all positions.
    pub(crate) fn check_for_graph(&self) -> Result<(), ModelError> {
        let mut rules = self.rules.iter();
        if rules.any(|rule| rule.window.is_some() && rule.integers.is_some()) {
            let message =
                "`kv.bits` beside a sliding window or `kv.max_positions` is computed on a CPU alone";
            return Err(ModelError::config(message));
        }
        Ok(())
    }

    /// Bytes that MLX's arrays take for a sequence of `tokens` that is fed at most `step` at once, with floats of
    /// `element_bytes` and arrays that grow by `block` positions.
    pub(crate) fn graph_bytes(
        &self,
        spec: &DecoderSpec,
        element_bytes: usize,
        [tokens, step, block]: [usize; 3],
    ) -> usize {
        let tokens = tokens.next_multiple_of(block);
        let elements = 2 * spec.kv_heads * spec.head_dim;
        let rules = self.rules.iter().map(|rule| {
            let held = tokens - rule.released(tokens.saturating_sub(step.max(block)));
            let held = held + if held < tokens { rule.keep } else { 0 };
            let (floats, integers) = match rule.integers {
                Some(integers) => (held.min(integers.from), held.saturating_sub(integers.from)),
                None => (held, 0),
            };
            let packed = rule.integers.map_or(0, |integers| {
                elements * integers.bits / 8 + 2 * elements / integers.group_size * element_bytes
            });
            let (floats, integers) = (floats.next_multiple_of(block), integers.next_multiple_of(block));
            rule.layers * (floats * elements * element_bytes + integers * packed)
        });
        rules.sum()
    }
}
