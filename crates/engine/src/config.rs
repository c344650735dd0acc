//! How an engine schedules and computes.

use std::path::PathBuf;

use mlx_engine_core::{KvConfig, ParamError};
use serde::{Deserialize, Serialize};

use crate::SpeculationConfig;

/// How an engine schedules and computes. It can be read from a file; what is not written there is the default.
///
/// ```
/// use mlx_engine_engine::EngineConfig;
///
/// let config = EngineConfig { max_batch: 4, ..EngineConfig::default() };
/// config.validate()?;
///
/// let error = EngineConfig { max_batch: 0, ..config }.validate().unwrap_err();
/// assert_eq!(error.to_string(), "`max_batch` is 0, allowed: 1 to 1024");
/// # Ok::<(), mlx_engine_core::ParamError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EngineConfig {
    /// Requests that run at the same time, and are decoded together; 1 to 1024.
    pub max_batch: usize,
    /// Requests that may wait beside as many as a batch has, at most a million; one more is refused with
    /// [`QueueFull`](mlx_engine_core::EngineError::QueueFull).
    pub max_queue: usize,
    /// The longest sequence, prompt and answer together, in tokens; at least 1. That of the model where `None`, and where
    /// it is shorter.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context_length: Option<usize>,
    /// Tokens of prompts, of all together, that are fed between two tokens of the answers that run; 1 to 65536. Where `None`,
    /// 512 on a CPU, where answers would wait longer, and where memory is tight, and 2048 elsewhere.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefill_chunk: Option<usize>,
    /// Bytes that the model's weights, its workspace and the keys and values of all its sequences may take together; no
    /// limit where `None`. It is MLX's limit in this process too, where it is told. A model or a request that can never fit is refused with
    /// [`InsufficientMemory`](mlx_engine_core::EngineError::InsufficientMemory), a request that does not fit now waits, and
    /// sequences that are only kept make room first. A request counts with its prompt and all the tokens that it may
    /// generate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_limit: Option<u64>,
    /// What is kept of requests for those that begin alike.
    pub prefix_cache: PrefixCacheConfig,
    /// How keys and values are kept: all of them, as floats, unless told otherwise.
    pub kv: KvConfig,
    /// Whether tokens are guessed, so that a step may give several; off unless told.
    #[serde(skip_serializing_if = "SpeculationConfig::is_off")]
    pub speculation: SpeculationConfig,
    /// Whether a CPU computes all in float32, several times slower, where it would use 8-bit integers for
    /// activations and float16 for keys and values. A GPU computes in the type of the checkpoint either way.
    pub exact: bool,
    /// Threads that compute on a CPU, 1 to 1024; one for each physical core where `None`, more than which gain nothing. MLX's
    /// own operations add none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threads: Option<usize>,
}

/// What is kept of requests for those that begin alike.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PrefixCacheConfig {
    /// Bytes of keys and values that are kept, those used last; 0 keeps none. Where `None`, a quarter of what
    /// [`memory_limit`](EngineConfig::memory_limit) leaves beside the weights, and 1 GiB where there is no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_bytes: Option<u64>,
    /// Where what was computed outlives the process; nowhere where `None`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk: Option<DiskCacheConfig>,
}

/// Keys and values on disk. They are written and read beside the work, in chunks of 256 tokens, and found again by a model
/// of the same content; what is damaged, or takes longer to read than to compute, is computed again. An engine that has nothing else
/// to do writes what is left; one that is [drained](crate::UnloadMode::Drain) has written all of it, and one that is dropped or
/// unloaded otherwise not. A model with a window and `kv.max_positions` forget keys and values, and refuse this.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskCacheConfig {
    /// The folder, which is made where it is missing. Several models and processes may share it.
    pub folder: PathBuf,
    /// Bytes that the files of the folder may take, those used last; 4 GiB unless told, at least 1.
    #[serde(default = "DiskCacheConfig::default_max_bytes")]
    pub max_bytes: u64,
    /// Bytes that have to stay free on the disk; 2 GiB unless told. Nothing is written where there would be less.
    #[serde(default = "DiskCacheConfig::default_min_free_bytes")]
    pub min_free_bytes: u64,
}

impl DiskCacheConfig {
    /// A folder with the limits that are not told otherwise.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self {
            folder: folder.into(),
            max_bytes: Self::default_max_bytes(),
            min_free_bytes: Self::default_min_free_bytes(),
        }
    }

    const fn default_max_bytes() -> u64 {
        4 << 30
    }

    const fn default_min_free_bytes() -> u64 {
        2 << 30
    }
}

