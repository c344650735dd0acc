//! Products against float64, for every bit width, group size, instruction set and precision.

use half::{bf16, f16};
use mlx_engine_kernels::{
    Activations, AffineSource, DenseSource, Gate, Isa, KernelError, Matrix, Pool, Precision, Product,
    all_finite, apply_gate, argmax, gated, project,
};
use proptest::prelude::*;
use proptest::sample::select;

/// A matrix in MLX's affine quantization, with its weights in float64.
#[derive(Clone, Debug)]
struct Affine {
    packed: Vec<u32>,
    scales: Vec<f32>,
    biases: Vec<f32>,
    bits: u32,
    group_size: usize,
    weights: Vec<f64>,
}

impl Affine {
    /// Packs numbers, row-major, as MLX does: a row is one stream of bits.
    fn new(
        numbers: &[u8],
        columns: usize,
        bits: u32,
        group_size: usize,
        scales: Vec<f32>,
        biases: Vec<f32>,
    ) -> Self {
        let mut packed = Vec::new();
        for row in numbers.chunks_exact(columns) {
            let mut words = vec![0_u32; columns * bits as usize / 32];
            for (index, number) in row.iter().enumerate() {
                for bit in 0..bits as usize {
                    let at = index * bits as usize + bit;
                    words[at / 32] |= u32::from(number >> bit & 1) << (at % 32);
                }
            }
            packed.extend(words);
        }
        let weights = numbers
            .iter()
            .enumerate()
            .map(|(index, number)| {
                let group = index / group_size;
                f64::from(scales[group]) * f64::from(*number) + f64::from(biases[group])
            })
            .collect();
        Self {
            packed,
            scales,
            biases,
            bits,
            group_size,
            weights,
        }
    }

    fn source(&self) -> AffineSource<'_> {
        AffineSource {
            packed: &self.packed,
            scales: &self.scales,
            biases: &self.biases,
            bits: self.bits,
            group_size: self.group_size,
        }
    }
}

/// `x [m, columns]` times the transpose of `w [rows, columns]`, and the sum of the magnitudes of what was added up.
fn product(x: &[f32], w: &[f64], columns: usize) -> Vec<(f64, f64)> {
    let mut out = Vec::new();
    for x in x.chunks_exact(columns) {
        for w in w.chunks_exact(columns) {
            let terms = x.iter().zip(w).map(|(x, w)| f64::from(*x) * w);
            out.push(terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs())));
        }
    }
    out
}

fn affine() -> impl Strategy<Value = (Affine, usize, usize)> {
    let sizes = (
        select(vec![2_u32, 3, 4, 5, 6, 8]),
        select(vec![32_usize, 64, 128]),
        1_usize..40,
        1_usize..4,
        0..4_u8,
    );
    sizes.prop_flat_map(|(bits, group_size, rows, groups, kind)| {
        let columns = group_size * groups;
        let numbers = prop::collection::vec(0..=((1_u16 << bits) - 1) as u8, rows * columns);
        let scales = prop::collection::vec(-1.0_f32..1.0, rows * groups);
        let biases = prop::collection::vec(-4.0_f32..4.0, rows * groups);
        (numbers, scales, biases).prop_map(move |(numbers, scales, biases)| {
            // What checkpoints have: float16, bfloat16, float32, and symmetric formats without a bias of their own.
            let kept = |values: Vec<f32>| -> Vec<f32> {
                let keep = |value: f32| match kind {
                    0 | 3 => f16::from_f32(value).to_f32(),
                    1 => bf16::from_f32(value).to_f32(),
                    _ => value,
                };
                values.into_iter().map(keep).collect()
            };
            let scales = kept(scales);
            let biases = if kind == 3 {
                scales
                    .iter()
                    .map(|scale| -(scale * (1_u32 << (bits - 1)) as f32))
                    .collect()
            } else {
                kept(biases)
            };
            (
                Affine::new(&numbers, columns, bits, group_size, scales, biases),
                rows,
                columns,
            )
        })
    })
}

/// Numbers that repeat after a prime, so that no two rows are alike, with one that is many times larger in some blocks of 32.
fn activations(rows: usize, columns: usize) -> Vec<f32> {
    let value = |i: usize| ((i * 37 % 101) as f32 - 50.0) / 17.0;
    (0..rows * columns)
        .map(|i| match (i / columns, i % columns) {
            (row, column) if column % 32 == 5 && (column / 32 + row) % 4 == 1 => 60.0 + value(i),
            _ => value(i),
        })
        .collect()
}

