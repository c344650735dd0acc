//! One step of a decoder.

use mlx_engine_kernels::{
    Activations, AttentionSpec, Gate, KernelError, Matrix, Product, Queries, Reading, RopeLayout, Rotation,
    attend, gated, project, rms_norm, rotate,
};

use super::cache::{PagePlan, Pages};
use super::experts::Routes;
use super::faults::Faults;
use super::{Block, FeedForward, Linear, Mlp, Model};
use crate::memory::Held;
use crate::spec::Activation;

/// Rows up to which a step waits for its weights rather than for arithmetic.
const FEW_ROWS: usize = 8;

/// The rows of a step that belong to one sequence.
pub(super) struct Part<'a> {
    /// The sequence's keys and values, which grow with it.
    pub(super) pages: &'a mut Pages,
    /// What went wrong in its steps.
    pub(super) faults: &'a Faults,
    /// Positions before the first row.
    pub(super) position: usize,
    /// Tokens that are fed.
    pub(super) rows: usize,
    /// How many of the last of them give logits.
    pub(super) wanted: usize,
    /// Whether they are of a prompt.
    pub(super) prompt: bool,
}

impl Part<'_> {
    /// Whether the positions before the first row are there.
    pub(super) fn is_sound(&self) -> bool {
        self.faults.below(self.position).is_none()
    }
}

/// Memory that a step needs and the next one uses again.
#[derive(Debug, Default)]
pub(super) struct Workspace {
    /// The residual stream, `[rows, hidden_size]`.
    x: Vec<f32>,
    /// How many of the last rows are of prompts.
    prompts: usize,
    pub(super) normed: Activations,
    queries: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    /// What a norm reads while it writes where that was.
    heads: Vec<f32>,
    /// What attention or MLP add to the residual stream, where it is not added at once.
    pub(super) branch: Vec<f32>,
    attended: Activations,
    pub(super) gated: Activations,
    pub(super) routes: Routes,
    held: Held,
}

impl Workspace {
    /// Counts the memory that is reserved.
    pub(super) fn count(&mut self) {
        let floats = [
            &self.x,
            &self.queries,
            &self.keys,
            &self.values,
            &self.heads,
            &self.branch,
        ];
        let floats: usize = floats
            .iter()
            .map(|floats| floats.capacity() * size_of::<f32>())
            .sum();
        let activations = [&self.normed, &self.attended, &self.gated];
        let activations = activations.iter().map(|x| x.bytes()).sum::<usize>();
        self.held.set(floats + activations + self.routes.bytes());
    }
}

