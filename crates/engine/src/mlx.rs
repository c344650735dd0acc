//! MLX's decoders as the scheduler sees them.

use std::collections::VecDeque;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use mlx_engine_checkpoint::Metadata;
use mlx_engine_core::{
    Backend, Device, DeviceMemory, EngineError, GenerateParams, LoadProgress, ModelConfiguration, ModelType,
    ParamError, ProgressFn,
};
use mlx_engine_models::{
    self as models, Compute, Decoder, DecoderBytes, DecoderSpec, FeedTokens, History, LoadOptions,
    ModelError, Sampler, Source, Step, Wanted,
};
use mlx_engine_text::{GgufVocabulary, Tokenizer};

use crate::config::EngineConfig;
use crate::engine::{Engine, Loaded};
use crate::fingerprint::fingerprint;
use crate::fit::{BATCH_LIMIT, KvWindow, MemoryNeeds};
use crate::speculation::{DraftConfig, SpeculationConfig, same_vocabulary};
use crate::{Chosen, Feed, FeedError, PromptEncoder, TokenModel};

/// Tokens of a prompt that are fed at once. A GPU is kept busy by more; on a CPU the others would wait for it too long.
const DEVICE_CHUNK: usize = 2048;
const CPU_CHUNK: usize = 512;

/// Positions by which the memory of keys and values grows, at most.
const KV_BLOCK: u64 = 256;

/// The part of the memory beside the weights that MLX may keep for later arrays.
const KEPT_BY_MLX: u64 = 8;

/// What MLX computes on in this process.
///
/// # Errors
///
/// [`EngineError::MlxUnavailable`] where its library could not be opened, with the reason.
pub fn mlx_device() -> Result<Device, EngineError> {
    match models::detect() {
        Ok(info) => Ok(info.device),
        Err(ModelError::Mlx(reason)) => Err(EngineError::MlxUnavailable { reason }),
        Err(error) => Err(EngineError::MlxUnavailable {
            reason: error.to_string(),
        }),
    }
}

/// Loads a model folder or a `.gguf` file.
///
/// `configuration` says what is known of the model, from a registry; without one it is read from the checkpoint.
/// Dropping the future gives the load up.
///
/// # Errors
///
/// [`EngineError::MlxUnavailable`], [`EngineError::UnsupportedModel`], [`EngineError::InsufficientMemory`] where the files are
/// larger than [`EngineConfig::memory_limit`], [`EngineError::ModelLoad`] with what is wrong
/// with the files, and the errors of tokenizer and template.
pub async fn load_mlx(
    path: PathBuf,
    configuration: Option<ModelConfiguration>,
    config: EngineConfig,
    progress: Option<ProgressFn>,
) -> Result<Engine, EngineError> {
    let options = load_options(&config);
    let kept = config.clone();
    Engine::load(config, progress, move |cancelled, progress| {
        let mut loaded = load(&path, configuration, options, &kept, cancelled, progress)?;
        if let SpeculationConfig::Draft(draft) = &kept.speculation {
            loaded.draft = Some(load_draft(draft, &loaded, options, &kept, cancelled, progress)?);
            loaded
                .model
                .settle(2)
                .map_err(|error| load_error(&draft.model, error))?;
        }
        if kept.prefix_cache.disk.is_some() {
            let content = fingerprint(&path)
                .map_err(|error| EngineError::model_load(&*loaded.configuration.id, error))?;
            loaded.model.identity = Some(format!("{content} {} {:?}", options.compute, kept.kv));
        }
        Ok(loaded)
    })
    .await
}

/// Has MLX keep to a limit beside weights of so many bytes.
fn limit_memory(limit: u64, weight_bytes: u64) -> Result<(), ModelError> {
    // What MLX keeps for later arrays must not stand in the way of what is needed now.
    models::limit_memory(limit, limit.saturating_sub(weight_bytes) / KEPT_BY_MLX)
}

/// What of a configuration a decoder is loaded by.
fn load_options(config: &EngineConfig) -> LoadOptions {
    LoadOptions {
        compute: if config.exact {
            Compute::Exact
        } else {
            Compute::Fastest
        },
        threads: config.threads,
    }
}

