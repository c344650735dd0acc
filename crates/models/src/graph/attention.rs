//! Attention by MLX's operations.

use mlx_rs::fast::{ScaledDotProductAttentionMask, scaled_dot_product_attention};
use mlx_rs::ops::indexing::IndexOp;
use mlx_rs::{Array, Dtype, ops};

use super::cache::{Rows, Segment};
use crate::ModelError;

/// What rows of queries see, and how.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sight {
    /// What scores are multiplied by.
    pub(super) scale: f32,
    /// Scores `s` become `cap * tanh(s / cap)`.
    pub(super) softcap: Option<f32>,
    /// A row sees this many positions, its own included; all before it where `None`.
    pub(super) window: Option<usize>,
    /// A row sees the first positions too, this many.
    pub(super) keep: usize,
}

impl Sight {
    fn sees(self, row: usize, position: usize) -> bool {
        let near = self.window.is_none_or(|window| position + window > row);
        position <= row && (near || position < self.keep)
    }

    /// Queries `[1, heads, rows, head_dim]`, whose first row is at `position`, over what is there of all positions.
    pub(super) fn attend(
        self,
        queries: &Array,
        position: usize,
        segments: Vec<Segment>,
    ) -> Result<Array, ModelError> {
        let rows = queries.shape()[2] as usize;
        // What no row sees is left out.
        let start = self
            .window
            .map_or(0, |window| (position + 1).saturating_sub(window));
        let seen: Vec<Segment> = segments
            .into_iter()
            .map(|segment| self.cut(segment, start))
            .collect();
        let positions: Vec<usize> = seen
            .iter()
            .flat_map(|segment| segment.first..segment.first + segment.keys.positions())
            .collect();
        let mask = Mask::new(self, position..position + rows, &positions);
        if self.softcap.is_none()
            && let Some((keys, values)) = floats(&seen)?
        {
            let mask = match &mask {
                Mask::None => None,
                Mask::Causal => Some(ScaledDotProductAttentionMask::Causal),
                Mask::Array(mask) => Some(ScaledDotProductAttentionMask::Array(mask)),
            };
            return Ok(scaled_dot_product_attention(
                queries, keys, values, self.scale, mask, None,
            )?);
        }
        self.attend_by_parts(queries, &seen, mask, position, &positions)
    }

    /// Leaves out what lies between the kept positions and `start`.
    fn cut(self, segment: Segment, start: usize) -> Segment {
        let Segment { first, keys, values } = &segment;
        let (Rows::Floats(keys), Rows::Floats(values)) = (keys, values) else {
            return segment;
        };
        // Kept positions within the segment keep it whole: a mask hides what lies between.
        if start <= *first || (self.keep > 0 && *first < self.keep) {
            return segment;
        }
        let own = (.., .., (start - first) as i32.., ..);
        Segment {
            first: start,
            keys: Rows::Floats(keys.index(own.clone())),
            values: Rows::Floats(values.index(own)),
        }
    }

    /// The definition: MLX has no operation with a cap, nor one over integers.
    fn attend_by_parts(
        self,
        queries: &Array,
        segments: &[Segment],
        mask: Mask,
        position: usize,
        positions: &[usize],
    ) -> Result<Array, ModelError> {
        let [_, heads, rows, head_dim] = *queries.shape() else {
            return Err(ModelError::Mlx("queries have four axes".to_owned()));
        };
        let kv_heads = segments.first().map_or(1, |segment| match &segment.keys {
            Rows::Floats(array)
            | Rows::Integers {
                parts: [array, ..], ..
            } => array.shape()[1],
        });
        let scale = Array::from_f32(self.scale).as_dtype(queries.dtype())?;
        let grouped = [1, kv_heads, heads / kv_heads, rows, head_dim];
        let queries = ops::multiply(queries, scale)?.reshape(&grouped)?;
        let mut scores = Vec::with_capacity(segments.len());
        for segment in segments {
            scores.push(match &segment.keys {
                Rows::Floats(keys) => {
                    let keys = ops::expand_dims(keys, 2)?.transpose_axes(&[0, 1, 2, 4, 3])?;
                    ops::matmul(&queries, &keys)?
                }
                Rows::Integers { parts, .. } => segment.keys.product(&queries, parts, true)?,
            });
        }
        let scores = soft_capped(ops::concatenate(&scores, -1)?, self.softcap)?;
        let scores = match mask {
            Mask::None => scores,
            mask => {
                let visible = match mask {
                    Mask::Array(visible) => visible,
                    _ => visible(self, position..position + rows as usize, positions),
                };
                let hidden = Array::from_f32(f32::NEG_INFINITY).as_dtype(scores.dtype())?;
                ops::select(&visible, &scores, &hidden)?
            }
        };
        let weights = ops::softmax_axis(&scores, -1, Some(true))?;
        let mut attended: Option<Array> = None;
        let mut first = 0;
        for segment in segments {
            let own = first..first + segment.values.positions() as i32;
            first = own.end;
            let weights = weights.index((.., .., .., .., own));
            let part = match &segment.values {
                Rows::Floats(values) => ops::matmul(&weights, &ops::expand_dims(values, 2)?)?,
                Rows::Integers { parts, .. } => segment.values.product(&weights, parts, false)?,
            };
            attended = Some(match attended {
                Some(sum) => ops::add(sum, part)?,
                None => part,
            });
        }
        let attended = attended.ok_or(ModelError::NoTokens)?;
        Ok(attended.reshape(&[1, heads, rows, head_dim])?)
    }
}

