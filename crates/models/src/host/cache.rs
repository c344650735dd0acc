//! Keys and values in pages.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mlx_engine_kernels::{
    KernelError, KvFloat, KvFormat, KvIntegers, KvLayer, KvLayout, KvPage, PAGE, Precision,
};
use mlx_rs::{Array, Stream, transforms};
use mlx_sys::{HostOp, HostOutput, mlx_dtype__MLX_UINT32};

use super::faults::Faults;
use crate::kv::{KvPlan, KvRule};
use crate::memory::{Held, check_room};
use crate::{DecoderSpec, ModelError};

/// The keys and values of a sequence, which a step in flight may be writing.
pub(crate) struct HostCache {
    pages: Arc<Mutex<Pages>>,
    /// What the last step gives back when it has written its keys and values. The next step takes it, so that MLX runs
    /// both, and in this order.
    pub(crate) written: Option<Array>,
    /// What went wrong in its steps.
    pub(crate) faults: Faults,
}

/// For each kind of attention, pages of 64 positions; `None` where what they held is no longer seen.
#[derive(Clone, Default)]
pub(crate) struct Pages {
    groups: Vec<Vec<Option<Arc<Page>>>>,
}

/// 64 positions of all layers of a kind. A page that several sequences have is read by all and written by none of them.
#[derive(Clone)]
struct Page {
    kv: KvPage,
    held: Held,
}

/// How pages are made: what is kept, and the formats in which it is stored.
#[derive(Clone, Debug)]
pub(crate) struct PagePlan {
    pub(crate) kv: KvPlan,
    layout: KvLayout,
    float: KvFloat,
}

impl PagePlan {
    pub(crate) fn new(spec: &DecoderSpec, kv: KvPlan, precision: Precision) -> Self {
        Self {
            kv,
            layout: KvLayout {
                heads: spec.kv_heads,
                head_dim: spec.head_dim,
            },
            float: match precision {
                Precision::Exact => KvFloat::F32,
                Precision::Integer => KvFloat::F16,
            },
        }
    }

    /// The shape of a layer.
    pub(crate) fn layout(&self) -> KvLayout {
        self.layout
    }

    /// The name of the type of what is not an integer.
    pub(crate) fn element(&self) -> &'static str {
        match self.float {
            KvFloat::F32 => "f32",
            KvFloat::F16 => "f16",
        }
    }

    fn format(&self, rule: &KvRule, page: usize) -> KvFormat {
        KvFormat {
            layout: self.layout,
            layers: rule.layers,
            float: self.float,
            integers: rule
                .integers
                .filter(|integers| page * PAGE >= integers.from)
                .map(|integers| KvIntegers {
                    bits: integers.bits,
                    group_size: integers.group_size,
                }),
        }
    }

    fn page(&self, rule: &KvRule, page: usize) -> Result<Arc<Page>, KernelError> {
        let format = self.format(rule, page);
        check_room(format.bytes())?;
        let kv = KvPage::new(format)?;
        let held = Held::new(kv.format().bytes());
        Ok(Arc::new(Page { kv, held }))
    }

    /// Bytes that each of the first tokens of a sequence takes.
    pub(crate) fn bytes_per_token(&self) -> usize {
        self.bytes(PAGE, PAGE) / PAGE
    }

    /// Bytes that a sequence of `tokens` takes, which was fed at most `step` of them at once.
    pub(crate) fn bytes(&self, tokens: usize, step: usize) -> usize {
        let groups = self.kv.rules.iter().map(|rule| {
            let last = tokens.saturating_sub(step.min(tokens));
            let pages = (0..tokens.div_ceil(PAGE)).filter(|&page| is_held(rule, page, rule.released(last)));
            pages.map(|page| self.format(rule, page).bytes()).sum::<usize>()
        });
        groups.sum()
    }
}

/// Whether a page is there where those beside the kept ones are from `released` on.
fn is_held(rule: &KvRule, page: usize, released: usize) -> bool {
    page * PAGE < rule.keep || (page + 1) * PAGE > released
}

impl Pages {
    /// The pages of the first `positions`, which are shared from now on.
    fn fork(&self, positions: usize) -> Self {
        let count = positions.div_ceil(PAGE);
        let groups = self.groups.iter();
        Self {
            groups: groups
                .map(|pages| pages.iter().take(count).cloned().collect())
                .collect(),
        }
    }

    fn all(&self) -> impl Iterator<Item = &Arc<Page>> {
        self.groups.iter().flatten().flatten()
    }

    /// Gives back what rows from `position` on do not see, and makes room for `rows` of them. A shared page of which
    /// nothing is kept is left to the others; one of which something is kept is copied when it is written to.
    pub(super) fn make_room(
        &mut self,
        plan: &PagePlan,
        position: usize,
        rows: usize,
    ) -> Result<(), KernelError> {
        self.groups.resize(plan.kv.rules.len(), Vec::new());
        for (pages, rule) in self.groups.iter_mut().zip(&plan.kv.rules) {
            let released = rule.released(position);
            for (index, page) in pages.iter_mut().enumerate() {
                if !is_held(rule, index, released) {
                    *page = None;
                }
            }
            for index in position.div_ceil(PAGE)..(position + rows).div_ceil(PAGE) {
                match pages.get_mut(index) {
                    None => pages.push(Some(plan.page(rule, index)?)),
                    Some(Some(page)) if Arc::strong_count(page) == 1 => {}
                    Some(page) => *page = Some(plan.page(rule, index)?),
                }
            }
        }
        Ok(())
    }

