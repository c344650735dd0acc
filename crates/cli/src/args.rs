//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use mlx_engine::{
    BackendChoice, Capability, DraftConfig, GenerateParams, KvConfig, LookupConfig, ModelType, OptimizeGoal,
    SpeculationConfig, ToolChoice, UseCase,
};

use crate::criteria::{CAPABILITIES, ORDERS, Order, TYPES, USES, amount, one_of};
use crate::failure::Failure;

/// The variable that names the collector, for this process and for one that it starts.
#[cfg(feature = "otlp")]
pub(crate) const OTLP: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";

/// Runs language models on Apple's MLX.
#[derive(Debug, Parser)]
#[command(name = "mlx-engine", version)]
pub(crate) struct Cli {
    /// Send spans of requests and steps to this collector for OTLP over HTTP, such as http://localhost:4318
    #[cfg(feature = "otlp")]
    #[arg(long, global = true, value_name = "URL", env = OTLP)]
    pub(crate) otlp: Option<String>,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Answer a prompt
    Generate(Generate),
    /// Talk with a model
    Chat(Chat),
    /// Report the log-probability of each token of a text, and its perplexity
    Score(Score),
    /// Report the token ids of stdin
    Tokenize(Tokenize),
    /// Measure how fast a model reads and writes
    Bench(Bench),
    /// Write a model as a folder in MLX's layout, quantized or not, for this command and for mlx-lm
    #[cfg(feature = "mlx")]
    Convert(crate::convert::Args),
    /// Measure which configuration serves a goal best on this machine
    Optimize(Optimize),
    /// Find, fetch, check and remove models
    Models(Models),
    /// Say what this machine has, what is missing, and what to do
    Doctor(Doctor),
    /// Be the process of an engine that another one started
    #[cfg(unix)]
    #[command(hide = true)]
    ServeEngine,
}

impl Command {
    /// The model that the command loads for requests.
    #[cfg(all(unix, feature = "otlp"))]
    pub(crate) fn model(&mut self) -> Option<&mut Model> {
        match self {
            Self::Generate(args) => Some(&mut args.model),
            Self::Chat(args) => Some(&mut args.model),
            Self::Score(args) => Some(&mut args.model),
            Self::Bench(args) => Some(&mut args.model),
            Self::Optimize(args) => Some(&mut args.model),
            _ => None,
        }
    }
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub(crate) enum Backend {
    /// MLX, or the mock where MLX cannot run
    #[default]
    Auto,
    /// MLX or an error
    Mlx,
    /// The scripted mock
    Mock,
}

impl From<Backend> for BackendChoice {
    fn from(backend: Backend) -> Self {
        match backend {
            Backend::Auto => Self::Auto,
            Backend::Mlx => Self::Mlx,
            Backend::Mock => Self::Mock,
        }
    }
}

/// Memory that a model may take.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Memory {
    /// What there is.
    All,
    Bytes(u64),
}

fn memory(text: &str) -> Result<Memory, String> {
    match text {
        "all" => Ok(Memory::All),
        _ => amount(text).map(Memory::Bytes),
    }
}

/// Which model to load, and where.
#[expect(clippy::struct_field_names, reason = "the option is called `--model`")]
#[derive(Clone, Debug, Args)]
pub(crate) struct Model {
    /// A model folder, a .gguf file, a name of the registry, owner/name[@revision] or hf:owner/name/FILE.gguf
    #[arg(long, value_name = "REF")]
    pub(crate) model: String,

    /// What computes the tokens
    #[arg(long, value_enum, default_value_t)]
    pub(crate) backend: Backend,

    /// Compute all in float32 on a CPU, several times slower, in place of 8-bit activations and 16-bit keys and values
    #[arg(long)]
    pub(crate) exact: bool,

    /// Threads that compute on a CPU; one for each physical core unless told
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) threads: Option<u32>,

    /// Keep keys and values as integers of this many bits, 8 or 4, in groups of 64
    #[arg(long, value_name = "N")]
    kv_bits: Option<u32>,

    /// Keep keys and values of the first 4 positions and the last, this many together, and forget those between
    #[arg(long, value_name = "N")]
    max_kv: Option<usize>,

    /// Choose the longest context and the largest batch that fit into this much memory, such as --fit=8GB, or into what there is,
    /// and say on stderr what was chosen
    #[arg(long, value_name = "SIZE", num_args = 0..=1, require_equals = true, default_missing_value = "all",
          value_parser = memory)]
    pub(crate) fit: Option<Memory>,

    /// Guess what comes next from what was said before, and verify several tokens in a step: for answers that repeat their
    /// prompt. They stay the same, and what does not pay is paused
    #[arg(long, conflicts_with = "draft_model")]
    speculate: bool,

    /// Have this smaller model with the same vocabulary guess what comes next, and verify several tokens in a step
    #[arg(long, value_name = "REF")]
    draft_model: Option<String>,

    /// Read how requests are scheduled from this file, as `optimize --output` writes it
    #[arg(long, value_name = "F")]
    pub(crate) config: Option<PathBuf>,

    /// Run the engine in a process of its own: a crash in it costs an answer and not the program
    #[cfg(unix)]
    #[arg(long)]
    pub(crate) isolate: bool,

    /// Where a process of its own sends its spans.
    #[cfg(all(unix, feature = "otlp"))]
    #[arg(skip)]
    pub(crate) otlp: Option<String>,
}

