//! Norms, rotations and attention against float64.

use half::f16;
use mlx_engine_checkpoint::{AffineTensor, FloatType};
use mlx_engine_kernels::{
    AttentionSpec, Isa, KvFloat, KvFormat, KvIntegers, KvLayer, KvLayout, KvPage, PAGE, Pool, Queries,
    RopeLayout, Rotation, attend, layer_norm, rms_norm, rotate,
};
use proptest::prelude::*;
use proptest::sample::select;

/// Numbers between -1 and 1 that look random.
fn noise(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1_u64 << 23) as f32 - 1.0
        })
        .collect()
}

/// Causal attention of one sequence: `q [rows, heads, dim]` from `position`, `k` and `v` `[positions, kv_heads, dim]`.
struct Attention<'a> {
    q: &'a [f32],
    k: &'a [f64],
    v: &'a [f64],
    heads: usize,
    kv_heads: usize,
    dim: usize,
    position: usize,
    scale: f64,
    softcap: Option<f64>,
    window: Option<usize>,
    keep: usize,
}

impl Attention<'_> {
    fn compute(&self) -> Vec<f64> {
        let mut out = Vec::new();
        for (row, q) in self.q.chunks_exact(self.heads * self.dim).enumerate() {
            let end = self.position + row + 1;
            let start = self.window.map_or(0, |window| end.saturating_sub(window));
            let seen: Vec<usize> = (0..end).filter(|&at| at >= start || at < self.keep).collect();
            for (head, q) in q.chunks_exact(self.dim).enumerate() {
                let kv = head / (self.heads / self.kv_heads);
                let at = |position: usize| (position * self.kv_heads + kv) * self.dim;
                let scores: Vec<f64> = seen
                    .iter()
                    .map(|&position| {
                        let k = &self.k[at(position)..][..self.dim];
                        let score = self.scale * q.iter().zip(k).map(|(q, k)| f64::from(*q) * k).sum::<f64>();
                        self.softcap.map_or(score, |cap| cap * (score / cap).tanh())
                    })
                    .collect();
                let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
                let total: f64 = weights.iter().sum();
                for d in 0..self.dim {
                    let weighted = seen
                        .iter()
                        .zip(&weights)
                        .map(|(&position, w)| w * self.v[at(position) + d]);
                    out.push(weighted.sum::<f64>() / total);
                }
            }
        }
        out
    }
}

/// Keys and values in pages, and as float64 what the pages hold.
struct Kept {
    pages: Vec<KvPage>,
    keys: Vec<f64>,
    values: Vec<f64>,
}

/// What a page makes of rows of heads, by MLX's quantizer where it has integers.
fn stored(format: &KvFormat, rows: &[f32]) -> Vec<f64> {
    let float = |x: f32| match format.float {
        KvFloat::F32 => x,
        KvFloat::F16 => f16::from_f32(x).to_f32(),
    };
    let Some(KvIntegers { bits, group_size }) = format.integers else {
        return rows.iter().map(|&x| f64::from(float(x))).collect();
    };
    let dim = format.layout.head_dim;
    let tensor = AffineTensor::quantize(
        rows,
        [rows.len() / dim, dim],
        bits as u32,
        group_size as u32,
        FloatType::F32,
    )
    .expect("finite numbers in whole groups");
    let mask = (1 << bits) - 1;
    (0..rows.len())
        .map(|i| {
            let code = (tensor.packed[i * bits / 32] >> (i * bits % 32)) & mask;
            let group = i / group_size;
            f64::from(code) * f64::from(float(tensor.scales[group])) + f64::from(float(tensor.biases[group]))
        })
        .collect()
}

