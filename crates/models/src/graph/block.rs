//! A block: attention and MLP, each added to the residual stream.

use mlx_rs::{Array, ops};

use super::gate::Gate;
use super::layers::{Linear, Norm};
use super::mlp::FeedForward;
use super::projections::Attention;
use super::rows::Batch;
use crate::ModelError;

#[derive(Debug)]
pub(super) struct Block {
    /// The norms that the family has where it has them.
    pub(super) attention_norm: Option<Norm>,
    pub(super) attention: Attention,
    pub(super) post_attention_norm: Option<Norm>,
    pub(super) mlp_norm: Option<Norm>,
    pub(super) feed_forward: FeedForward,
    pub(super) post_mlp_norm: Option<Norm>,
    pub(super) residual_scale: f32,
}

impl Block {
    pub(super) fn forward(
        &self,
        x: &Array,
        batch: &mut Batch<'_, '_>,
        layer: usize,
        gate: &Gate,
    ) -> Result<Array, ModelError> {
        let normed = normalized(self.attention_norm.as_ref(), x)?;
        let attended = self.attention.forward(&normed, batch, layer)?;
        let x = self.add(x, &attended, self.post_attention_norm.as_ref())?;
        let normed = normalized(self.mlp_norm.as_ref(), &x)?;
        let fed = self.feed_forward.forward(&normed, gate)?;
        self.add(&x, &fed, self.post_mlp_norm.as_ref())
    }

    /// Adds what attention or MLP give to the residual stream.
    fn add(&self, x: &Array, branch: &Array, norm: Option<&Norm>) -> Result<Array, ModelError> {
        let branch = normalized(norm, branch)?;
        Ok(ops::add(x, scaled(branch, self.residual_scale)?)?)
    }

    pub(super) fn arrays(&self) -> Vec<&Array> {
        let attention = &self.attention;
        let linears = [
            &attention.query,
            &attention.key,
            &attention.value,
            &attention.output,
        ];
        let mut arrays: Vec<&Array> = linears.into_iter().flat_map(Linear::arrays).collect();
        arrays.extend(self.feed_forward.arrays());
        let norms = [
            &self.attention_norm,
            &self.post_attention_norm,
            &self.mlp_norm,
            &self.post_mlp_norm,
        ];
        arrays.extend(norms.into_iter().flatten().map(|norm| &norm.weight));
        arrays
    }
}

fn normalized(norm: Option<&Norm>, x: &Array) -> Result<Array, ModelError> {
    norm.map_or_else(|| Ok(x.clone()), |norm| norm.forward(x))
}

/// In the type of `x`.
pub(super) fn scaled(x: Array, scale: f32) -> Result<Array, ModelError> {
    if scale == 1.0 {
        return Ok(x);
    }
    let scale = Array::from_f32(scale).as_dtype(x.dtype())?;
    Ok(ops::multiply(x, scale)?)
}
