//! One step of a decoder.

use std::sync::Arc;

use mlx_engine_kernels::{
    Activations, AttentionSpec, Gate, KernelError, KvElement, PAGE, Product, Queries, RopeLayout, Rotation,
    attend, gated, project, rms_norm, rotate,
};

use super::cache::{Page, layout, make_room};
use super::{Block, Model};
use crate::memory::Held;

/// The rows of a step that belong to one sequence.
pub(super) struct Part<'a, E> {
    /// The sequence's keys and values, which grow with it.
    pub(super) pages: &'a mut Vec<Arc<Page<E>>>,
    /// Positions before the first row.
    pub(super) position: usize,
    /// Tokens that are fed.
    pub(super) rows: usize,
    /// How many of the last of them give logits.
    pub(super) wanted: usize,
}

/// Memory that a step needs and the next one uses again.
#[derive(Debug, Default)]
pub(super) struct Workspace {
    /// The residual stream, `[rows, hidden_size]`.
    x: Vec<f32>,
    normed: Activations,
    queries: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    /// What a norm reads while it writes queries or keys.
    heads: Vec<f32>,
    attended: Activations,
    gated: Activations,
    held: Held,
}

impl Workspace {
    /// Counts the memory that is reserved.
    pub(super) fn count(&mut self) {
        let floats = [&self.x, &self.queries, &self.keys, &self.values, &self.heads];
        let floats: usize = floats
            .iter()
            .map(|floats| floats.capacity() * size_of::<f32>())
            .sum();
        let activations = [&self.normed, &self.attended, &self.gated];
        self.held
            .set(floats + activations.iter().map(|x| x.bytes()).sum::<usize>());
    }
}

impl Model {
    /// Feeds the tokens of all parts, one after the other in `ids`, and writes the logits of the rows that each part wants.
    pub(super) fn forward<E: KvElement>(
        &self,
        work: &mut Workspace,
        ids: &[u32],
        parts: &mut [Part<'_, E>],
        logits: &mut [f32],
    ) -> Result<(), KernelError> {
        let spec = &self.spec;
        let hidden = spec.hidden_size;
        work.x.resize(ids.len() * hidden, 0.0);
        for (id, row) in ids.iter().zip(work.x.chunks_exact_mut(hidden)) {
            self.embedding.row(*id as usize, row)?;
        }
        let mut rotations = Vec::with_capacity(ids.len());
        for part in parts.iter_mut() {
            make_room(part.pages, spec, part.position, part.rows);
            let positions = part.position..part.position + part.rows;
            rotations
                .extend(positions.map(|p| Rotation::new(p as f32 * spec.rope.scale(), &self.wavelengths)));
        }
        for (layer, block) in self.blocks.iter().enumerate() {
            self.attention(work, block, layer, parts, &rotations)?;
            self.mlp(work, block)?;
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
        work.normed.prepare(self.isa, &self.pool, self.precision);
        let output = self.output.as_ref().unwrap_or(&self.embedding);
        let product = Product::write(output, None, logits);
        project(self.isa, &self.pool, &work.normed, &mut [product])
    }

    /// Adds a block's attention to the residual stream.
    fn attention<E: KvElement>(
        &self,
        work: &mut Workspace,
        block: &Block,
        layer: usize,
        parts: &mut [Part<'_, E>],
        rotations: &[Rotation],
    ) -> Result<(), KernelError> {
        let (spec, isa, pool) = (&self.spec, self.isa, &self.pool);
        let rows = rotations.len();
        let (q_width, kv_width) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        let normed = work.normed.resize(rows, spec.hidden_size);
        rms_norm(isa, pool, &work.x, &block.attention_norm, spec.norm_eps, normed)?;
        work.normed.prepare(isa, pool, self.precision);
        work.queries.resize(rows * q_width, 0.0);
        work.keys.resize(rows * kv_width, 0.0);
        work.values.resize(rows * kv_width, 0.0);
        let [query, key, value] = [&block.query, &block.key, &block.value];
        let products = &mut [
            Product::write(&query.matrix, query.bias.as_deref(), &mut work.queries),
            Product::write(&key.matrix, key.bias.as_deref(), &mut work.keys),
            Product::write(&value.matrix, value.bias.as_deref(), &mut work.values),
        ];
        project(isa, pool, &work.normed, products)?;
        if let Some((query_norm, key_norm)) = &block.head_norms {
            for (x, weight) in [(&mut work.queries, query_norm), (&mut work.keys, key_norm)] {
                work.heads.clone_from(x);
                rms_norm(isa, pool, &work.heads, weight, spec.norm_eps, x)?;
            }
        }
        let rope = if spec.rope.interleaved {
            RopeLayout::Interleaved
        } else {
            RopeLayout::Halves
        };
        rotate(isa, pool, rope, rotations, spec.head_dim, &mut work.queries)?;
        rotate(isa, pool, rope, rotations, spec.head_dim, &mut work.keys)?;

        let layout = layout(spec);
        let own = layer * layout.page_len()..(layer + 1) * layout.page_len();
        let mut kv = work
            .keys
            .chunks_exact(kv_width)
            .zip(work.values.chunks_exact(kv_width));
        for part in parts.iter_mut() {
            for (position, (keys, values)) in (part.position..part.position + part.rows).zip(&mut kv) {
                let page = Arc::make_mut(&mut part.pages[position / PAGE]);
                layout.write(&mut page.elements[own.clone()], position % PAGE, keys, values)?;
            }
        }
        let pages: Vec<Vec<&[E]>> = parts
            .iter()
            .map(|part| {
                let used = (part.position + part.rows).div_ceil(PAGE);
                part.pages[..used]
                    .iter()
                    .map(|page| &page.elements[own.clone()])
                    .collect()
            })
            .collect();
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
        let attention = AttentionSpec {
            layout,
            heads: spec.heads,
            scale: (spec.head_dim as f32).sqrt().recip(),
            window: None,
        };
        let attended = work.attended.resize(rows, q_width);
        attend(isa, pool, attention, &work.queries, &sequences, attended)?;
        work.attended.prepare(isa, pool, self.precision);
        let output = &block.attention_output;
        let product = Product::add(&output.matrix, output.bias.as_deref(), &mut work.x);
        project(isa, pool, &work.attended, &mut [product])
    }

    /// Adds a block's MLP to the residual stream.
    fn mlp(&self, work: &mut Workspace, block: &Block) -> Result<(), KernelError> {
        let (spec, isa, pool) = (&self.spec, self.isa, &self.pool);
        let rows = work.x.len() / spec.hidden_size;
        let normed = work.normed.resize(rows, spec.hidden_size);
        rms_norm(isa, pool, &work.x, &block.mlp_norm, spec.norm_eps, normed)?;
        work.normed.prepare(isa, pool, self.precision);
        let [gate, up, down] = [&block.gate, &block.up, &block.down];
        let out = work.gated.resize(rows, spec.intermediate_size);
        let biases = [gate.bias.as_deref(), up.bias.as_deref()];
        gated(
            isa,
            pool,
            &work.normed,
            Gate::Silu,
            [&gate.matrix, &up.matrix],
            biases,
            out,
        )?;
        work.gated.prepare(isa, pool, self.precision);
        let product = Product::add(&down.matrix, down.bias.as_deref(), &mut work.x);
        project(isa, pool, &work.gated, &mut [product])
    }
}
