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
    let mut x = Activations::new();
    for (i, x) in x.resize(rows, columns).iter_mut().enumerate() {
        let (row, column) = (i / columns, i % columns);
        *x = ((i * 37 % 101) as f32 - 50.0) / 17.0;
        if row % 3 == 1 && column / 32 == 1 {
            *x *= 40.0;
        }
    }
    x.prepare(portable(), &Pool::new(1), Precision::Integer);
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
