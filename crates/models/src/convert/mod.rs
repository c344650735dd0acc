//! From a checkpoint to the weights and the `config.json` of an MLX folder.
//!
//! Nothing of MLX is called: the quantizer is that of `mlx-engine-checkpoint`. Matrices go through some rows at a time, so that
//! memory does not grow with the model.

mod config;
pub(crate) mod matrix;
mod options;
mod plan;
mod read;
mod write;

use std::collections::BTreeMap;
use std::path::Path;

use mlx_engine_checkpoint::{AffineTensor, ShardWriter, TensorLayout};
use serde_json::{Map, Value};

pub use options::{Conversion, ConvertOptions, ConvertProgress, Recipe, WeightBits};

use crate::ModelError;
use crate::source::Source;
use crate::weights::Loader;
use config::TargetConfig;
use plan::{Item, plan};
use read::Reader;
use write::Written;

/// What was written.
#[derive(Clone, Debug)]
pub struct ConvertedWeights {
    /// The `config.json` that belongs to the weights, with `quantization`.
    pub config: Map<String, Value>,
    /// What became of the tensors, by kind.
    pub conversions: Vec<Conversion>,
    /// The number of weights.
    pub parameters: u64,
    /// Bytes of the weights.
    pub bytes: u64,
    /// The model type of the weights, as `config.json` has them.
    pub model_type: String,
}

/// Writes a checkpoint's weights into a folder in MLX's layout, `model*.safetensors` and their index, and tells `progress` of each
/// block of rows; an error from it gives the conversion up and is returned. What was written so far is left to the caller.
///
/// # Errors
///
/// Where the checkpoint lacks a tensor or has one that the model does not use, where bits and group size are none of MLX's, where a
/// value does not fit the type it should have or is not finite, where `config.json` has no way to say what a GGUF file is, where a
/// file cannot be written, and what `progress` returns.
pub fn convert_weights(
    source: &Source,
    options: &ConvertOptions,
    folder: &Path,
    progress: &mut dyn FnMut(ConvertProgress<'_>) -> Result<(), ModelError>,
) -> Result<ConvertedWeights, ModelError> {
    check_options(options)?;
    if source.spec.experts.is_some() {
        return Err(ModelError::config(format!(
            "a `{}` has experts, whose matrices are not converted yet; mlx_lm.convert does it",
            source.spec.model_type
        )));
    }
    let loader = Loader::new(source)?;
    let mut target = TargetConfig::new(source)?;
    let tensors = Reader {
        source,
        loader: &loader,
    }
    .tensors(&target.spec)?;
    let items = plan(source, options, &tensors, &mut target);
    let layouts: Vec<TensorLayout> = items.iter().flat_map(Item::layouts).collect();
    let mut writer = ShardWriter::create(folder, &layouts, ShardWriter::SHARD_BYTES)?;
    let mut written = Written {
        done: 0,
        total: writer.total_bytes(),
        kinds: BTreeMap::new(),
        loader: &loader,
        progress,
    };
    for item in &items {
        written.write(item, &mut writer)?;
    }
    let parameters = items.iter().map(Item::elements).sum();
    writer.finish(parameters)?;
    Ok(ConvertedWeights {
        model_type: target.spec.model_type.clone(),
        config: target.config,
        conversions: written.conversions(),
        parameters,
        bytes: written.total,
    })
}

fn check_options(options: &ConvertOptions) -> Result<(), ModelError> {
    let (bits, group_size) = match options.bits {
        WeightBits::Uniform { bits, group_size } => (bits, group_size),
        WeightBits::Mixed { recipe, group_size } => (recipe.bits().0, group_size),
        WeightBits::AsTheyAre | WeightBits::Floats => return Ok(()),
    };
    if !AffineTensor::BITS.contains(&bits) {
        return Err(ModelError::config(format!(
            "{bits} bits were asked for, MLX has 2, 3, 4, 5, 6 and 8"
        )));
    }
    if !AffineTensor::GROUP_SIZES.contains(&group_size) {
        return Err(ModelError::config(format!(
            "groups of {group_size} were asked for, MLX has 32, 64 and 128"
        )));
    }
    Ok(())
}
