//! What the choice of a token costs, from logits that have been read.

use criterion::{Criterion, criterion_group, criterion_main};
use mlx_engine_core::GenerateParams;
use mlx_engine_models::Sampler;

/// Of the test model, and of models with large vocabularies.
const VOCABULARIES: [usize; 2] = [49_152, 151_936];

/// Logits whose largest are few, as those of models are: a walk through all of them, without order.
fn logits(len: usize) -> Vec<f32> {
    let spread = |index: usize| (index * 7919 % len) as f32 / len as f32;
    (0..len)
        .map(|index| 12.0 * (1.0 - spread(index).sqrt()) - 4.0)
        .collect()
}

fn choose(criterion: &mut Criterion) {
    let plain = GenerateParams::default().with_temperature(0.8).with_seed(1);
    let ways = [
        ("greedy", plain.clone().with_temperature(0.0)),
        ("temperature", plain.clone()),
        ("top-k 40", plain.clone().with_top_k(40)),
        ("top-p 0.9", plain.clone().with_top_p(0.9)),
        ("min-p 0.05", plain.clone().with_min_p(0.05)),
        (
            "penalties",
            GenerateParams {
                repetition_penalty: 1.1,
                ..plain
            },
        ),
    ];
    let tokens: Vec<u32> = (0..512).collect();
    for len in VOCABULARIES {
        let logits = logits(len);
        let mut group = criterion.benchmark_group(format!("choose of {len}"));
        for (name, params) in &ways {
            let sampler = Sampler::new(params, 1);
            group.bench_function(*name, |bencher| {
                let mut number = 0;
                bencher.iter(|| {
                    number += 1;
                    sampler.choose(&logits, number, &tokens, 256, &mut |_| {})
                });
            });
        }
        group.finish();
    }
}

criterion_group!(benches, choose);
criterion_main!(benches);
