//! The decoder: one implementation for every family.

use mlx_engine_core::LoadProgress;
use mlx_rs::fast::{ScaledDotProductAttentionMask, scaled_dot_product_attention};
use mlx_rs::ops::indexing::IndexOp;
use mlx_rs::{Array, Dtype, nn, ops, transforms};

use crate::cache::{KvCache, Sequence};
use crate::device::{self, DeviceInfo};
use crate::layers::{Linear, Matrix, Norm, Rope};
use crate::names::{Part, Place};
use crate::sampling::log_softmax;
use crate::weights::Loader;
use crate::{DecoderSpec, ModelError, Source};

/// A decoder whose weights are in memory.
#[derive(Debug)]
pub struct Decoder {
    spec: DecoderSpec,
    device: DeviceInfo,
    dtype: Dtype,
    embedding: Matrix,
    blocks: Vec<Block>,
    norm: Norm,
    /// `None` where the logits use the embedding.
    output: Option<Matrix>,
}

#[derive(Debug)]
struct Block {
    attention_norm: Norm,
    attention: Attention,
    mlp_norm: Norm,
    gate: Linear,
    up: Linear,
    down: Linear,
}

#[derive(Debug)]
struct Attention {
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    /// Norms of queries and keys, where the family has them.
    norms: Option<(Norm, Norm)>,
    rope: Rope,
    heads: i32,
    kv_heads: i32,
    head_dim: i32,
}

impl Attention {
    /// `[1, tokens, heads * head_dim]` to `[1, heads, tokens, head_dim]`.
    fn split(&self, x: &Array, heads: i32) -> Result<Array, ModelError> {
        let tokens = x.shape()[1];
        Ok(x.reshape(&[1, tokens, heads, self.head_dim])?)
    }

    fn forward(&self, x: &Array, cache: &mut KvCache, offset: usize) -> Result<Array, ModelError> {
        let tokens = x.shape()[1];
        let mut queries = self.split(&self.query.forward(x)?, self.heads)?;
        let mut keys = self.split(&self.key.forward(x)?, self.kv_heads)?;
        let values = self.split(&self.value.forward(x)?, self.kv_heads)?;
        if let Some((query_norm, key_norm)) = &self.norms {
            queries = query_norm.forward(&queries)?;
            keys = key_norm.forward(&keys)?;
        }
        let heads_first = [0, 2, 1, 3];
        let queries = self
            .rope
            .forward(&queries.transpose_axes(&heads_first)?, offset)?;
        let keys = self.rope.forward(&keys.transpose_axes(&heads_first)?, offset)?;
        let (keys, values) = cache.update(offset, &keys, &values.transpose_axes(&heads_first)?)?;
        let scale = (self.head_dim as f32).sqrt().recip();
        let mask = (tokens > 1).then_some(ScaledDotProductAttentionMask::Causal);
        let attended = scaled_dot_product_attention(queries, keys, values, scale, mask, None)?;
        let attended =
            attended
                .transpose_axes(&heads_first)?
                .reshape(&[1, tokens, self.heads * self.head_dim])?;
        self.output.forward(&attended)
    }
}

impl Block {
    fn forward(&self, x: &Array, cache: &mut KvCache, offset: usize) -> Result<Array, ModelError> {
        let x = ops::add(
            x,
            self.attention
                .forward(&self.attention_norm.forward(x)?, cache, offset)?,
        )?;
        let normed = self.mlp_norm.forward(&x)?;
        let gated = ops::multiply(nn::silu(self.gate.forward(&normed)?)?, self.up.forward(&normed)?)?;
        Ok(ops::add(&x, self.down.forward(&gated)?)?)
    }
}

