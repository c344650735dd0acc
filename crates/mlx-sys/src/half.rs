//! Half-precision numbers as their bits, in the shape that `mlx-rs` expects of them.

#![expect(non_camel_case_types, reason = "the names are those of C")]

use std::ffi::c_int;

use crate::mlx_array;

/// The bits of an IEEE half.
#[repr(transparent)]
#[derive(Debug, Copy, Clone, Default)]
pub struct float16_t(pub u16);

/// The bits of a bfloat16.
pub type bfloat16_t = u16;

unsafe extern "C" {
    /// Evaluates an array of one float16 and writes its bits. Returns 0 on success.
    pub fn mlx_array_item_float16(res: *mut float16_t, arr: mlx_array) -> c_int;
    /// Evaluates an array of one bfloat16 and writes its bits. Returns 0 on success.
    pub fn mlx_array_item_bfloat16(res: *mut bfloat16_t, arr: mlx_array) -> c_int;
    /// The data of an evaluated float16 array, or null.
    pub fn mlx_array_data_float16(arr: mlx_array) -> *const float16_t;
    /// The data of an evaluated bfloat16 array, or null.
    pub fn mlx_array_data_bfloat16(arr: mlx_array) -> *const bfloat16_t;
}