impl Model {
    /// Feeds the tokens of all parts, one after the other in `ids`, and writes the logits of the rows that each part wants.
    pub(super) fn forward(
        &self,
        work: &mut Workspace,
        plan: &PagePlan,
        ids: &[u32],
        parts: &mut [Part<'_>],
        logits: &mut [f32],
    ) -> Result<(), KernelError> {
        let spec = &self.spec;
        let hidden = spec.hidden_size;
        work.x.resize(ids.len() * hidden, 0.0);
        for (id, row) in ids.iter().zip(work.x.chunks_exact_mut(hidden)) {
            self.embedding.row(*id as usize, row)?;
            if spec.embedding_scale != 1.0 {
                for x in row {
                    *x *= spec.embedding_scale;
                }
            }
        }
        let prompts = parts.iter().rev().take_while(|part| part.prompt);
        work.prompts = prompts.map(|part| part.rows).sum();
        for part in parts.iter_mut() {
            part.pages.make_room(plan, part.position, part.rows)?;
        }
        let rotations = self.rotations(parts);
        for (layer, block) in self.blocks.iter().enumerate() {
            let rotations = rotations[spec.attention_kind(layer)].as_deref();
            self.attention(work, plan, block, layer, parts, rotations)?;
            self.feed_forward(work, block, self.blocks.get(layer + 1))?;
        }
        let wanted = parts.iter().map(|part| part.wanted).sum();
        if wanted == 0 {
            return Ok(());
        }
        let mut normed = work.normed.resize(wanted, hidden).chunks_exact_mut(hidden);
        let mut rows = work.x.chunks_exact(hidden);
        for part in parts.iter() {
            let own = rows.by_ref().take(part.rows).skip(part.rows - part.wanted);
            for (row, out) in own.zip(&mut normed) {
                rms_norm(self.isa, &self.pool, row, &self.norm, spec.norm_eps, out)?;
            }
        }
        // Of a prompt its last row alone, which is no work for a unit that multiplies matrices.
        work.normed.prepare(self.isa, &self.pool, self.precision);
        let output = self.output.as_ref().unwrap_or(&self.embedding);
        let product = Product::write(output, None, logits);
        project(self.isa, &self.pool, &work.normed, &mut [product])?;
        if spec.logit_scale != 1.0 {
            for logit in logits.iter_mut() {
                *logit *= spec.logit_scale;
            }
        }
        if let Some(cap) = spec.logit_softcap {
            for logit in logits {
                *logit = cap * (*logit / cap).tanh();
            }
        }
        Ok(())
    }

    /// For each kind of attention, where it rotates, the rotations of all rows.
    fn rotations(&self, parts: &[Part<'_>]) -> Vec<Option<Vec<Rotation>>> {
        let kinds = self.spec.attention.iter().zip(&self.wavelengths);
        kinds
            .map(|(attention, wavelengths)| {
                let (rope, wavelengths) = attention.rope.as_ref().zip(wavelengths.as_ref())?;
                let positions = parts
                    .iter()
                    .flat_map(|part| part.position..part.position + part.rows);
                Some(
                    positions
                        .map(|position| Rotation::new(position as f32 * rope.scale(), wavelengths))
                        .collect(),
                )
            })
            .collect()
    }

    /// What attention or MLP read of the residual stream.
    pub(super) fn enter(&self, work: &mut Workspace, norm: Option<&[f32]>) -> Result<(), KernelError> {
        let (isa, pool, hidden) = (self.isa, &self.pool, self.spec.hidden_size);
        let out = work.normed.resize(work.x.len() / hidden, hidden);
        match norm {
            Some(norm) => rms_norm(isa, pool, &work.x, norm, self.spec.norm_eps, out)?,
            None => out.copy_from_slice(&work.x),
        }
        work.normed.prepare_with(isa, pool, self.precision, work.prompts);
        Ok(())
    }

    /// Adds what attention or MLP have computed to the residual stream.
    fn leave(
        &self,
        work: &mut Workspace,
        from: fn(&Workspace) -> &Activations,
        linear: &Linear,
        norm: Option<&[f32]>,
    ) -> Result<(), KernelError> {
        let (isa, pool, scale) = (self.isa, &self.pool, self.spec.residual_scale);
        let bias = linear.bias.as_deref();
        let mut x = std::mem::take(&mut work.x);
        if norm.is_none() && scale == 1.0 {
            let product = Product::add(&linear.matrix, bias, &mut x);
            project(isa, pool, from(work), &mut [product])?;
            work.x = x;
            return Ok(());
        }
        let mut branch = std::mem::take(&mut work.branch);
        branch.resize(x.len(), 0.0);
        let product = Product::write(&linear.matrix, bias, &mut branch);
        project(isa, pool, from(work), &mut [product])?;
        (work.x, work.branch) = (x, branch);
        self.add_branch(work, norm)
    }

    /// Adds the branch to the residual stream.
    pub(super) fn add_branch(&self, work: &mut Workspace, norm: Option<&[f32]>) -> Result<(), KernelError> {
        if let Some(norm) = norm {
            work.heads.clone_from(&work.branch);
            let (isa, eps) = (self.isa, self.spec.norm_eps);
            rms_norm(isa, &self.pool, &work.heads, norm, eps, &mut work.branch)?;
        }
        for (x, add) in work.x.iter_mut().zip(&work.branch) {
            *x += self.spec.residual_scale * add;
        }
        Ok(())
    }

    /// Tells the threads which weights are multiplied next, where there are so few rows that weights are waited for.
    fn announce<const N: usize>(&self, rows: usize, matrices: [&Matrix; N]) {
        if rows <= FEW_ROWS {
            self.pool.announce(Reading::InTurn(&matrices.map(Matrix::memory)));
        }
    }

    /// As [`announce`](Self::announce), of matrices that are gone through side by side.
    fn announce_together<const N: usize>(&self, rows: usize, matrices: [&Matrix; N]) {
        if rows <= FEW_ROWS {
            self.pool
                .announce(Reading::Together(&matrices.map(Matrix::memory)));
        }
    }

    /// Adds a block's attention to the residual stream.
    fn attention(
        &self,
        work: &mut Workspace,
        plan: &PagePlan,
        block: &Block,
        layer: usize,
        parts: &mut [Part<'_>],
        rotations: Option<&[Rotation]>,
    ) -> Result<(), KernelError> {
        let (spec, isa, pool) = (&self.spec, self.isa, &self.pool);
        let rows = work.x.len() / spec.hidden_size;
        let (q_width, kv_width) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        self.enter(work, block.attention_norm.as_deref())?;
        work.queries.resize(rows * q_width, 0.0);
        work.keys.resize(rows * kv_width, 0.0);
        work.values.resize(rows * kv_width, 0.0);
        let [query, key, value] = [&block.query, &block.key, &block.value];
        let products = &mut [
            Product::write(&query.matrix, query.bias.as_deref(), &mut work.queries),
            Product::write(&key.matrix, key.bias.as_deref(), &mut work.keys),
            Product::write(&value.matrix, value.bias.as_deref(), &mut work.values),
        ];
        let place = plan.kv.places[layer];
        if rows <= FEW_ROWS {
            for part in &*parts {
                let positions = part.position..part.position + part.rows;
                positions.for_each(|position| part.pages.will_write(place, position));
            }
        }
        self.announce(rows, [&block.attention_output.matrix]);
        project(isa, pool, &work.normed, products)?;
        if let Some((query_norm, key_norm)) = &block.head_norms {
            for (x, weight) in [(&mut work.queries, query_norm), (&mut work.keys, key_norm)] {
                work.heads.clone_from(x);
                rms_norm(isa, pool, &work.heads, weight, spec.norm_eps, x)?;
            }
        }
        let kind = spec.attention_of(layer);
        if let Some((rope, rotations)) = kind.rope.as_ref().zip(rotations) {
            let rope = if rope.interleaved {
                RopeLayout::Interleaved
            } else {
                RopeLayout::Halves
            };
            rotate(isa, pool, rope, rotations, spec.head_dim, &mut work.queries)?;
            rotate(isa, pool, rope, rotations, spec.head_dim, &mut work.keys)?;
        }

        let mut kv = work
            .keys
            .chunks_exact(kv_width)
            .zip(work.values.chunks_exact(kv_width));
        for part in parts.iter_mut() {
            for (position, (keys, values)) in (part.position..part.position + part.rows).zip(&mut kv) {
                part.pages.write(place, position, keys, values)?;
            }
        }
        let pages: Vec<_> = parts
            .iter()
            .map(|part| part.pages.layer(place, part.position + part.rows))
            .collect::<Result<_, _>>()?;
        let mut first = 0;
        let mut sequences = Vec::with_capacity(parts.len());
        for (part, pages) in parts.iter().zip(&pages) {
            sequences.push(Queries {
                pages,
                position: part.position,
                first,
                rows: part.rows,
            });
            first += part.rows;
        }
        let rule = &plan.kv.rules[place.0];
        let attention = AttentionSpec {
            layout: plan.layout(),
            heads: spec.heads,
            scale: spec.attention_scale,
            softcap: spec.attention_softcap,
            window: rule.window,
            keep: rule.keep,
        };
        let attended = work.attended.resize(rows, q_width);
        attend(isa, pool, attention, &work.queries, &sequences, attended)?;
        work.attended
            .prepare_with(isa, pool, self.precision, work.prompts);
        if let FeedForward::Mlp(mlp) = &block.feed_forward {
            self.announce_together(rows, [&mlp.gate.matrix, &mlp.up.matrix]);
        }
        let norm = block.post_attention_norm.as_deref();
        self.leave(work, |work| &work.attended, &block.attention_output, norm)
    }

    /// Adds a block's MLP, or its experts, to the residual stream.
    fn feed_forward(
        &self,
        work: &mut Workspace,
        block: &Block,
        next: Option<&Block>,
    ) -> Result<(), KernelError> {
        match &block.feed_forward {
            FeedForward::Mlp(mlp) => self.mlp(work, block, mlp, next),
            FeedForward::Experts(experts) => self.experts(work, block, experts),
        }
    }

    /// Adds a block's MLP to the residual stream.
    fn mlp(
        &self,
        work: &mut Workspace,
        block: &Block,
        mlp: &Mlp,
        next: Option<&Block>,
    ) -> Result<(), KernelError> {
        self.enter(work, block.mlp_norm.as_deref())?;
        let rows = work.normed.rows();
        self.announce(rows, [&mlp.down.matrix]);
        self.gate(work, mlp)?;
        match next {
            Some(next) => {
                let linears = [&next.query, &next.key, &next.value];
                self.announce(rows, linears.map(|linear| &linear.matrix));
            }
            None => self.announce(rows, [self.output.as_ref().unwrap_or(&self.embedding)]),
        }
        let norm = block.post_mlp_norm.as_deref();
        self.leave(work, |work| &work.gated, &mlp.down, norm)
    }

    /// The first half of an MLP.
    pub(super) fn gate(&self, work: &mut Workspace, mlp: &Mlp) -> Result<(), KernelError> {
        let (isa, pool) = (self.isa, &self.pool);
        let [gate, up] = [&mlp.gate, &mlp.up];
        let out = work.gated.resize(work.normed.rows(), gate.matrix.rows());
        let biases = [gate.bias.as_deref(), up.bias.as_deref()];
        let matrices = [&gate.matrix, &up.matrix];
        gated(
            isa,
            pool,
            &work.normed,
            self.gate_function(),
            matrices,
            biases,
            out,
        )?;
        work.gated.prepare_with(isa, pool, self.precision, work.prompts);
        Ok(())
    }

    pub(super) fn gate_function(&self) -> Gate {
        match self.spec.activation {
            Activation::Silu => Gate::Silu,
            Activation::GeluTanh => Gate::GeluTanh,
        }
    }
}
