//! The rotary position embedding (Su and others, 2021).

use crate::KernelError;
use crate::error::check_len;
use crate::isa::Isa;
use crate::simd::{Kernel, Simd, dispatch};

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

/// Rotates the heads of one token, `[heads, head_dim]`, in place; what lies behind the rotated elements of a head stays.
///
/// # Errors
///
/// Where the rotation is wider than a head, and where `x` is not whole heads.
pub fn rotate(
    isa: Isa,
    layout: RopeLayout,
    rotation: &Rotation,
    head_dim: usize,
    x: &mut [f32],
) -> Result<(), KernelError> {
    let head = head_dim.max(1);
    check_len("the heads to rotate", x.len(), x.len() / head * head_dim)?;
    if rotation.dimensions() > head_dim {
        return Err(KernelError::Length {
            what: "a rotation",
            found: rotation.dimensions(),
            expected: head_dim,
        });
    }
    dispatch(
        isa,
        Rotate {
            layout,
            rotation,
            head,
            x,
        },
    );
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
