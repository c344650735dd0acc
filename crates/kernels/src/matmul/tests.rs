//! Products by a matrix unit, which an emulated one has on every machine.

use super::*;
use crate::simd::emulated_unit::with_unit;
use crate::{AffineSource, Precision};

/// A matrix of numbers that repeat after a prime; where it is symmetric its biases are what such a format has.
fn matrix(rows: usize, columns: usize, bits: u32, group_size: usize, symmetric: bool) -> Matrix {
    let words = rows * columns * bits as usize / 32;
    let packed: Vec<u32> = (0..words as u32).map(|i| i.wrapping_mul(2_654_435_761)).collect();
    let groups = rows * columns / group_size;
    let scales: Vec<f32> = (0..groups)
        .map(|i| ((i * 29 % 31) as f32 - 15.0) / 64.0)
        .collect();
    let half = (1_u32 << (bits - 1)) as f32;
    let bias = |(i, scale): (usize, &f32)| {
        if symmetric {
            -scale * half
        } else {
            ((i * 17 % 23) as f32 - 11.0) / 8.0
        }
    };
    let biases: Vec<f32> = scales.iter().enumerate().map(bias).collect();
    let source = AffineSource {
        packed: &packed,
        scales: &scales,
        biases: &biases,
        bits,
        group_size,
    };
    Matrix::quantized(&Pool::new(1), rows, columns, source).unwrap()
}

/// Rows of which some have a block that is many times as large as the others, so that it has a rest.
fn activations(rows: usize, columns: usize) -> Activations {
    prepared(rows, columns, 0)
}

/// Those, of which the last are given to a unit.
fn prepared(rows: usize, columns: usize, halves: usize) -> Activations {
    let mut x = Activations::new();
    for (i, x) in x.resize(rows, columns).iter_mut().enumerate() {
        let (row, column) = (i / columns, i % columns);
        *x = ((i * 37 % 101) as f32 - 50.0) / 17.0;
        if row % 3 == 1 && column / 32 == 1 {
            *x *= 40.0;
        }
    }
    x.prepare_with(portable(), &Pool::new(1), Precision::Integer, halves);
    x
}

fn portable() -> Isa {
    Isa::available()[0]
}

fn products(x: &Activations, matrix: &Matrix) -> Vec<u32> {
    let mut out = vec![0.0; x.rows() * matrix.rows];
    let mut product = [Product::write(matrix, None, &mut out)];
    // The only thread of such a pool is this one.
    project(portable(), &Pool::new(1), x, &mut product).unwrap();
    out.into_iter().map(f32::to_bits).collect()
}

#[test]
fn a_matrix_unit_changes_no_bit() {
    for bits in [2, 3, 4, 5, 6, 8] {
        for (group_size, symmetric) in [(32, false), (64, true)] {
            let (rows, columns) = (37, 4 * 64);
            let weights = matrix(rows, columns, bits, group_size, symmetric);
            // Whole strips, and strips that are not full.
            for count in [9, 16, 17, 40] {
                let x = activations(count, columns);
                let expected = products(&x, &weights);
                let (found, used) = with_unit(|| products(&x, &weights));
                assert!(used > 0, "{count} rows");
                assert!(expected.iter().any(|bits| *bits != 0));
                assert_eq!(
                    found, expected,
                    "{bits} bits, groups of {group_size}, {count} rows"
                );
            }
        }
    }
}

#[test]
fn up_to_eight_rows_are_left_to_vectors() {
    let weights = matrix(16, 64, 4, 64, true);
    for count in 1..=8 {
        let x = activations(count, 64);
        assert_eq!(with_unit(|| products(&x, &weights)), (products(&x, &weights), 0));
    }
}

