//! AMX: tiles of 16 by 64 bytes, and their products in one instruction, of bytes or of bfloat16.

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count};

use super::{Bytes, Line, Square};

/// The processor has AMX for bytes and bfloat16, the system lets this process use it, and a product came out right.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MatrixUnit(());

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Tiles in use on this thread for `ROWS` rows of activations, 16 at most, until it is dropped.
pub(crate) struct Tiles<const ROWS: usize>(());

/// For each of `ROWS` rows of activations sixteen lanes.
pub(crate) type Sums<const ROWS: usize> = [Line; ROWS];

/// Tiles in use on this thread for products of bfloat16, until it is dropped.
pub(crate) struct HalfTiles(());

/// Bits 22, 24 and 25 of `edx` of leaf 7: products of bfloat16, tiles, and their products of bytes.
const NEEDED: u32 = 0b1101 << 22;
/// `arch_prctl`: ask for the use of a feature of the processor.
const ARCH_REQ_XCOMP_PERM: libc::c_int = 0x1023;
/// The state that holds the tiles.
const XFEATURE_XTILEDATA: libc::c_ulong = 18;

impl MatrixUnit {
    /// Asks the system for the tiles, and multiplies once of each kind, in a child process: there are machines that promise the
    /// instructions and do not run them.
    pub(crate) fn detect() -> Option<Self> {
        if __cpuid(0).eax < 7 || __cpuid_count(7, 0).edx & NEEDED != NEEDED {
            return None;
        }
        // SAFETY: the call changes nothing but what this process may use.
        let granted = unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) };
        (granted == 0 && proved_in_child(is_right)).then_some(Self(()))
    }

    /// The proof again, where [`detect`](Self::detect) has given it before.
    pub(super) fn detected() -> Self {
        Self(())
    }

    /// Gets the tiles of this thread ready.
    #[expect(
        clippy::unused_self,
        reason = "the value proves that the instructions are there"
    )]
    #[inline(always)]
    pub(crate) fn configure<const ROWS: usize>(self) -> Tiles<ROWS> {
        configure()
    }

    /// Gets the tiles of this thread ready for bfloat16.
    #[expect(
        clippy::unused_self,
        reason = "the value proves that the instructions are there"
    )]
    #[inline(always)]
    pub(crate) fn halves(self) -> HalfTiles {
        configure_halves()
    }
}

/// Gives the first tiles their rows and the bytes of these.
#[inline(always)]
fn shape(shapes: &[(u8, u16)]) {
    let mut configuration = Configuration {
        palette: 1,
        start_row: 0,
        reserved: [0; 14],
        row_bytes: [0; 16],
        rows: [0; 16],
    };
    let tiles = configuration.rows.iter_mut().zip(&mut configuration.row_bytes);
    for (shape, (rows, row_bytes)) in shapes.iter().zip(tiles) {
        (*rows, *row_bytes) = *shape;
    }
    // SAFETY: whoever has a `MatrixUnit` may use the instruction, which reads 64 bytes.
    unsafe {
        asm!("ldtilecfg [{}]", in(reg) &raw const configuration, options(nostack, preserves_flags));
    }
}

#[inline(always)]
fn configure<const ROWS: usize>() -> Tiles<ROWS> {
    const { assert!(ROWS > 0 && ROWS <= 16, "rows of a tile") };
    // Sums, activations, weights.
    let rows = ROWS as u8;
    shape(&[(rows, 64), (rows, 32), (8, 64)]);
    Tiles(())
}

#[inline(always)]
fn configure_halves() -> HalfTiles {
    shape(&[(16, 64); 8]);
    HalfTiles(())
}

/// Runs an instruction with a tile that is in memory.
macro_rules! at_square {
    ($instruction:literal, $square:expr) => {
        // SAFETY: the tiles are configured, for 16 lines of 64 bytes, which a square has.
        unsafe {
            asm!(
                $instruction,
                at = in(reg) $square,
                line = in(reg) size_of::<Line>(),
                options(nostack, preserves_flags),
            );
        }
    };
}

/// Runs an instruction of tiles alone.
macro_rules! of_tiles {
    ($instruction:literal) => {
        // SAFETY: the tiles are configured, and no other code of this thread uses them meanwhile.
        unsafe { asm!($instruction, options(nostack, preserves_flags)) }
    };
}

impl HalfTiles {
    /// Multiplies each of `W` tiles of weights with each of `X` strips of activations, block by block, in one pass over both. A sum has the
    /// even columns of a block, then the odd ones, added to those of the blocks before.
    #[expect(
        clippy::unused_self,
        reason = "the value proves that the tiles are configured"
    )]
    #[inline(always)]
    pub(crate) fn multiply<const W: usize, const X: usize>(
        &self,
        weights: [&[Square]; W],
        x: [&[Square]; X],
        sums: &mut [[Square; X]; W],
    ) {
        const {
            assert!(
                W > 0 && W <= 2 && X > 0 && X <= 2,
                "eight tiles are all there are"
            );
        };
        let blocks = weights
            .iter()
            .chain(&x)
            .map(|squares| squares.len())
            .min()
            .unwrap_or(0);
        of_tiles!("tilezero tmm0");
        of_tiles!("tilezero tmm1");
        of_tiles!("tilezero tmm2");
        of_tiles!("tilezero tmm3");
        for block in 0..blocks {
            at_square!("tileloadd tmm6, [{at} + {line}*1]", &raw const weights[0][block]);
            at_square!("tileloadd tmm4, [{at} + {line}*1]", &raw const x[0][block]);
            of_tiles!("tdpbf16ps tmm0, tmm4, tmm6");
            if X == 2 {
                at_square!("tileloadd tmm5, [{at} + {line}*1]", &raw const x[1][block]);
                of_tiles!("tdpbf16ps tmm1, tmm5, tmm6");
            }
            if W == 2 {
                at_square!("tileloadd tmm7, [{at} + {line}*1]", &raw const weights[1][block]);
                of_tiles!("tdpbf16ps tmm2, tmm4, tmm7");
                if X == 2 {
                    of_tiles!("tdpbf16ps tmm3, tmm5, tmm7");
                }
            }
        }
        at_square!("tilestored [{at} + {line}*1], tmm0", &raw mut sums[0][0]);
        if X == 2 {
            at_square!("tilestored [{at} + {line}*1], tmm1", &raw mut sums[0][1]);
        }
        if W == 2 {
            at_square!("tilestored [{at} + {line}*1], tmm2", &raw mut sums[1][0]);
            if X == 2 {
                at_square!("tilestored [{at} + {line}*1], tmm3", &raw mut sums[1][1]);
            }
        }
    }
}