pub(crate) fn load(
    path: &Path,
    configuration: Option<ModelConfiguration>,
    options: LoadOptions,
    config: &EngineConfig,
    cancelled: &AtomicBool,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Loaded<MlxModel>, EngineError> {
    let device = mlx_device()?;
    let shown = path.display().to_string();
    let id = configuration.as_ref().map_or(shown, |known| known.id.clone());
    let failed = |error: ModelError| load_error(&id, error);
    let mut source = Source::open(path).map_err(failed)?;
    let needs = DecoderBytes::of(&source, options.compute, &config.kv).map_err(failed)?;
    if config.prefix_cache.disk.is_some() && !needs.windows.is_empty() {
        // What was given up on the way cannot be written down.
        let allowed = "unset for a model whose layers see a window, and beside `kv.max_positions`";
        return Err(ParamError::new("prefix_cache.disk", "set", allowed).into());
    }
    let weight_bytes = needs.weights;
    if let Some(available) = config.memory_limit.filter(|&limit| limit < weight_bytes) {
        return Err(EngineError::InsufficientMemory {
            required: weight_bytes,
            available,
        });
    }
    // The tokenizer first: it is read in a moment, and a model without one is of no use.
    let tokenizer = read_tokenizer(&source, &id)?;
    let mut configuration = configuration.unwrap_or_else(|| described(path, &source, &tokenizer));
    configuration.context_length = source.spec().context_length as u32;
    let encoder = PromptEncoder::new(tokenizer, configuration.default_system_prompt.clone())?;
    source.forget_tokenizer();
    if let Some(limit) = config.memory_limit {
        limit_memory(limit, weight_bytes).map_err(failed)?;
    }
    let before = models::active_memory().map_err(failed)?;
    let decoder = Decoder::load(&source, options, &mut |stage| {
        progress(stage);
        if cancelled.load(Ordering::Relaxed) {
            Err(ModelError::Cancelled)
        } else {
            Ok(())
        }
    })
    .and_then(|decoder| decoder.with_kv(&config.kv))
    .map_err(failed)?;
    let weight_bytes = models::active_memory().map_err(failed)?.saturating_sub(before);
    if let Some(available) = config.memory_limit.filter(|&limit| limit < weight_bytes) {
        // It was taken to be smaller than it is.
        return Err(EngineError::InsufficientMemory {
            required: weight_bytes,
            available,
        });
    }
    let mut model = MlxModel {
        weight_bytes,
        peak_before: 0,
        decoder,
        prefill_chunk: config.prefill_chunk,
        identity: None,
        alone_since: None,
        _living: Living::new(),
    };
    model.settle(1).map_err(failed)?;
    Ok(Loaded {
        model,
        draft: None,
        configuration,
        encoder,
        backend: Backend::Mlx,
        device,
    })
}

/// Loads the model that guesses for another one.
fn load_draft(
    draft: &DraftConfig,
    loaded: &Loaded<MlxModel>,
    options: LoadOptions,
    config: &EngineConfig,
    cancelled: &AtomicBool,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<MlxModel, EngineError> {
    let path = Path::new(&draft.model);
    let source = Source::open(path).map_err(|error| load_error(&draft.model, error))?;
    let needs = DecoderBytes::of(&source, options.compute, &config.kv);
    let needs = needs.map_err(|error| load_error(&draft.model, error))?;
    let required = loaded.model.weight_bytes.saturating_add(needs.weights);
    if let Some(available) = config.memory_limit.filter(|&limit| limit < required) {
        return Err(EngineError::InsufficientMemory { required, available });
    }
    let tokenizer = read_tokenizer(&source, &draft.model)?;
    same_vocabulary(loaded.encoder.tokenizer(), &tokenizer, &draft.model)?;
    drop(source);
    // The limit is that of both, and set. What the draft model computes is not written down.
    let mut config = EngineConfig {
        memory_limit: None,
        ..config.clone()
    };
    config.prefix_cache.disk = None;
    Ok(load(path, None, options, &config, cancelled, progress)?.model)
}

/// Reads the tokenizer and the template of a model, and no weights.
///
/// # Errors
///
/// As [`load_mlx`], but for those of the weights.
pub fn load_encoder(path: &Path, known: Option<&ModelConfiguration>) -> Result<PromptEncoder, EngineError> {
    let id = known.map_or_else(|| path.display().to_string(), |known| known.id.clone());
    let tokenizer = if path.is_dir() {
        Tokenizer::from_folder(path).map_err(tokenizer_error)?
    } else {
        read_tokenizer(&Source::open(path).map_err(|error| load_error(&id, error))?, &id)?
    };
    PromptEncoder::new(
        tokenizer,
        known.and_then(|known| known.default_system_prompt.clone()),
    )
}

/// What models of this process have allocated.
pub(crate) fn device_memory() -> Option<DeviceMemory> {
    Some(DeviceMemory {
        active_bytes: models::active_memory().ok()?,
        cache_bytes: models::cache_memory().ok()?,
        peak_bytes: models::peak_memory().ok()?,
    })
}

/// The kernels that a CPU would compute with, and on how many threads.
///
/// # Errors
///
/// Where the environment names an instruction set that is not there.
pub fn cpu_kernels() -> Result<(&'static str, usize), EngineError> {
    models::cpu_kernels().map_err(|error| EngineError::device("the kernels cannot be chosen", error))
}

/// What a model needs of memory where it is loaded with this configuration, from its files' headers.
///
/// # Errors
///
/// As [`load_mlx`], but for those of the weights and the tokenizer.
pub fn memory_needs(path: &Path, config: &EngineConfig) -> Result<MemoryNeeds, EngineError> {
    let device = mlx_device()?;
    let id = path.display().to_string();
    let source = Source::open(path).map_err(|error| load_error(&id, error))?;
    let spec = source.spec();
    let bytes = DecoderBytes::of(&source, load_options(config).compute, &config.kv)
        .map_err(|error| load_error(&id, error))?;
    let chunk = chunk(device);
    // What a step has fed is there until the next begins, and memory is taken by blocks.
    let beside = config.prefill_chunk.unwrap_or(chunk) as u64;
    let windows = bytes.windows.iter().map(|window| KvWindow {
        bytes_per_token: window.bytes_per_token,
        positions: (window.positions as u64 + beside).next_multiple_of(KV_BLOCK),
    });
    Ok(MemoryNeeds {
        weight_bytes: bytes.weights,
        kv_bytes_per_token: bytes.kv_per_token,
        windows: windows.collect(),
        workspace_bytes_per_token: workspace_bytes_per_token(spec),
        logits_bytes: logits_bytes(spec),
        context_length: spec.context_length,
        prefill_chunk: chunk,
    })
}

/// Tokens of a prompt that are fed at once.
fn chunk(device: Device) -> usize {
    match device {
        Device::Cpu => CPU_CHUNK,
        _ => DEVICE_CHUNK,
    }
}

/// Bytes that a step needs for a token that is fed: the residual stream and its norm, queries, keys, values and what
/// attention gives, and the three vectors of the MLP, all in float32.
fn workspace_bytes_per_token(spec: &DecoderSpec) -> u64 {
    let attention = 2 * spec.heads * spec.head_dim + 2 * spec.kv_heads * spec.head_dim;
    let experts = spec.experts.as_ref();
    // Of each expert that a token chooses, what goes in, what lies between the halves, and what comes out.
    let of_experts = experts.map_or(0, |experts| {
        experts.active * (2 * spec.hidden_size + 3 * experts.intermediate_size)
    });
    let mlp = (3 * spec.intermediate_size).max(of_experts);
    let floats = 4 * spec.hidden_size + attention + mlp;
    (floats * size_of::<f32>()) as u64
}

fn logits_bytes(spec: &DecoderSpec) -> u64 {
    (spec.vocab_size * size_of::<f32>()) as u64
}

fn read_tokenizer(source: &Source, id: &str) -> Result<Tokenizer, EngineError> {
    let Some(file) = source.gguf() else {
        return Tokenizer::from_folder(source.path()).map_err(tokenizer_error);
    };
    let vocabulary = vocabulary(file.metadata()).map_err(|error| EngineError::model_load(id, error))?;
    Tokenizer::from_vocabulary(vocabulary).map_err(tokenizer_error)
}

/// What a checkpoint says of itself.
fn described(path: &Path, source: &Source, tokenizer: &Tokenizer) -> ModelConfiguration {
    let kind = if tokenizer.chat_template().is_some() {
        ModelType::Chat
    } else {
        ModelType::Base
    };
    let name = path
        .file_stem()
        .map_or_else(String::new, |stem| stem.to_string_lossy().into_owned());
    ModelConfiguration {
        name,
        family: source.spec().model_type.clone(),
        parameters: source.spec().parameters(),
        size_bytes: source.total_bytes(),
        ..ModelConfiguration::new(path.display().to_string(), kind)
    }
}

fn tokenizer_error(error: mlx_engine_text::TextError) -> EngineError {
    EngineError::tokenizer("the model's tokenizer is unusable", error)
}

fn load_error(id: &str, error: ModelError) -> EngineError {
    match error {
        ModelError::Unsupported {
            model_type,
            supported,
        } => EngineError::UnsupportedModel {
            model_type,
            supported: supported.into_iter().map(str::to_owned).collect(),
        },
        ModelError::Cancelled => EngineError::Cancelled,
        error if error.is_out_of_memory() => EngineError::OutOfMemory,
        error => EngineError::model_load(id, error),
    }
}

/// An error of a request.
pub(crate) fn run_error(error: ModelError) -> EngineError {
    match error {
        error if error.is_out_of_memory() => EngineError::OutOfMemory,
        error => EngineError::device("the model could not take the step", error),
    }
}

/// The vocabulary in a GGUF file's metadata.
pub(crate) fn vocabulary(
    metadata: &Metadata,
) -> Result<GgufVocabulary, mlx_engine_checkpoint::CheckpointError> {
    let id = |key: &str| metadata.optional_u32(&format!("tokenizer.ggml.{key}_token_id"));
    let text = |key: &str| metadata.optional_string(key).map(|text| text.map(str::to_owned));
    Ok(GgufVocabulary {
        model: metadata.string("tokenizer.ggml.model")?.to_owned(),
        pre: text("tokenizer.ggml.pre")?,
        tokens: metadata
            .optional_strings("tokenizer.ggml.tokens")?
            .unwrap_or_default(),
        scores: metadata
            .optional_f32s("tokenizer.ggml.scores")?
            .unwrap_or_default(),
        token_types: metadata
            .optional_i32s("tokenizer.ggml.token_type")?
            .unwrap_or_default(),
        merges: metadata
            .optional_strings("tokenizer.ggml.merges")?
            .unwrap_or_default(),
        bos: id("bos")?,
        eos: id("eos")?,
        eot: id("eot")?,
        eom: id("eom")?,
        unknown: id("unknown")?,
        add_bos: metadata.optional_bool("tokenizer.ggml.add_bos_token")?,
        add_eos: metadata.optional_bool("tokenizer.ggml.add_eos_token")?,
        add_space_prefix: metadata.optional_bool("tokenizer.ggml.add_space_prefix")?,
        chat_template: text("tokenizer.chat_template")?,
    })
}

/// Models that this process has loaded, and those that live.
static LOADED: AtomicU64 = AtomicU64::new(0);
static LIVING: AtomicUsize = AtomicUsize::new(0);

/// A model that lives.
struct Living;

impl Living {
    fn new() -> Self {
        LOADED.fetch_add(1, Ordering::Relaxed);
        LIVING.fetch_add(1, Ordering::Relaxed);
        Self
    }
}

impl Drop for Living {
    fn drop(&mut self) {
        LIVING.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A decoder and the steps that it has begun.
pub(crate) struct MlxModel {
    decoder: Decoder,
    /// Tokens of a prompt that are fed at once, where the configuration says it.
    prefill_chunk: Option<usize>,
    weight_bytes: u64,
    /// The most bytes that models had taken before it was counted what sequences take.
    peak_before: u64,
    /// The content of the model and how it computes, where keys and values are written to disk.
    identity: Option<String>,
    /// How many models had been loaded when this engine had the only ones; `None` where there were others beside them.
    alone_since: Option<u64>,
    _living: Living,
}

/// A sequence of a decoder, with the tokens that are being chosen: the oldest first.
pub(crate) struct MlxSequence {
    sequence: models::Sequence,
    sampler: Option<Sampler>,
    steps: VecDeque<Step>,
}

impl MlxModel {
    /// Begins to tell what this engine takes, which has so many models.
    fn settle(&mut self, own: usize) -> Result<(), ModelError> {
        self.peak_before = models::peak_memory()?;
        let alone = LIVING.load(Ordering::Relaxed) == own;
        self.alone_since = alone.then(|| LOADED.load(Ordering::Relaxed));
        Ok(())
    }

    /// What the decoder is fed for a sequence.
    fn fed<'a>(&self, feed: &Feed<'a, MlxSequence>) -> Result<models::Feed<'a>, EngineError> {
        let count = feed.tokens.map_or(1, <[u32]>::len);
        let logits = match feed.choices {
            0 => Wanted::None,
            1 => Wanted::Last,
            choices if choices == count => Wanted::All,
            choices => {
                let message = format!("{choices} choices were asked for of {count} tokens");
                return Err(EngineError::internal(message));
            }
        };
        let tokens = if let Some(tokens) = feed.tokens {
            FeedTokens::Read(tokens)
        } else {
            let unread = feed.sequence.steps.back().and_then(Step::unread);
            let token = unread.ok_or_else(|| EngineError::internal("a token was fed that nobody chose"))?;
            FeedTokens::Unread(token.clone())
        };
        let fed = models::Feed {
            tokens,
            logits,
            // What follows a prompt is the first token of the answer.
            prompt: feed.number == 0,
        };
        self.decoder
            .check(&fed, &feed.sequence.sequence)
            .map_err(run_error)?;
        Ok(fed)
    }

    /// Begins to choose behind each of the last tokens of a feed, of which these are the logits.
    fn choose(feed: &mut Feed<'_, MlxSequence>, logits: &models::Logits) -> Result<(), EngineError> {
        // A request without a seed draws one of the clock, once.
        let sampler = match feed.sequence.sampler.take() {
            Some(sampler) if feed.number > 0 => sampler,
            _ => Sampler::new(feed.params, clock_seed()),
        };
        let fed = feed.tokens.unwrap_or_default();
        let mut tokens = Vec::new();
        let mut history = History {
            prompt_len: feed.prompt_len,
            ..History::default()
        };
        if sampler.looks_back() {
            tokens.extend_from_slice(feed.before);
            tokens.extend_from_slice(fed);
            if feed.tokens.is_none() {
                let unread = feed.sequence.steps.iter().filter_map(Step::unread);
                history.unread = unread.cloned().collect();
            }
        }
        for (row, number) in (0..feed.choices).zip(feed.number..) {
            let logits = models::row(logits, row).map_err(run_error)?;
            // Behind each but the last choice come guesses.
            let seen = tokens.len().saturating_sub(feed.choices - 1 - row);
            history.tokens = &tokens[..seen];
            let step = sampler.start(&logits, number, &history).map_err(run_error)?;
            feed.sequence.steps.push_back(step);
        }
        feed.sequence.sampler = Some(sampler);
        Ok(())
    }
}

fn clock_seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |since| since.as_nanos() as u64)
}

