//! The values of ggml's blocks, against gguf-py.

use mlx_engine_checkpoint::{AffineTensor, CheckpointError, GgmlType};
use proptest::prelude::*;

fn hex(text: &str) -> Vec<u8> {
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).expect("the fixture is whole"))
        .collect()
}

/// The bytes and values of each type in `blocks.json`.
fn cases() -> Vec<(GgmlType, Vec<u8>, Vec<f32>)> {
    let json: serde_json::Value =
        serde_json::from_str(include_str!("fixtures/blocks.json")).expect("the fixture is whole");
    GgmlType::ALL
        .into_iter()
        .map(|ggml_type| {
            let case = &json[ggml_type.name()];
            let values = hex(case["values"].as_str().expect("the fixture is whole"));
            let values = values
                .chunks_exact(4)
                .map(|four| f32::from_le_bytes(four.try_into().expect("the fixture is whole")))
                .collect();
            (
                ggml_type,
                hex(case["bytes"].as_str().expect("the fixture is whole")),
                values,
            )
        })
        .collect()
}

/// Relative to the largest value of the blocks, as a difference of large numbers may be near zero.
fn assert_close(ggml_type: GgmlType, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{ggml_type}");
    let largest = expected
        .iter()
        .fold(f32::MIN_POSITIVE, |most, value| most.max(value.abs()));
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!(
            (found - expected).abs() <= 1e-6 * largest,
            "{ggml_type}[{i}]: {found} is not {expected}"
        );
    }
}

#[test]
fn values_are_those_of_gguf_py() {
    for (ggml_type, bytes, expected) in cases() {
        assert_close(ggml_type, &ggml_type.dequantize(&bytes).unwrap(), &expected);
    }
}

#[test]
fn the_affine_layout_keeps_every_value() {
    let mut mapped = Vec::new();
    for (ggml_type, bytes, expected) in cases() {
        let Some(affine) = AffineTensor::from_ggml(ggml_type, &bytes, 2, expected.len() / 2).unwrap() else {
            continue;
        };
        mapped.push(ggml_type.name());
        assert_eq!(affine.packed.len() * 32, expected.len() * affine.bits as usize);
        assert_close(ggml_type, &affine.dequantize(), &expected);
    }
    assert_eq!(mapped, ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K"]);
}

#[test]
fn a_part_of_a_block_is_refused() {
    let error = GgmlType::Q4_0.dequantize(&[0; 19]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "19 bytes are not whole blocks of Q4_0, which have 18 bytes"
    );
    let error = AffineTensor::from_ggml(GgmlType::Q8_0, &[0; 34], 2, 32).unwrap_err();
    assert!(
        matches!(error, CheckpointError::PartialBlock { bytes: 34, .. }),
        "{error:?}"
    );
    let error = AffineTensor::rounded_from_ggml(GgmlType::Q6_K, &[0; 210], 2, 256).unwrap_err();
    assert!(
        matches!(error, CheckpointError::PartialBlock { bytes: 210, .. }),
        "{error:?}"
    );
}

proptest! {
    #[test]
    fn any_finite_blocks_map_onto_the_affine_layout(
        which in 0..GgmlType::ALL.len(),
        seed in prop::collection::vec(any::<u8>(), 210 * 2),
        halves in prop::collection::vec(-0.5f32..0.5, 2),
    ) {
        let ggml_type = GgmlType::ALL[which];
        let mut bytes = seed[..ggml_type.block_bytes() * 2].to_vec();
        // The halves of the formats that map stand at the beginning of a block.
        for block in bytes.chunks_exact_mut(ggml_type.block_bytes()) {
            let count = match ggml_type {
                GgmlType::Q4_0 | GgmlType::Q5_0 | GgmlType::Q8_0 => 1,
                GgmlType::Q4_1 | GgmlType::Q5_1 | GgmlType::Q4_K | GgmlType::Q5_K => 2,
                _ => 0,
            };
            for i in 0..count {
                block[2 * i..2 * i + 2].copy_from_slice(&half::f16::from_f32(halves[i]).to_le_bytes());
            }
        }
        let affine = AffineTensor::from_ggml(ggml_type, &bytes, 2, ggml_type.block_len()).unwrap();
        if let Some(affine) = affine {
            assert_close(ggml_type, &affine.dequantize(), &ggml_type.dequantize(&bytes).unwrap());
        }
    }

    /// What is rounded is as near as it is said to be, and scales and biases are float16.
    #[test]
    fn rounded_blocks_are_near(
        which in 0..GgmlType::ALL.len(),
        seed in prop::collection::vec(any::<u8>(), 210 * 2),
        halves in prop::collection::vec(prop_oneof![-0.5_f32..0.5, -1e-4_f32..1e-4, Just(0.0)], 2),
    ) {
        let ggml_type = GgmlType::ALL[which];
        let mut bytes = seed[..ggml_type.block_bytes() * 2].to_vec();
        for block in bytes.chunks_exact_mut(ggml_type.block_bytes()) {
            let places: &[usize] = match ggml_type {
                GgmlType::Q4_0 | GgmlType::Q5_0 | GgmlType::Q8_0 => &[0],
                GgmlType::Q4_1 | GgmlType::Q5_1 | GgmlType::Q4_K | GgmlType::Q5_K => &[0, 2],
                GgmlType::Q2_K => &[80, 82],
                GgmlType::Q3_K => &[108],
                GgmlType::Q6_K => &[208],
                GgmlType::F32 | GgmlType::F16 | GgmlType::BF16 => &[],
            };
            for (&at, &half) in places.iter().zip(&halves) {
                block[at..at + 2].copy_from_slice(&half::f16::from_f32(half).to_le_bytes());
            }
        }
        let affine = AffineTensor::rounded_from_ggml(ggml_type, &bytes, 2, ggml_type.block_len()).unwrap();
        prop_assert_eq!(affine.is_none(), ggml_type.is_float());
        let Some(affine) = affine else { return Ok(()) };
        prop_assert_eq!(Some((affine.bits, affine.group_size)), AffineTensor::rounded_form_of(ggml_type));
        for &value in affine.scales.iter().chain(&affine.biases) {
            prop_assert_eq!(half::f16::from_f32(value).to_f32(), value);
        }
        let expected = ggml_type.dequantize(&bytes).unwrap();
        for (group, (found, expected)) in affine.dequantize().chunks(32).zip(expected.chunks(32)).enumerate() {
            let largest = expected.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
            // Of a sum of two rounded numbers each may be larger than it; a float16 is exact to 2^-25 at least.
            let summands = affine.scales[group].abs() * 31.0 + affine.biases[group].abs();
            let near = match AffineTensor::form_of(ggml_type) {
                Some(_) => summands / 2048.0 + 32.0 / (1 << 25) as f32,
                None => largest / 254.0 * 1.002 + 1.0 / (1 << 24) as f32,
            };
            for (found, expected) in found.iter().zip(expected) {
                prop_assert!((found - expected).abs() <= near, "{}: {} is not {}", ggml_type, found, expected);
            }
        }
    }
}
