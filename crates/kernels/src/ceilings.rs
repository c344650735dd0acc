//! What the machine gives at most, for figures to be compared with.

use std::hint::black_box;
use std::time::{Duration, Instant};

use crate::Pool;
use crate::isa::Isa;
use crate::matrix::STEPS;
use crate::simd::{Bytes, Kernel, LANES, Line, Simd, dispatch};

/// Lines of a buffer of the size of a small model, 96 MiB, so that it is in the caches that such a model is in.
const LINES: usize = (96 << 20) / size_of::<Line>();
/// Lines of a piece of work, and how many between the one that is read and the one that is asked for.
const PIECE: usize = 1024;
const AHEAD: usize = 32;
/// Products of blocks in a piece of work.
const PRODUCTS: usize = 1 << 14;
/// Rounds, of which the fastest counts: what else the machine does takes away and never adds.
const ROUNDS: usize = 12;

/// What all threads of a pool reach together, doing nothing else.
#[derive(Clone, Copy, Debug)]
pub struct Ceilings {
    /// Bytes a second that are read of 96 MiB.
    pub read_bytes_per_s: f64,
    /// Multiplications and additions a second of bytes in registers, each counted, with the instructions for vectors: a
    /// matrix unit does more.
    pub integer_ops_per_s: f64,
}

/// Measures, for about a quarter of a second.
pub fn ceilings(isa: Isa, pool: &Pool) -> Ceilings {
    let buffer = vec![Line::ZERO; LINES];
    let pieces: Vec<&[Line]> = buffer.chunks(PIECE).collect();
    let read = fastest(|| {
        pool.split(pieces.len(), |range| {
            for lines in &pieces[range] {
                black_box(dispatch(isa, Read { lines }));
            }
        });
    });
    let pieces = 16 * pool.threads();
    let multiply = fastest(|| {
        pool.split(pieces, |range| {
            for _ in range {
                black_box(dispatch(isa, Multiply));
            }
        });
    });
    // A block is 32 columns of sixteen lanes, eight rows of them a product.
    let operations = pieces * PRODUCTS * 2 * 32 * LANES * ROWS;
    Ceilings {
        read_bytes_per_s: size_of_val(&*buffer) as f64 / read.as_secs_f64(),
        integer_ops_per_s: operations as f64 / multiply.as_secs_f64(),
    }
}

fn fastest(mut work: impl FnMut()) -> Duration {
    let mut fastest = Duration::MAX;
    for _ in 0..ROUNDS {
        let started = Instant::now();
        work();
        fastest = fastest.min(started.elapsed());
    }
    fastest
}

struct Read<'a> {
    lines: &'a [Line],
}

impl Kernel for Read<'_> {
    type Output = Line;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Line {
        // Several, so that none waits for the one before it.
        let mut all = [s.zero(); 4];
        for lines in self.lines.chunks_exact(all.len()) {
            for (all, line) in all.iter_mut().zip(lines) {
                s.prefetch((&raw const *line).wrapping_add(AHEAD));
                *all = s.or(*all, s.line(line));
            }
        }
        let mut out = Line::ZERO;
        s.store_line(all.into_iter().fold(s.zero(), |a, b| s.or(a, b)), &mut out);
        out
    }
}

/// Rows that are multiplied with the same weights.
const ROWS: usize = 8;

struct Multiply;

impl Kernel for Multiply {
    type Output = [Line; ROWS];

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> [Line; ROWS] {
        let weights = black_box([s.splat_i(0x0101_0101); STEPS]);
        let x = black_box([Bytes([[1; 4]; STEPS]); ROWS]);
        let mut sums = [s.zero(); ROWS];
        for _ in 0..PRODUCTS {
            for (sum, x) in sums.iter_mut().zip(&x) {
                *sum = s.dot::<4>(*sum, &weights, x);
            }
        }
        sums.map(|sum| {
            let mut out = Line::ZERO;
            s.store_line(sum, &mut out);
            out
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_instruction_set_reads_and_multiplies_at_some_speed() {
        for isa in Isa::available() {
            let Ceilings {
                read_bytes_per_s: read,
                integer_ops_per_s: multiply,
            } = ceilings(isa, &Pool::new(2));
            assert!(read.is_finite() && read > 0.0, "{isa}: {read}");
            assert!(multiply.is_finite() && multiply > 0.0, "{isa}: {multiply}");
        }
    }

    #[test]
    fn what_is_read_is_what_is_there_and_what_is_multiplied_is_summed() {
        for isa in Isa::available() {
            let mut lines = vec![Line::ZERO; 8];
            lines[5].0[17] = 3;
            lines[6].0[17] = 4;
            let found = dispatch(isa, Read { lines: &lines });
            assert_eq!((found.0[17], found.0[16]), (7, 0), "{isa}");
            // 32 columns of ones, as often as there are products.
            let sums = dispatch(isa, Multiply);
            let expected = [32 * PRODUCTS as i32; LANES];
            assert!(
                sums.iter()
                    .all(|sum| bytemuck::cast::<Line, [i32; LANES]>(*sum) == expected),
                "{isa}"
            );
        }
    }

    #[test]
    fn the_fastest_round_counts_and_all_are_done() {
        let mut rounds = 0;
        let fastest = fastest(|| rounds += 1);
        assert_eq!(rounds, ROUNDS);
        assert!(fastest < Duration::MAX);
    }
}
