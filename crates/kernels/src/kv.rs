//! Keys and values in pages.
//!
//! A page holds 64 positions of some layers. The keys of a layer lie sixteen positions side by side, so that a score
//! needs no sum across lanes; its values lie row by row. Both are floats, or integers of 8 or 4 bits in groups of a head's
//! elements with a scale and a bias for each, as MLX's affine quantization has them.

use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::KernelError;
use crate::error::check_len;
use crate::pool::prefetch_to_write;
use crate::simd::{LANES, Line, Simd};

/// Positions of a page.
pub const PAGE: usize = 64;

/// Elements of a key that are converted together.
const KEYS_AT_ONCE: usize = 64;

/// Vectors of sixteen positions in a page.
pub(crate) const SLICES: usize = PAGE / LANES;

/// The shape of the keys and values of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KvLayout {
    /// Heads of keys and values.
    pub heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

impl KvLayout {
    /// Keys of a head in a page: `[slices, head_dim, 16]`.
    fn keys(self) -> usize {
        PAGE * self.head_dim
    }

    /// Values of a head in a page: `[64, width]`.
    fn values(self) -> usize {
        PAGE * self.width()
    }

    /// The width of a head in whole vectors.
    pub(crate) fn width(self) -> usize {
        self.head_dim.next_multiple_of(LANES)
    }
}

/// The type of keys and values that are not quantized, and of the scales and biases of those that are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvFloat {
    /// float32.
    F32,
    /// float16.
    F16,
}

impl KvFloat {
    /// Bytes of an element.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => size_of::<f32>(),
            Self::F16 => size_of::<f16>(),
        }
    }
}

/// Integers for keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KvIntegers {
    /// 8 or 4.
    pub bits: usize,
    /// Elements of a head that share a scale and a bias: 32, 64 or 128.
    pub group_size: usize,
}

/// How the keys and values of a page are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KvFormat {
    /// The shape of each layer.
    pub layout: KvLayout,
    /// Layers of the page.
    pub layers: usize,
    /// The type of what is not an integer.
    pub float: KvFloat,
    /// The integers, where keys and values are quantized.
    pub integers: Option<KvIntegers>,
}

impl KvFormat {
    /// Checks that groups are whole.
    ///
    /// # Errors
    ///
    /// [`KernelError::Layout`] for bits other than 8 and 4, for groups other than of 32, 64 and 128, and where a head is
    /// not whole groups.
    pub fn check(&self) -> Result<(), KernelError> {
        let Some(KvIntegers { bits, group_size }) = self.integers else {
            return Ok(());
        };
        let head_dim = self.layout.head_dim;
        if [4, 8].contains(&bits)
            && [32, 64, 128].contains(&group_size)
            && head_dim.is_multiple_of(group_size)
        {
            return Ok(());
        }
        Err(KernelError::Layout {
            bits: bits as u32,
            group_size,
            columns: head_dim,
        })
    }

    /// Bytes of a page.
    pub fn bytes(&self) -> usize {
        let (codes, floats) = self.lengths();
        self.layers * (codes + floats * self.float.bytes())
    }

    /// Bytes of codes and number of floats of a layer.
    fn lengths(&self) -> (usize, usize) {
        let KvLayout { heads, .. } = self.layout;
        match self.integers {
            None => (0, heads * (self.layout.keys() + self.layout.values())),
            Some(KvIntegers { bits, group_size }) => {
                let elements = 2 * PAGE * self.layout.head_dim;
                (heads * elements * bits / 8, heads * 2 * elements / group_size)
            }
        }
    }
}

/// The keys and values of 64 positions of some layers.
#[derive(Clone, Debug)]
pub struct KvPage {
    format: KvFormat,
    /// Integers, layer by layer.
    codes: Vec<u8>,
    /// Floats, or the scales and biases of the integers, layer by layer.
    floats: Floats,
}

#[derive(Clone, Debug)]
enum Floats {
    F32(Vec<f32>),
    F16(Vec<f16>),
}

/// A layer of a page.
#[derive(Clone, Copy, Debug)]
pub struct KvLayer<'a> {
    format: &'a KvFormat,
    codes: &'a [u8],
    floats: FloatSlice<'a>,
}

#[derive(Clone, Copy, Debug)]
enum FloatSlice<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
}

