//! The decoder: one implementation for every family, and the one place that decides where it runs.

use std::fmt;
use std::sync::Arc;

use mlx_engine_core::{Device, KvConfig, LoadProgress};
use mlx_rs::ops::indexing::TryIndexOp;
use mlx_rs::{Array, ops};

use crate::device::{self, DeviceInfo};
use crate::graph::{GraphDecoder, GraphRows, KvCache};
use crate::host::{HostCache, HostDecoder, HostRows, Precision};
use crate::kv::KvPlan;
use crate::sampling::log_softmax;
use crate::sequence::{Cache, Sequence};
use crate::weights::Loader;
use crate::{DecoderSpec, ModelError, Source, graph};

/// What computes a decoder.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Compute {
    /// Our kernels on a CPU, with activations as 8-bit integers and keys and values in float16; MLX's operations on a GPU.
    #[default]
    Fastest,
    /// Our kernels on a CPU, all in float32; MLX's operations on a GPU.
    Exact,
    /// MLX's operations, on a CPU too, where they are slow.
    Mlx,
}

/// How a decoder is loaded. A [`Compute`] alone leaves the rest to the defaults.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct LoadOptions {
    /// What computes.
    pub compute: Compute,
    /// Threads of our kernels, the calling one included; one for each physical core where `None`. A GPU and MLX's own
    /// operations, which have one thread on a CPU, do not ask.
    pub threads: Option<usize>,
}

impl From<Compute> for LoadOptions {
    fn from(compute: Compute) -> Self {
        Self {
            compute,
            ..Self::default()
        }
    }
}

impl Compute {
    /// The name, as options spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fastest => "fastest",
            Self::Exact => "exact",
            Self::Mlx => "mlx",
        }
    }
}

impl fmt::Display for Compute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The token that a sequence is fed next.
#[derive(Clone, Debug)]
pub enum NextToken {
    /// One that is known.
    Read(u32),
    /// One that is being chosen: an array of one `u32`.
    Unread(Array),
}

/// The tokens that a step feeds to one sequence, and the logits that it gives for them.
#[derive(Clone, Debug)]
pub struct Feed<'a> {
    /// The tokens, one at least.
    pub tokens: FeedTokens<'a>,
    /// After which of them logits are wanted.
    pub logits: Wanted,
    /// Whether they are of a prompt rather than of an answer. Where the processor multiplies matrices of bfloat16, it does so for the
    /// tokens of prompts, however many there are: several times as fast, with another rounding. It changes nothing elsewhere.
    pub prompt: bool,
}

/// The tokens of a sequence in a step.
#[derive(Clone, Copy)]
struct Rows {
    /// How many.
    fed: usize,
    /// After how many of the last of them logits are wanted.
    wanted: usize,
    prompt: bool,
}

/// Tokens that may still be being chosen.
#[derive(Clone, Debug)]
pub enum FeedTokens<'a> {
    /// Some that are known.
    Read(&'a [u32]),
    /// Some that are being chosen: an array of `u32`.
    Unread(Array),
}

/// After which of the tokens that are fed logits are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Wanted {
    /// After none.
    None,
    /// After the last.
    Last,
    /// After each.
    All,
}

impl Wanted {
    /// The number of rows of logits for this many tokens.
    fn rows(self, tokens: usize) -> usize {
        match self {
            Self::None => 0,
            Self::Last => tokens.min(1),
            Self::All => tokens,
        }
    }
}

/// A decoder whose weights are in memory.
#[derive(Debug)]
pub struct Decoder {
    spec: DecoderSpec,
    device: DeviceInfo,
    pub(crate) body: Body,
    pub(crate) kv: KvConfig,
    pub(crate) plan: Arc<KvPlan>,
}

/// What the kernels of a CPU compute with; `None` where MLX computes.
fn precision(device: Device, compute: Compute) -> Option<Precision> {
    match (device, compute) {
        (Device::Cpu, Compute::Fastest) => Some(Precision::Integer),
        (Device::Cpu, Compute::Exact) => Some(Precision::Exact),
        _ => None,
    }
}