impl Model {
    /// How tokens are guessed, where the command line says it, and as in `config` elsewhere.
    pub(crate) fn speculation(&self, config: &SpeculationConfig) -> SpeculationConfig {
        match (&self.draft_model, config) {
            (Some(model), SpeculationConfig::Draft(draft)) => SpeculationConfig::Draft(DraftConfig {
                model: model.clone(),
                ..draft.clone()
            }),
            (Some(model), _) => SpeculationConfig::Draft(DraftConfig::new(model)),
            (None, SpeculationConfig::Lookup(_)) => config.clone(),
            (None, _) if self.speculate => SpeculationConfig::Lookup(LookupConfig::default()),
            (None, _) => config.clone(),
        }
    }

    /// How keys and values are kept, where the command line says it, and as in `config` elsewhere.
    pub(crate) fn kv(&self, config: &KvConfig) -> Result<KvConfig, Failure> {
        let config = KvConfig {
            bits: self.kv_bits.or(config.bits),
            max_positions: self.max_kv.or(config.max_positions),
            ..config.clone()
        };
        config
            .validate()
            .map_err(|error| Failure::usage(error.to_string()))?;
        Ok(config)
    }
}

/// How to sample.
#[derive(Clone, Debug, Args)]
pub(crate) struct Sampling {
    /// The most tokens to generate
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    max_tokens: Option<u32>,
    /// Divides the logits before sampling; 0 takes the likeliest token
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    temperature: Option<f32>,
    /// Keep the likeliest tokens whose probabilities sum to this
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    top_p: Option<f32>,
    /// Keep this many of the likeliest tokens; 0 keeps all
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    top_k: Option<u32>,
    /// Keep tokens at least this likely relative to the likeliest
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    min_p: Option<f32>,
    /// Divide the logits of tokens that were seen lately
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    repetition_penalty: Option<f32>,
    /// Make sampling repeatable
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    seed: Option<u64>,
    /// End the answer before this text; may be given again
    #[arg(long, value_name = "S", allow_hyphen_values = true)]
    stop: Vec<String>,
}

impl Sampling {
    /// The parameters, with the engine's defaults for what was not given.
    pub(crate) fn params(&self) -> GenerateParams {
        let mut params = GenerateParams::default();
        let set = |to: &mut f32, from: Option<f32>| *to = from.unwrap_or(*to);
        set(&mut params.temperature, self.temperature);
        set(&mut params.top_p, self.top_p);
        set(&mut params.min_p, self.min_p);
        set(&mut params.repetition_penalty, self.repetition_penalty);
        params.max_tokens = self.max_tokens.unwrap_or(params.max_tokens);
        params.top_k = self.top_k.unwrap_or(params.top_k);
        params.seed = self.seed;
        params.with_stop(self.stop.iter().cloned())
    }
}

/// Tools that the model may call.
#[expect(clippy::struct_field_names, reason = "the options are called so")]
#[derive(Clone, Debug, Args)]
pub(crate) struct Tools {
    /// Offer the tools of this JSON file to the model: a list of functions as OpenAI's API takes it
    #[arg(long, value_name = "F")]
    pub(crate) tools: Option<PathBuf>,
    /// Whether the model calls one: `auto`, `none`, `required`, or the name of a tool
    #[arg(long, value_name = "CHOICE", default_value = "auto", requires = "tools")]
    pub(crate) tool_choice: ToolChoice,
    /// How the model writes calls, such as `hermes`; by its chat template unless told
    #[arg(long, value_name = "NAME")]
    pub(crate) tool_format: Option<String>,
    /// Tokens after which the model has to stop thinking
    #[arg(long, value_name = "N")]
    pub(crate) thinking_budget: Option<u32>,
}

#[derive(Debug, Args)]
pub(crate) struct Generate {
    /// Say on stderr what was counted, and how the engine is
    #[arg(long)]
    pub(crate) verbose: bool,
    /// Keep the answer valid under this JSON schema
    #[arg(long, value_name = "F", conflicts_with = "regex")]
    pub(crate) json_schema: Option<PathBuf>,
    /// Keep the answer to this regular expression
    #[arg(long, value_name = "S", allow_hyphen_values = true)]
    pub(crate) regex: Option<String>,

