//! What follows attention in a block: an MLP, or experts of which each token chooses some.

use mlx_rs::ops::indexing::{TryIndexOp, take_along_axis, take_axis};
use mlx_rs::{Array, Dtype, ops};

use super::gate::Gate;
use super::layers::{Linear, Matrix};
use crate::ModelError;

#[derive(Debug)]
pub(super) enum FeedForward {
    Mlp(Mlp),
    Experts(Box<Experts>),
}

/// A gated MLP.
#[derive(Debug)]
pub(super) struct Mlp {
    pub(super) gate: Linear,
    pub(super) up: Linear,
    pub(super) down: Linear,
}

/// MLPs of which each token chooses some.
#[derive(Debug)]
pub(super) struct Experts {
    /// What scores them.
    pub(super) router: Matrix,
    pub(super) gate: Stack,
    pub(super) up: Stack,
    pub(super) down: Stack,
    /// How many a token chooses.
    pub(super) active: i32,
    /// Whether the weights of those add up to 1.
    pub(super) normalized: bool,
    /// An MLP that every token passes besides, and what weighs it.
    pub(super) shared: Option<(Mlp, Matrix)>,
}

/// A matrix for each expert: `[experts, rows, columns]`.
#[derive(Debug)]
pub(super) enum Stack {
    Dense(Array),
    Quantized {
        packed: Array,
        scales: Array,
        biases: Array,
        group_size: i32,
        bits: i32,
    },
}

/// From so many choices on they are put in the order of the experts, so that the rows of one follow each other: mlx-lm's
/// number.
const SORTED_FROM: usize = 64;

impl FeedForward {
    /// `[1, rows, hidden_size]` to the same.
    pub(super) fn forward(&self, x: &Array, gate: &Gate) -> Result<Array, ModelError> {
        match self {
            Self::Mlp(mlp) => mlp.forward(x, gate),
            Self::Experts(experts) => experts.forward(x, gate),
        }
    }

    pub(super) fn arrays(&self) -> Vec<&Array> {
        match self {
            Self::Mlp(mlp) => mlp.arrays(),
            Self::Experts(experts) => {
                let stacks = [&experts.gate, &experts.up, &experts.down];
                let mut arrays = experts.router.arrays();
                arrays.extend(stacks.into_iter().flat_map(Stack::arrays));
                if let Some((mlp, gate)) = &experts.shared {
                    arrays.extend(mlp.arrays());
                    arrays.extend(gate.arrays());
                }
                arrays
            }
        }
    }
}

impl Mlp {
    fn forward(&self, x: &Array, gate: &Gate) -> Result<Array, ModelError> {
        self.down
            .forward(&gate.forward(&self.gate.forward(x)?, &self.up.forward(x)?)?)
    }

    fn arrays(&self) -> Vec<&Array> {
        let linears = [&self.gate, &self.up, &self.down];
        linears.into_iter().flat_map(Linear::arrays).collect()
    }
}

impl Experts {
    fn forward(&self, x: &Array, gate: &Gate) -> Result<Array, ModelError> {
        let &[_, rows, hidden] = x.shape() else {
            return Err(ModelError::Mlx(format!(
                "experts of rows of the shape {:?}",
                x.shape()
            )));
        };
        let x = x.reshape(&[rows, hidden])?;
        let (chosen, weights) = self.choose(&x)?;
        let each = self.each(&x, &chosen, gate)?;
        let weights = weights.reshape(&[rows, self.active, 1])?.as_dtype(each.dtype())?;
        let mut sum = ops::sum_axis(ops::multiply(each, weights)?, 1, false)?;
        if let Some((mlp, weight)) = &self.shared {
            let weight = ops::sigmoid(weight.project(&x)?)?;
            sum = ops::add(sum, ops::multiply(mlp.forward(&x, gate)?, weight)?)?;
        }
        Ok(sum.reshape(&[1, rows, hidden])?)
    }

    /// The experts of each row, `[rows, active]`, and their weights.
    fn choose(&self, x: &Array) -> Result<(Array, Array), ModelError> {
        // In float32: two experts that are nearly as likely are other ones in the halves.
        let scores = self.router.project(x)?.as_dtype(Dtype::Float32)?;
        let scores = ops::softmax_axis(scores, -1, true)?;
        let order = ops::argpartition_axis(ops::negative(&scores)?, self.active - 1, -1)?;
        let chosen = order.try_index((.., ..self.active))?;
        let weights = take_along_axis(&scores, &chosen, -1)?;
        if !self.normalized {
            return Ok((chosen, weights));
        }
        let total = ops::sum_axis(&weights, -1, true)?;
        Ok((chosen, ops::divide(weights, total)?))
    }

    /// What each of the chosen experts gives for each row, `[rows, active, hidden_size]`.
    fn each(&self, x: &Array, chosen: &Array, gate: &Gate) -> Result<Array, ModelError> {
        let hidden = x.shape()[1];
        let shape = [chosen.shape()[0], self.active, hidden];
        if chosen.size() < SORTED_FROM {
            let x = x.reshape(&[-1, 1, 1, hidden])?;
            return Ok(self.mlps(&x, chosen, gate, false)?.reshape(&shape)?);
        }
        let flat = chosen.reshape(&[-1])?;
        let order = ops::argsort_axis(&flat, 0)?;
        let back = ops::argsort_axis(&order, 0)?;
        let active = Array::from_int(self.active).as_dtype(order.dtype())?;
        let rows = take_axis(x, ops::floor_divide(&order, active)?, 0)?.reshape(&[-1, 1, hidden])?;
        let each = self.mlps(&rows, &take_axis(flat, order, 0)?, gate, true)?;
        Ok(take_axis(each, back, 0)?.reshape(&shape)?)
    }

    fn mlps(&self, x: &Array, experts: &Array, gate: &Gate, sorted: bool) -> Result<Array, ModelError> {
        let up = self.up.project(x, experts, sorted)?;
        let gated = gate.forward(&self.gate.project(x, experts, sorted)?, &up)?;
        self.down.project(&gated, experts, sorted)
    }
}

impl Stack {
    /// Rows `[.., 1, columns]` times the matrices of the experts `[..]`: `[.., 1, rows]`.
    fn project(&self, x: &Array, experts: &Array, sorted: bool) -> Result<Array, ModelError> {
        Ok(match self {
            Self::Dense(weights) => {
                let weights = ops::swap_axes(weights, -1, -2)?;
                ops::gather_mm(x, weights, None, Some(experts), sorted)?
            }
            Self::Quantized {
                packed,
                scales,
                biases,
                group_size,
                bits,
            } => ops::gather_qmm(
                x,
                packed,
                scales,
                Some(biases),
                None,
                Some(experts),
                true,
                *group_size,
                *bits,
                sorted,
            )?,
        })
    }

    fn arrays(&self) -> Vec<&Array> {
        match self {
            Self::Dense(weights) => vec![weights],
            Self::Quantized {
                packed,
                scales,
                biases,
                ..
            } => vec![packed, scales, biases],
        }
    }
}
