//! Keys and values in pages.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytemuck::{AnyBitPattern, NoUninit};
use half::f16;
use mlx_engine_kernels::{KvElement, KvLayout, PAGE, Precision};
use mlx_rs::{Array, Stream, transforms};
use mlx_sys::{HostOp, HostOutput, mlx_dtype__MLX_UINT32};

use crate::block::damaged;
use crate::memory::Held;
use crate::{DecoderSpec, ModelError};

/// The keys and values of a sequence, which a step in flight may be writing.
pub(crate) struct HostCache {
    pages: Arc<Mutex<Pages>>,
    /// What the last step gives back when it has written its keys and values. The next step takes it, so that MLX runs
    /// both, and in this order.
    pub(crate) written: Option<Array>,
}

/// Pages of 64 positions, each of all layers one after the other.
pub(crate) enum Pages {
    F32(Vec<Arc<Page<f32>>>),
    F16(Vec<Arc<Page<f16>>>),
}

/// 64 positions of all layers. A page that several sequences have is read by all and written by none of them.
pub(crate) struct Page<E> {
    pub(super) elements: Vec<E>,
    held: Held,
}

impl<E: KvElement> Clone for Page<E> {
    fn clone(&self) -> Self {
        Self::new(self.elements.clone())
    }
}

impl<E> Page<E> {
    fn new(elements: Vec<E>) -> Self {
        Self {
            held: Held::new(size_of_val(&*elements)),
            elements,
        }
    }
}

impl Pages {
    fn new(precision: Precision) -> Self {
        match precision {
            Precision::Exact => Self::F32(Vec::new()),
            Precision::Integer => Self::F16(Vec::new()),
        }
    }

    /// The pages of the first `positions`, which are shared from now on.
    fn fork(&self, positions: usize) -> Self {
        let count = positions.div_ceil(PAGE);
        match self {
            Self::F32(pages) => Self::F32(pages.iter().take(count).cloned().collect()),
            Self::F16(pages) => Self::F16(pages.iter().take(count).cloned().collect()),
        }
    }

    /// The bytes of each page, and whether other sequences have it too.
    fn sizes(&self) -> Vec<(usize, bool)> {
        fn of<E>(pages: &[Arc<Page<E>>]) -> Vec<(usize, bool)> {
            let pages = pages.iter();
            pages
                .map(|page| (page.held.bytes(), Arc::strong_count(page) > 1))
                .collect()
        }
        match self {
            Self::F32(pages) => of(pages),
            Self::F16(pages) => of(pages),
        }
    }
}

impl HostCache {
    pub(crate) fn new(precision: Precision) -> Self {
        Self {
            pages: Arc::new(Mutex::new(Pages::new(precision))),
            written: None,
        }
    }

    pub(super) fn pages(&self) -> Arc<Mutex<Pages>> {
        Arc::clone(&self.pages)
    }

    /// A cache that begins with the first `positions` of this one and shares their pages, until one of the two writes
    /// to a page that both have: that one copies it first.
    ///
    /// A step may be in flight that writes what is shared, so sharing is a step too, between the last one and the next
    /// of either.
    pub(crate) fn fork(&mut self, positions: usize) -> Result<Self, ModelError> {
        // Without a step there is none in flight.
        let in_flight = self.written.as_ref().filter(|_| positions > 0);
        let now = if in_flight.is_some() { 0 } else { positions };
        let mut fork = Self {
            pages: Arc::new(Mutex::new(self.lock().fork(now))),
            written: None,
        };
        let Some(written) = in_flight else {
            return Ok(fork);
        };
        let (from, to) = (self.pages(), fork.pages());
        let op = HostOp::new(c"fork", move |_, outputs| {
            if let Some(done) = outputs.first_mut() {
                done.as_mut_slice::<u32>()?.fill(0);
            }
            let shared = from
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .fork(positions);
            *to.lock().unwrap_or_else(PoisonError::into_inner) = shared;
            Ok(())
        });
        let outputs = [HostOutput::new(&[1], mlx_dtype__MLX_UINT32)];
        let stream = Stream::cpu();
        #[expect(unsafe_code, reason = "the graph is built through MLX's C interface")]
        // SAFETY: the handles of the array and of the stream are alive; the result is owned, and taken once.
        let shared = unsafe {
            let mut results = op
                .call(&[written.as_ptr()], &outputs, stream.as_ptr())
                .map_err(ModelError::Mlx)?;
            Array::from_ptr(results.remove(0))
        };
        // At once, so that nothing that waits to be run keeps the pages of a sequence that is gone.
        transforms::async_eval([&shared])?;
        self.written = Some(shared.clone());
        fork.written = Some(shared);
        Ok(fork)
    }

