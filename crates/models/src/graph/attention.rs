//! Attention by MLX's operations.

use mlx_rs::fast::{ScaledDotProductAttentionMask, scaled_dot_product_attention};
use mlx_rs::ops::indexing::IndexOp;
use mlx_rs::{Array, Dtype, ops};

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
}

impl Sight {
    /// Queries `[1, heads, rows, head_dim]`, of the last rows of keys and values `[1, kv_heads, positions, head_dim]`.
    pub(super) fn attend(self, queries: &Array, keys: Array, values: Array) -> Result<Array, ModelError> {
        let rows = queries.shape()[2] as usize;
        let positions = keys.shape()[2] as usize;
        // What no row sees is left out.
        let first = self
            .window
            .map_or(0, |window| (positions + 1).saturating_sub(rows + window));
        let (keys, values) = if first > 0 {
            let own = (.., .., first as i32.., ..);
            (keys.index(own.clone()), values.index(own))
        } else {
            (keys, values)
        };
        let window = self.window.filter(|&window| window < positions - first);
        if let Some(cap) = self.softcap {
            return self.attend_capped(queries, &keys, &values, cap, window);
        }
        let mask = window.map(|window| visible(rows, positions - first, Some(window)));
        let mask = match &mask {
            Some(mask) => Some(ScaledDotProductAttentionMask::Array(mask)),
            None => (rows > 1).then_some(ScaledDotProductAttentionMask::Causal),
        };
        Ok(scaled_dot_product_attention(
            queries, keys, values, self.scale, mask, None,
        )?)
    }

    /// MLX has no operation with a cap, so this is the definition.
    fn attend_capped(
        self,
        queries: &Array,
        keys: &Array,
        values: &Array,
        cap: f32,
        window: Option<usize>,
    ) -> Result<Array, ModelError> {
        let [_, heads, rows, head_dim] = *queries.shape() else {
            return Err(ModelError::Mlx("queries have four axes".to_owned()));
        };
        let (kv_heads, positions) = (keys.shape()[1], keys.shape()[2]);
        let scale = Array::from_f32(self.scale).as_dtype(queries.dtype())?;
        let queries =
            ops::multiply(queries, scale)?.reshape(&[1, kv_heads, heads / kv_heads, rows, head_dim])?;
        let keys = ops::expand_dims(keys, 2)?.transpose_axes(&[0, 1, 2, 4, 3])?;
        let scores = soft_capped(ops::matmul(&queries, &keys)?, Some(cap))?;
        let visible = visible(rows as usize, positions as usize, window);
        let hidden = Array::from_f32(f32::NEG_INFINITY).as_dtype(scores.dtype())?;
        let scores = ops::select(&visible, &scores, &hidden)?;
        let weights = ops::softmax_axis(&scores, -1, Some(true))?;
        let attended = ops::matmul(&weights, &ops::expand_dims(values, 2)?)?;
        Ok(attended.reshape(&[1, heads, rows, head_dim])?)
    }
}

/// Which positions rows see, `[rows, positions]`: those up to their own, as many as the window has. The rows are the
/// last of the positions.
fn visible(rows: usize, positions: usize, window: Option<usize>) -> Array {
    let first = positions - rows;
    let visible: Vec<bool> = (first..positions)
        .flat_map(|row| {
            let start = window.map_or(0, |window| (row + 1).saturating_sub(window));
            (0..positions).map(move |position| (start..=row).contains(&position))
        })
        .collect();
    Array::from_slice(&visible, &[rows as i32, positions as i32])
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
