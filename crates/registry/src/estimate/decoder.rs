//! A decoder: embedding, layers and output layer.

use serde_json::Value;

use super::EstimateError;
use super::family::{Family, Stack, Tied, Windows};
use super::feed::FeedForward;
use super::fields::{Count, Fields};
use super::mixers::{Attention, Cached, DeltaNet, Latent, Mamba, Mamba2, ShortConvolution};
use super::tensors::Tensors;

/// Far above the deepest model, and small enough to walk through.
pub(super) const MAX_LAYERS: u64 = 2048;

/// What one layer consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Layer {
    attention: Option<Span>,
    recurrent: bool,
    feed: Option<Feed>,
}

/// What an attention sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Span {
    All,
    Window,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Feed {
    /// Dense or sparse, as the configuration says for the index.
    Indexed,
    Dense,
    Sparse,
}

/// Counts the tensors. What the layers cache comes back. `tied_outside` is what the configuration around the decoder's says
/// of its output layer.
pub(super) fn count(
    fields: &Fields<'_>,
    family: &Family,
    tied_outside: Option<bool>,
    tensors: &mut Tensors,
) -> Result<Cached, EstimateError> {
    let hidden = fields.required("hidden_size")?;
    let layers = plan(fields, family)?;
    count_ends(fields, family, tied_outside, tensors, hidden)?;

    let uses = |wanted: fn(&Layer) -> bool| layers.iter().any(wanted);
    let attention = (uses(|layer| layer.attention.is_some()) && family.stack != Stack::Latent)
        .then(|| Attention::read(fields, family))
        .transpose()?;
    let latent = (family.stack == Stack::Latent)
        .then(|| Latent::read(fields))
        .transpose()?;
    let recurrent = if uses(|layer| layer.recurrent) {
        Recurrent::read(fields, family)?
    } else {
        None
    };
    let feed = if uses(|layer| layer.feed.is_some()) {
        Some(FeedForward::read(fields, family)?)
    } else {
        None
    };

    let mut cached = Cached::default();
    let norm = hidden * if family.norm_bias { 2 } else { 1 };
    for (index, layer) in layers.iter().enumerate() {
        let path = format!("layers.{index}");
        let attention_path = match family.stack {
            Stack::Pattern => format!("{path}.mixer"),
            _ => format!("{path}.self_attn"),
        };
        if let Some(span) = layer.attention {
            let per_token = match (&attention, &latent) {
                (Some(attention), _) => attention.count(tensors, &attention_path, family),
                (None, Some(latent)) => latent.count(tensors, &attention_path),
                (None, None) => 0,
            };
            match span {
                Span::All => cached.per_token += per_token,
                Span::Window => cached.per_windowed_token += per_token,
            }
        }
        if let Some(recurrent) = recurrent.as_ref().filter(|_| layer.recurrent) {
            cached.state += recurrent.count(tensors, &path, family);
        }
        if let Some(feed) = &feed {
            match layer.feed {
                None => {}
                Some(Feed::Indexed) => feed.count(tensors, &path, index as u64, fields)?,
                Some(Feed::Dense) => feed.count_dense(tensors, &path, fields)?,
                Some(Feed::Sparse) => feed.count_sparse(tensors, &path, fields)?,
            }
        }
        tensors.plain(Count::from(family.norms) * norm);
    }
    tensors.plain(norm);
    Ok(cached)
}

/// Embedding and output layer.
fn count_ends(
    fields: &Fields<'_>,
    family: &Family,
    tied_outside: Option<bool>,
    tensors: &mut Tensors,
    hidden: Count,
) -> Result<(), EstimateError> {
    let vocabulary = match fields.dimension("vocab_size")? {
        Some(size) => size,
        // Gemma 3's configurations leave it out.
        None if fields
            .text("model_type")?
            .is_some_and(|name| name.starts_with("gemma3")) =>
        {
            262_208
        }
        None => return Err(fields.missing("vocab_size")),
    };
    let tied = match family.tied {
        Tied::Always => true,
        Tied::Never => false,
        Tied::Default(default) => fields.flag("tie_word_embeddings", tied_outside.unwrap_or(default))?,
    };
    if tied {
        tensors.matrix("embed_tokens", vocabulary, hidden);
    } else {
        tensors.table("embed_tokens", vocabulary, hidden);
        tensors.linear("lm_head", vocabulary, hidden, fields.flag("lm_head_bias", false)?);
    }
    Ok(())
}

