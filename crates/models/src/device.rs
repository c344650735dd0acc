//! What MLX computes on, and how much memory it uses.

use mlx_engine_core::Device;
use mlx_rs::{Dtype, memory};

use crate::ModelError;

/// What MLX computes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// The device.
    pub device: Device,
}

impl DeviceInfo {
    /// The type of activations for weights of type `stored`: float32 on a CPU, where MLX emulates the halves.
    pub(crate) fn compute_type(self, stored: Dtype) -> Dtype {
        match (self.device, stored) {
            (Device::Cpu, _) => Dtype::Float32,
            (_, Dtype::Float16 | Dtype::Bfloat16) => stored,
            _ => Dtype::Float32,
        }
    }
}

/// Finds out what MLX computes on in this process.
///
/// # Errors
///
/// Where MLX could not be opened, with what is missing.
pub fn detect() -> Result<DeviceInfo, ModelError> {
    if let Some(error) = mlx_sys::load_error() {
        return Err(ModelError::Mlx(error));
    }
    let available = |ask: unsafe extern "C" fn(*mut bool) -> std::ffi::c_int| {
        let mut available = false;
        #[expect(unsafe_code, reason = "mlx-rs has no such call for every device")]
        // SAFETY: MLX is loaded, and the call writes one bool.
        let status = unsafe { ask(&raw mut available) };
        status == 0 && available
    };
    let device = if available(mlx_sys::mlx_metal_is_available) {
        Device::Metal
    } else if available(mlx_sys::mlx_cuda_is_available) {
        Device::Cuda
    } else {
        Device::Cpu
    };
    Ok(DeviceInfo { device })
}

/// The most bytes that MLX had allocated at once since [`reset_peak_memory`].
///
/// # Errors
///
/// None that MLX documents.
pub fn peak_memory() -> Result<u64, ModelError> {
    Ok(memory::peak_memory()? as u64)
}

/// Bytes that MLX's arrays take now.
///
/// # Errors
///
/// None that MLX documents.
pub fn active_memory() -> Result<u64, ModelError> {
    Ok(memory::active_memory()? as u64)
}

/// Lets [`peak_memory`] start again.
///
/// # Errors
///
/// None that MLX documents.
pub fn reset_peak_memory() -> Result<(), ModelError> {
    Ok(memory::reset_peak_memory()?)
}

/// Gives memory back to the system that MLX keeps for later arrays.
///
/// # Errors
///
/// None that MLX documents.
pub fn clear_cache() -> Result<(), ModelError> {
    Ok(memory::clear_cache()?)
}
