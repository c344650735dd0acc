//! A slice that several tasks write at once, each its own part.

use std::marker::PhantomData;

/// A borrowed slice whose parts are handed to several threads.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Disjoint<'a, T> {
    start: *mut T,
    len: usize,
    owner: PhantomData<&'a mut [T]>,
}

#[expect(unsafe_code, reason = "the parts are handed to other threads")]
// SAFETY: whoever calls `part` promises that no two parts overlap, so that sharing this is sharing `&mut [T]` in pieces.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}
#[expect(unsafe_code, reason = "the parts are handed to other threads")]
// SAFETY: as above.
unsafe impl<T: Send> Send for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self {
            start: slice.as_mut_ptr(),
            len: slice.len(),
            owner: PhantomData,
        }
    }

    /// The part from `start`, of `len` elements, or nothing where that is beyond the end.
    ///
    /// # Safety
    ///
    /// Parts that are alive at the same time must not overlap.
    #[expect(unsafe_code, reason = "the caller knows the parts apart")]
    pub(crate) unsafe fn part(&self, start: usize, len: usize) -> &'a mut [T] {
        if start.checked_add(len).is_none_or(|end| end > self.len) {
            return &mut [];
        }
        // SAFETY: within the slice, which is borrowed for `'a`, and no other part overlaps.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }
}