/// What attention reads of a head.
#[derive(Clone, Copy)]
pub(crate) enum Head<'a> {
    F32(&'a [f32], &'a [f32]),
    F16(&'a [f16], &'a [f16]),
    /// What [`KvLayer::unpack`] makes floats of.
    Integers,
}

/// So many zeros; where there is no memory for them, that is an error and no abort.
fn zeros<E: Clone + Default>(len: usize) -> Result<Vec<E>, KernelError> {
    let mut zeros = Vec::new();
    zeros
        .try_reserve_exact(len)
        .map_err(|_| KernelError::OutOfMemory {
            bytes: len.saturating_mul(size_of::<E>()),
        })?;
    zeros.resize(len, E::default());
    Ok(zeros)
}

impl KvPage {
    /// A page of zeros.
    ///
    /// # Errors
    ///
    /// As [`KvFormat::check`], and [`KernelError::OutOfMemory`] where there is no memory for it.
    pub fn new(format: KvFormat) -> Result<Self, KernelError> {
        format.check()?;
        let (codes, floats) = format.lengths();
        let floats = format.layers * floats;
        Ok(Self {
            format,
            codes: zeros(format.layers * codes)?,
            floats: match format.float {
                KvFloat::F32 => Floats::F32(zeros(floats)?),
                KvFloat::F16 => Floats::F16(zeros(floats)?),
            },
        })
    }

    /// How it is stored.
    pub fn format(&self) -> &KvFormat {
        &self.format
    }

    /// What it holds, as bytes.
    pub fn as_bytes(&self) -> [&[u8]; 2] {
        let floats = match &self.floats {
            Floats::F32(floats) => bytemuck::cast_slice(floats),
            Floats::F16(floats) => bytemuck::cast_slice(floats),
        };
        [&self.codes, floats]
    }

    /// Takes over what another page of this format gave as bytes, one part after the other.
    ///
    /// # Errors
    ///
    /// Where there are not as many.
    pub fn set_bytes(&mut self, bytes: &[u8]) -> Result<(), KernelError> {
        check_len("the bytes of a page", bytes.len(), self.format.bytes())?;
        let (codes, floats) = bytes.split_at(self.codes.len());
        self.codes.copy_from_slice(codes);
        match &mut self.floats {
            Floats::F32(to) => bytemuck::cast_slice_mut(to).copy_from_slice(floats),
            Floats::F16(to) => bytemuck::cast_slice_mut(to).copy_from_slice(floats),
        }
        Ok(())
    }

    /// A layer.
    ///
    /// # Errors
    ///
    /// Where the page has no such layer.
    pub fn layer(&self, layer: usize) -> Result<KvLayer<'_>, KernelError> {
        self.check_layer(layer)?;
        let (codes, floats) = self.format.lengths();
        let own = layer * floats..(layer + 1) * floats;
        Ok(KvLayer {
            format: &self.format,
            codes: &self.codes[layer * codes..][..codes],
            floats: match &self.floats {
                Floats::F32(all) => FloatSlice::F32(&all[own]),
                Floats::F16(all) => FloatSlice::F16(&all[own]),
            },
        })
    }

    fn check_layer(&self, layer: usize) -> Result<(), KernelError> {
        if layer < self.format.layers {
            return Ok(());
        }
        Err(KernelError::Index {
            what: "layer",
            index: layer,
            len: self.format.layers,
        })
    }

    /// Asks for the memory that [`write`](Self::write) of this position will touch, so that it does not wait for it. Pages
    /// of integers are left out.
    pub fn will_write(&self, layer: usize, position: usize) {
        let KvFormat {
            layout,
            layers,
            integers,
            ..
        } = self.format;
        if integers.is_some() || layer >= layers || position >= PAGE {
            return;
        }
        let (start, element) = match &self.floats {
            Floats::F32(all) => (all.as_ptr().addr(), size_of::<f32>()),
            Floats::F16(all) => (all.as_ptr().addr(), size_of::<f16>()),
        };
        let (_, floats) = self.format.lengths();
        let keys = start + layer * floats * element;
        let values = keys + layout.heads * layout.keys() * element;
        let slice = layout.head_dim * LANES;
        for head in 0..layout.heads {
            let key = keys + (head * layout.keys() + position / LANES * slice) * element;
            let value = values + (head * layout.values() + position * layout.width()) * element;
            for (start, len) in [(key, slice * element), (value, layout.head_dim * element)] {
                for line in (start..start + len).step_by(size_of::<Line>()) {
                    prefetch_to_write(line);
                }
            }
        }
    }

    /// Writes the keys and values of one position of a layer, `[heads, head_dim]` each.
    ///
    /// # Errors
    ///
    /// Where a length does not fit, and for a layer or a position that the page does not have.
    pub fn write(
        &mut self,
        layer: usize,
        position: usize,
        keys: &[f32],
        values: &[f32],
    ) -> Result<(), KernelError> {
        let KvFormat { layout, integers, .. } = self.format;
        self.check_layer(layer)?;
        check_len("the keys", keys.len(), layout.heads * layout.head_dim)?;
        check_len("the values", values.len(), layout.heads * layout.head_dim)?;
        if position >= PAGE {
            return Err(KernelError::Index {
                what: "position",
                index: position,
                len: PAGE,
            });
        }
        let (codes, floats) = self.format.lengths();
        let own = layer * floats..(layer + 1) * floats;
        let codes = &mut self.codes[layer * codes..][..codes];
        match (&mut self.floats, integers) {
            (Floats::F32(all), None) => write_floats(layout, position, &mut all[own], keys, values),
            (Floats::F16(all), None) => write_floats(layout, position, &mut all[own], keys, values),
            (Floats::F32(all), Some(integers)) => {
                write_integers(layout, integers, position, codes, &mut all[own], keys, values);
            }
            (Floats::F16(all), Some(integers)) => {
                write_integers(layout, integers, position, codes, &mut all[own], keys, values);
            }
        }
        Ok(())
    }
}