impl Decoder {
    /// Reads the weights, layer by layer, and tells `progress` of each; an error from it gives the load up.
    ///
    /// # Errors
    ///
    /// Where the checkpoint lacks a tensor, has one that the model does not use or one of the wrong shape, where MLX is
    /// missing or fails, and what `progress` returns.
    pub fn load(
        source: &Source,
        progress: &mut dyn FnMut(LoadProgress) -> Result<(), ModelError>,
    ) -> Result<Self, ModelError> {
        let device = device::detect()?;
        let loader = Loader::new(source, device)?;
        let spec = source.spec().clone();
        let norm = |place, len| -> Result<Norm, ModelError> {
            Ok(Norm {
                weight: loader.vector(place, "weight", len)?,
                eps: spec.norm_eps,
            })
        };
        let total = source.total_bytes();
        progress(LoadProgress::Bytes { done: 0, total })?;
        let embedding = loader.matrix(Place::Embedding, spec.vocab_size, spec.hidden_size)?;
        let output = (!spec.tied_embeddings)
            .then(|| loader.matrix(Place::Output, spec.vocab_size, spec.hidden_size))
            .transpose()?;
        let final_norm = norm(Place::FinalNorm, spec.hidden_size)?;
        transforms::eval(embedding.arrays())?;
        let wavelengths = spec
            .rope
            .wavelengths(spec.head_dim)
            .map(|values| Array::from_slice(&values, &[values.len() as i32]));
        let layers = spec.layers as u32;
        let mut blocks = Vec::with_capacity(spec.layers);
        for layer in 0..spec.layers {
            progress(LoadProgress::Layers {
                done: layer as u32,
                total: layers,
            })?;
            let at = |part| Place::InLayer(layer, part);
            let (q_width, kv_width) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
            let (hidden, wide) = (spec.hidden_size, spec.intermediate_size);
            let norms = if spec.qk_norm {
                Some((
                    norm(at(Part::QueryNorm), spec.head_dim)?,
                    norm(at(Part::KeyNorm), spec.head_dim)?,
                ))
            } else {
                None
            };
            let block = Block {
                attention_norm: norm(at(Part::AttentionNorm), hidden)?,
                attention: Attention {
                    query: loader.linear(at(Part::Query), q_width, hidden, spec.qkv_bias)?,
                    key: loader.linear(at(Part::Key), kv_width, hidden, spec.qkv_bias)?,
                    value: loader.linear(at(Part::Value), kv_width, hidden, spec.qkv_bias)?,
                    output: loader.linear(at(Part::AttentionOutput), hidden, q_width, spec.output_bias)?,
                    norms,
                    rope: Rope {
                        dimensions: spec.head_dim as i32,
                        interleaved: spec.rope.interleaved,
                        theta: spec.rope.theta,
                        scale: spec.rope.scale(),
                        wavelengths: wavelengths.clone(),
                    },
                    heads: spec.heads as i32,
                    kv_heads: spec.kv_heads as i32,
                    head_dim: spec.head_dim as i32,
                },
                mlp_norm: norm(at(Part::MlpNorm), hidden)?,
                gate: loader.linear(at(Part::Gate), wide, hidden, spec.mlp_bias)?,
                up: loader.linear(at(Part::Up), wide, hidden, spec.mlp_bias)?,
                down: loader.linear(at(Part::Down), hidden, wide, spec.mlp_bias)?,
            };
            transforms::eval(block.arrays())?;
            blocks.push(block);
        }
        progress(LoadProgress::Layers {
            done: layers,
            total: layers,
        })?;
        progress(LoadProgress::Bytes { done: total, total })?;
        let (device, dtype) = (loader.device(), loader.dtype);
        Ok(Self {
            spec,
            device,
            dtype,
            embedding,
            blocks,
            norm: final_norm,
            output,
        })
    }

    /// What the decoder looks like.
    pub fn spec(&self) -> &DecoderSpec {
        &self.spec
    }

    /// What it runs on.
    pub fn device(&self) -> DeviceInfo {
        self.device
    }

    /// Bytes of keys and values that a token takes.
    pub fn kv_bytes_per_token(&self) -> usize {
        self.spec
            .kv_bytes_per_token(if self.dtype == Dtype::Float32 { 4 } else { 2 })
    }

    /// A sequence that has seen nothing.
    pub fn sequence(&self) -> Sequence {
        Sequence::new(self.spec.layers)
    }

    /// Feeds tokens and returns the logits after the last, `[1, vocab_size]` float32, not evaluated yet.
    ///
    /// # Errors
    ///
    /// For no tokens, a token out of the vocabulary, and a sequence longer than the context.
    pub fn forward(&self, tokens: &[u32], sequence: &mut Sequence) -> Result<Array, ModelError> {
        let hidden = self.hidden(&self.ids(tokens)?, sequence)?;
        self.logits(&hidden.index((.., -1, ..)))
    }