/// The products in float64, and the sums of the magnitudes of what was added up.
fn expected(x: &Activations, matrix: &Matrix) -> Vec<(f64, f64)> {
    let mut weights = vec![0.0; matrix.columns];
    let mut out = Vec::new();
    for x in x.floats().chunks_exact(matrix.columns) {
        for row in 0..matrix.rows {
            matrix.row(row, &mut weights).unwrap();
            let terms = x.iter().zip(&weights).map(|(x, w)| f64::from(*x) * f64::from(*w));
            out.push(terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs())));
        }
    }
    out
}

#[test]
fn rows_that_are_given_to_a_unit_are_multiplied_as_bfloat16() {
    for bits in [2, 3, 4, 5, 6, 8] {
        for (group_size, symmetric) in [(32, false), (64, true)] {
            // Tiles by twos and one that is left, the last not full.
            let (rows, columns) = (3 * LANES - 5, 4 * 64);
            let weights = matrix(rows, columns, bits, group_size, symmetric);
            for count in [1, 16, 17, 40, 65] {
                let ((x, found), used) = with_unit(|| {
                    let x = prepared(count, columns, count);
                    let found = products(&x, &weights);
                    (x, found)
                });
                assert!(used > 0, "{count} rows");
                let expected = expected(&x, &weights);
                let integers = products(&activations(count, columns), &weights);
                assert_ne!(found, integers, "{count} rows");
                for (found, (sum, size)) in found.iter().zip(&expected) {
                    let found = f64::from(f32::from_bits(*found));
                    // Either is wrong by at most half of its last bit of eight.
                    let allowed = size * (2.0 / 256.0 / 2.0 + 1.0 / 65536.0);
                    assert!(
                        (found - sum).abs() <= allowed,
                        "{bits} bits, {count} rows: {found} {sum} {size}"
                    );
                }
            }
        }
    }
}

#[test]
fn rows_that_are_given_to_a_unit_get_the_same_bits_whatever_the_others_are() {
    let (rows, columns) = (37, 2 * 64);
    let weights = matrix(rows, columns, 4, 32, false);
    let row = |products: &[u32], row: usize| products[row * rows..][..rows].to_vec();
    let (all, _) = with_unit(|| products(&prepared(50, columns, 50), &weights));
    let integers = products(&activations(50, columns), &weights);
    for halves in [1, 9, 33, 49] {
        let (some, _) = with_unit(|| products(&prepared(50, columns, halves), &weights));
        for at in 0..50 {
            let expected = if at < 50 - halves { &integers } else { &all };
            assert_eq!(row(&some, at), row(expected, at), "{halves} halves, row {at}");
        }
    }
}

#[test]
fn a_gate_and_a_dense_matrix_have_the_rows_of_a_unit_too() {
    let (rows, columns, count) = (20, 64, 21);
    let pool = Pool::new(1);
    let gate = matrix(rows, columns, 4, 64, false);
    let dense: Vec<f32> = (0..rows * columns)
        .map(|i| ((i * 13 % 29) as f32 - 14.0) / 9.0)
        .collect();
    let dense = Matrix::dense(rows, columns, crate::DenseSource::F32(&dense)).unwrap();
    for matrices in [[&gate, &gate], [&gate, &dense], [&dense, &gate]] {
        let ((), used) = with_unit(|| {
            let x = prepared(count, columns, 18);
            let mut out = vec![f32::NAN; count * rows];
            gated(
                portable(),
                &pool,
                &x,
                Gate::Silu,
                matrices,
                [None, None],
                &mut out,
            )
            .unwrap();
            let [a, b] = matrices.map(|matrix| products(&x, matrix).into_iter().map(f32::from_bits));
            for ((out, a), b) in out.iter().zip(a).zip(b) {
                let expected = f64::from(a) / (1.0 + (-f64::from(a)).exp()) * f64::from(b);
                assert!(
                    (f64::from(*out) - expected).abs() <= 1e-5 * expected.abs() + 1e-6,
                    "{out} {expected}"
                );
            }
        });
        assert!(used > 0);
    }
}