/// An element of keys and values, or of scales and biases.
pub(crate) trait Element: Copy + Default {
    fn of(value: f32) -> Self;
    /// Several at once, of the same length.
    fn of_all(values: &[f32], to: &mut [Self]);
    fn to_f32(self) -> f32;
    fn load<S: Simd>(s: S, from: &[Self; LANES]) -> S::F;
}

impl Element for f32 {
    #[inline(always)]
    fn of(value: f32) -> Self {
        value
    }
    fn of_all(values: &[f32], to: &mut [Self]) {
        to.copy_from_slice(values);
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn load<S: Simd>(s: S, from: &[Self; LANES]) -> S::F {
        s.load(from)
    }
}

impl Element for f16 {
    #[inline(always)]
    fn of(value: f32) -> Self {
        f16::from_f32(value)
    }
    fn of_all(values: &[f32], to: &mut [Self]) {
        to.convert_from_f32_slice(values);
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
    #[inline(always)]
    fn load<S: Simd>(s: S, from: &[Self; LANES]) -> S::F {
        s.load_f16(from)
    }
}

fn write_floats<E: Element>(layout: KvLayout, position: usize, page: &mut [E], keys: &[f32], values: &[f32]) {
    let (slice, lane) = (position / LANES, position % LANES);
    let (key_page, value_page) = page.split_at_mut(layout.heads * layout.keys());
    let heads = value_page.chunks_exact_mut(layout.values());
    for (head, values) in heads.zip(values.chunks_exact(layout.head_dim)) {
        E::of_all(values, &mut head[position * layout.width()..][..layout.head_dim]);
    }
    let heads = key_page.chunks_exact_mut(layout.keys());
    for (head, keys) in heads.zip(keys.chunks_exact(layout.head_dim)) {
        let slice = &mut head[slice * layout.head_dim * LANES..][..layout.head_dim * LANES];
        for (lanes, keys) in slice
            .chunks_mut(KEYS_AT_ONCE * LANES)
            .zip(keys.chunks(KEYS_AT_ONCE))
        {
            let mut elements = [E::default(); KEYS_AT_ONCE];
            let elements = &mut elements[..keys.len()];
            E::of_all(keys, elements);
            for (lanes, key) in lanes.chunks_exact_mut(LANES).zip(elements) {
                lanes[lane] = *key;
            }
        }
    }
}

/// The integers of a head are its keys and then its values, their scales and biases likewise.
///
/// Keys: codes `[slices, head_dim, 16]`, two elements of a head to a byte where they have 4 bits, and `[slices, groups, 2,
/// 16]` scales and biases. Values: codes `[64, head_dim]`, where of 4 bits two vectors of sixteen to sixteen bytes, and
/// `[64, groups, 2]`.
fn write_integers<E: Element>(
    layout: KvLayout,
    KvIntegers { bits, group_size }: KvIntegers,
    position: usize,
    codes: &mut [u8],
    factors: &mut [E],
    keys: &[f32],
    values: &[f32],
) {
    let (slice, lane) = (position / LANES, position % LANES);
    let head_dim = layout.head_dim;
    let (code_len, factor_len) = (PAGE * head_dim * bits / 8, PAGE * 2 * head_dim / group_size);
    let heads = codes
        .chunks_exact_mut(2 * code_len)
        .zip(factors.chunks_exact_mut(2 * factor_len))
        .zip(keys.chunks_exact(head_dim).zip(values.chunks_exact(head_dim)));
    for ((codes, factors), (keys, values)) in heads {
        let (key_codes, value_codes) = codes.split_at_mut(code_len);
        let (key_factors, value_factors) = factors.split_at_mut(factor_len);
        for (group, keys) in keys.chunks_exact(group_size).enumerate() {
            let affine = Affine::of(keys, bits);
            let at = (slice * (head_dim / group_size) + group) * 2 * LANES + lane;
            key_factors[at] = E::of(affine.scale);
            key_factors[at + LANES] = E::of(affine.bias);
            for (element, key) in (group * group_size..).zip(keys) {
                let code = affine.code(*key);
                if bits == 8 {
                    key_codes[(slice * head_dim + element) * LANES + lane] = code;
                } else {
                    let byte = &mut key_codes[(slice * head_dim / 2 + element / 2) * LANES + lane];
                    put_nibble(byte, code, element % 2 == 1);
                }
            }
        }
        for (group, values) in values.chunks_exact(group_size).enumerate() {
            let affine = Affine::of(values, bits);
            let at = (position * (head_dim / group_size) + group) * 2;
            value_factors[at] = E::of(affine.scale);
            value_factors[at + 1] = E::of(affine.bias);
            for (element, value) in (position * head_dim + group * group_size..).zip(values) {
                let code = affine.code(*value);
                if bits == 8 {
                    value_codes[element] = code;
                } else {
                    let (pair, within) = (element / (2 * LANES), element % (2 * LANES));
                    let byte = &mut value_codes[pair * LANES + within % LANES];
                    put_nibble(byte, code, within >= LANES);
                }
            }
        }
    }
}

fn put_nibble(byte: &mut u8, code: u8, high: bool) {
    *byte = if high {
        (*byte & 0x0f) | (code << 4)
    } else {
        (*byte & 0xf0) | code
    };
}

/// The scale and the bias of a group, as `mx.quantize` finds them: the end of the range that is farther from zero is kept,
/// and zero is.
struct Affine {
    scale: f32,
    bias: f32,
    largest: f32,
}

impl Affine {
    fn of(values: &[f32], bits: usize) -> Self {
        let largest = ((1_u32 << bits) - 1) as f32;
        let min = values.iter().copied().fold(f32::INFINITY, f32::min);
        let max = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let step = ((max - min) / largest).max(1e-7);
        let (edge, step) = if min.abs() > max.abs() {
            (min, step)
        } else {
            (max, -step)
        };
        let zero = (edge / step).round_ties_even();
        let (scale, bias) = if zero == 0.0 {
            (step, 0.0)
        } else {
            (edge / zero, edge)
        };
        Self { scale, bias, largest }
    }

