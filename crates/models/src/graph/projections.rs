//! The projections around attention: queries, keys and values of all rows together, attention of each sequence alone.

use mlx_rs::ops::indexing::IndexOp;
use mlx_rs::{Array, ops};

use super::attention::Sight;
use super::layers::{Linear, Norm, Rope};
use super::rows::Batch;
use crate::ModelError;
use crate::spec::QkNorm;

#[derive(Debug)]
pub(super) struct Attention {
    pub(super) query: Linear,
    pub(super) key: Linear,
    pub(super) value: Linear,
    pub(super) output: Linear,
    /// Norms of queries and keys, where the family has them.
    pub(super) norms: Option<(Norm, Norm)>,
    pub(super) qk_norm: QkNorm,
    pub(super) rope: Option<Rope>,
    pub(super) scale: f32,
    pub(super) softcap: Option<f32>,
    pub(super) heads: i32,
    pub(super) kv_heads: i32,
    pub(super) head_dim: i32,
}

const HEADS_FIRST: [i32; 4] = [0, 2, 1, 3];

impl Attention {
    /// `[1, rows, heads * head_dim]` to `[1, rows, heads, head_dim]`.
    fn split(&self, x: &Array, heads: i32) -> Result<Array, ModelError> {
        Ok(x.reshape(&[1, x.shape()[1], heads, self.head_dim])?)
    }

    /// `[1, rows, heads, head_dim]` to `[1, heads, rows, head_dim]` for each sequence.
    fn per_sequence(x: &Array, batch: &Batch<'_, '_>) -> Result<Vec<Array>, ModelError> {
        let mut first = 0;
        batch
            .parts
            .iter()
            .map(|part| {
                let own = first..first + part.rows as i32;
                first = own.end;
                let own = if batch.parts.len() == 1 {
                    x.clone()
                } else {
                    x.index((.., own, .., ..))
                };
                Ok(own.transpose_axes(&HEADS_FIRST)?)
            })
            .collect()
    }

    /// As [`per_sequence`](Self::per_sequence), with the heads rotated by their positions.
    fn rotated(&self, x: &Array, batch: &Batch<'_, '_>) -> Result<Vec<Array>, ModelError> {
        let Some(rope) = &self.rope else {
            return Self::per_sequence(x, batch);
        };
        if let Some(positions) = &batch.positions {
            // One kernel for all: each sequence is a row of a batch with a position of its own.
            let count = batch.parts.len() as i32;
            let rows = x.reshape(&[count, -1, x.shape()[2], self.head_dim])?;
            let rotated = rope.forward_each(&rows.transpose_axes(&HEADS_FIRST)?, positions)?;
            return Ok((0..count)
                .map(|row| rotated.index((row..row + 1, .., .., ..)))
                .collect());
        }
        Self::per_sequence(x, batch)?
            .iter()
            .zip(batch.parts.iter())
            .map(|(x, part)| rope.forward(x, part.position))
            .collect()
    }

    /// Queries or keys by head, normalized where the family does.
    fn normed(&self, x: &Array, norm: Option<&Norm>, heads: i32) -> Result<Array, ModelError> {
        match (norm, self.qk_norm) {
            (Some(norm), QkNorm::AllHeads) => self.split(&norm.forward(x)?, heads),
            (Some(norm), _) => norm.forward(&self.split(x, heads)?),
            (None, _) => self.split(x, heads),
        }
    }

    pub(super) fn forward(
        &self,
        x: &Array,
        batch: &mut Batch<'_, '_>,
        layer: usize,
    ) -> Result<Array, ModelError> {
        let rows = x.shape()[1];
        let (query_norm, key_norm) = self.norms.as_ref().map(|(query, key)| (query, key)).unzip();
        let queries = self.normed(&self.query.forward(x)?, query_norm, self.heads)?;
        let keys = self.normed(&self.key.forward(x)?, key_norm, self.kv_heads)?;
        let values = self.split(&self.value.forward(x)?, self.kv_heads)?;
        let queries = self.rotated(&queries, batch)?;
        let keys = self.rotated(&keys, batch)?;
        let values = Self::per_sequence(&values, batch)?;
        let rule = &batch.plan.rules[batch.plan.places[layer].0];
        let sight = Sight {
            scale: self.scale,
            softcap: self.softcap,
            window: rule.window,
            keep: rule.keep,
        };
        let mut attended = Vec::with_capacity(batch.parts.len());
        for (((part, queries), keys), values) in batch.parts.iter_mut().zip(queries).zip(keys).zip(values) {
            let segments = part.layers[layer].update(rule, part.position, &keys, &values)?;
            let own = sight.attend(&queries, part.position, segments)?;
            attended.push(own.transpose_axes(&HEADS_FIRST)?);
        }
        let attended = match &attended[..] {
            [one] => one.clone(),
            several => ops::concatenate(&several.iter().collect::<Vec<_>>(), 1)?,
        };
        self.output
            .forward(&attended.reshape(&[1, rows, self.heads * self.head_dim])?)
    }
}
