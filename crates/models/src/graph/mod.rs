//! The decoder as a graph of MLX's operations, for every device that MLX has.

mod attention;
mod block;
mod cache;
mod gate;
mod layers;
mod load;
mod mlp;
mod projections;
mod rows;

use mlx_rs::ops::indexing::{IndexOp, take_axis};
use mlx_rs::{Array, Dtype};

use attention::soft_capped;
use block::{Block, scaled};
pub(crate) use cache::{BLOCK, KvCache, LAYOUT, element};
use gate::Gate;
use layers::{Matrix, Norm};
pub(crate) use rows::GraphRows;
use rows::{Batch, Wanted};

use crate::ModelError;
use crate::kv::KvPlan;

/// The blocks and what lies around them, as arrays of MLX.
#[derive(Debug)]
pub(crate) struct GraphDecoder {
    /// The type of activations.
    dtype: Dtype,
    embedding: Matrix,
    blocks: Vec<Block>,
    gate: Gate,
    norm: Norm,
    /// `None` where the logits use the embedding.
    output: Option<Matrix>,
    embedding_scale: f32,
    logit_scale: f32,
    logit_softcap: Option<f32>,
}

impl GraphDecoder {
    /// The type of keys and values.
    pub(crate) fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Bytes of an element of keys and values.
    pub(crate) fn kv_element_bytes(&self) -> usize {
        if self.dtype == Dtype::Float32 { 4 } else { 2 }
    }

    /// Feeds `[rows]` ids, those of one sequence after those of another, and returns the logits that the sequences want,
    /// `[wanted, vocab_size]` float32.
    pub(crate) fn forward(
        &self,
        ids: &Array,
        plan: &KvPlan,
        parts: &mut [GraphRows<'_>],
    ) -> Result<Option<Array>, ModelError> {
        let ids = ids.reshape(&[1, -1])?;
        let wanted = Wanted::of(parts);
        let mut batch = Batch::new(parts, plan);
        let mut x = scaled(self.embedding.rows(&ids, self.dtype)?, self.embedding_scale)?;
        for (layer, block) in self.blocks.iter().enumerate() {
            x = block.forward(&x, &mut batch, layer, &self.gate)?;
        }
        let hidden = match wanted {
            Wanted::None => return Ok(None),
            Wanted::All => x.index((0, .., ..)),
            Wanted::From(row) => x.index((0, row.., ..)),
            Wanted::Some(rows) => {
                take_axis(&x, Array::from_slice(&rows, &[rows.len() as i32]), 1)?.index((0, .., ..))
            }
        };
        self.logits(&hidden).map(Some)
    }

    fn logits(&self, hidden: &Array) -> Result<Array, ModelError> {
        let logits = self
            .output
            .as_ref()
            .unwrap_or(&self.embedding)
            .project(&self.norm.forward(hidden)?)?;
        let logits = if logits.dtype() == Dtype::Float32 {
            logits
        } else {
            logits.as_dtype(Dtype::Float32)?
        };
        soft_capped(scaled(logits, self.logit_scale)?, self.logit_softcap)
    }
}