/// The recurrent mixer of a stack.
enum Recurrent {
    Mamba(Mamba),
    Mamba2(Mamba2),
    DeltaNet(DeltaNet),
    ShortConvolution(ShortConvolution),
}

impl Recurrent {
    fn read(fields: &Fields<'_>, family: &Family) -> Result<Option<Self>, EstimateError> {
        Ok(Some(match family.stack {
            Stack::Attention | Stack::Latent => return Ok(None),
            Stack::Mamba | Stack::Jamba => Self::Mamba(Mamba::read(fields, family)?),
            Stack::Mamba2 | Stack::Parallel | Stack::ListedMamba2 | Stack::Pattern => {
                Self::Mamba2(Mamba2::read(fields, family)?)
            }
            Stack::DeltaNet => Self::DeltaNet(DeltaNet::read(fields)?),
            Stack::ShortConvolution => Self::ShortConvolution(ShortConvolution::read(fields)?),
        }))
    }

    fn count(&self, tensors: &mut Tensors, layer: &str, family: &Family) -> Count {
        match self {
            Self::DeltaNet(net) => net.count(tensors, &format!("{layer}.linear_attn")),
            Self::ShortConvolution(convolution) => convolution.count(tensors, &format!("{layer}.conv")),
            Self::Mamba(mamba) => mamba.count(tensors, &format!("{layer}.{}", mamba_name(family))),
            Self::Mamba2(mamba) => mamba.count(tensors, &format!("{layer}.{}", mamba_name(family))),
        }
    }
}

fn mamba_name(family: &Family) -> &'static str {
    match family.stack {
        Stack::Mamba | Stack::Mamba2 | Stack::Pattern => "mixer",
        _ => "mamba",
    }
}

/// Tokens in the window of the layers that have one.
pub(super) fn window(fields: &Fields<'_>) -> Result<Option<u64>, EstimateError> {
    for name in ["sliding_window", "attention_chunk_size"] {
        if let Some(window) = fields.ranged(name, 0, u64::from(u32::MAX))?
            && window > 0
        {
            return Ok(Some(window));
        }
    }
    Ok(None)
}

fn plan(fields: &Fields<'_>, family: &Family) -> Result<Vec<Layer>, EstimateError> {
    if family.stack == Stack::Pattern {
        return pattern(fields);
    }
    let count = match fields.ranged("num_hidden_layers", 1, MAX_LAYERS)? {
        Some(count) => count,
        None => fields
            .ranged("n_layer", 1, MAX_LAYERS)?
            .ok_or_else(|| fields.missing("num_hidden_layers"))?,
    };
    let types = fields.texts("layer_types")?;
    if types.as_ref().is_some_and(|types| types.len() as u64 != count) {
        return Err(fields.invalid("layer_types", "one entry for each of `num_hidden_layers`"));
    }
    let attending = fields.indices("full_attn_idxs")?;
    let windows = Windowing::read(fields, family)?;
    let every = |name: &str, default| -> Result<u64, EstimateError> {
        Ok(fields.ranged(name, 1, u64::from(u32::MAX))?.unwrap_or(default))
    };
    let interval = every("full_attention_interval", 4)?;
    let period = every("attn_layer_period", 8)?;
    let offset = fields
        .ranged("attn_layer_offset", 0, u64::from(u32::MAX))?
        .unwrap_or(4);

    (0..count)
        .map(|index| {
            let listed = types
                .as_ref()
                .and_then(|types| types.get(index as usize))
                .copied();
            let is_windowed = match listed {
                Some("sliding_attention" | "chunked_attention") => true,
                Some("full_attention" | "attention") => false,
                Some("linear_attention" | "conv" | "mamba" | "recurrent")
                    if !matches!(family.stack, Stack::Attention | Stack::Latent) =>
                {
                    false
                }
                Some(_) => {
                    return Err(fields.invalid("layer_types", "the kinds of layer that this family has"));
                }
                None => windows.has(index),
            };
            let span = if is_windowed && windows.size.is_some() {
                Span::Window
            } else {
                Span::All
            };
            let attends = |by_default: bool| {
                listed.map_or(by_default, |kind| {
                    kind.ends_with("attention") && kind != "linear_attention"
                })
            };
            let (attention, recurrent) = match family.stack {
                Stack::Attention | Stack::Latent => (true, false),
                Stack::Mamba | Stack::Mamba2 | Stack::Pattern => (false, true),
                Stack::Parallel => (true, true),
                Stack::DeltaNet => split(attends((index + 1).is_multiple_of(interval))),
                Stack::ShortConvolution => split(attends(
                    attending.as_ref().is_some_and(|indices| indices.contains(&index)),
                )),
                Stack::ListedMamba2 => split(attends(true)),
                Stack::Jamba => split(attends(index % period == offset)),
            };
            let has_feed = !matches!(family.stack, Stack::Mamba | Stack::Mamba2);
            Ok(Layer {
                attention: attention.then_some(span),
                recurrent,
                feed: has_feed.then_some(Feed::Indexed),
            })
        })
        .collect()
}

