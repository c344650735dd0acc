//! What MLX computes on.

use mlx_engine_core::Device;
use mlx_rs::Stream;

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

/// Makes new streams the default ones of this thread: what is asked of MLX from now on does not wait for what an old one
/// is at, nor hear of its errors. Arrays that an old stream was to compute should be dropped before.
///
/// # Errors
///
/// Where MLX could not be opened, and what it says.
pub fn rebuild_stream() -> Result<(), ModelError> {
    let devices = match detect()?.device {
        Device::Cpu => vec![mlx_rs::Device::cpu()],
        _ => vec![mlx_rs::Device::cpu(), mlx_rs::Device::gpu()],
    };
    for device in devices {
        let stream = Stream::new_with_device(&device);
        #[expect(unsafe_code, reason = "mlx-rs has no such call")]
        // SAFETY: the handle is alive, and MLX copies what it says.
        let status = unsafe { mlx_sys::mlx_set_default_stream(stream.as_ptr()) };
        if status != 0 {
            return Err(ModelError::Mlx(
                "a new stream could not be made the default".to_owned(),
            ));
        }
    }
    Ok(())
}

/// Waits until what this thread has begun is done.
///
/// MLX frees what it keeps when the process ends, and does not wait for its own threads then: a step that gives its memory
/// back meanwhile does so to what is gone.
pub(crate) fn settle() {
    let Ok(DeviceInfo { device }) = detect() else {
        return;
    };
    let mut streams = vec![Stream::cpu()];
    if device != Device::Cpu {
        streams.push(Stream::gpu());
    }
    for stream in streams {
        #[expect(unsafe_code, reason = "mlx-rs has no such call")]
        // SAFETY: the handle is alive, and the call waits alone.
        // Whoever wanted what failed has heard of it, or is gone.
        let _ = unsafe { mlx_sys::mlx_synchronize(stream.as_ptr()) };
    }
}
