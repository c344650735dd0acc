//! Whole files: what is in good ones, and what is said of bad ones.

use std::path::Path;

use mlx_engine_checkpoint::{
    CheckpointError, Dtype, GgmlType, GgufFile, GgufValue, SafetensorsFile, ShardedCheckpoint,
};
use proptest::prelude::*;

const GGUF: &[u8] = include_bytes!("fixtures/small.gguf");
const SAFETENSORS: &[u8] = include_bytes!("fixtures/small.safetensors");

fn gguf(bytes: &[u8]) -> Result<GgufFile, CheckpointError> {
    GgufFile::from_bytes("small.gguf", bytes.to_vec())
}

fn gguf_error(bytes: &[u8]) -> String {
    gguf(bytes).expect_err("the file is bad").to_string()
}

fn safetensors(bytes: &[u8]) -> Result<SafetensorsFile, CheckpointError> {
    SafetensorsFile::from_bytes("small.safetensors", bytes.to_vec())
}

#[test]
fn gguf_metadata_of_every_type() {
    let file = gguf(GGUF).unwrap();
    let metadata = file.metadata();
    let integers = ["u8", "u16", "u32", "u64"].map(|name| metadata.u64(&format!("t.{name}")).unwrap());
    assert_eq!(integers, [200, 60_000, 4_000_000_000, 1 << 60]);
    let signed = ["i8", "i16", "i32", "i64"].map(|name| metadata.get(&format!("t.{name}")).unwrap().as_i64());
    assert_eq!(signed, [Some(-5), Some(-300), Some(-70_000), Some(-(1 << 40))]);
    assert_eq!(metadata.optional_f64("t.f32").unwrap(), Some(0.5));
    assert_eq!(metadata.optional_f64("t.f64").unwrap(), Some(0.1));
    assert_eq!(metadata.optional_bool("t.bool").unwrap(), Some(true));
    assert_eq!(metadata.string("t.string").unwrap(), "grüße");
    assert_eq!(
        metadata.optional_strings("t.strings").unwrap().unwrap(),
        ["a", "", "ß"]
    );
    assert_eq!(metadata.optional_i32s("t.ints").unwrap().unwrap(), [1, -2, 3]);
    assert_eq!(metadata.optional_f32s("t.floats").unwrap().unwrap(), [0.5, -1.5]);
    assert_eq!(metadata.optional_string("t.none").unwrap(), None);
    assert_eq!(metadata.optional_u32("t.u32").unwrap(), Some(4_000_000_000));
    assert_eq!(
        metadata.iter().next(),
        Some(("general.architecture", &GgufValue::String("llama".to_owned())))
    );
}

#[test]
fn a_getter_names_the_key_and_what_it_found() {
    let file = gguf(GGUF).unwrap();
    let check = |error: CheckpointError, expect: &str| assert_eq!(error.to_string(), expect);
    check(
        file.metadata().string("t.none").unwrap_err(),
        "metadata `t.none` is missing",
    );
    check(
        file.metadata().string("t.u8").unwrap_err(),
        "metadata `t.u8` is an integer, expected a string",
    );
    check(
        file.metadata().u64("t.i8").unwrap_err(),
        "metadata `t.i8` is an integer, expected an integer that is not negative",
    );
}