/// `format_of` gives the format of each page.
fn kept(format_of: impl Fn(usize) -> KvFormat, positions: usize, seed: u64) -> Kept {
    let layout = format_of(0).layout;
    let row = layout.heads * layout.head_dim;
    let (keys, values) = (noise(positions * row, seed), noise(positions * row, seed + 1));
    let formats: Vec<KvFormat> = (0..positions.div_ceil(PAGE)).map(format_of).collect();
    let mut pages: Vec<KvPage> = formats
        .iter()
        .map(|format| KvPage::new(*format).expect("a format that is there"))
        .collect();
    let (mut as_keys, mut as_values) = (Vec::new(), Vec::new());
    for position in 0..positions {
        let at = position * row..(position + 1) * row;
        let page = position / PAGE;
        let (keys, values) = (&keys[at.clone()], &values[at]);
        // The first layer is another one's.
        pages[page]
            .write(1, position % PAGE, keys, values)
            .expect("a row of the page");
    }
    let page_rows = keys.chunks(PAGE * row).zip(values.chunks(PAGE * row));
    for ((keys, values), format) in page_rows.zip(&formats) {
        as_keys.extend(stored(format, keys));
        as_values.extend(stored(format, values));
    }
    Kept {
        pages,
        keys: as_keys,
        values: as_values,
    }
}