/// The largest errors that activations of a row may have as integers: 1/254 of the largest of 32, or, where that is far above what
/// it is in the row's other 32, 1/254 of 1/254 of it.
fn allowed_errors(row: &[f32]) -> Vec<f64> {
    let largest: Vec<f64> = row
        .chunks(32)
        .map(|block| {
            block
                .iter()
                .fold(0.0_f64, |largest, x| largest.max(f64::from(x.abs())))
        })
        .collect();
    let inverses: f64 = largest.iter().map(|largest| 1.0 / largest).sum();
    let usual = largest.len() as f64 / inverses;
    let steps = |largest: f64| {
        if largest > 2.1 * usual {
            254.0 * 250.0
        } else {
            254.0
        }
    };
    largest
        .iter()
        .flat_map(|&largest| [largest / steps(largest); 32])
        .collect()
}

fn prepared(isa: Isa, pool: &Pool, rows: usize, x: &[f32], precision: Precision) -> Activations {
    let mut activations = Activations::new();
    activations.resize(rows, x.len() / rows).copy_from_slice(x);
    activations.prepare(isa, pool, precision);
    activations
}

proptest! {
    #[test]
    fn quantized_products_are_those_of_float64((w, rows, columns) in affine(), m in select(vec![1, 2, 3, 7, 16, 19]), threads in 1..3_usize) {
        let pool = Pool::new(threads);
        let matrix = Matrix::quantized(&pool, rows, columns, w.source()).unwrap();
        let x = activations(m, columns);
        let expected = product(&x, &w.weights, columns);
        let errors: Vec<Vec<f64>> = x.chunks_exact(columns).map(allowed_errors).collect();
        let residual = 0.5_f32;
        for isa in Isa::available() {
            for precision in [Precision::Exact, Precision::Integer] {
                let activations = prepared(isa, &pool, m, &x, precision);
                let mut out = vec![f32::NAN; m * rows];
                let mut added = vec![residual; m * rows];
                let bias: Vec<f32> = (0..rows).map(|row| row as f32).collect();
                project(isa, &pool, &activations, &mut [
                    Product::write(&matrix, None, &mut out),
                    Product::add(&matrix, Some(&bias), &mut added),
                ]).unwrap();
                for (index, (sum, size)) in expected.iter().enumerate() {
                    let allowed = match precision {
                        Precision::Exact => 1e-5 * size + 1e-4,
                        Precision::Integer => {
                            let w = &w.weights[index % rows * columns..][..columns];
                            let error: f64 = w.iter().zip(&errors[index / rows]).map(|(w, error)| w.abs() * error).sum();
                            error + 1e-5 * size + 1e-3
                        }
                    };
                    prop_assert!((f64::from(out[index]) - sum).abs() <= allowed, "{isa} {precision:?} {index}: {} {sum}", out[index]);
                    let with = sum + f64::from(residual) + (index % rows) as f64;
                    prop_assert!((f64::from(added[index]) - with).abs() <= allowed, "{isa} {precision:?} {index}: {} {with}", added[index]);
                }
            }
        }
    }

    #[test]
    fn whole_activations_lose_nothing((w, rows, columns) in affine(), seed in any::<u32>()) {
        // Activations that are whole, with the largest integer of a block among them, are kept as they are.
        let x: Vec<f32> = (0..columns as u32).map(|i| match i % 32 {
            0 => 127.0,
            _ => f32::from((i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 16) as u16 as i16).clamp(-127.0, 127.0),
        }).collect();
        let pool = Pool::new(1);
        let matrix = Matrix::quantized(&pool, rows, columns, w.source()).unwrap();
        let expected = product(&x, &w.weights, columns);
        for isa in Isa::available() {
            let activations = prepared(isa, &pool, 1, &x, Precision::Integer);
            let mut out = vec![f32::NAN; rows];
            project(isa, &pool, &activations, &mut [Product::write(&matrix, None, &mut out)]).unwrap();
            for (out, (sum, size)) in out.iter().zip(&expected) {
                prop_assert!((f64::from(*out) - sum).abs() <= 1e-6 * size + 1e-3, "{isa} {} bits: {out} {sum}", w.bits);
            }
        }
    }

    #[test]
    fn every_instruction_set_and_number_of_rows_gives_the_same_bits((w, rows, columns) in affine(), m in 1..36_usize) {
        let pool = Pool::new(2);
        let matrix = Matrix::quantized(&pool, rows, columns, w.source()).unwrap();
        let x = activations(m, columns);
        let mut alone = Vec::new();
        for x in x.chunks_exact(columns) {
            let isa = Isa::fastest();
            let mut out = vec![f32::NAN; rows];
            project(isa, &pool, &prepared(isa, &pool, 1, x, Precision::Integer), &mut [Product::write(&matrix, None, &mut out)]).unwrap();
            alone.extend(out);
        }
        // Without fused instructions the portable code rounds twice.
        for isa in Isa::available().into_iter().filter(|isa| isa.name() != "portable") {
            let mut out = vec![f32::NAN; m * rows];
            project(isa, &pool, &prepared(isa, &pool, m, &x, Precision::Integer), &mut [Product::write(&matrix, None, &mut out)]).unwrap();
            prop_assert_eq!(&out, &alone, "{} {} rows", isa, m);
        }
    }

    #[test]
    fn rows_are_looked_up_as_they_are((w, rows, columns) in affine()) {
        let matrix = Matrix::quantized(&Pool::new(1), rows, columns, w.source()).unwrap();
        let mut out = vec![0.0; columns];
        for (row, expected) in w.weights.chunks_exact(columns).enumerate() {
            matrix.row(row, &mut out).unwrap();
            for (out, expected) in out.iter().zip(expected) {
                prop_assert!((f64::from(*out) - expected).abs() <= expected.abs() * 1e-6 + 1e-5);
            }
        }
        let refused = matrix.row(rows, &mut out).unwrap_err();
        prop_assert_eq!(refused, KernelError::Index { what: "row", index: rows, len: rows });
    }

    #[test]
    fn dense_products_are_those_of_float64(rows in 1_usize..40, columns in 1_usize..90, m in select(vec![1, 2, 5, 17]), kind in 0..3_u8) {
        let values: Vec<f32> = (0..rows * columns).map(|i| ((i * 61 % 127) as f32 - 63.0) / 64.0).collect();
        let x = activations(m, columns);
        let half: Vec<f16> = values.iter().map(|&value| f16::from_f32(value)).collect();
        let brain: Vec<bf16> = values.iter().map(|&value| bf16::from_f32(value)).collect();
        let source = match kind {
            0 => DenseSource::F32(&values),
            1 => DenseSource::F16(&half),
            _ => DenseSource::Bf16(&brain),
        };
        let weights: Vec<f64> = match kind {
            2 => brain.iter().map(|value| value.to_f64()).collect(),
            _ => values.iter().map(|&value| f64::from(value)).collect(),
        };
        let matrix = Matrix::dense(rows, columns, source).unwrap();
        let expected = product(&x, &weights, columns);
        let pool = Pool::new(2);
        for isa in Isa::available() {
            let activations = prepared(isa, &pool, m, &x, Precision::Integer);
            let mut out = vec![f32::NAN; m * rows];
            project(isa, &pool, &activations, &mut [Product::write(&matrix, None, &mut out)]).unwrap();
            for (out, (sum, size)) in out.iter().zip(&expected) {
                prop_assert!((f64::from(*out) - sum).abs() <= 1e-5 * size + 1e-5, "{isa}: {out} {sum}");
            }
        }
        let mut row = vec![0.0; columns];
        matrix.row(rows - 1, &mut row).unwrap();
        let last = &weights[(rows - 1) * columns..];
        prop_assert!(row.iter().zip(last).all(|(a, b)| f64::from(*a) == *b));
    }

    #[test]
    fn gates_are_those_of_float64(x in prop::collection::vec(-30.0_f32..30.0, 1..70)) {
        let up: Vec<f32> = x.iter().map(|x| 1.0 + x / 7.0).collect();
        for isa in Isa::available() {
            for gate in [Gate::Silu, Gate::GeluTanh] {
                let mut out = vec![f32::NAN; x.len()];
                apply_gate(isa, gate, &x, &up, &mut out).unwrap();
                for ((x, up), out) in x.iter().zip(&up).zip(&out) {
                    let (x, up) = (f64::from(*x), f64::from(*up));
                    let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x * x * x);
                    let expected = up * match gate {
                        Gate::Silu => x / (1.0 + (-x).exp()),
                        Gate::GeluTanh => 0.5 * x * (1.0 + inner.tanh()),
                    };
                    prop_assert!((f64::from(*out) - expected).abs() <= 2e-6 * expected.abs() + 1e-6, "{isa} {gate:?} {x}: {out} {expected}");
                }
            }
        }
    }

    #[test]
    fn the_first_of_the_largest_is_found(values in prop::collection::vec(-4_i8..4, 1..2500)) {
        let values: Vec<f32> = values.into_iter().map(f32::from).collect();
        let largest = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let expected = values.iter().position(|&value| value == largest).unwrap();
        for isa in Isa::available() {
            prop_assert_eq!(argmax(isa, &values), expected);
        }
    }

    #[test]
    fn numbers_that_are_not_finite_are_found(len in 1..100_usize, at in any::<prop::sample::Index>(), bad in select(vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY])) {
        let mut values = vec![f32::MAX; len];
        for isa in Isa::available() {
            prop_assert!(all_finite(isa, &values));
        }
        values[at.index(len)] = bad;
        for isa in Isa::available() {
            prop_assert!(!all_finite(isa, &values));
        }
    }
}