/// What a decoder is going to take, from its files' headers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DecoderBytes {
    /// Bytes of the weights, as they are in memory.
    pub weights: u64,
    /// Bytes of keys and values that the first tokens take each; later ones take less where they are integers or a window
    /// forgets.
    pub kv_per_token: u64,
    /// What of that is of layers that forget, by what they keep. Where there are any, sequences cannot be cut anywhere.
    pub windows: Vec<KvWindow>,
}

/// Keys and values of layers that do not keep all positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvWindow {
    /// Bytes that a position takes in all these layers.
    pub bytes_per_token: u64,
    /// Positions that they keep, beside those of the step that was taken last.
    pub positions: usize,
}

impl DecoderBytes {
    /// Finds it out for a decoder that is to be loaded so, and to keep keys and values so.
    ///
    /// # Errors
    ///
    /// Where MLX could not be opened, and what [`Decoder::with_kv`] refuses.
    pub fn of(source: &Source, compute: Compute, kv: &KvConfig) -> Result<Self, ModelError> {
        let precision = precision(device::detect()?.device, compute);
        let spec = source.spec();
        let plan = KvPlan::new(spec, kv)?;
        if precision.is_none() {
            plan.check_for_graph()?;
        }
        let per_token = |plan: KvPlan| match precision {
            Some(precision) => crate::host::kv_bytes_per_token(spec, plan, precision) as u64,
            // Float16 and bfloat16 in all cases but one.
            None => plan.graph_bytes(spec, 2, [1, 1, 1]) as u64,
        };
        let windows = plan.rules.iter().enumerate().filter_map(|(kind, rule)| {
            Some(KvWindow {
                positions: rule.window? + rule.keep + crate::kv::SLACK,
                bytes_per_token: per_token(plan.of_kind(kind)),
            })
        });
        Ok(Self {
            weights: crate::weights::loaded_bytes(source, precision),
            windows: windows.filter(|window| window.bytes_per_token > 0).collect(),
            kv_per_token: per_token(plan.clone()),
        })
    }
}

impl Drop for Decoder {
    fn drop(&mut self) {
        device::settle();
    }
}

