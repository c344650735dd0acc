//! Reading ahead while a thread waits.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Most parts that are announced.
const PARTS: usize = 3;

/// Bytes that a thread reads ahead at most, which leaves half of a small second cache to what else it holds.
const LIMIT: usize = 256 << 10;

/// Lines that are asked for between two looks at the gate.
const AT_ONCE: usize = 4;

const LINE: usize = 64;

/// What a job will read, up to three parts of memory.
#[derive(Clone, Copy, Debug)]
pub enum Reading<'a> {
    /// The parts are one piece of work after the other, and are shared out as a whole.
    InTurn(&'a [&'a [u8]]),
    /// Each piece of work reads as much of all parts.
    Together(&'a [&'a [u8]]),
}

impl Reading<'_> {
    /// What a thread of so many reads of each part.
    pub(super) fn share(&self, thread: usize, threads: usize) -> [Range<usize>; PARTS] {
        let mut shares = [const { 0..0 }; PARTS];
        let of = |len: usize| thread * len / threads..(thread + 1) * len / threads;
        match self {
            Self::InTurn(parts) => {
                let all = of(parts.iter().map(|part| part.len()).sum());
                let mut first = 0;
                for (share, part) in shares.iter_mut().zip(*parts) {
                    let within = |at: usize| at.clamp(first, first + part.len()) - first;
                    let start = part.as_ptr().addr();
                    *share = start + within(all.start)..start + within(all.end);
                    first += part.len();
                }
            }
            Self::Together(parts) => {
                for (share, part) in shares.iter_mut().zip(*parts) {
                    let (start, of) = (part.as_ptr().addr(), of(part.len()));
                    *share = start + of.start..start + of.end;
                }
            }
        }
        shares
    }
}

/// Addresses that a thread will read, as another thread writes them down. What is half old and half new is harmless: nothing
/// but hints to the processor comes of it.
#[derive(Default)]
pub(super) struct Announced {
    starts: [AtomicUsize; PARTS],
    ends: [AtomicUsize; PARTS],
}

impl Announced {
    pub(super) fn set(&self, shares: [Range<usize>; PARTS]) {
        for ((share, start), end) in shares.into_iter().zip(&self.starts).zip(&self.ends) {
            end.store(share.end, Ordering::Relaxed);
            start.store(share.start, Ordering::Relaxed);
        }
    }

    pub(super) fn get(&self) -> Ahead {
        let mut parts = [const { 0..0 }; PARTS];
        for ((part, start), end) in parts.iter_mut().zip(&self.starts).zip(&self.ends) {
            // The next look finds nothing.
            *part = start.load(Ordering::Relaxed)..end.load(Ordering::Relaxed);
            end.store(0, Ordering::Relaxed);
        }
        Ahead { parts, left: LIMIT }
    }
}

/// Lines that are still to be asked for.
pub(super) struct Ahead {
    parts: [Range<usize>; PARTS],
    left: usize,
}

impl Ahead {
    /// Asks for some lines of each part. Whether there were any.
    pub(super) fn read(&mut self) -> bool {
        if self.left == 0 {
            return false;
        }
        let mut any = false;
        for part in &mut self.parts {
            for _ in 0..AT_ONCE {
                if part.start >= part.end {
                    break;
                }
                prefetch(part.start);
                part.start += LINE;
                self.left = self.left.saturating_sub(LINE);
                any = true;
            }
        }
        any
    }
}

/// Asks for the line at an address, to be written. Nothing need be there.
#[inline]
pub(crate) fn prefetch_to_write(address: usize) {
    #[cfg(target_arch = "x86_64")]
    #[expect(unsafe_code, reason = "an intrinsic")]
    // SAFETY: a hint, which does nothing at an address that is not mapped.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_ET0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_ET0>(std::ptr::without_provenance(address));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// Asks for the line at an address, into the second cache. Nothing need be there.
fn prefetch(address: usize) {
    #[cfg(target_arch = "x86_64")]
    #[expect(unsafe_code, reason = "an intrinsic")]
    // SAFETY: a hint, which does nothing at an address that is not mapped.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(std::ptr::without_provenance(address));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn len(shares: &[Range<usize>]) -> usize {
        shares.iter().map(ExactSizeIterator::len).sum()
    }

    #[test]
    fn shares_of_all_threads_are_the_whole_once() {
        let memory = [0_u8; 1000];
        let parts = [&memory[..100], &memory[100..130], &memory[130..]];
        for threads in 1..5 {
            for reading in [Reading::InTurn(&parts), Reading::Together(&parts)] {
                for (index, part) in parts.iter().enumerate() {
                    let start = part.as_ptr().addr();
                    let mut next = start;
                    for thread in 0..threads {
                        let share = reading.share(thread, threads)[index].clone();
                        if !share.is_empty() {
                            assert_eq!(share.start, next, "{reading:?}");
                            next = share.end;
                        }
                    }
                    assert_eq!(next, start + part.len());
                }
            }
        }
    }

    #[test]
    fn work_in_turn_is_shared_as_a_whole_and_work_together_part_by_part() {
        let memory = [0_u8; 400];
        let parts = [&memory[..200], &memory[200..300], &memory[300..]];
        let lens = |reading: Reading<'_>| reading.share(1, 2).map(|share| share.len());
        assert_eq!(lens(Reading::InTurn(&parts)), [0, 100, 100]);
        assert_eq!(lens(Reading::Together(&parts)), [100, 50, 50]);
        assert_eq!(lens(Reading::InTurn(&parts[..1])), [100, 0, 0]);
    }

    #[test]
    fn what_is_announced_is_read_once_and_not_beyond_the_limit() {
        let memory = vec![0_u8; 2 * LIMIT];
        let announced = Announced::default();
        announced.set(Reading::Together(&[&memory]).share(0, 1));
        let mut ahead = announced.get();
        let mut rounds = 0;
        while ahead.read() {
            rounds += 1;
        }
        assert_eq!(rounds * AT_ONCE * LINE, LIMIT);
        assert_eq!(len(&announced.get().parts), 0);
        assert!(!announced.get().read());
    }
}
