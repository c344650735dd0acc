//! Experts together give what each row gets from each of them alone, bit for bit; those products are compared with float64
//! in `products.rs`.

use mlx_engine_kernels::{
    Activations, AffineSource, DenseSource, Expert, ExpertSum, Gate, Isa, KernelError, Matrix, Pool,
    Precision, Product, gated, gated_each, project, sum_experts,
};
use proptest::prelude::*;
use proptest::sample::select;

/// Numbers that look random.
fn words(len: usize, seed: u64) -> Vec<u32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u32
    };
    (0..len).map(|_| next()).collect()
}

fn floats(len: usize, seed: u64) -> Vec<f32> {
    let words = words(len, seed).into_iter();
    words
        .map(|word| (word >> 8) as f32 / (1_u32 << 23) as f32 - 1.0)
        .collect()
}

/// A matrix of 4 bits in groups of 32, or of float32.
fn matrix(pool: &Pool, rows: usize, columns: usize, quantized: bool, seed: u64) -> Matrix {
    if !quantized {
        return Matrix::dense(rows, columns, DenseSource::F32(&floats(rows * columns, seed)))
            .expect("it fits");
    }
    let source = AffineSource {
        packed: &words(rows * columns / 8, seed),
        scales: &floats(rows * columns / 32, seed + 1),
        biases: &floats(rows * columns / 32, seed + 2),
        bits: 4,
        group_size: 32,
    };
    Matrix::quantized(pool, rows, columns, source).expect("it fits")
}

fn activations(isa: Isa, pool: &Pool, x: &[f32], rows: usize, precision: Precision) -> Activations {
    let mut activations = Activations::new();
    activations.resize(rows, x.len() / rows.max(1)).copy_from_slice(x);
    activations.prepare(isa, pool, precision);
    activations
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn experts_together_are_each_row_with_each_alone(
        // For each expert the rows that have chosen it.
        chosen in prop::collection::vec(prop::collection::btree_set(0..9_usize, 0..9), 1..6),
        wide in select(vec![32_usize, 96]),
        hidden in select(vec![32_usize, 64, 80]),
        quantized in any::<bool>(),
        precision in select(vec![Precision::Exact, Precision::Integer]),
        threads in 1..4_usize,
        seed in 0..1000_u64,
    ) {
        let pool = Pool::new(threads);
        let hidden = if quantized { hidden / 32 * 32 } else { hidden };
        let x = floats(9 * hidden, seed);
        let of_experts: Vec<[Matrix; 3]> = (0..chosen.len() as u64)
            .map(|expert| [
                matrix(&pool, wide, hidden, quantized, seed + 10 * expert),
                matrix(&pool, wide, hidden, quantized, seed + 10 * expert + 3),
                matrix(&pool, hidden, wide, quantized, seed + 10 * expert + 6),
            ])
            .collect();
        for isa in Isa::available() {
            let mut expected = floats(9 * hidden, seed + 7);
            let mut found = expected.clone();

            for ([gate, up, down], rows) in of_experts.iter().zip(&chosen) {
                for &row in rows {
                    let x = activations(isa, &pool, &x[row * hidden..][..hidden], 1, precision);
                    let mut inner = vec![0.0; wide];
                    gated(isa, &pool, &x, Gate::Silu, [gate, up], [None, None], &mut inner).unwrap();
                    let inner = activations(isa, &pool, &inner, 1, precision);
                    let mut out = vec![0.0; hidden];
                    project(isa, &pool, &inner, &mut [Product::write(down, None, &mut out)]).unwrap();
                    for (expected, out) in expected[row * hidden..].iter_mut().zip(out) {
                        *expected += out;
                    }
                }
            }

            let rows: Vec<Vec<usize>> = chosen.iter().map(|rows| rows.iter().copied().collect()).collect();
            let gathered: Vec<Activations> = rows
                .iter()
                .map(|rows| {
                    let x: Vec<f32> = rows.iter().flat_map(|row| x[row * hidden..][..hidden].to_vec()).collect();
                    activations(isa, &pool, &x, rows.len(), precision)
                })
                .collect();
            let mut inner: Vec<Vec<f32>> = rows.iter().map(|rows| vec![0.0; rows.len() * wide]).collect();
            let mut experts: Vec<Expert<'_>> = of_experts
                .iter()
                .zip(&gathered)
                .zip(&mut inner)
                // An expert that nobody has chosen is left out.
                .filter(|((_, x), _)| x.rows() > 0)
                .map(|(([gate, up, _], x), out)| Expert { x, gate, up, out })
                .collect();
            gated_each(isa, &pool, Gate::Silu, &mut experts).unwrap();
            let inner: Vec<Activations> = inner
                .iter()
                .zip(&rows)
                .map(|(inner, rows)| activations(isa, &pool, inner, rows.len(), precision))
                .collect();
            let sums: Vec<ExpertSum<'_>> = of_experts
                .iter()
                .zip(&inner)
                .zip(&rows)
                .filter(|(_, rows)| !rows.is_empty())
                .map(|(([_, _, matrix], x), rows)| ExpertSum { x, matrix, rows })
                .collect();
            sum_experts(isa, &pool, &sums, &mut found).unwrap();
            prop_assert_eq!(&found, &expected, "{}", isa);
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let (isa, pool) = (Isa::fastest(), Pool::new(1));
    let [wide, narrow] = [64, 32].map(|rows| matrix(&pool, rows, 32, false, 1));
    let x = activations(isa, &pool, &[0.5; 32], 1, Precision::Exact);
    let refused = |gate, up, out: &mut [f32]| {
        let expert = Expert { x: &x, gate, up, out };
        gated_each(isa, &pool, Gate::Silu, &mut [expert]).unwrap_err()
    };
    assert!(matches!(
        refused(&wide, &narrow, &mut [0.0; 64]),
        KernelError::Length { .. }
    ));
    assert!(matches!(
        refused(&wide, &wide, &mut [0.0; 32]),
        KernelError::Length { .. }
    ));
    let mut out = [0.0; 32];
    let mut refused = |matrix, rows: &[usize]| {
        let sum = ExpertSum { x: &x, matrix, rows };
        sum_experts(isa, &pool, &[sum], &mut out).unwrap_err()
    };
    assert!(matches!(
        refused(&narrow, &[1]),
        KernelError::Index { index: 1, len: 1, .. }
    ));
    assert!(matches!(refused(&narrow, &[0, 0]), KernelError::Length { .. }));
    assert_eq!(sum_experts(isa, &pool, &[], &mut out), Ok(()));
}
