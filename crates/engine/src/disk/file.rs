//! A chunk as a safetensors file: its tokens, its block, and what they are.

use std::collections::HashMap;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use super::chain::Name;

const FORMAT: &str = "mlx-engine-prefix-1";

/// The check sum of a chunk.
fn check(name: &str, tokens: &[u8], block: &[u8]) -> String {
    let mut hash = crc32fast::Hasher::new();
    hash.update(name.as_bytes());
    hash.update(tokens);
    hash.update(block);
    format!("{:08x}", hash.finalize())
}

fn bytes(tokens: &[u32]) -> Vec<u8> {
    tokens.iter().flat_map(|token| token.to_le_bytes()).collect()
}

/// The file of a chunk.
pub(super) fn encode(name: &Name, tokens: &[u32], block: &[u8]) -> Result<Vec<u8>, String> {
    let (name, ids) = (name.to_string(), bytes(tokens));
    let metadata = HashMap::from([
        ("format".to_owned(), FORMAT.to_owned()),
        ("crc32".to_owned(), check(&name, &ids, block)),
        ("name".to_owned(), name),
    ]);
    let tensor =
        |dtype, shape, data| TensorView::new(dtype, vec![shape], data).map_err(|error| error.to_string());
    let tensors = [
        ("tokens", tensor(Dtype::U32, tokens.len(), &ids)?),
        ("block", tensor(Dtype::U8, block.len(), block)?),
    ];
    safetensors::serialize(tensors, Some(metadata)).map_err(|error| error.to_string())
}

/// The block in a file, where it is the one of this name and these tokens; else what is wrong.
pub(super) fn decode(file: &[u8], name: &Name, tokens: &[u32]) -> Result<Vec<u8>, String> {
    let (_, header) = SafeTensors::read_metadata(file).map_err(|error| error.to_string())?;
    let found = |key: &str| header.metadata().as_ref()?.get(key).cloned();
    if found("format").as_deref() != Some(FORMAT) {
        return Err("it has another format".to_owned());
    }
    let name = name.to_string();
    if found("name").as_ref() != Some(&name) {
        return Err("it is of another model or other tokens".to_owned());
    }
    let tensors = SafeTensors::deserialize(file).map_err(|error| error.to_string())?;
    let tensor = |name: &str| tensors.tensor(name).map_err(|error| error.to_string());
    let (ids, block) = (tensor("tokens")?, tensor("block")?);
    if ids.dtype() != Dtype::U32 || ids.data() != bytes(tokens) {
        return Err("its tokens are others".to_owned());
    }
    if found("crc32") != Some(check(&name, ids.data(), block.data())) {
        return Err("its check sum is another".to_owned());
    }
    Ok(block.data().to_vec())
}
