//! AMX: tiles of 16 by 64 bytes, and their products in one instruction.

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count};

use super::{Bytes, Line};

/// The processor has AMX for bytes, the system lets this process use it, and a product came out right.
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

/// Bits 24 and 25 of `edx` of leaf 7: tiles, and their products of bytes.
const TILES_AND_BYTES: u32 = 0b11 << 24;
/// `arch_prctl`: ask for the use of a feature of the processor.
const ARCH_REQ_XCOMP_PERM: libc::c_int = 0x1023;
/// The state that holds the tiles.
const XFEATURE_XTILEDATA: libc::c_ulong = 18;

impl MatrixUnit {
    /// Asks the system for the tiles, and multiplies once, in a child process: there are machines that promise the
    /// instructions and do not run them.
    pub(crate) fn detect() -> Option<Self> {
        if __cpuid(0).eax < 7 || __cpuid_count(7, 0).edx & TILES_AND_BYTES != TILES_AND_BYTES {
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
}

#[inline(always)]
fn configure<const ROWS: usize>() -> Tiles<ROWS> {
    const { assert!(ROWS > 0 && ROWS <= 16, "rows of a tile") };
    let mut configuration = Configuration {
        palette: 1,
        start_row: 0,
        reserved: [0; 14],
        row_bytes: [0; 16],
        rows: [0; 16],
    };
    // Sums, activations, weights.
    let rows = ROWS as u8;
    let shapes = [(rows, 64), (rows, 32), (8, 64)];
    for (tile, (rows, row_bytes)) in shapes.into_iter().enumerate() {
        configuration.rows[tile] = rows;
        configuration.row_bytes[tile] = row_bytes;
    }
    // SAFETY: whoever has a `MatrixUnit` may use the instruction, which reads 64 bytes.
    unsafe {
        asm!("ldtilecfg [{}]", in(reg) &raw const configuration, options(nostack, preserves_flags));
    }
    Tiles(())
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
        // SAFETY: the tiles were configured by this thread; a thread that keeps them makes every switch dearer.
        unsafe { asm!("tilerelease", options(nostack, preserves_flags)) };
    }
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

/// Multiplies a row of known bytes, signed and unsigned ones beyond 127.
fn is_right() -> bool {
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