#[test]
fn gguf_tensors_have_row_major_shapes() {
    let file = gguf(GGUF).unwrap();
    let shapes: Vec<_> = file
        .tensors()
        .map(|tensor| (tensor.name, tensor.ggml_type, tensor.shape.to_vec()))
        .collect();
    assert_eq!(
        shapes,
        [
            ("plain", GgmlType::F32, vec![2, 3]),
            ("half", GgmlType::F16, vec![4]),
            ("blocks", GgmlType::Q8_0, vec![2, 64]),
        ]
    );
    assert_eq!(
        file.tensor("plain").unwrap().dequantize().unwrap(),
        [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    );
    assert_eq!(
        file.tensor("half").unwrap().dequantize().unwrap(),
        [0.0, 1.0, 2.0, 3.0]
    );
    assert_eq!(file.tensor("blocks").unwrap().elements(), 128);
    assert!(file.tensor("other").is_none());
}

#[test]
fn every_truncation_is_an_error() {
    // The last tensor is padded to the alignment, and whole without that.
    let len = GGUF.len() - 24;
    assert!(gguf(&GGUF[..len]).is_ok());
    for len in 0..len {
        assert!(gguf(&GGUF[..len]).is_err(), "GGUF cut to {len}");
    }
    for len in 0..SAFETENSORS.len() {
        let error = safetensors(&SAFETENSORS[..len]).unwrap_err();
        assert!(
            matches!(error, CheckpointError::Truncated { .. }),
            "safetensors cut to {len}: {error}"
        );
    }
    let len = GGUF.len();
    assert_eq!(
        gguf_error(&GGUF[..len - 40]),
        format!(
            "`small.gguf` is truncated: tensor `blocks` needs {} bytes, the file has {}; fetch it again",
            len - 24,
            len - 40
        )
    );
    let len = SAFETENSORS.len();
    let error = safetensors(&SAFETENSORS[..len - 1]).unwrap_err().to_string();
    assert_eq!(
        error,
        format!(
            "`small.safetensors` is truncated: the last tensor needs {len} bytes, the file has {}; fetch it again",
            len - 1
        )
    );
}

/// Writes `with` over the first occurrence of `what`.
fn replace(bytes: &[u8], what: &[u8], with: &[u8]) -> Vec<u8> {
    let at = bytes
        .windows(what.len())
        .position(|window| window == what)
        .expect("the test is set up");
    let mut bytes = bytes.to_vec();
    bytes[at..at + with.len()].copy_from_slice(with);
    bytes
}

#[test]
fn what_was_released_is_read_again_and_what_was_forgotten_is_gone() {
    let folder = folder(&[("small.gguf", GGUF), ("small.safetensors", SAFETENSORS)]);
    let mut file = GgufFile::open(&folder.path().join("small.gguf")).unwrap();
    file.release();
    for (found, expected) in file.tensors().zip(gguf(GGUF).unwrap().tensors()) {
        assert_eq!((found.name, found.data), (expected.name, expected.data));
    }
    file.forget("t.");
    assert!(file.metadata().get("t.u32").is_none());
    assert!(file.metadata().iter().all(|(key, _)| !key.starts_with("t.")));
    assert!(file.metadata().string("general.architecture").is_ok());
    let file = SafetensorsFile::open(&folder.path().join("small.safetensors")).unwrap();
    let names: Vec<String> = file.names().map(str::to_owned).collect();
    file.release();
    let expected = safetensors(SAFETENSORS).unwrap();
    for name in names {
        assert_eq!(
            file.tensor(&name).unwrap().data,
            expected.tensor(&name).unwrap().data
        );
    }
}

#[test]
fn what_is_wrong_with_a_gguf_file_is_said() {
    let check = |bytes: &[u8], expect: &str| {
        let error = gguf_error(bytes);
        assert!(error.contains(expect), "{error}");
    };
    check(b"PK\x03\x04", "does not begin with `GGUF`");
    check(b"", "does not begin with `GGUF`");
    check(b"GGUF\x01\0\0\0", "version 1 is not supported, only 2 and 3 are");
    check(b"GGUF\0\0\0\x03", "which is big-endian");
    check(&replace(GGUF, b"t.i8", b"t.u8"), "metadata `t.u8` is there twice");
    check(
        &replace(GGUF, b"plain\x02", b"plain\x09"),
        "tensor `plain` has 9 axes, at most 4 are allowed",
    );
    let mut unknown = GGUF.to_vec();
    let at = GGUF.windows(4).position(|window| window == b"half").unwrap();
    unknown[at + 4 + 4 + 8] = 23;
    check(
        &unknown,
        "tensor `half` has the type number 23, supported: F32, F16, BF16, Q4_0",
    );
    let mut partial = GGUF.to_vec();
    partial[at + 4 + 4 + 8] = 8;
    check(
        &partial,
        "tensor `half` has rows of 4, which are not whole blocks of 32 for Q8_0",
    );
    let mut huge = GGUF.to_vec();
    huge[at + 8..at + 16].copy_from_slice(&(u64::MAX / 4).to_le_bytes());
    check(&huge, "tensor `half`");
    let mut overlapping = GGUF.to_vec();
    overlapping[at + 4 + 4 + 8 + 4..][..8].copy_from_slice(&0_u64.to_le_bytes());
    check(&overlapping, "tensors `plain` and `half` overlap");
    let mut misaligned = GGUF.to_vec();
    misaligned[at + 4 + 4 + 8 + 4..][..8].copy_from_slice(&33_u64.to_le_bytes());
    check(&misaligned, "tensor `half` is at offset 33, not aligned to 32");
}

#[test]
fn a_count_is_compared_with_the_file_before_it_is_believed() {
    // 2^60 entries of metadata in a file of 24 bytes.
    let mut bytes = b"GGUF\x03\0\0\0\0\0\0\0\0\0\0\0".to_vec();
    bytes.extend((1_u64 << 60).to_le_bytes());
    assert!(gguf_error(&bytes).contains("the number of metadata entries of 1152921504606846976"));
    let mut bytes = b"GGUF\x03\0\0\0".to_vec();
    bytes.extend((1_u64 << 60).to_le_bytes());
    bytes.extend(0_u64.to_le_bytes());
    assert!(gguf_error(&bytes).contains("the list of 1152921504606846976 tensors"));
}

#[test]
fn safetensors_tensors() {
    let file = safetensors(SAFETENSORS).unwrap();
    assert_eq!(
        file.names().collect::<Vec<_>>(),
        ["a.weight", "b.weight", "c.packed"]
    );
    let tensor = file.tensor("a.weight").unwrap();
    assert_eq!(
        (tensor.dtype, tensor.shape, tensor.data.len()),
        (Dtype::F32, &[2, 3][..], 24)
    );
    assert_eq!(tensor.data[20..], 5.0_f32.to_le_bytes());
    let tensor = file.tensor("c.packed").unwrap();
    assert_eq!(
        (tensor.dtype, tensor.data),
        (Dtype::U32, [0_u32, 1, 2, 3].map(u32::to_le_bytes).as_flattened())
    );
    assert!(file.tensor("d").is_none());
}

#[test]
fn what_is_wrong_with_a_safetensors_file_is_said() {
    let check = |header: &str, expect: &str| {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        let error = safetensors(&bytes).unwrap_err().to_string();
        assert!(error.contains(expect), "{header}: {error}");
    };
    check("{", "`small.safetensors` is not a valid safetensors file");
    check(
        r#"{"x":{"dtype":"F8_E4M3","shape":[0],"data_offsets":[0,0]}}"#,
        "tensor `x` has the type F8_E4M3",
    );
    check(
        r#"{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#,
        "is truncated: the last tensor needs",
    );
}

/// A folder with these files.
fn folder(files: &[(&str, &[u8])]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("the test is set up");
    for (name, bytes) in files {
        std::fs::write(folder.path().join(name), bytes).expect("the test is set up");
    }
    folder
}

/// A safetensors file with one tensor.
fn one(name: &str) -> Vec<u8> {
    let header = format!(r#"{{"{name}":{{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}}}"#);
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.push(7);
    bytes
}

#[test]
fn a_folder_is_one_file_or_many() {
    let single = folder(&[
        ("model.safetensors", SAFETENSORS),
        ("model-old.safetensors", b"no"),
    ]);
    let checkpoint = ShardedCheckpoint::open(single.path()).unwrap();
    assert_eq!(checkpoint.names().len(), 3);
    assert_eq!(checkpoint.total_bytes(), SAFETENSORS.len() as u64);
    assert_eq!(checkpoint.folder(), single.path());

    let index = br#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}"#;
    let (a, b) = (one("a"), one("b"));
    let files: [(&str, &[u8]); 3] = [
        ("model-1.safetensors", &a),
        ("model-2.safetensors", &b),
        ("model.safetensors.index.json", index),
    ];
    for files in [&files[..], &files[..2]] {
        let sharded = folder(files);
        let checkpoint = ShardedCheckpoint::open(sharded.path()).unwrap();
        assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(checkpoint.tensor("b").unwrap().data, [7]);
        assert!(checkpoint.tensor("c").is_none());
    }
}

#[test]
fn what_is_wrong_with_a_folder_is_said() {
    let check = |files: &[(&str, &[u8])], expect: &str| {
        let folder = folder(files);
        let error = ShardedCheckpoint::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains(expect), "{error}");
    };
    let index = |map: &str| format!(r#"{{"weight_map": {map}}}"#).into_bytes();
    let a = one("a");
    check(
        &[],
        "has no `model.safetensors`, no `model.safetensors.index.json` and no `model*.safetensors`",
    );
    check(
        &[("model.safetensors.index.json", b"{}")],
        "it has no object `weight_map`",
    );
    check(&[("model.safetensors.index.json", b"{")], "EOF");
    check(
        &[("model.safetensors.index.json", &index(r#"{"a": 1}"#))],
        "the file of `a` is 1",
    );
    check(
        &[(
            "model.safetensors.index.json",
            &index(r#"{"a": "../../etc/passwd"}"#),
        )],
        "the file of `a` is `../../etc/passwd`, which is no plain file name",
    );
    check(
        &[(
            "model.safetensors.index.json",
            &index(r#"{"a": "gone.safetensors"}"#),
        )],
        "gone.safetensors",
    );
    check(
        &[
            (
                "model.safetensors.index.json",
                &index(r#"{"b": "model-1.safetensors"}"#),
            ),
            ("model-1.safetensors", &a),
        ],
        "tensor `b` is missing from `model-1.safetensors`",
    );
    check(
        &[("model-1.safetensors", &a), ("model-2.safetensors", &a)],
        "tensor `a` is in `model-1.safetensors` too",
    );
}

#[test]
fn a_path_that_is_no_file_is_said() {
    let error = GgufFile::open(Path::new("no/such.gguf")).unwrap_err();
    assert_eq!(error.to_string(), "failed to open `no/such.gguf`");
    let folder = folder(&[]);
    let error = GgufFile::open(folder.path()).unwrap_err();
    assert!(matches!(error, CheckpointError::Open { .. }), "{error:?}");
    let path = folder.path().join("empty.safetensors");
    std::fs::write(&path, b"").unwrap();
    let error = SafetensorsFile::open(&path).unwrap_err().to_string();
    assert!(
        error.contains("`empty.safetensors` is truncated: the header's length needs 8 bytes"),
        "{error}"
    );
}

proptest! {
    #[test]
    fn damaged_files_never_panic(
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        for (bytes, is_gguf) in [(GGUF, true), (SAFETENSORS, false)] {
            let mut bytes = bytes.to_vec();
            for (index, value) in &flips {
                let at = index.index(bytes.len());
                bytes[at] = *value;
            }
            if is_gguf {
                if let Ok(file) = gguf(&bytes) {
                    for tensor in file.tensors() {
                        prop_assert_eq!(tensor.dequantize().unwrap().len(), tensor.elements());
                    }
                }
            } else if let Ok(file) = safetensors(&bytes) {
                for name in file.names() {
                    prop_assert!(file.tensor(name).is_some());
                }
            }
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(tail in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = safetensors(&tail);
        let _ = gguf(&[b"GGUF\x03\0\0\0", tail.as_slice()].concat());
    }
}
