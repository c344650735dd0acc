//! The affine quantizer, against MLX's own.

use mlx_engine_checkpoint::{AffineTensor, CheckpointError, FloatType, SafetensorsFile, TensorView};
use proptest::prelude::*;

fn fixture() -> SafetensorsFile {
    let bytes = include_bytes!("fixtures/quantized.safetensors");
    SafetensorsFile::from_bytes("quantized.safetensors", bytes.to_vec()).expect("the fixture is whole")
}

fn tensor<'a>(file: &'a SafetensorsFile, name: &str) -> TensorView<'a> {
    file.tensor(name)
        .unwrap_or_else(|| panic!("the fixture has {name}"))
}

#[test]
fn bits_are_those_of_mlx() {
    let file = fixture();
    let mut groups = 0;
    for float_type in FloatType::ALL {
        let values = tensor(&file, &format!("values.{float_type}"));
        let shape = [values.shape[0], values.shape[1]];
        let values = float_type.decode(values.data);
        for bits in AffineTensor::BITS {
            for group_size in AffineTensor::GROUP_SIZES {
                let name = format!("{float_type}.{bits}.{group_size}");
                let found = AffineTensor::quantize(&values, shape, bits, group_size, float_type).unwrap();
                let packed: Vec<u8> = found.packed.iter().flat_map(|word| word.to_le_bytes()).collect();
                for (part, found) in [
                    ("weight", packed),
                    ("scales", float_type.encode(&found.scales)),
                    ("biases", float_type.encode(&found.biases)),
                ] {
                    let expected = tensor(&file, &format!("{name}.{part}"));
                    assert_eq!(found, expected.data, "{name}.{part}");
                }
                groups += found.scales.len();
            }
        }
    }
    // 20 rows in 4, 2 and 1 groups of each type and each number of bits.
    assert_eq!(groups, 20 * (4 + 2 + 1) * 3 * 6);
}

#[test]
fn a_large_matrix_is_that_of_its_rows() {
    // Enough for several threads, whose shares do not end where rows do.
    let (rows, columns) = (2100, 288);
    let values: Vec<f32> = (0..rows * columns)
        .map(|i| ((i * 7919 % 10_007) as f32 - 5000.0) * 1e-3)
        .collect();
    let whole = AffineTensor::quantize(&values, [rows, columns], 5, 32, FloatType::F16).unwrap();
    for (row, values) in values.chunks_exact(columns).enumerate() {
        let alone = AffineTensor::quantize(values, [1, columns], 5, 32, FloatType::F16).unwrap();
        let (words, groups) = (columns * 5 / 32, columns / 32);
        assert_eq!(whole.packed[row * words..][..words], alone.packed);
        assert_eq!(whole.scales[row * groups..][..groups], alone.scales);
        assert_eq!(whole.biases[row * groups..][..groups], alone.biases);
    }
}

#[test]
fn what_cannot_be_quantized_is_said() {
    let check = |values: &[f32], shape, bits, group_size, expect: &str| {
        let error = AffineTensor::quantize(values, shape, bits, group_size, FloatType::F32).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("it cannot be quantized to {bits} bits in groups of {group_size}: {expect}")
        );
    };
    let zeros = [0.0; 128];
    check(&zeros, [2, 64], 7, 64, "bits may be 2, 3, 4, 5, 6 or 8");
    check(&zeros, [2, 64], 4, 16, "groups may be of 32, 64 or 128");
    check(&zeros, [2, 64], 4, 128, "64 columns are not whole groups");
    check(&zeros, [3, 64], 4, 64, "128 values are no 3 x 64 matrix");
    let mut values = zeros;
    values[64 + 3] = f32::NEG_INFINITY;
    check(&values, [2, 64], 4, 32, "the value in row 1, column 3 is -inf");
    values[1] = f32::NAN;
    check(&values, [2, 64], 4, 32, "the value in row 0, column 1 is NaN");
    assert!(matches!(
        AffineTensor::quantize(&zeros, [usize::MAX, 64], 4, 64, FloatType::F32),
        Err(CheckpointError::Quantization { .. })
    ));
}

#[test]
fn nothing_is_quantized_to_nothing() {
    let empty = AffineTensor::quantize(&[], [0, 64], 4, 64, FloatType::F32).unwrap();
    assert!(empty.packed.is_empty() && empty.dequantize().is_empty());
}

proptest! {
    /// Half a step, where the steps are those of a range that reaches to zero: the scale may grow by half so that zero is
    /// kept, and then the other end of the range is cut.
    #[test]
    fn values_come_back_within_a_step(
        rows in 1_usize..5,
        groups in 1_usize..4,
        bits in prop::sample::select(AffineTensor::BITS.to_vec()),
        group_size in prop::sample::select(AffineTensor::GROUP_SIZES.to_vec()),
        seed in prop::collection::vec(-1.0_f32..1.0, 32),
        size in -6_i32..6,
        shift in -2.0_f32..2.0,
    ) {
        let columns = groups * group_size as usize;
        let size = 10_f32.powi(size);
        let values: Vec<f32> = (0..rows * columns)
            .map(|i| (seed[i * 13 % 32] * seed[i * 7 % 31] + shift) * size)
            .collect();
        let tensor = AffineTensor::quantize(&values, [rows, columns], bits, group_size, FloatType::F32).unwrap();
        prop_assert_eq!(tensor.packed.len(), rows * columns * bits as usize / 32);
        let found = tensor.dequantize();
        for (group, (found, values)) in found
            .chunks_exact(group_size as usize)
            .zip(values.chunks_exact(group_size as usize))
            .enumerate()
        {
            let range = values.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), &value| {
                (low.min(value), high.max(value))
            });
            let step = ((range.1 - range.0) / ((1 << bits) - 1) as f32).max(1e-7);
            let largest = range.0.abs().max(range.1.abs());
            for (found, value) in found.iter().zip(values) {
                let off = (found - value).abs();
                prop_assert!(
                    off <= tensor.scales[group].abs().max(step) * 1.01 + largest * 1e-6 + excess(range, step, bits),
                    "{} for {}, step {}", found, value, step
                );
            }
        }
    }
}

/// How much of the range is cut where the scale shrinks so that zero is kept.
fn excess((low, high): (f32, f32), step: f32, bits: u32) -> f32 {
    let edge = low.abs().max(high.abs());
    let zero = (edge / step).round_ties_even();
    if zero == 0.0 {
        return 0.0;
    }
    ((high - low) - edge / zero * ((1 << bits) - 1) as f32).max(0.0)
}
