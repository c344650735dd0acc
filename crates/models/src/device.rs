//! What MLX computes on.

use mlx_engine_core::Device;

use crate::ModelError;

/// What MLX computes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// The device.
    pub device: Device,
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