impl Drop for HalfTiles {
    fn drop(&mut self) {
        release();
    }
}

impl<const ROWS: usize> Tiles<ROWS> {
    /// Multiplies 32 columns of the rows of activations with those of sixteen rows of weights.
    #[expect(
        clippy::unused_self,
        reason = "the value proves that the tiles are configured"
    )]
    #[inline(always)]
    pub(crate) fn dot(&self, weights: &[Line; 8], x: &[Bytes; ROWS], sums: &mut Sums<ROWS>) {
        // SAFETY: the tiles are configured, for 8 lines of weights, `ROWS` of activations and as many of sums.
        unsafe {
            asm!(
                "tileloadd tmm2, [{weights} + {line}*1]",
                "tileloadd tmm1, [{x} + {row}*1]",
                "tilezero tmm0",
                "tdpbsud tmm0, tmm1, tmm2",
                "tilestored [{sums} + {line}*1], tmm0",
                weights = in(reg) weights.as_ptr(),
                x = in(reg) x.as_ptr(),
                sums = in(reg) sums.as_mut_ptr(),
                line = in(reg) size_of::<Line>(),
                row = in(reg) size_of::<Bytes>(),
                options(nostack, preserves_flags),
            );
        }
    }
}

impl<const ROWS: usize> Drop for Tiles<ROWS> {
    fn drop(&mut self) {
        release();
    }
}

/// Gives the tiles of this thread back: a thread that keeps them makes every switch dearer.
#[inline(always)]
fn release() {
    of_tiles!("tilerelease");
}

/// Whether something comes out right, found out by a process that may die of it.
fn proved_in_child(is_right: impl FnOnce() -> bool) -> bool {
    // SAFETY: the child has a copy of this memory, allocates nothing, and ends by the system call. It sends no signal
    // when it ends, so that no handler of the program hears of it.
    unsafe {
        let child = libc::syscall(libc::SYS_clone, 0, 0, 0, 0, 0);
        if child == 0 {
            let ends_well = is_right();
            libc::syscall(libc::SYS_exit_group, libc::c_int::from(!ends_well));
        }
        let Ok(child) = libc::pid_t::try_from(child) else {
            return false;
        };
        if child < 0 {
            return false;
        }
        let mut status = 0;
        loop {
            let waited = libc::waitpid(child, &raw mut status, libc::__WALL);
            if waited == child {
                return libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0;
            }
            if std::io::Error::last_os_error().kind() != std::io::ErrorKind::Interrupted {
                return false;
            }
        }
    }
}

/// Multiplies known numbers.
fn is_right() -> bool {
    bytes_are_right() && halves_are_right()
}

/// Multiplies squares of known bfloat16.
fn halves_are_right() -> bool {
    // 1.5 and -2, by turns.
    let pairs = |pair: u32| Square([bytemuck::cast([pair; 16]); 16]);
    let (weights, x) = (pairs(0xc000_3fc0), pairs(0x3fc0_3fc0));
    let mut sums = [[Square::ZERO; 2]; 2];
    let tiles = configure_halves();
    tiles.multiply([&[weights; 3], &[x; 3]], [&[x; 3], &[weights; 3]], &mut sums);
    drop(tiles);
    // 48 pairs of products.
    let expected = [[-0.75, 6.25], [4.5, -0.75]];
    sums.iter()
        .flatten()
        .zip(expected.as_flattened())
        .all(|(found, pair)| found.sums().iter().flatten().all(|sum| *sum == 48.0 * pair))
}

/// Multiplies a row of known bytes, signed and unsigned ones beyond 127.
fn bytes_are_right() -> bool {
    let weights = [Line([200; 64]); 8];
    let mut x = [Bytes([[3; 4]; 8]); 16];
    x[15] = Bytes([[-2; 4]; 8]);
    let mut sums = [Line::ZERO; 16];
    let tiles = configure::<16>();
    tiles.dot(&weights, &x, &mut sums);
    drop(tiles);
    let [first, last] = [sums[0], sums[15]].map(|row| bytemuck::cast::<Line, [i32; 16]>(row)[15]);
    (first, last) == (32 * 3 * 200, -32 * 2 * 200)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_says_what_comes_out_right_and_may_die_of_it() {
        assert!(proved_in_child(|| true));
        assert!(!proved_in_child(|| false));
        // As an instruction that the processor promised and does not have.
        // SAFETY: it ends the child, which has a copy of this memory.
        assert!(!proved_in_child(|| unsafe { asm!("ud2", options(noreturn)) }));
    }
}