#[test]
fn a_gated_pair_is_both_products_and_the_gate() {
    let (rows, columns) = (37, 64);
    let pool = Pool::new(2);
    let dense = |shift: usize| -> Vec<f32> {
        (0..rows * columns)
            .map(|i| ((i * 29 + shift) % 97) as f32 / 500.0 - 0.1)
            .collect()
    };
    let (gate_weights, up_weights) = (dense(0), dense(13));
    let gate_matrix = Matrix::dense(rows, columns, DenseSource::F32(&gate_weights)).unwrap();
    let up_matrix = Matrix::dense(rows, columns, DenseSource::F32(&up_weights)).unwrap();
    let bias: Vec<f32> = (0..rows).map(|row| row as f32 / 40.0).collect();
    for isa in Isa::available() {
        for m in [1, 3, 16, 21] {
            let x = prepared(isa, &pool, m, &activations(m, columns), Precision::Exact);
            let mut fused = vec![f32::NAN; m * rows];
            let matrices = [&gate_matrix, &up_matrix];
            gated(
                isa,
                &pool,
                &x,
                Gate::Silu,
                matrices,
                [Some(&bias), None],
                &mut fused,
            )
            .unwrap();
            let (mut a, mut b) = (vec![0.0; m * rows], vec![0.0; m * rows]);
            let products = &mut [
                Product::write(&gate_matrix, Some(&bias), &mut a),
                Product::write(&up_matrix, None, &mut b),
            ];
            project(isa, &pool, &x, products).unwrap();
            let mut apart = vec![0.0; m * rows];
            apply_gate(isa, Gate::Silu, &a, &b, &mut apart).unwrap();
            assert_eq!(fused, apart, "{isa} {m}");
        }
    }
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    let pool = Pool::new(1);
    let isa = Isa::fastest();
    let source = |bits, group_size| AffineSource {
        packed: &[0; 4],
        scales: &[1.0],
        biases: &[0.0],
        bits,
        group_size,
    };
    for (bits, group_size, columns) in [(7, 32, 32), (4, 16, 32), (4, 32, 48), (4, 64, 32), (4, 32, 0)] {
        let refused = Matrix::quantized(&pool, 1, columns, source(bits, group_size)).unwrap_err();
        assert_eq!(
            refused,
            KernelError::Layout {
                bits,
                group_size,
                columns
            }
        );
    }
    let matrix = Matrix::quantized(&pool, 1, 32, source(4, 32)).unwrap();
    let refused = Matrix::quantized(&pool, 2, 32, source(4, 32)).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "the packed matrix has 4 elements where the shapes make 8"
    );
    let x = prepared(isa, &pool, 1, &[0.0; 64], Precision::Integer);
    let mut out = [0.0];
    let refused = project(isa, &pool, &x, &mut [Product::write(&matrix, None, &mut out)]).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "the activations has 64 elements where the shapes make 32"
    );
    let x = prepared(isa, &pool, 1, &[0.0; 32], Precision::Integer);
    if let [portable, .., _] = Isa::available()[..] {
        let refused = project(
            portable,
            &pool,
            &x,
            &mut [Product::write(&matrix, None, &mut out)],
        )
        .unwrap_err();
        assert_eq!(refused, KernelError::OtherIsa);
    }
    let mut out = [0.0; 2];
    assert!(project(isa, &pool, &x, &mut [Product::write(&matrix, None, &mut out)]).is_err());
    assert!(Matrix::dense(2, 2, DenseSource::F32(&[0.0])).is_err());
}
