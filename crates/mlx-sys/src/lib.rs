//! MLX's C interface, linked on Linux and on Apple targets.
//!
//! This crate takes the place of upstream's `mlx-sys` 0.7.0 through `[patch.crates-io]`, because upstream's links on
//! Apple targets only. The declarations are the same, so that `mlx-rs` builds on it unchanged, and there are two
//! things more: [`load_error`] says whether MLX could be opened, and [`HostOp`] puts a Rust function into MLX's graph.
//!
//! On Linux the library is opened when the process starts: the one that the variable `MLX_ENGINE_LIBRARY` names, else
//! `lib/libmlxc.so` beside the program, else `../lib/mlx-engine/libmlxc.so`, else the one that was built. The first that is there is the
//! one; where it cannot be opened the program runs on, [`load_error`] says why, and whoever calls MLX all the same ends the process
//! with that text; ask first.

#![expect(unsafe_code, reason = "this crate is the border to C")]

mod bindings;
mod half;
mod host_op;

pub use bindings::*;
pub use half::*;
pub use host_op::{HostArray, HostArrayMut, HostElement, HostError, HostOp, HostOutput};

/// Why MLX cannot be called, or `None` where it can.
pub fn load_error() -> Option<String> {
    #[cfg(mlx_dynamic)]
    {
        unsafe extern "C" {
            fn mlx_engine_load_error() -> *const std::ffi::c_char;
        }
        // SAFETY: the function takes nothing and returns NULL or a text that ends in zero and lives forever.
        let text = unsafe { mlx_engine_load_error() };
        if text.is_null() {
            None
        } else {
            // SAFETY: as above, and it is not null.
            Some(
                unsafe { std::ffi::CStr::from_ptr(text) }
                    .to_string_lossy()
                    .into_owned(),
            )
        }
    }
    #[cfg(not(mlx_dynamic))]
    None
}

/// The clock that `mlx-rs` seeds its random numbers with, which only Apple's kernel has: nanoseconds since the epoch.
#[cfg(not(target_vendor = "apple"))]
#[unsafe(no_mangle)]
pub extern "C" fn mach_approximate_time() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |elapsed| elapsed.as_nanos() as u64)
}