    /// Feeds tokens and returns the logits after each, `[tokens, vocab_size]` float32, not evaluated yet.
    ///
    /// # Errors
    ///
    /// As [`forward`](Self::forward).
    pub fn forward_all(&self, tokens: &[u32], sequence: &mut Sequence) -> Result<Array, ModelError> {
        let hidden = self.hidden(&self.ids(tokens)?, sequence)?;
        self.logits(&hidden.index((0, .., ..)))
    }

    /// Feeds tokens for their keys and values alone, and waits until those are there.
    ///
    /// # Errors
    ///
    /// As [`forward`](Self::forward), and where MLX fails.
    pub fn prefill(&self, tokens: &[u32], sequence: &mut Sequence) -> Result<(), ModelError> {
        self.hidden(&self.ids(tokens)?, sequence)?;
        Ok(transforms::eval(sequence.arrays())?)
    }

    /// Feeds a token that has not been read yet, an array of one `u32`, and returns the logits after it.
    ///
    /// # Errors
    ///
    /// Where the sequence would be longer than the context.
    pub fn forward_unread(&self, token: &Array, sequence: &mut Sequence) -> Result<Array, ModelError> {
        let hidden = self.hidden(&token.reshape(&[1, 1])?, sequence)?;
        self.logits(&hidden.index((.., -1, ..)))
    }

    /// Feeds tokens and returns the log-probability of each of `next`, which are the tokens that follow each of them.
    ///
    /// # Errors
    ///
    /// As [`forward`](Self::forward), and where MLX fails.
    pub fn score(
        &self,
        tokens: &[u32],
        next: &[u32],
        sequence: &mut Sequence,
    ) -> Result<Vec<f32>, ModelError> {
        let logits = self.forward_all(tokens, sequence)?;
        logits.eval()?;
        let rows = logits.try_as_slice::<f32>()?.chunks_exact(self.spec.vocab_size);
        let vocabulary = self.spec.vocab_size;
        rows.zip(next)
            .map(|(row, &token)| {
                let logprob = log_softmax(row).get(token as usize).copied();
                logprob.ok_or(ModelError::Token { token, vocabulary })
            })
            .collect()
    }

    fn ids(&self, tokens: &[u32]) -> Result<Array, ModelError> {
        if tokens.is_empty() {
            return Err(ModelError::NoTokens);
        }
        // MLX reads rows out of bounds as they come.
        let vocabulary = self.spec.vocab_size;
        if let Some(&token) = tokens.iter().find(|&&token| token as usize >= vocabulary) {
            return Err(ModelError::Token { token, vocabulary });
        }
        Ok(Array::from_slice(tokens, &[1, tokens.len() as i32]))
    }

    /// The residual stream after the last block, `[1, tokens, hidden_size]`.
    fn hidden(&self, ids: &Array, sequence: &mut Sequence) -> Result<Array, ModelError> {
        let tokens = ids.shape()[1] as usize;
        let (end, context_length) = (sequence.offset + tokens, self.spec.context_length);
        if end > context_length {
            return Err(ModelError::ContextExceeded {
                tokens: end,
                context_length,
            });
        }
        let mut x = self.embedding.rows(ids, self.dtype)?;
        for (block, cache) in self.blocks.iter().zip(&mut sequence.layers) {
            x = block.forward(&x, cache, sequence.offset)?;
        }
        sequence.offset = end;
        Ok(x)
    }

    fn logits(&self, hidden: &Array) -> Result<Array, ModelError> {
        let logits = self
            .output
            .as_ref()
            .unwrap_or(&self.embedding)
            .project(&self.norm.forward(hidden)?)?;
        Ok(if logits.dtype() == Dtype::Float32 {
            logits
        } else {
            logits.as_dtype(Dtype::Float32)?
        })
    }
}

impl Block {
    fn arrays(&self) -> Vec<&Array> {
        let attention = &self.attention;
        let linears = [
            &attention.query,
            &attention.key,
            &attention.value,
            &attention.output,
            &self.gate,
            &self.up,
            &self.down,
        ];
        let mut arrays: Vec<&Array> = linears.iter().flat_map(|linear| linear.matrix.arrays()).collect();
        arrays.extend(linears.iter().filter_map(|linear| linear.bias.as_ref()));
        arrays.extend([&self.attention_norm.weight, &self.mlp_norm.weight]);
        arrays
    }
}
