//! Written safetensors, read by the library and by this crate.

use std::path::Path;

use mlx_engine_checkpoint::{CheckpointError, Dtype, ShardWriter, ShardedCheckpoint, TensorLayout};
use proptest::prelude::*;
use safetensors::SafeTensors;
use serde_json::{Value, json};

fn layout(name: &str, dtype: Dtype, shape: &[usize]) -> TensorLayout {
    TensorLayout {
        name: name.to_owned(),
        dtype,
        shape: shape.to_vec(),
    }
}

fn index(folder: &Path) -> Value {
    let text = std::fs::read(folder.join("model.safetensors.index.json")).expect("there is an index");
    serde_json::from_slice(&text).expect("it is JSON")
}

#[test]
fn a_file_is_what_the_library_reads() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = [
        layout("a.scales", Dtype::F16, &[3]),
        layout("a.weight", Dtype::U32, &[2, 2]),
        layout("b", Dtype::F32, &[1]),
        layout("nothing", Dtype::BF16, &[0, 4]),
    ];
    let mut writer = ShardWriter::create(folder.path(), &tensors, ShardWriter::SHARD_BYTES).unwrap();
    assert_eq!(writer.total_bytes(), 6 + 16 + 4);
    // In another order than they were announced in.
    let data: Vec<u8> = (0..16).collect();
    writer.write("b", &1.5_f32.to_le_bytes()).unwrap();
    writer.write("a.weight", &data[..5]).unwrap();
    writer.write("a.weight", &data[5..]).unwrap();
    writer.write("nothing", &[]).unwrap();
    writer.write("a.scales", &data[..6]).unwrap();
    writer.finish(5).unwrap();

    let bytes = std::fs::read(folder.path().join("model.safetensors")).unwrap();
    let (_, about) = SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(about.metadata().as_ref().unwrap()["format"], "mlx");
    let read = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(read.tensor("a.weight").unwrap().data(), data);
    assert_eq!(read.tensor("a.scales").unwrap().shape(), [3]);
    assert_eq!(read.tensor("b").unwrap().data(), 1.5_f32.to_le_bytes());
    assert_eq!(read.len(), 4);
    assert_eq!(
        index(folder.path()),
        json!({
            "metadata": {"total_size": 26, "total_parameters": 5},
            "weight_map": {
                "a.scales": "model.safetensors", "a.weight": "model.safetensors", "b": "model.safetensors",
                "nothing": "model.safetensors",
            },
        })
    );
}

/// mlx-lm's `make_shards`: a tensor that would not fit begins the next shard, and a larger one has its own.
#[test]
fn shards_are_dealt_as_mlx_lm_deals_them() {
    let folder = tempfile::tempdir().unwrap();
    let sizes = [4_usize, 4, 1, 12, 2, 8];
    let tensors: Vec<_> = sizes
        .iter()
        .enumerate()
        .map(|(number, &size)| layout(&format!("t{number}"), Dtype::U8, &[size]))
        .collect();
    let mut writer = ShardWriter::create(folder.path(), &tensors, 9).unwrap();
    for (number, &size) in sizes.iter().enumerate() {
        writer
            .write(&format!("t{number}"), &vec![number as u8; size])
            .unwrap();
    }
    writer.finish(0).unwrap();
    let map = &index(folder.path())["weight_map"];
    let shard = |number: usize| map[format!("t{number}")].as_str().unwrap().to_owned();
    let expected = [1, 1, 1, 2, 3, 4].map(|shard| format!("model-{shard:05}-of-00004.safetensors"));
    assert_eq!([0, 1, 2, 3, 4, 5].map(shard), expected);
    let read = ShardedCheckpoint::open(folder.path()).unwrap();
    assert_eq!(read.tensor("t3").unwrap().data, [3; 12]);
    assert_eq!(read.names().len(), 6);
}

#[test]
fn what_was_not_announced_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = [layout("a", Dtype::U8, &[2])];
    let mut writer = ShardWriter::create(folder.path(), &tensors, 100).unwrap();
    let mut error = |name: &str, data: &[u8]| writer.write(name, data).unwrap_err().to_string();
    assert!(error("b", &[1]).contains("tensor `b` of "), "a name");
    assert!(error("a", &[1; 3]).ends_with("has 3 bytes where 2 were announced"));
    let unwritten = writer.finish(0).unwrap_err().to_string();
    assert!(
        unwritten.ends_with("has 0 bytes where 2 were announced"),
        "{unwritten}"
    );

    let folder = tempfile::tempdir().unwrap();
    let mut writer = ShardWriter::create(folder.path(), &tensors, 100).unwrap();
    writer.write("a", &[1, 2]).unwrap();
    let again = writer.write("a", &[1]).unwrap_err().to_string();
    assert!(again.ends_with("has 3 bytes where 2 were announced"), "{again}");

    // Never over a file that is there.
    let there = ShardWriter::create(folder.path(), &tensors, 100);
    assert!(matches!(there, Err(CheckpointError::Write { .. })));
    let twice = [tensors[0].clone(), tensors[0].clone()];
    let folder = tempfile::tempdir().unwrap();
    let twice = ShardWriter::create(folder.path(), &twice, 100)
        .unwrap_err()
        .to_string();
    assert!(twice.ends_with("was announced twice"), "{twice}");
}

proptest! {
    // Each case waits for the disk.
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn what_is_written_is_what_is_read(
        tensors in prop::collection::btree_map("[a-z.0-9]{1,12}", (0_usize..5, 0_usize..5, 0_usize..4), 1..12),
        shard_bytes in 1_u64..200,
    ) {
        let dtypes = [Dtype::F32, Dtype::F16, Dtype::U32, Dtype::BF16];
        let layouts: Vec<_> = tensors
            .iter()
            .map(|(name, &(rows, columns, dtype))| layout(name, dtypes[dtype], &[rows, columns]))
            .collect();
        let data = |layout: &TensorLayout| -> Vec<u8> {
            (0..layout.bytes()).map(|at| (at as u8).wrapping_add(layout.name.len() as u8)).collect()
        };
        let folder = tempfile::tempdir().unwrap();
        let mut writer = ShardWriter::create(folder.path(), &layouts, shard_bytes).unwrap();
        for layout in layouts.iter().rev() {
            writer.write(&layout.name, &data(layout)).unwrap();
        }
        writer.finish(1).unwrap();
        let read = ShardedCheckpoint::open(folder.path()).unwrap();
        prop_assert_eq!(read.names().len(), layouts.len());
        for layout in &layouts {
            let tensor = read.tensor(&layout.name).unwrap();
            prop_assert_eq!(tensor.shape, &layout.shape[..]);
            prop_assert_eq!(tensor.dtype, layout.dtype);
            prop_assert_eq!(tensor.data, data(layout));
        }
    }
}