impl PrefixCacheConfig {
    /// Keeps nothing.
    pub const OFF: Self = Self::of(0);

    /// Keeps this many bytes.
    pub const fn of(max_bytes: u64) -> Self {
        Self {
            max_bytes: Some(max_bytes),
            disk: None,
        }
    }

    /// Keeps keys and values on disk too.
    pub fn with_disk(mut self, disk: DiskCacheConfig) -> Self {
        self.disk = Some(disk);
        self
    }
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            max_batch: 16,
            max_queue: 64,
            context_length: None,
            prefill_chunk: None,
            memory_limit: None,
            prefix_cache: PrefixCacheConfig::default(),
            kv: KvConfig::default(),
            speculation: SpeculationConfig::Off,
            exact: false,
            threads: None,
        }
    }
}

impl EngineConfig {
    /// Checks every range.
    ///
    /// # Errors
    ///
    /// The first field that is out of its range, with its value and what is allowed.
    pub fn validate(&self) -> Result<(), ParamError> {
        ParamError::between("max_batch", self.max_batch, 1..=1024)?;
        ParamError::between("max_queue", self.max_queue, 0..=1_000_000)?;
        ParamError::at_least("context_length", self.context_length.unwrap_or(1), 1)?;
        ParamError::between("threads", self.threads.unwrap_or(1), 1..=1024)?;
        ParamError::between("prefill_chunk", self.prefill_chunk.unwrap_or(1), 1..=65_536)?;
        ParamError::at_least("memory_limit", self.memory_limit.unwrap_or(1), 1)?;
        let disk = self.prefix_cache.disk.as_ref();
        let max_bytes = disk.map_or(1, |disk| disk.max_bytes);
        ParamError::at_least("prefix_cache.disk.max_bytes", max_bytes, 1)?;
        self.speculation.validate()?;
        self.kv.validate()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_not_written_is_the_default() {
        let read = |value| serde_json::from_value::<EngineConfig>(value);
        assert_eq!(read(json!({})).unwrap(), EngineConfig::default());
        EngineConfig::default().validate().unwrap();
        let config = EngineConfig {
            max_batch: 3,
            prefill_chunk: Some(64),
            memory_limit: Some(1 << 30),
            prefix_cache: PrefixCacheConfig::of(5).with_disk(DiskCacheConfig::new("kept")),
            ..EngineConfig::default()
        };
        let json = serde_json::to_value(&config).unwrap();
        let disk =
            json!({"folder": "kept", "max_bytes": 4_294_967_296_u64, "min_free_bytes": 2_147_483_648_u64});
        assert_eq!(json["prefix_cache"], json!({"max_bytes": 5, "disk": disk}));
        let read_disk = read(json!({"prefix_cache": {"disk": {"folder": "kept"}}})).unwrap();
        assert_eq!(read_disk.prefix_cache.disk, Some(DiskCacheConfig::new("kept")));
        assert_eq!(read(json).unwrap(), config);
        let unknown = read(json!({"max_batches": 3})).unwrap_err().to_string();
        assert!(unknown.contains("unknown field `max_batches`"), "{unknown}");
    }

    #[test]
    fn every_field_has_its_range() {
        let check = |value: serde_json::Value, field: &str| {
            let config: EngineConfig = serde_json::from_value(value).unwrap();
            assert_eq!(config.validate().unwrap_err().field(), field);
        };
        check(json!({"max_batch": 0}), "max_batch");
        check(json!({"max_batch": 1025}), "max_batch");
        check(json!({"max_queue": 1_000_001}), "max_queue");
        check(json!({"context_length": 0}), "context_length");
        check(json!({"prefill_chunk": 0}), "prefill_chunk");
        check(json!({"prefill_chunk": 65_537}), "prefill_chunk");
        check(json!({"memory_limit": 0}), "memory_limit");
        for (field, value) in [
            ("max_tokens", 0),
            ("max_tokens", 33),
            ("min_ngram", 0),
            ("max_ngram", 1),
        ] {
            check(
                json!({"speculation": {"lookup": {field: value}}}),
                &format!("speculation.lookup.{field}"),
            );
        }
        let disk = json!({"folder": "/tmp", "max_bytes": 0});
        check(
            json!({"prefix_cache": {"disk": disk}}),
            "prefix_cache.disk.max_bytes",
        );
    }
}