    fn lock(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes in memory.
    pub(crate) fn bytes(&self) -> usize {
        self.lock().sizes().iter().map(|(bytes, _)| bytes).sum()
    }

    /// Bytes in memory that no other sequence shares.
    pub(crate) fn unshared_bytes(&self) -> usize {
        let sizes = self.lock().sizes();
        let own = sizes.iter().filter(|(_, shared)| !shared);
        own.map(|(bytes, _)| bytes).sum()
    }
}

impl fmt::Debug for HostCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostCache").field("bytes", &self.bytes()).finish()
    }
}

/// The order of the elements of a page, as blocks name it.
pub(crate) const LAYOUT: &str = "pages-of-64-by-16";

impl HostCache {
    /// The type of the elements.
    pub(crate) fn element(&self) -> &'static str {
        match &*self.lock() {
            Pages::F32(_) => "f32",
            Pages::F16(_) => "f16",
        }
    }

    /// The elements of the pages that hold these positions. The steps that write them have run.
    pub(crate) fn export(&self, range: Range<usize>) -> Vec<u8> {
        fn of<E: NoUninit>(pages: &[Arc<Page<E>>], range: Range<usize>) -> Vec<u8> {
            let pages = pages
                .iter()
                .take(range.end.div_ceil(PAGE))
                .skip(range.start / PAGE);
            pages
                .flat_map(|page| bytemuck::cast_slice::<E, u8>(&page.elements))
                .copied()
                .collect()
        }
        match &*self.lock() {
            Pages::F32(pages) => of(pages, range),
            Pages::F16(pages) => of(pages, range),
        }
    }

    /// Adds pages of these elements, as many as hold `positions`.
    pub(crate) fn import(
        &mut self,
        spec: &DecoderSpec,
        positions: usize,
        elements: &[u8],
    ) -> Result<(), ModelError> {
        fn add<E: KvElement + AnyBitPattern + NoUninit>(
            pages: &mut Vec<Arc<Page<E>>>,
            spec: &DecoderSpec,
            count: usize,
            bytes: &[u8],
        ) -> Result<(), ModelError> {
            let len = spec.layers * layout(spec).page_len();
            let expected = count * len * size_of::<E>();
            if bytes.len() != expected {
                let found = bytes.len();
                return Err(damaged(format!(
                    "it has {found} bytes of elements, not {expected}"
                )));
            }
            for bytes in bytes.chunks_exact(len * size_of::<E>()) {
                let mut elements = vec![E::default(); len];
                bytemuck::cast_slice_mut(&mut elements).copy_from_slice(bytes);
                pages.push(Arc::new(Page::new(elements)));
            }
            Ok(())
        }
        let count = positions.div_ceil(PAGE);
        match &mut *self.lock() {
            Pages::F32(pages) => add(pages, spec, count, elements),
            Pages::F16(pages) => add(pages, spec, count, elements),
        }
    }
}

/// The layout of a layer.
pub(super) fn layout(spec: &DecoderSpec) -> KvLayout {
    KvLayout {
        heads: spec.kv_heads,
        head_dim: spec.head_dim,
    }
}

/// Makes room for `rows` positions behind the first `position`. A shared page of which nothing is kept is left to the
/// others; one of which something is kept is copied when it is written to.
pub(super) fn make_room<E: KvElement>(
    pages: &mut Vec<Arc<Page<E>>>,
    spec: &DecoderSpec,
    position: usize,
    rows: usize,
) {
    let len = spec.layers * layout(spec).page_len();
    let fresh = || Arc::new(Page::new(vec![E::default(); len]));
    for index in position.div_ceil(PAGE)..(position + rows).div_ceil(PAGE) {
        match pages.get_mut(index) {
            None => pages.push(fresh()),
            Some(page) if Arc::strong_count(page) > 1 => *page = fresh(),
            Some(_) => {}
        }
    }
}