impl TokenModel for MlxModel {
    type Sequence = MlxSequence;

    fn context_length(&self) -> usize {
        self.decoder.spec().context_length
    }

    fn prefill_chunk(&self) -> usize {
        chunk(self.decoder.device().device)
    }

    fn open(&mut self) -> MlxSequence {
        MlxSequence {
            sequence: self.decoder.sequence(),
            sampler: None,
            steps: VecDeque::new(),
        }
    }

    fn len(&self, sequence: &MlxSequence) -> usize {
        sequence.sequence.len()
    }

    fn truncate(&mut self, sequence: &mut MlxSequence, len: usize) -> bool {
        sequence.steps.clear();
        let possible = sequence.sequence.can_truncate(len);
        sequence.sequence.truncate(len);
        possible
    }

    fn undo(&mut self, sequence: &mut MlxSequence, len: usize) -> bool {
        // Arrays of MLX's graph that have failed are part of what was to follow them.
        let lasts = self.decoder.outlives_failed_steps();
        lasts && self.truncate(sequence, len) && sequence.sequence.check(len).is_ok()
    }

    fn fork(&mut self, sequence: &mut MlxSequence, len: usize) -> Result<Option<MlxSequence>, EngineError> {
        // What failed to be computed is not handed on.
        if !sequence.sequence.can_truncate(len) || sequence.sequence.check(len).is_err() {
            return Ok(None);
        }
        let fork = sequence.sequence.fork(len).map_err(run_error)?;
        Ok(Some(MlxSequence {
            sequence: fork,
            sampler: None,
            steps: VecDeque::new(),
        }))
    }