/// Attention, or else the recurrent mixer.
fn split(attends: bool) -> (bool, bool) {
    (attends, !attends)
}

/// Nemotron's layers: a letter or a name each, with one part alone.
fn pattern(fields: &Fields<'_>) -> Result<Vec<Layer>, EstimateError> {
    let name = ["hybrid_override_pattern", "layers_block_type", "layer_types"]
        .into_iter()
        .find(|name| fields.has(name))
        .ok_or_else(|| fields.missing("hybrid_override_pattern"))?;
    let kinds: Vec<String> = match fields.value(name) {
        Some(Value::String(letters)) => letters.chars().map(String::from).collect(),
        _ => fields
            .texts(name)?
            .unwrap_or_default()
            .into_iter()
            .map(str::to_owned)
            .collect(),
    };
    if kinds.is_empty() || kinds.len() as u64 > MAX_LAYERS {
        return Err(fields.invalid(name, "from 1 to 2048 layers"));
    }
    let part = |kind: &String| {
        let (attention, recurrent, feed) = match &**kind {
            "M" | "mamba" | "linear_attention" | "conv" => (None, true, None),
            "*" | "attention" | "full_attention" => (Some(Span::All), false, None),
            "-" | "mlp" => (None, false, Some(Feed::Dense)),
            "E" | "moe" => (None, false, Some(Feed::Sparse)),
            _ => return Err(fields.invalid(name, "layers of the kinds M, *, - and E")),
        };
        Ok(Layer {
            attention,
            recurrent,
            feed,
        })
    };
    kinds.iter().map(part).collect()
}

/// Which layers see a window, where `layer_types` does not say.
struct Windowing {
    size: Option<u64>,
    rule: Windows,
    from: u64,
    pattern: u64,
}

impl Windowing {
    fn read(fields: &Fields<'_>, family: &Family) -> Result<Self, EstimateError> {
        let mut windowing = Self {
            size: window(fields)?,
            rule: family.windows,
            from: 0,
            pattern: 1,
        };
        match family.windows {
            Windows::Listed => {
                // Llama 4: three layers of four see a chunk.
                if fields.has("attention_chunk_size") {
                    (windowing.rule, windowing.pattern) = (Windows::AllBut(4), 4);
                }
            }
            Windows::All => {}
            Windows::AllBut(nth) => {
                for name in ["sliding_window_pattern", "_sliding_window_pattern"] {
                    // EXAONE 4 writes it as letters.
                    if fields.value(name).is_some_and(Value::is_u64) {
                        windowing.pattern = fields.ranged(name, 1, MAX_LAYERS)?.unwrap_or(nth);
                        return Ok(windowing);
                    }
                }
                windowing.pattern = nth;
            }
            Windows::Switched => {
                if fields.flag("use_sliding_window", false)? {
                    windowing.from = fields
                        .ranged("max_window_layers", 0, u64::from(u32::MAX))?
                        .unwrap_or(0);
                } else {
                    windowing.size = None;
                }
            }
        }
        Ok(windowing)
    }

    fn has(&self, index: u64) -> bool {
        match self.rule {
            Windows::Listed => false,
            Windows::All => true,
            Windows::AllBut(_) => !(index + 1).is_multiple_of(self.pattern),
            Windows::Switched => index >= self.from,
        }
    }
}