    /// Asks for the memory that [`write`](Self::write) will touch.
    pub(super) fn will_write(&self, (kind, number): (usize, usize), position: usize) {
        let pages = self.groups.get(kind);
        if let Some(Some(page)) = pages.and_then(|pages| pages.get(position / PAGE)) {
            page.kv.will_write(number, position % PAGE);
        }
    }

    /// Writes a position of a layer, which is the `number`th of its kind.
    pub(super) fn write(
        &mut self,
        (kind, number): (usize, usize),
        position: usize,
        keys: &[f32],
        values: &[f32],
    ) -> Result<(), KernelError> {
        let page = self
            .groups
            .get_mut(kind)
            .and_then(|pages| pages.get_mut(position / PAGE));
        let Some(Some(page)) = page else {
            return Err(KernelError::Index {
                what: "page",
                index: position / PAGE,
                len: 0,
            });
        };
        let page = Arc::make_mut(page);
        page.kv.write(number, position % PAGE, keys, values)
    }

    /// The pages of a layer that hold the first `positions`.
    pub(super) fn layer(
        &self,
        (kind, number): (usize, usize),
        positions: usize,
    ) -> Result<Vec<Option<KvLayer<'_>>>, KernelError> {
        let pages = self.groups.get(kind).map_or(&[][..], Vec::as_slice);
        let pages = pages.iter().take(positions.div_ceil(PAGE));
        pages
            .map(|page| page.as_ref().map(|page| page.kv.layer(number)).transpose())
            .collect()
    }
}

impl HostCache {
    pub(crate) fn new() -> Self {
        Self {
            pages: Arc::default(),
            written: None,
            faults: Faults::default(),
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
            faults: Faults::default(),
        };
        let Some(written) = in_flight else {
            return Ok(fork);
        };
        let (from, to) = (self.pages(), fork.pages());
        let (faults, own) = (self.faults.clone(), fork.faults.clone());
        let op = HostOp::new(c"fork", move |_, outputs| {
            if let Some(done) = outputs.first_mut() {
                done.as_mut_slice::<u32>()?.fill(0);
            }
            let shared = from
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .fork(positions);
            *to.lock().unwrap_or_else(PoisonError::into_inner) = shared;
            if let Some(fault) = faults.below(positions) {
                own.note(0, fault);
            }
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

    /// # Errors
    ///
    /// What the step failed with that was to compute one of the first `positions`, where one did so far.
    pub(crate) fn check(&self, positions: usize) -> Result<(), ModelError> {
        self.faults
            .below(positions)
            .map_or(Ok(()), |fault| Err(fault.into()))
    }

    fn lock(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes in memory.
    pub(crate) fn bytes(&self) -> usize {
        self.lock().all().map(|page| page.held.bytes()).sum()
    }

    /// Bytes in memory that no other sequence shares.
    pub(crate) fn unshared_bytes(&self) -> usize {
        let pages = self.lock();
        let own = pages.all().filter(|page| Arc::strong_count(page) == 1);
        own.map(|page| page.held.bytes()).sum()
    }

    /// What the pages of these positions hold, those that are there, and which these are for each kind of attention. The
    /// steps that write them have run.
    pub(crate) fn export(&self, range: Range<usize>) -> (Vec<Vec<bool>>, Vec<u8>) {
        let pages = self.lock();
        let own = range.start / PAGE..range.end.div_ceil(PAGE);
        let mut bytes = Vec::new();
        let mut there = Vec::new();
        for group in &pages.groups {
            let group = &group[own.start.min(group.len())..own.end.min(group.len())];
            for page in group.iter().flatten() {
                for part in page.kv.as_bytes() {
                    bytes.extend_from_slice(part);
                }
            }
            there.push(group.iter().map(Option::is_some).collect());
        }
        (there, bytes)
    }

    /// Adds what [`export`](Self::export) gave of pages behind the first `start` positions; `None` where it does not
    /// fit.
    pub(crate) fn import(
        &mut self,
        plan: &PagePlan,
        range: Range<usize>,
        there: &[Vec<bool>],
        mut bytes: &[u8],
    ) -> Result<Option<()>, ModelError> {
        let own = range.start / PAGE..range.end.div_ceil(PAGE);
        let mut pages = self.lock();
        pages.groups.resize(plan.kv.rules.len(), Vec::new());
        if there.len() != pages.groups.len() || there.iter().any(|group| group.len() != own.len()) {
            return Ok(None);
        }
        for ((group, rule), there) in pages.groups.iter_mut().zip(&plan.kv.rules).zip(there) {
            for (index, &there) in own.clone().zip(there) {
                if !there {
                    group.push(None);
                    continue;
                }
                let len = plan.format(rule, index).bytes();
                let Some((own, rest)) = bytes.split_at_checked(len) else {
                    return Ok(None);
                };
                let mut page = plan.page(rule, index)?;
                Arc::make_mut(&mut page).kv.set_bytes(own)?;
                group.push(Some(page));
                bytes = rest;
            }
        }
        Ok(bytes.is_empty().then_some(()))
    }

    /// For each kind of attention the first position beside the kept ones from which on everything is there.
    pub(crate) fn released(&self) -> Vec<usize> {
        let pages = self.lock();
        let groups = pages.groups.iter();
        groups
            .map(|pages| {
                pages
                    .iter()
                    .rposition(Option::is_none)
                    .map_or(0, |page| (page + 1) * PAGE)
            })
            .collect()
    }
}

impl fmt::Debug for HostCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostCache").field("bytes", &self.bytes()).finish()
    }
}

/// The order of the elements of a page, as blocks name it.
pub(crate) const LAYOUT: &str = "pages-of-64-by-16";