    fn forks_anywhere(&self) -> bool {
        self.decoder.forks_anywhere()
    }

    fn seed(&self) -> u64 {
        clock_seed()
    }

    fn takes_back(&self) -> usize {
        models::TAKEN_BACK
    }

    fn can_look_ahead(&self, sequence: &MlxSequence) -> bool {
        sequence.steps.back().and_then(Step::unread).is_some()
    }

    fn batch_limit(&self) -> usize {
        BATCH_LIMIT
    }

    fn feed(&mut self, batch: &mut [Feed<'_, MlxSequence>]) -> Result<(), FeedError> {
        let mut feeds = Vec::with_capacity(batch.len());
        for (index, feed) in batch.iter().enumerate() {
            feeds.push(self.fed(feed).map_err(|error| FeedError {
                error,
                culprit: Some(index),
            })?);
        }
        let mut sequences: Vec<_> = batch.iter_mut().map(|feed| &mut feed.sequence.sequence).collect();
        let logits = self.decoder.step(&feeds, &mut sequences).map_err(run_error)?;
        if logits.iter().all(Option::is_none) {
            sequences
                .iter()
                .try_for_each(|sequence| sequence.wait())
                .map_err(run_error)?;
        }
        for (feed, logits) in batch.iter_mut().zip(logits) {
            if let Some(logits) = logits {
                Self::choose(feed, &logits)?;
            }
        }
        Ok(())
    }

    fn read(
        &mut self,
        sequence: &mut MlxSequence,
        _params: &GenerateParams,
        tokens: &[u32],
        prompt_len: usize,
        mask: &mut dyn FnMut(&mut [f32]),
    ) -> Result<Chosen, EngineError> {
        let step = sequence.steps.pop_front().zip(sequence.sampler.as_ref());
        let (step, sampler) =
            step.ok_or_else(|| EngineError::internal("a token was read that nobody chose"))?;
        let sampled = step.read(sampler, tokens, prompt_len, mask).map_err(run_error)?;
        // The logits are those behind the last of the tokens.
        sequence.sequence.check(tokens.len()).map_err(run_error)?;
        Ok(Chosen {
            token: sampled.token,
            logprob: sampled.logprob,
            top: sampled.top,
        })
    }

    fn score(
        &mut self,
        sequence: &mut MlxSequence,
        tokens: &[u32],
        next: &[u32],
    ) -> Result<Vec<f32>, EngineError> {
        self.decoder
            .score(tokens, next, &mut sequence.sequence)
            .map_err(run_error)
    }

    fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }

    fn limit_memory(&mut self, bytes: u64) -> Result<(), EngineError> {
        limit_memory(bytes, self.weight_bytes).map_err(run_error)?;
        // What sequences had taken before was not counted where there was no limit.
        self.peak_before = models::peak_memory().map_err(run_error)?;
        Ok(())
    }

    fn sequence_bytes(&self, tokens: usize) -> u64 {
        let step = self.prefill_chunk.unwrap_or_else(|| self.prefill_chunk());
        self.decoder.kv_bytes(tokens, step) as u64
    }

    fn workspace_bytes(&self, chunk: usize, batch: usize) -> u64 {
        let spec = self.decoder.spec();
        let rows = workspace_bytes_per_token(spec).saturating_mul((chunk + batch.saturating_sub(1)) as u64);
        rows.saturating_add(logits_bytes(spec).saturating_mul(batch as u64))
    }

    fn measured_bytes(&self) -> Option<u64> {
        // What is measured is of the whole process: another model's weights and steps would be taken for this one's.
        let alone = self.alone_since == Some(LOADED.load(Ordering::Relaxed));
        // A peak that was reached before says nothing of what came after.
        models::peak_memory()
            .ok()
            .filter(|&peak| alone && peak > self.peak_before)
    }

    fn identity(&self) -> Option<String> {
        // What was given up on the way cannot be written down.
        self.identity.clone().filter(|_| self.decoder.forks_anywhere())
    }

    fn export(&mut self, sequence: &MlxSequence, range: Range<usize>) -> Result<Vec<u8>, EngineError> {
        self.decoder.export(&sequence.sequence, range).map_err(run_error)
    }

    fn import(&mut self, blocks: &[Vec<u8>]) -> Result<MlxSequence, EngineError> {
        let sequence = self.decoder.import(blocks).map_err(run_error)?;
        Ok(MlxSequence {
            sequence,
            sampler: None,
            steps: VecDeque::new(),
        })
    }

    fn shared_bytes(&self, len: usize) -> u64 {
        self.sequence_bytes(self.decoder.shared_tokens(len))
    }

    fn peak_memory_bytes(&self) -> u64 {
        models::peak_memory().unwrap_or_default()
    }

    fn clear_caches(&mut self) -> Result<(), EngineError> {
        models::clear_cache().map_err(run_error)
    }

    fn has_stream(&self) -> bool {
        true
    }

    fn rebuild_stream(&mut self) -> Result<(), EngineError> {
        models::rebuild_stream().map_err(run_error)
    }
}