    fn code(&self, value: f32) -> u8 {
        ((value - self.bias) / self.scale)
            .round_ties_even()
            .clamp(0.0, self.largest) as u8
    }
}

impl<'a> KvLayer<'a> {
    /// The shape.
    pub(crate) fn layout(&self) -> KvLayout {
        self.format.layout
    }

    /// The keys and values of a head.
    #[inline(always)]
    pub(crate) fn head(&self, head: usize) -> Head<'a> {
        fn of<E>(layout: KvLayout, page: &[E], head: usize) -> (&[E], &[E]) {
            let (keys, values) = page.split_at(layout.heads * layout.keys());
            (
                &keys[head * layout.keys()..][..layout.keys()],
                &values[head * layout.values()..][..layout.values()],
            )
        }
        if self.format.integers.is_some() {
            return Head::Integers;
        }
        match self.floats {
            FloatSlice::F32(floats) => {
                let (keys, values) = of(self.format.layout, floats, head);
                Head::F32(keys, values)
            }
            FloatSlice::F16(floats) => {
                let (keys, values) = of(self.format.layout, floats, head);
                Head::F16(keys, values)
            }
        }
    }

    /// Makes floats of the integers of a head, in the layout of floats.
    #[inline(always)]
    pub(crate) fn unpack<S: Simd>(&self, s: S, head: usize, to: &mut Unpacked) {
        let Some(integers) = self.format.integers else {
            return;
        };
        let head_dim = self.format.layout.head_dim;
        to.keys.resize(PAGE * head_dim, 0.0);
        to.values.resize(PAGE * head_dim, 0.0);
        let code_len = 2 * PAGE * head_dim * integers.bits / 8;
        let factor_len = 4 * PAGE * head_dim / integers.group_size;
        let codes = &self.codes[head * code_len..][..code_len];
        let own = head * factor_len..(head + 1) * factor_len;
        match self.floats {
            FloatSlice::F32(floats) => unpack(s, head_dim, integers, codes, &floats[own], to),
            FloatSlice::F16(floats) => unpack(s, head_dim, integers, codes, &floats[own], to),
        }
    }
}

/// The keys and values of a head as floats.
#[derive(Debug, Default)]
pub(crate) struct Unpacked {
    pub(crate) keys: Vec<f32>,
    pub(crate) values: Vec<f32>,
}

#[inline(always)]
fn unpack<S: Simd, E: Element>(
    s: S,
    head_dim: usize,
    KvIntegers { bits, group_size }: KvIntegers,
    codes: &[u8],
    factors: &[E],
    to: &mut Unpacked,
) {
    let (key_codes, value_codes) = codes.split_at(codes.len() / 2);
    let (key_factors, value_factors) = factors.split_at(factors.len() / 2);
    let (key_factors, _) = key_factors.as_chunks::<LANES>();
    let (key_codes, _) = key_codes.as_chunks::<LANES>();
    let (keys, _) = to.keys.as_chunks_mut::<LANES>();
    let groups = keys
        .chunks_exact_mut(group_size)
        .zip(key_codes.chunks_exact(group_size * bits / 8))
        .zip(key_factors.chunks_exact(2));
    for ((keys, codes), factors) in groups {
        let (scale, bias) = (E::load(s, &factors[0]), E::load(s, &factors[1]));
        if bits == 8 {
            for (key, codes) in keys.iter_mut().zip(codes) {
                s.store(s.fma(s.to_float(s.load_u8(codes)), scale, bias), key);
            }
        } else {
            for (pair, codes) in keys.chunks_exact_mut(2).zip(codes) {
                let codes = s.load_u8(codes);
                let low = s.to_float(s.and(codes, s.splat_i(15)));
                let high = s.to_float(s.shr::<4>(codes));
                s.store(s.fma(low, scale, bias), &mut pair[0]);
                s.store(s.fma(high, scale, bias), &mut pair[1]);
            }
        }
    }
    debug_assert_eq!(to.values.len(), PAGE * head_dim);
    let (value_codes, _) = value_codes.as_chunks::<LANES>();
    let (values, _) = to.values.as_chunks_mut::<LANES>();
    let (value_factors, _) = value_factors.as_chunks::<2>();
    let groups = values
        .chunks_exact_mut(group_size / LANES)
        .zip(value_codes.chunks_exact(group_size / LANES * bits / 8))
        .zip(value_factors);
    for ((values, codes), factors) in groups {
        let [scale, bias] = factors.map(|factor| s.splat(factor.to_f32()));
        if bits == 8 {
            for (value, codes) in values.iter_mut().zip(codes) {
                s.store(s.fma(s.to_float(s.load_u8(codes)), scale, bias), value);
            }
        } else {
            for (pair, codes) in values.chunks_exact_mut(2).zip(codes) {
                let codes = s.load_u8(codes);
                let low = s.to_float(s.and(codes, s.splat_i(15)));
                let high = s.to_float(s.shr::<4>(codes));
                s.store(s.fma(low, scale, bias), &mut pair[0]);
                s.store(s.fma(high, scale, bias), &mut pair[1]);
            }
        }
    }
}