fn check_attention(
    spec: AttentionSpec,
    sequences: &[(usize, usize)],
    threads: usize,
    format_of: impl Fn(usize) -> KvFormat,
) -> Result<(), TestCaseError> {
    let row = spec.heads * spec.layout.head_dim;
    let total: usize = sequences.iter().map(|(_, rows)| rows).sum();
    let q: Vec<f32> = noise(total * row, 99).iter().map(|x| 3.0 * x).collect();
    let held: Vec<Kept> = sequences
        .iter()
        .enumerate()
        .map(|(index, (position, rows))| kept(&format_of, position + rows, index as u64 * 7 + 5))
        .collect();
    let pages: Vec<Vec<Option<KvLayer<'_>>>> = held
        .iter()
        .zip(sequences)
        .map(|(held, &(position, rows))| {
            let seen = spec.pages(position..position + rows);
            let pages = held.pages.iter().enumerate();
            pages
                .map(|(index, page)| {
                    let seen = seen.iter().any(|range| range.contains(&index));
                    seen.then(|| page.layer(1).expect("the layer"))
                })
                .collect()
        })
        .collect();
    let mut first = 0;
    let mut queries = Vec::new();
    let mut expected = Vec::new();
    for ((&(position, rows), held), pages) in sequences.iter().zip(&held).zip(&pages) {
        queries.push(Queries {
            pages,
            position,
            first,
            rows,
        });
        let reference = Attention {
            q: &q[first * row..][..rows * row],
            k: &held.keys,
            v: &held.values,
            heads: spec.heads,
            kv_heads: spec.layout.heads,
            dim: spec.layout.head_dim,
            position,
            scale: f64::from(spec.scale),
            softcap: spec.softcap.map(f64::from),
            window: spec.window,
            keep: spec.keep,
        };
        expected.extend(reference.compute());
        first += rows;
    }
    let pool = Pool::new(threads);
    for isa in Isa::available() {
        let mut out = vec![f32::NAN; total * row];
        attend(isa, &pool, spec, &q, &queries, &mut out).expect("shapes that fit");
        for (index, (found, expected)) in out.iter().zip(&expected).enumerate() {
            prop_assert!(
                (f64::from(*found) - expected).abs() < 5e-6,
                "{isa} {index}: {found} {expected}"
            );
        }
        // A row gets the same bits alone.
        let mut first = 0;
        for (sequence, pages) in queries.iter().zip(&pages) {
            for index in (0..sequence.rows).step_by(5) {
                let alone = Queries {
                    pages,
                    position: sequence.position + index,
                    first: 0,
                    rows: 1,
                };
                let own = (first + index) * row..(first + index + 1) * row;
                let mut found = vec![f32::NAN; row];
                attend(isa, &pool, spec, &q[own.clone()], &[alone], &mut found).expect("shapes that fit");
                prop_assert_eq!(&found, &out[own]);
            }
            first += sequence.rows;
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn attention_is_that_of_float64(
        kv_heads in 1..4_usize,
        group in select(vec![1_usize, 2, 3, 5, 7, 13]),
        head_dim in select(vec![2_usize, 8, 16, 24, 64]),
        sequences in prop::collection::vec((0..400_usize, 1..20_usize), 1..4),
        softcap in select(vec![None, Some(0.8_f32), Some(3.0)]),
        window in select(vec![None, Some(1), Some(7), Some(100)]),
        keep in select(vec![0_usize, 0, 4, 70]),
        threads in 1..4_usize,
        float in select(vec![KvFloat::F32, KvFloat::F16]),
    ) {
        let layout = KvLayout { heads: kv_heads, head_dim };
        let scale = 1.0 / (head_dim as f32).sqrt();
        let spec = AttentionSpec { layout, heads: kv_heads * group, scale, softcap, window, keep };
        check_attention(spec, &sequences, threads, |_| KvFormat { layout, layers: 2, float, integers: None })?;
    }

    #[test]
    fn attention_to_integers_is_that_of_float64(
        kv_heads in 1..4_usize,
        group in select(vec![1_usize, 3, 5]),
        head_dim in select(vec![32_usize, 64, 96, 128]),
        sequences in prop::collection::vec((0..400_usize, 1..20_usize), 1..4),
        window in select(vec![None, Some(100)]),
        bits in select(vec![4_usize, 8]),
        group_size in select(vec![32_usize, 64]),
        from in 0..4_usize,
        float in select(vec![KvFloat::F32, KvFloat::F16]),
    ) {
        prop_assume!(head_dim % group_size == 0);
        let layout = KvLayout { heads: kv_heads, head_dim };
        let scale = 1.0 / (head_dim as f32).sqrt();
        let spec = AttentionSpec { layout, heads: kv_heads * group, scale, softcap: None, window, keep: 0 };
        check_attention(spec, &sequences, 2, |page| KvFormat {
            layout,
            layers: 2,
            float,
            integers: (page >= from).then_some(KvIntegers { bits, group_size }),
        })?;
    }
}

proptest! {
    #[test]
    fn norms_are_those_of_float64(rows in 1..20_usize, width in 1..100_usize, scale in 0.01_f32..100.0, seed in any::<u32>()) {
        let x: Vec<f32> = noise(rows * width, u64::from(seed)).iter().map(|x| (x + 0.3) * scale).collect();
        let weight: Vec<f32> = (0..width).map(|i| 1.0 + i as f32 / 50.0).collect();
        let bias: Vec<f32> = (0..width).map(|i| i as f32 / 9.0).collect();
        let pool = Pool::new(2);
        for isa in Isa::available() {
            let (mut rms, mut layer) = (vec![f32::NAN; x.len()], vec![f32::NAN; x.len()]);
            rms_norm(isa, &pool, &x, &weight, 1e-5, &mut rms).unwrap();
            layer_norm(isa, &pool, &x, &weight, Some(&bias), 1e-5, &mut layer).unwrap();
            for (row, x) in x.chunks_exact(width).enumerate() {
                let x: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
                let n = width as f64;
                let square = x.iter().map(|x| x * x).sum::<f64>() / n;
                let mean = x.iter().sum::<f64>() / n;
                let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
                // What is left of elements that are nearly alike is mostly their rounding.
                let slack = 1e-5 * (1.0 + mean.abs() / (variance + 1e-5).sqrt());
                for (i, x) in x.iter().enumerate() {
                    let expected = x / (square + 1e-5).sqrt() * f64::from(weight[i]);
                    prop_assert!((f64::from(rms[row * width + i]) - expected).abs() < 1e-5 * (1.0 + expected.abs()));
                    let expected = (x - mean) / (variance + 1e-5).sqrt() * f64::from(weight[i]) + f64::from(bias[i]);
                    prop_assert!((f64::from(layer[row * width + i]) - expected).abs() < slack * (1.0 + expected.abs()));
                }
            }
        }
    }

    #[test]
    fn rotations_are_those_of_complex_numbers(heads in 1..4_usize, pairs in 1..40_usize, extra in 0..5_usize, position in 0..5000_u32) {
        let head_dim = 2 * pairs + extra;
        let x = noise(heads * head_dim, 3);
        let wavelengths: Vec<f32> = (0..pairs).map(|i| 10_000_f32.powf(i as f32 / pairs as f32)).collect();
        let rotation = Rotation::new(position as f32, &wavelengths);
        for layout in [RopeLayout::Halves, RopeLayout::Interleaved] {
            let rotations = vec![rotation.clone(); 9];
            let mut out = x.repeat(9);
            rotate(Isa::fastest(), &Pool::new(2), layout, &rotations, head_dim, &mut out).unwrap();
            let (first, rest) = out.split_at(x.len());
            prop_assert!(rest.chunks_exact(x.len()).all(|token| token == first));
            for (head, (x, out)) in x.chunks_exact(head_dim).zip(out.chunks_exact(head_dim)).enumerate() {
                for (pair, wavelength) in wavelengths.iter().enumerate() {
                    let (a, b) = match layout {
                        RopeLayout::Halves => (pair, pair + pairs),
                        RopeLayout::Interleaved => (2 * pair, 2 * pair + 1),
                    };
                    let angle = f64::from(position as f32 / wavelength);
                    let (sine, cosine) = angle.sin_cos();
                    let expected = (
                        f64::from(x[a]) * cosine - f64::from(x[b]) * sine,
                        f64::from(x[a]) * sine + f64::from(x[b]) * cosine,
                    );
                    prop_assert!((f64::from(out[a]) - expected.0).abs() < 1e-6, "{head} {pair}");
                    prop_assert!((f64::from(out[b]) - expected.1).abs() < 1e-6, "{head} {pair}");
                }
                prop_assert_eq!(&x[2 * pairs..], &out[2 * pairs..]);
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let pool = Pool::new(1);
    let isa = Isa::fastest();
    let layout = KvLayout {
        heads: 2,
        head_dim: 4,
    };
    let format = KvFormat {
        layout,
        layers: 1,
        float: KvFloat::F32,
        integers: None,
    };
    let mut page = KvPage::new(format).unwrap();
    assert!(page.write(0, PAGE, &[0.0; 8], &[0.0; 8]).is_err());
    assert!(page.write(1, 0, &[0.0; 8], &[0.0; 8]).is_err());
    assert!(page.write(0, 0, &[0.0; 7], &[0.0; 8]).is_err());
    assert!(page.layer(1).is_err());
    for (bits, group_size) in [(8, 32), (3, 32), (4, 4)] {
        let integers = Some(KvIntegers { bits, group_size });
        let error = KvPage::new(KvFormat { integers, ..format }).unwrap_err();
        assert!(error.to_string().contains("has no layout here"), "{error}");
    }
    let spec = AttentionSpec {
        layout,
        heads: 4,
        scale: 1.0,
        softcap: None,
        window: None,
        keep: 0,
    };
    let pages = [Some(page.layer(0).unwrap())];
    let queries = |position, first, rows| Queries {
        pages: &pages,
        position,
        first,
        rows,
    };
    let mut out = [0.0; 16];
    let mut run = |spec, queries| attend(isa, &pool, spec, &[0.0; 16], &[queries], &mut out);
    assert!(run(spec, queries(0, 0, 1)).is_ok());
    let error = run(spec, queries(PAGE, 0, 1)).unwrap_err();
    assert_eq!(error.to_string(), "page 1 is beyond the last, of 1");
    assert!(run(spec, queries(0, 0, 2)).is_err());
    assert!(run(spec, queries(0, 1, 1)).is_err());
    assert!(run(AttentionSpec { heads: 3, ..spec }, queries(0, 0, 1)).is_err());
    let rotation = Rotation::new(1.0, &[1.0, 2.0]);
    assert!(
        rotate(
            isa,
            &pool,
            RopeLayout::Halves,
            std::slice::from_ref(&rotation),
            3,
            &mut [0.0; 3]
        )
        .is_err()
    );
    assert!(rotate(isa, &pool, RopeLayout::Halves, &[rotation], 4, &mut [0.0; 6]).is_err());
    assert!(rms_norm(isa, &pool, &[0.0; 5], &[1.0; 2], 0.0, &mut [0.0; 5]).is_err());
    assert!(layer_norm(isa, &pool, &[0.0; 4], &[1.0; 2], Some(&[0.0]), 0.0, &mut [0.0; 4]).is_err());
}