    #[command(flatten)]
    pub(crate) model: Model,
    /// The prompt
    #[arg(long, value_name = "S", allow_hyphen_values = true, conflicts_with_all = ["prompt_file", "stdin"])]
    pub(crate) prompt: Option<String>,
    /// Read the prompt from a file
    #[arg(long, value_name = "F", conflicts_with = "stdin")]
    pub(crate) prompt_file: Option<PathBuf>,
    /// `-` reads the prompt from stdin
    #[arg(value_name = "-", value_parser = ["-"])]
    pub(crate) stdin: Option<String>,
    /// The system prompt
    #[arg(long, value_name = "S", allow_hyphen_values = true, conflicts_with = "raw")]
    pub(crate) system: Option<String>,
    /// Give the prompt to the model as it is, without the chat template
    #[arg(long)]
    pub(crate) raw: bool,
    #[command(flatten)]
    pub(crate) tools: Tools,
    #[command(flatten)]
    pub(crate) sampling: Sampling,
    /// Report the log-probability of each token and of this many alternatives
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(0..=20))]
    pub(crate) logprobs: Option<u8>,
    /// Print one JSON object in place of the text
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Chat {
    #[command(flatten)]
    pub(crate) model: Model,
    /// The system prompt
    #[arg(long, value_name = "S")]
    pub(crate) system: Option<String>,
    #[command(flatten)]
    pub(crate) tools: Tools,
    #[command(flatten)]
    pub(crate) sampling: Sampling,
    /// Tell at the end what was counted and how the engine is; at a terminal it is told in any case
    #[arg(long)]
    pub(crate) verbose: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Score {
    #[command(flatten)]
    pub(crate) model: Model,
    /// The text
    #[arg(long, value_name = "F")]
    pub(crate) text_file: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Tokenize {
    /// A model folder, a .gguf file, a name of the registry, owner/name[@revision] or hf:owner/name/FILE.gguf
    #[arg(long, value_name = "REF")]
    pub(crate) model: String,
    /// Stdin is a JSON list of messages, which the chat template renders
    #[arg(long)]
    pub(crate) chat: bool,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// What an engine is to be good at.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub(crate) enum Goal {
    /// One request at a time
    #[default]
    Latency,
    /// Many requests at once
    Throughput,
    /// Little memory
    Memory,
}

impl From<Goal> for OptimizeGoal {
    fn from(goal: Goal) -> Self {
        match goal {
            Goal::Latency => Self::Latency,
            Goal::Throughput => Self::Throughput,
            Goal::Memory => Self::Memory,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct Optimize {
    #[command(flatten)]
    pub(crate) model: Model,
    /// What the engine is to be good at
    #[arg(long, value_enum, default_value_t)]
    pub(crate) goal: Goal,
    /// How long it may take, in seconds
    #[arg(long, value_name = "S", default_value_t = 60.0)]
    pub(crate) time_limit: f64,
    /// Ask what this file says, in place of a prompt that means nothing; guessing ahead is tried with it alone
    #[arg(long, value_name = "F")]
    pub(crate) sample: Option<PathBuf>,
    /// Try keys and values as integers too, which changes answers a little
    #[arg(long)]
    pub(crate) kv_integers: bool,
    /// Write the configuration to keep to this file, for `--config`
    #[arg(long, value_name = "F")]
    pub(crate) output: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Bench {
    #[command(flatten)]
    pub(crate) model: Model,
    /// Tokens of the prompt
    #[arg(short = 'p', long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) prompt_tokens: u32,
    /// Tokens to generate
    #[arg(short = 'n', long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(2..))]
    pub(crate) generate_tokens: u32,
    /// Answer so many requests at once, for each number of a list such as 1,4,8, in place of one after the other
    #[arg(long, value_name = "N,...", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=256))]
    pub(crate) batch: Vec<u32>,
    /// Rounds, whose medians are reported
    #[arg(short = 'r', long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) rounds: u32,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Models {
    #[command(subcommand)]
    pub(crate) command: ModelsCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ModelsCommand {
    /// List the models of the registry, or those that are on this machine
    List {
        /// List the models in the local cache
        #[arg(long)]
        cached: bool,
        /// Print a JSON list
        #[arg(long)]
        json: bool,
    },
    /// Search the models of the registry, or of the hub
    Search {
        /// Search the hub: words in the id, the most downloaded first
        #[cfg(feature = "hub")]
        #[arg(long, conflicts_with_all = [
            "family", "model_type", "capability", "min_parameters", "max_parameters", "max_size", "bits", "min_context",
            "licence", "fits",
        ])]
        hub: bool,
        /// Only models of this owner, with --hub
        #[cfg(feature = "hub")]
        #[arg(long, value_name = "NAME", requires = "hub")]
        author: Option<String>,
        /// Only models with this tag, such as mlx, with --hub; may be given again
        #[cfg(feature = "hub")]
        #[arg(long, value_name = "TAG", requires = "hub")]
        tag: Vec<String>,
        /// Words that all have to be found; case, order and small typing errors do not matter
        words: Vec<String>,
        /// Only this family
        #[arg(long, value_name = "NAME")]
        family: Option<String>,
        /// Only models for this
        #[arg(long = "type", value_name = "TYPE", value_parser = one_of(TYPES))]
        model_type: Option<ModelType>,
        /// Only models that can do this
        #[arg(long, value_name = "NAME", value_parser = one_of(CAPABILITIES))]
        capability: Option<Capability>,
        /// Only so many parameters or more, such as 3B
        #[arg(long, value_name = "N", value_parser = amount)]
        min_parameters: Option<u64>,
        /// Only so many parameters or fewer
        #[arg(long, value_name = "N", value_parser = amount)]
        max_parameters: Option<u64>,
        /// Only weights of at most so many bytes, such as 4GB
        #[arg(long, value_name = "SIZE", value_parser = amount)]
        max_size: Option<u64>,
        /// Only weights of so many bits; 0 stands for those that are not quantized
        #[arg(long, value_name = "N")]
        bits: Option<u8>,
        /// Only contexts of at least so many tokens
        #[arg(long, value_name = "TOKENS")]
        min_context: Option<u32>,
        /// Only this licence
        #[arg(long, value_name = "NAME")]
        licence: Option<String>,
        /// Only models that run in so many bytes of memory, with 8192 tokens
        #[arg(long, value_name = "SIZE", value_parser = amount)]
        fits: Option<u64>,
        /// The order; of the hub's models by downloads unless told
        #[arg(long, value_name = "ORDER", value_parser = one_of(ORDERS))]
        sort: Option<Order>,
        /// At most so many models
        #[arg(long, value_name = "N")]
        limit: Option<usize>,
        /// Print a JSON list
        #[arg(long)]
        json: bool,
    },
    /// Fetch a model from the hub into the local cache, or take up a fetch that was interrupted
    #[cfg(feature = "hub")]
    Pull {
        /// A name of the registry, owner/name, either with @revision, or hf:owner/name/FILE
        #[arg(value_name = "REF")]
        model: String,
        /// Fetch files that match this pattern, in place of those that the engine reads; may be given again
        #[arg(long, value_name = "PATTERN")]
        include: Vec<String>,
        /// Leave out files that match this pattern; may be given again
        #[arg(long, value_name = "PATTERN")]
        exclude: Vec<String>,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Compare the files of a cached model with their hashes
    Verify {
        /// A name of the registry, owner/name, either with @revision, or hf:owner/name/FILE
        #[arg(value_name = "REF")]
        model: String,
        /// Fetch what is damaged or missing
        #[cfg(feature = "hub")]
        #[arg(long)]
        repair: bool,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Remove a model from the local cache, or one revision or file of it
    Rm {
        /// A name of the registry, or owner/name; with @revision that revision alone, hf:owner/name/FILE that file alone
        #[arg(value_name = "REF")]
        model: String,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Remove from the local cache what nothing refers to: revisions that no branch or tag stood at when they were
    /// fetched, files of no revision, and fetches that did not end
    Prune {
        /// Only say what would be removed
        #[arg(long)]
        dry_run: bool,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Say how much room the cached models take
    Du {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Recommend models for a use, with the reason for each
    Recommend {
        /// What they are for
        #[arg(value_parser = one_of(USES))]
        use_case: UseCase,
        /// Memory of the device, such as 16GiB; this machine's unless told
        #[arg(long, value_name = "SIZE", value_parser = amount)]
        memory: Option<u64>,
        /// Bytes a second that the device reads from memory, which sets the speed
        #[arg(long, value_name = "SIZE", default_value = "100GB", value_parser = amount)]
        bandwidth: u64,
        /// At most so many models
        #[arg(long, value_name = "N", default_value_t = 5)]
        limit: usize,
        /// Print a JSON list
        #[arg(long)]
        json: bool,
    },
    /// Show what is known of a model: of the registry, of the hub, or on this machine
    Show {
        /// A name of the registry, owner/name[@revision], hf:owner/name/FILE, a folder or a .gguf file
        #[arg(value_name = "REF")]
        name: String,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Doctor {
    /// Load this model too, and have it generate a token
    #[arg(long, value_name = "REF")]
    pub(crate) model: Option<String>,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}
