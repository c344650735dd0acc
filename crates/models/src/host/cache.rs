//! Keys and values in pages.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use half::f16;
use mlx_engine_kernels::{KvElement, KvLayout, PAGE, Precision};
use mlx_rs::Array;

use crate::DecoderSpec;
use crate::memory::Held;

/// The keys and values of a sequence, which a step in flight may be writing.
pub(crate) struct HostCache {
    pages: Arc<Mutex<Pages>>,
    /// What the last step gives back when it has written its keys and values. The next step takes it, so that MLX runs
    /// both, and in this order.
    pub(super) written: Option<Array>,
}

/// Pages of 64 positions, each of all layers one after the other.
pub(crate) enum Pages {
    F32(Vec<Page<f32>>),
    F16(Vec<Page<f16>>),
}

/// 64 positions of all layers.
pub(crate) struct Page<E> {
    pub(super) elements: Vec<E>,
    held: Held,
}

impl HostCache {
    pub(crate) fn new(precision: Precision) -> Self {
        let pages = match precision {
            Precision::Exact => Pages::F32(Vec::new()),
            Precision::Integer => Pages::F16(Vec::new()),
        };
        Self {
            pages: Arc::new(Mutex::new(pages)),
            written: None,
        }
    }

    pub(super) fn pages(&self) -> Arc<Mutex<Pages>> {
        Arc::clone(&self.pages)
    }

    /// Bytes in memory.
    pub(crate) fn bytes(&self) -> usize {
        match &*self.pages.lock().unwrap_or_else(PoisonError::into_inner) {
            Pages::F32(pages) => pages.iter().map(|page| page.held.bytes()).sum(),
            Pages::F16(pages) => pages.iter().map(|page| page.held.bytes()).sum(),
        }
    }
}

impl fmt::Debug for HostCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostCache").field("bytes", &self.bytes()).finish()
    }
}

/// The layout of a layer.
pub(super) fn layout(spec: &DecoderSpec) -> KvLayout {
    KvLayout {
        heads: spec.kv_heads,
        head_dim: spec.head_dim,
    }
}

/// Adds pages until there is room for `positions`.
pub(super) fn grow<E: KvElement>(pages: &mut Vec<Page<E>>, spec: &DecoderSpec, positions: usize) {
    let len = spec.layers * layout(spec).page_len();
    while pages.len() * PAGE < positions {
        pages.push(Page {
            elements: vec![E::default(); len],
            held: Held::new(len * size_of::<E>()),
        });
    }
}
