//! Encoders of text and of images.

use super::EstimateError;
use super::decoder::MAX_LAYERS;
use super::fields::{Count, Fields};
use super::tensors::Tensors;

/// The encoders that are counted.
const FAMILIES: [&str; 4] = ["bert", "roberta", "xlm-roberta", "modernbert"];

pub(super) fn is_encoder(model_type: &str) -> bool {
    FAMILIES.contains(&model_type)
}

fn layers(fields: &Fields<'_>, names: &[&str]) -> Result<Option<Count>, EstimateError> {
    for name in names {
        if let Some(count) = fields.ranged(name, 0, MAX_LAYERS)? {
            return Ok(Some(Count::from(count)));
        }
    }
    Ok(None)
}

/// Counts an encoder of the BERT family; it caches nothing.
pub(super) fn count(
    fields: &Fields<'_>,
    model_type: &str,
    tensors: &mut Tensors,
) -> Result<(), EstimateError> {
    let hidden = fields.required("hidden_size")?;
    let width = fields.required("intermediate_size")?;
    let count = layers(fields, &["num_hidden_layers"])?.ok_or_else(|| fields.missing("num_hidden_layers"))?;
    tensors.table("word_embeddings", fields.required("vocab_size")?, hidden);
    let modern = model_type == "modernbert";
    if modern {
        for index in 0..count {
            let path = format!("layers.{index}");
            tensors.matrix(&format!("{path}.attn.Wqkv"), 3 * hidden, hidden);
            tensors.matrix(&format!("{path}.attn.Wo"), hidden, hidden);
            tensors.matrix(&format!("{path}.mlp.Wi"), 2 * width, hidden);
            tensors.matrix(&format!("{path}.mlp.Wo"), hidden, width);
            tensors.plain(2 * hidden);
        }
        tensors.plain(2 * hidden);
        return Ok(());
    }
    tensors.table(
        "position_embeddings",
        fields.required("max_position_embeddings")?,
        hidden,
    );
    tensors.table(
        "token_type_embeddings",
        fields.count("type_vocab_size")?.unwrap_or(2),
        hidden,
    );
    tensors.plain(2 * hidden);
    for index in 0..count {
        let path = format!("layers.{index}");
        for name in ["query", "key", "value", "output"] {
            tensors.linear(&format!("{path}.attention.{name}"), hidden, hidden, true);
        }
        tensors.linear(&format!("{path}.intermediate"), width, hidden, true);
        tensors.linear(&format!("{path}.output"), hidden, width, true);
        tensors.plain(4 * hidden);
    }
    tensors.linear("pooler", hidden, hidden, true);
    Ok(())
}

/// The weights of a vision tower and its projector, by the shape that most have: a ViT with biases, and a projector
/// of two matrices. Towers differ in details that come to a few percent of them, and they are a small part of a model.
pub(super) fn vision_weights(vision: &Fields<'_>, text_hidden: Count) -> Result<Count, EstimateError> {
    let Some(count) = layers(vision, &["num_hidden_layers", "depth", "layers"])? else {
        return Ok(0);
    };
    let Some(hidden) = vision.any_dimension(&["hidden_size", "embed_dim", "width"])? else {
        return Ok(0);
    };
    // Qwen2-VL's `hidden_size` is that of the text.
    let hidden = match vision.dimension("embed_dim")? {
        Some(own) => own,
        None => hidden,
    };
    let width = vision.dimension("intermediate_size")?.unwrap_or(4 * hidden);
    let patch = vision
        .any_dimension(&["patch_size", "spatial_patch_size"])?
        .unwrap_or(14);
    let patches = match vision.value("image_size").and_then(serde_json::Value::as_u64) {
        Some(size) if size <= 1 << 16 => {
            let side = Count::from(size) / patch;
            side * side
        }
        _ => vision.count("num_position_embeddings")?.unwrap_or(0),
    };
    let merge = vision.ranged("spatial_merge_size", 1, 64)?.map_or(1, Count::from);
    let out = vision.dimension("out_hidden_size")?.unwrap_or(text_hidden);
    let merged = hidden * merge * merge;
    let layer = 4 * hidden * hidden + 2 * hidden * width + 9 * hidden + width;
    // Qwen3-VL has a merger for each layer whose output the decoder sees too.
    let more = vision.indices("deepstack_visual_indexes")?;
    let mergers = 1 + more.map_or(0, |layers| layers.len() as Count);
    let projector = if merge > 1 {
        mergers * (merged * merged + merged * out)
    } else {
        hidden * out
    };
    Ok(count * layer + (patches + 3 * patch * patch) * hidden + projector)
}
