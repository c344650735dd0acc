//! What the kernels reach on this machine, against the bytes they read and the operations they do.
//!
//! The shapes are those of SmolLM2-135M's projections and head; a product with one row reads every weight once, so its
//! bytes a second compare with what the memory gives, and one with many rows compares with the processor's peak.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::f16;
use mlx_engine_kernels::{
    Activations, AffineSource, AttentionSpec, Isa, KvFloat, KvFormat, KvLayout, KvPage, Matrix, PAGE, Pool,
    Precision, Product, Queries, attend, project,
};

fn matrix(pool: &Pool, rows: usize, columns: usize, bits: u32) -> Matrix {
    let packed: Vec<u32> = (0..rows * columns * bits as usize / 32)
        .map(|i| (i as u32).wrapping_mul(2_654_435_761))
        .collect();
    let scales: Vec<f32> = (0..rows * columns / 32)
        .map(|i| f16::from_f32(1.0 / (1 + i % 7) as f32).to_f32())
        .collect();
    let biases: Vec<f32> = scales
        .iter()
        .map(|scale| f16::from_f32(-7.5 * scale).to_f32())
        .collect();
    let source = AffineSource {
        packed: &packed,
        scales: &scales,
        biases: &biases,
        bits,
        group_size: 32,
    };
    Matrix::quantized(pool, rows, columns, source).expect("shapes that fit")
}

fn activations(isa: Isa, pool: &Pool, rows: usize, columns: usize, precision: Precision) -> Activations {
    let mut x = Activations::new();
    for (index, x) in x.resize(rows, columns).iter_mut().enumerate() {
        *x = (index % 101) as f32 / 50.0 - 1.0;
    }
    x.prepare(isa, pool, precision);
    x
}

/// One row, over as many matrices as a model has, so that no cache near a core holds them.
fn decode(criterion: &mut Criterion) {
    let isa = Isa::fastest();
    let pool = Pool::new(Pool::physical_cores());
    let mut group = criterion.benchmark_group("decode");
    for (name, bits, rows, columns, count) in [
        ("projection", 4, 1536, 576, 60),
        ("down", 4, 576, 1536, 60),
        ("head", 8, 49152, 576, 1),
    ] {
        let matrices: Vec<Matrix> = (0..count).map(|_| matrix(&pool, rows, columns, bits)).collect();
        let bytes: usize = matrices.iter().map(Matrix::bytes).sum();
        for precision in [Precision::Integer, Precision::Exact] {
            let x = activations(isa, &pool, 1, columns, precision);
            let mut out = vec![0.0; rows];
            group.throughput(Throughput::Bytes(bytes as u64));
            group.bench_function(BenchmarkId::new(name, format!("{precision:?}")), |bencher| {
                bencher.iter(|| {
                    for matrix in &matrices {
                        project(isa, &pool, &x, &mut [Product::write(matrix, None, &mut out)])
                            .expect("shapes that fit");
                    }
                });
            });
        }
    }
    group.finish();
}

fn prefill(criterion: &mut Criterion) {
    let isa = Isa::fastest();
    let pool = Pool::new(Pool::physical_cores());
    let mut group = criterion.benchmark_group("prefill");
    let (rows, columns) = (1536, 576);
    let matrix = matrix(&pool, rows, columns, 4);
    for m in [8, 512] {
        for precision in [Precision::Integer, Precision::Exact] {
            let x = activations(isa, &pool, m, columns, precision);
            let mut out = vec![0.0; m * rows];
            group.throughput(Throughput::Elements((2 * m * rows * columns) as u64));
            group.bench_function(BenchmarkId::new(format!("{precision:?}"), m), |bencher| {
                bencher.iter(|| {
                    project(isa, &pool, &x, &mut [Product::write(&matrix, None, &mut out)])
                        .expect("shapes that fit");
                });
            });
        }
    }
    group.finish();
}

fn attention(criterion: &mut Criterion) {
    let isa = Isa::fastest();
    let pool = Pool::new(Pool::physical_cores());
    let layout = KvLayout {
        heads: 3,
        head_dim: 64,
    };
    let spec = AttentionSpec {
        layout,
        heads: 9,
        scale: 0.125,
        softcap: None,
        window: None,
        keep: 0,
    };
    let format = KvFormat {
        layout,
        layers: 1,
        float: KvFloat::F16,
        integers: None,
    };
    let page = KvPage::new(format).expect("a format that is there");
    let pages = [Some(page.layer(0).expect("the layer")); 16];
    let mut group = criterion.benchmark_group("attention");
    for (position, rows) in [(511, 1), (0, 512)] {
        let queries = vec![0.1; rows * 9 * 64];
        let mut out = vec![0.0; queries.len()];
        let sequence = Queries {
            pages: &pages[..(position + rows).div_ceil(PAGE)],
            position,
            first: 0,
            rows,
        };
        group.bench_function(BenchmarkId::new(format!("{rows} rows at"), position), |bencher| {
            bencher
                .iter(|| attend(isa, &pool, spec, &queries, &[sequence], &mut out).expect("shapes that fit"));
        });
    }
    group.finish();
}

criterion_group!(benches, decode, prefill, attention);
criterion_main!(benches);