#[derive(Debug)]
pub(crate) enum Body {
    Graph(GraphDecoder),
    Host(HostDecoder),
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
        options: impl Into<LoadOptions>,
        progress: &mut dyn FnMut(LoadProgress) -> Result<(), ModelError>,
    ) -> Result<Self, ModelError> {
        let LoadOptions { compute, threads } = options.into();
        let device = device::detect()?;
        let loader = Loader::new(source)?;
        let spec = source.spec().clone();
        let total = source.total_bytes();
        progress(LoadProgress::Bytes { done: 0, total })?;
        let precision = precision(device.device, compute);
        let kv = KvConfig::default();
        let plan = Arc::new(KvPlan::new(&spec, &kv)?);
        let body = match precision {
            Some(precision) => {
                let plan = (*plan).clone();
                let host = HostDecoder::load(&spec, &loader, precision, threads, plan, progress)?;
                Body::Host(host)
            }
            None => Body::Graph(GraphDecoder::load(&spec, &loader, device, progress)?),
        };
        let layers = spec.layers as u32;
        progress(LoadProgress::Layers {
            done: layers,
            total: layers,
        })?;
        progress(LoadProgress::Bytes { done: total, total })?;
        Ok(Self {
            spec,
            device,
            body,
            kv,
            plan,
        })
    }

    /// Keeps keys and values otherwise than all of them as floats.
    ///
    /// # Errors
    ///
    /// For what [`KvConfig::validate`] refuses, for groups that do not make whole heads, and, with MLX's operations, for
    /// integers beside layers that see a window.
    pub fn with_kv(mut self, config: &KvConfig) -> Result<Self, ModelError> {
        let plan = KvPlan::new(&self.spec, config)?;
        match &mut self.body {
            Body::Host(host) => host.keep(plan.clone()),
            Body::Graph(_) => plan.check_for_graph()?,
        }
        self.plan = Arc::new(plan);
        self.kv = config.clone();
        Ok(self)
    }

    /// Whether sequences can be forked and truncated anywhere, and not only near their end.
    pub fn forks_anywhere(&self) -> bool {
        self.plan.rules.iter().all(|rule| rule.window.is_none())
    }

    /// Whether a sequence of which a step has failed can be cut to what there was before and go on. On a CPU it can: keys and
    /// values have their places. Of MLX's graph an array that has failed is a part of those that follow.
    pub fn outlives_failed_steps(&self) -> bool {
        matches!(self.body, Body::Host(_))
    }

    /// What the decoder looks like.
    pub fn spec(&self) -> &DecoderSpec {
        &self.spec
    }

    /// What it runs on.
    pub fn device(&self) -> DeviceInfo {
        self.device
    }

    /// Bytes of keys and values that a token takes, while all are kept.
    pub fn kv_bytes_per_token(&self) -> usize {
        match &self.body {
            Body::Graph(graph) => self
                .plan
                .graph_bytes(&self.spec, graph.kv_element_bytes(), [1, 1, 1]),
            Body::Host(host) => host.kv_bytes_per_token(),
        }
    }

    /// How many of the first `len` tokens a fork at that length goes on sharing whatever either of the two is fed: those
    /// in pages that are full. MLX's graph shares none for long.
    pub fn shared_tokens(&self, len: usize) -> usize {
        match &self.body {
            Body::Graph(_) => 0,
            Body::Host(_) => len / crate::host::PAGE * crate::host::PAGE,
        }
    }

    /// Bytes of keys and values of a sequence of `tokens` that is fed at most `step` of them at once, with what is
    /// reserved.
    pub fn kv_bytes(&self, tokens: usize, step: usize) -> usize {
        match &self.body {
            Body::Graph(graph) => {
                let bytes = graph.kv_element_bytes();
                self.plan
                    .graph_bytes(&self.spec, bytes, [tokens, step, graph::BLOCK])
            }
            Body::Host(host) => host.pages.bytes(tokens, step.max(1)),
        }
    }

    /// A sequence that has seen nothing.
    pub fn sequence(&self) -> Sequence {
        Sequence {
            cache: match &self.body {
                Body::Graph(_) => Cache::Graph((0..self.spec.layers).map(|_| KvCache::default()).collect()),
                Body::Host(_) => Cache::Host(HostCache::new()),
            },
            offset: 0,
            released: vec![0; self.plan.rules.len()],
            plan: Arc::clone(&self.plan),
        }
    }

    /// Feeds tokens and returns the logits after the last, `[1, vocab_size]` float32, not evaluated yet. Whether they could be
    /// computed [`Sequence::check`] tells once they are.
    ///
    /// # Errors
    ///
    /// For no tokens, a token out of the vocabulary, and a sequence longer than the context.
    pub fn forward(&self, tokens: &[u32], sequence: &mut Sequence) -> Result<Array, ModelError> {
        self.logits(&self.ids(tokens)?, sequence, Wanted::Last)
    }

    /// Feeds tokens and returns the logits after each, `[tokens, vocab_size]` float32, not evaluated yet.
    ///
    /// # Errors
    ///
    /// As [`forward`](Self::forward).
    pub fn forward_all(&self, tokens: &[u32], sequence: &mut Sequence) -> Result<Array, ModelError> {
        self.logits(&self.ids(tokens)?, sequence, Wanted::All)
    }

    /// Feeds tokens of a prompt for their keys and values alone, and waits until those are there.
    ///
    /// # Errors
    ///
    /// As [`forward`](Self::forward), and where MLX fails.
    pub fn prefill(&self, tokens: &[u32], sequence: &mut Sequence) -> Result<(), ModelError> {
        self.feed(&self.ids(tokens)?, sequence, Wanted::None, true)?;
        sequence.wait()
    }

    /// Feeds a token that has not been read yet, an array of one `u32`, and returns the logits after it.
    ///
    /// # Errors
    ///
    /// Where the sequence would be longer than the context.
    pub fn forward_unread(&self, token: &Array, sequence: &mut Sequence) -> Result<Array, ModelError> {
        self.logits(token, sequence, Wanted::Last)
    }

    /// Feeds one token to each of several sequences in one step, and returns the logits after each, `[1, vocab_size]`
    /// float32, not evaluated yet. On a CPU each gets the bits that it gets alone.
    ///
    /// # Errors
    ///
    /// As [`step`](Self::step).
    pub fn forward_batch(
        &self,
        tokens: &[NextToken],
        sequences: &mut [&mut Sequence],
    ) -> Result<Vec<Array>, ModelError> {
        let feeds: Vec<Feed<'_>> = tokens
            .iter()
            .map(|token| Feed {
                tokens: match token {
                    NextToken::Read(token) => FeedTokens::Read(std::slice::from_ref(token)),
                    NextToken::Unread(token) => FeedTokens::Unread(token.clone()),
                },
                logits: Wanted::Last,
                prompt: false,
            })
            .collect();
        Ok(self.step(&feeds, sequences)?.into_iter().flatten().collect())
    }

    /// Feeds any number of tokens to each of several sequences in one step, and returns the logits that each wants,
    /// `[rows, vocab_size]` float32, not evaluated yet. On a CPU each sequence gets the bits that it gets alone. Where a
    /// sequence wants none, the step is run when one of the others is, or by [`Sequence::wait`].
    ///
    /// A step of some guessed tokens with all their logits is how a guess is verified; what was wrong is given up by
    /// [`Sequence::truncate`].
    ///
    /// # Errors
    ///
    /// Where there are not as many feeds as sequences, and as [`forward`](Self::forward); then no sequence was fed.
    pub fn step(
        &self,
        feeds: &[Feed<'_>],
        sequences: &mut [&mut Sequence],
    ) -> Result<Vec<Option<Array>>, ModelError> {
        if feeds.is_empty() || feeds.len() != sequences.len() {
            return Err(ModelError::NoTokens);
        }
        // Those of prompts come last: they may be computed in another way.
        let mut fed: Vec<_> = feeds.iter().zip(sequences.iter_mut()).enumerate().collect();
        fed.sort_by_key(|(_, (feed, _))| feed.prompt);
        let ids: Vec<Array> = fed
            .iter()
            .map(|(_, (feed, _))| match &feed.tokens {
                FeedTokens::Read(tokens) => self.ids(tokens),
                FeedTokens::Unread(tokens) if tokens.size() == 0 => Err(ModelError::NoTokens),
                FeedTokens::Unread(tokens) => Ok(tokens.reshape(&[-1])?),
            })
            .collect::<Result<_, _>>()?;
        let rows: Vec<Rows> = ids
            .iter()
            .zip(&fed)
            .map(|(ids, (_, (feed, _)))| Rows {
                fed: ids.size(),
                wanted: feed.logits.rows(ids.size()),
                prompt: feed.prompt,
            })
            .collect();
        let all = match &ids[..] {
            [one] => one.clone(),
            several => ops::concatenate(&several.iter().collect::<Vec<_>>(), 0)?,
        };
        let (places, mut sequences): (Vec<_>, Vec<_>) = fed
            .into_iter()
            .map(|(place, (_, sequence))| (place, &mut **sequence))
            .unzip();
        let logits = self.run(&all, &mut sequences, &rows)?;
        let mut found = vec![None; places.len()];
        let mut first = 0;
        for (place, Rows { wanted, .. }) in places.into_iter().zip(rows) {
            let own = first..first + wanted as i32;
            first = own.end;
            if let Some(logits) = logits.as_ref().filter(|_| wanted > 0) {
                found[place] = Some(logits.try_index((own, ..))?);
            }
        }
        Ok(found)
    }

    /// Feeds ids, those of one sequence after those of another, prompts last.
    fn run(
        &self,
        ids: &Array,
        sequences: &mut [&mut Sequence],
        rows: &[Rows],
    ) -> Result<Option<Array>, ModelError> {
        for (sequence, rows) in sequences.iter().zip(rows) {
            self.check_room(sequence, rows.fed)?;
        }
        let fed = sequences.iter_mut().zip(rows.iter().copied());
        let logits = match &self.body {
            Body::Host(host) => {
                let rows = fed.map(|(sequence, rows)| match &mut sequence.cache {
                    Cache::Host(cache) => Ok(HostRows {
                        cache,
                        position: sequence.offset,
                        rows: rows.fed,
                        wanted: rows.wanted,
                        prompt: rows.prompt,
                    }),
                    Cache::Graph(_) => Err(Self::foreign()),
                });
                host.forward(ids, &mut rows.collect::<Result<Vec<_>, _>>()?)?
            }
            Body::Graph(graph) => {
                let rows = fed.map(|(sequence, rows)| match &mut sequence.cache {
                    Cache::Graph(layers) => Ok(GraphRows {
                        layers,
                        position: sequence.offset,
                        rows: rows.fed,
                        wanted: rows.wanted,
                    }),
                    Cache::Host(_) => Err(Self::foreign()),
                });
                graph.forward(ids, &self.plan, &mut rows.collect::<Result<Vec<_>, _>>()?)?
            }
        };
        for (sequence, rows) in sequences.iter_mut().zip(rows) {
            sequence.advance(rows.fed);
        }
        Ok(logits)
    }

    /// Feeds tokens of a prompt and returns the log-probability of each of `next`, which are the tokens that follow each of them.
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
        let logits = self.feed(&self.ids(tokens)?, sequence, Wanted::All, true)?;
        let logits = logits.ok_or(ModelError::NoTokens)?;
        logits.eval()?;
        sequence.check(sequence.len())?;
        let rows = logits.try_as_slice::<f32>()?.chunks_exact(self.spec.vocab_size);
        let vocabulary = self.spec.vocab_size;
        rows.zip(next)
            .map(|(row, &token)| {
                let logprob = log_softmax(row).get(token as usize).copied();
                logprob.ok_or(ModelError::Token { token, vocabulary })
            })
            .collect()
    }

    /// Whether a step can feed this to a sequence, as far as that can be told without taking it: whose fault it is where one
    /// of several cannot be fed.
    ///
    /// # Errors
    ///
    /// For no tokens, a token out of the vocabulary, and a sequence longer than the context.
    pub fn check(&self, feed: &Feed<'_>, sequence: &Sequence) -> Result<(), ModelError> {
        match &feed.tokens {
            FeedTokens::Read(tokens) => {
                self.check_tokens(tokens)?;
                self.check_room(sequence, tokens.len())
            }
            FeedTokens::Unread(tokens) => self.check_room(sequence, tokens.size()),
        }
    }

    fn check_tokens(&self, tokens: &[u32]) -> Result<(), ModelError> {
        if tokens.is_empty() {
            return Err(ModelError::NoTokens);
        }
        // MLX reads rows out of bounds as they come.
        let vocabulary = self.spec.vocab_size;
        let beyond = tokens.iter().find(|&&token| token as usize >= vocabulary);
        beyond.map_or(Ok(()), |&token| Err(ModelError::Token { token, vocabulary }))
    }

    fn ids(&self, tokens: &[u32]) -> Result<Array, ModelError> {
        self.check_tokens(tokens)?;
        Ok(Array::from_slice(tokens, &[tokens.len() as i32]))
    }

    fn check_room(&self, sequence: &Sequence, tokens: usize) -> Result<(), ModelError> {
        let (end, context_length) = (sequence.offset + tokens, self.spec.context_length);
        if end > context_length {
            return Err(ModelError::ContextExceeded {
                tokens: end,
                context_length,
            });
        }
        Ok(())
    }

    pub(crate) fn foreign() -> ModelError {
        ModelError::config("the sequence is of another decoder".to_owned())
    }

    fn feed(
        &self,
        ids: &Array,
        sequence: &mut Sequence,
        logits: Wanted,
        prompt: bool,
    ) -> Result<Option<Array>, ModelError> {
        let fed = ids.size();
        let wanted = logits.rows(fed);
        self.run(ids, &mut [sequence], &[Rows { fed, wanted, prompt }])
    }

    /// As [`feed`](Self::feed), where logits are wanted, of an answer.
    fn logits(&self, ids: &Array, sequence: &mut Sequence, logits: Wanted) -> Result<Array, ModelError> {
        self.feed(ids, sequence, logits, false)?
            .ok_or(ModelError::NoTokens)
    }
}
