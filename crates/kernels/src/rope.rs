//! The rotary position embedding (Su and others, 2021).

use crate::disjoint::Disjoint;
use crate::error::check_len;
use crate::isa::Isa;
use crate::simd::{Kernel, Simd, dispatch};
use crate::{KernelError, Pool};

/// Tokens below which one thread does them all.
const FEW: usize = 8;

/// Which elements of a head are rotated together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RopeLayout {
    /// `i` and `i + half`: Hugging Face's.
    Halves,
    /// `2 i` and `2 i + 1`: the paper's, and that of GGUF files of the Llama family.
    Interleaved,
}

/// The cosines and sines of one position, one of each for a pair.
#[derive(Clone, Debug, Default)]
pub struct Rotation {
    cosines: Vec<f32>,
    sines: Vec<f32>,
}

impl Rotation {
    /// The angles of a position, which may be a fraction where positions are scaled: `position / wavelength` for each
    /// pair, with wavelengths in radians.
    pub fn new(position: f32, wavelengths: &[f32]) -> Self {
        let angles = wavelengths
            .iter()
            .map(|wavelength| f64::from(position / wavelength).sin_cos());
        let (sines, cosines) = angles.map(|(sine, cosine)| (sine as f32, cosine as f32)).unzip();
        Self { cosines, sines }
    }

    /// Elements of a head that are rotated.
    pub fn dimensions(&self) -> usize {
        2 * self.cosines.len()
    }
}

/// Rotates the heads of some tokens in place: `x` is `[tokens, heads, head_dim]`, with one rotation a token. What lies
/// behind the rotated elements of a head stays.
///
/// # Errors
///
/// Where a rotation is wider than a head, and where `x` is not whole heads of each token.
pub fn rotate(
    isa: Isa,
    pool: &Pool,
    layout: RopeLayout,
    rotations: &[Rotation],
    head_dim: usize,
    x: &mut [f32],
) -> Result<(), KernelError> {
    let per_token = x.len() / rotations.len().max(1);
    let whole = per_token / head_dim.max(1) * head_dim * rotations.len();
    check_len("the heads to rotate", x.len(), whole)?;
    for rotation in rotations {
        if rotation.dimensions() > head_dim {
            return Err(KernelError::Length {
                what: "a rotation",
                found: rotation.dimensions(),
                expected: head_dim,
            });
        }
    }
    let x = Disjoint::new(x);
    let token = |token: usize| {
        #[expect(unsafe_code, reason = "each task rotates its own tokens")]
        // SAFETY: every token is given to one task, once.
        let x = unsafe { x.part(token * per_token, per_token) };
        dispatch(
            isa,
            Rotate {
                layout,
                rotation: &rotations[token],
                head: head_dim,
                x,
            },
        );
    };
    if rotations.len() < FEW {
        (0..rotations.len()).for_each(token);
    } else {
        pool.split(rotations.len(), |range| range.for_each(&token));
    }
    Ok(())
}

struct Rotate<'a> {
    layout: RopeLayout,
    rotation: &'a Rotation,
    head: usize,
    x: &'a mut [f32],
}

impl Kernel for Rotate<'_> {
    type Output = ();

    /// Plain loops, which compilers vectorize for the instruction set of the caller.
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Rotation { cosines, sines } = self.rotation;
        for head in self.x.chunks_exact_mut(self.head) {
            match self.layout {
                RopeLayout::Halves => {
                    let (low, rest) = head.split_at_mut(cosines.len());
                    for (((a, b), cosine), sine) in low.iter_mut().zip(rest).zip(cosines).zip(sines) {
                        (*a, *b) = (*a * cosine - *b * sine, *a * sine + *b * cosine);
                    }
                }
                RopeLayout::Interleaved => {
                    let (pairs, _) = head.as_chunks_mut::<2>();
                    for (([a, b], cosine), sine) in pairs.iter_mut().zip(cosines).zip(sines) {
                        (*a, *b) = (*a * cosine - *b * sine, *a * sine + *b * cosine);
                    }
                }
            }
        }
    }
}