impl Rows {
    fn product(
        &self,
        x: &Array,
        [packed, scales, biases]: &[Array; 3],
        transposed: bool,
    ) -> Result<Array, ModelError> {
        let Self::Integers { bits, group_size, .. } = self else {
            return Err(ModelError::Mlx("these are floats".to_owned()));
        };
        let wide = |array: &Array| ops::expand_dims(array, 2);
        Ok(ops::quantized_matmul(
            x,
            wide(packed)?,
            wide(scales)?,
            &wide(biases)?,
            transposed,
            *group_size,
            *bits,
        )?)
    }
}

/// Which positions rows see.
enum Mask {
    /// All.
    None,
    /// Those up to their own, without a gap.
    Causal,
    /// `[rows, positions]`.
    Array(Array),
}

impl Mask {
    fn new(sight: Sight, rows: std::ops::Range<usize>, positions: &[usize]) -> Self {
        let first = positions.first().copied().unwrap_or(0);
        let whole = positions.len() == rows.end - first;
        let all_near = sight.window.is_none_or(|window| first + window >= rows.end);
        let kept_or_near = |&position: &usize| sight.sees(rows.end - 1, position);
        if rows.len() == 1 && positions.iter().all(kept_or_near) {
            Self::None
        } else if whole && all_near {
            Self::Causal
        } else {
            Self::Array(visible(sight, rows, positions))
        }
    }
}

/// Which of the positions rows see, `[rows, positions]`.
fn visible(sight: Sight, rows: std::ops::Range<usize>, positions: &[usize]) -> Array {
    let shape = [rows.len() as i32, positions.len() as i32];
    let visible: Vec<bool> = rows
        .flat_map(|row| positions.iter().map(move |&position| sight.sees(row, position)))
        .collect();
    Array::from_slice(&visible, &shape)
}

/// The keys and values of floats alone.
fn floats(segments: &[Segment]) -> Result<Option<(Array, Array)>, ModelError> {
    let mut keys = Vec::with_capacity(segments.len());
    let mut values = Vec::with_capacity(segments.len());
    for segment in segments {
        let (Rows::Floats(some_keys), Rows::Floats(some_values)) = (&segment.keys, &segment.values) else {
            return Ok(None);
        };
        keys.push(some_keys.clone());
        values.push(some_values.clone());
    }
    Ok(Some(match (&keys[..], &values[..]) {
        ([keys], [values]) => (keys.clone(), values.clone()),
        _ => (ops::concatenate(&keys, 2)?, ops::concatenate(&values, 2)?),
    }))
}

/// `cap * tanh(x / cap)`, where there is a cap.
pub(super) fn soft_capped(x: Array, cap: Option<f32>) -> Result<Array, ModelError> {
    let Some(cap) = cap else {
        return Ok(x);
    };
    let dtype: Dtype = x.dtype();
    let cap = Array::from_f32(cap).as_dtype(dtype)?;
    Ok(ops::multiply(ops::tanh(ops::divide(x, &cap)?)?, &cap)?)
}
