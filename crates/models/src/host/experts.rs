//! A block's experts.

use mlx_engine_kernels::{
    Activations, Expert, ExpertSum, KernelError, Product, gated_each, project, softmax, sum_experts, top_k,
};

use super::forward::Workspace;
use super::{Block, Experts, Model};

/// Rows of experts that are computed together, about so many: what lies between the halves of their MLPs takes memory.
const ROWS: usize = 1024;

/// Which rows have chosen which experts, and what is computed for them.
#[derive(Debug, Default)]
pub(super) struct Routes {
    /// For each row the score of each expert.
    scores: Vec<f32>,
    /// For each expert the rows that have chosen it, and the weights that they give it.
    chosen: Vec<(Vec<usize>, Vec<f32>)>,
    /// The rows of experts, what lies between the halves of their MLPs, and how much the shared one counts.
    inputs: Vec<Activations>,
    inner: Vec<Activations>,
    shared: Vec<f32>,
}

impl Routes {
    /// Bytes that are reserved.
    pub(super) fn bytes(&self) -> usize {
        let activations = self.inputs.iter().chain(&self.inner);
        let floats = self.scores.capacity() + self.shared.capacity();
        activations.map(Activations::bytes).sum::<usize>() + floats * size_of::<f32>()
    }
}

impl Model {
    /// Adds a block's experts to the residual stream.
    pub(super) fn experts(
        &self,
        work: &mut Workspace,
        block: &Block,
        experts: &Experts,
    ) -> Result<(), KernelError> {
        self.enter(work, block.mlp_norm.as_deref())?;
        let mut routes = std::mem::take(&mut work.routes);
        let added = self.add_experts(work, &mut routes, experts);
        work.routes = routes;
        added?;
        self.add_branch(work, block.post_mlp_norm.as_deref())
    }

    fn add_experts(
        &self,
        work: &mut Workspace,
        routes: &mut Routes,
        experts: &Experts,
    ) -> Result<(), KernelError> {
        let (isa, pool) = (self.isa, &self.pool);
        self.choose(&work.normed, routes, experts)?;
        let mut branch = std::mem::take(&mut work.branch);
        branch.clear();
        branch.resize(work.normed.rows() * work.normed.columns(), 0.0);
        if let Some((mlp, gate)) = &experts.shared {
            routes.shared.resize(work.normed.rows(), 0.0);
            let product = Product::write(gate, None, &mut routes.shared);
            project(isa, pool, &work.normed, &mut [product])?;
            self.gate(work, mlp)?;
            let product = Product::write(&mlp.down.matrix, mlp.down.bias.as_deref(), &mut branch);
            project(isa, pool, &work.gated, &mut [product])?;
            let rows = branch.chunks_exact_mut(work.normed.columns());
            for (row, gate) in rows.zip(&routes.shared) {
                let weight = 1.0 / (1.0 + (-gate).exp());
                for x in row {
                    *x *= weight;
                }
            }
        }
        // In the order of the experts: a row adds up the same numbers in the same order whatever the others choose.
        let mut first = 0;
        while first < experts.matrices.len() {
            let (mut end, mut rows) = (first, 0);
            while end < experts.matrices.len() && (rows == 0 || rows + routes.chosen[end].0.len() <= ROWS) {
                rows += routes.chosen[end].0.len();
                end += 1;
            }
            self.add_some(&work.normed, routes, experts, first..end, &mut branch)?;
            first = end;
        }
        work.branch = branch;
        Ok(())
    }

    /// Scores the experts for each row and notes the likeliest.
    fn choose(&self, x: &Activations, routes: &mut Routes, experts: &Experts) -> Result<(), KernelError> {
        let count = experts.matrices.len();
        routes.scores.resize(x.rows() * count, 0.0);
        let product = Product::write(&experts.router, None, &mut routes.scores);
        project(self.isa, &self.pool, x, &mut [product])?;
        routes.chosen.resize_with(count, Default::default);
        for (rows, weights) in &mut routes.chosen {
            rows.clear();
            weights.clear();
        }
        for (row, scores) in routes.scores.chunks_exact_mut(count).enumerate() {
            softmax(self.isa, scores);
            let chosen = top_k(self.isa, scores, experts.active);
            let total = if experts.normalized {
                chosen.iter().map(|(_, score)| score).sum()
            } else {
                1.0
            };
            for (expert, score) in chosen {
                let (rows, weights) = &mut routes.chosen[expert];
                rows.push(row);
                weights.push(score / total);
            }
        }
        Ok(())
    }

    /// Adds what some of the experts give to the rows that have chosen them.
    fn add_some(
        &self,
        x: &Activations,
        routes: &mut Routes,
        experts: &Experts,
        range: std::ops::Range<usize>,
        out: &mut [f32],
    ) -> Result<(), KernelError> {
        let (isa, pool, columns) = (self.isa, &self.pool, x.columns());
        // Rows are gathered in their order, so that those of prompts come last again.
        let first = x.rows() - x.halves();
        let halves = |rows: &[usize]| rows.len() - rows.partition_point(|row| *row < first);
        let Routes {
            chosen,
            inputs,
            inner,
            ..
        } = routes;
        let some: Vec<_> = experts.matrices[range.clone()]
            .iter()
            .zip(&chosen[range])
            .filter(|(_, (rows, _))| !rows.is_empty())
            .collect();
        if inputs.len() < some.len() {
            inputs.resize_with(some.len(), Activations::new);
            inner.resize_with(some.len(), Activations::new);
        }
        for ((_, (rows, _)), input) in some.iter().zip(inputs.iter_mut()) {
            let gathered = input.resize(rows.len(), columns).chunks_exact_mut(columns);
            for (&row, gathered) in rows.iter().zip(gathered) {
                gathered.copy_from_slice(&x.floats()[row * columns..][..columns]);
            }
            input.prepare_with(isa, pool, self.precision, halves(rows));
        }
        let mut firsts: Vec<Expert<'_>> = some
            .iter()
            .zip(inputs.iter())
            .zip(inner.iter_mut())
            .map(|((([gate, up, _], (rows, _)), x), inner)| {
                let out = inner.resize(rows.len(), gate.rows());
                Expert { x, gate, up, out }
            })
            .collect();
        gated_each(isa, pool, self.gate_function(), &mut firsts)?;
        for ((_, (rows, weights)), inner) in some.iter().zip(inner.iter_mut()) {
            // What a row gives an expert is multiplied in here, where there is less than behind the second half.
            let columns = inner.columns();
            for (row, weight) in inner.floats_mut().chunks_exact_mut(columns).zip(weights) {
                for x in row {
                    *x *= weight;
                }
            }
            inner.prepare_with(isa, pool, self.precision, halves(rows));
        }
        let sums: Vec<ExpertSum<'_>> = some
            .iter()
            .zip(inner.iter())
            .map(|(([_, _, matrix], (rows, _)), x)| ExpertSum { x, matrix, rows })
            .collect();
        sum_experts(isa, pool, &sums, out)
    }
}
