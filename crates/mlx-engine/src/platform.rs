//! Where the program runs.

use mlx_engine_core::{Device, Platform};

/// The platform, with what MLX and the system say: the device, and the memory that it can use.
pub fn platform() -> Platform {
    let system = sysinfo::System::new_with_specifics(
        sysinfo::RefreshKind::nothing().with_memory(sysinfo::MemoryRefreshKind::nothing().with_ram()),
    );
    let memory = Some(system.total_memory()).filter(|&bytes| bytes > 0);
    Platform::detect(cfg!(feature = "mlx"), device(), memory)
}

/// Bytes that could be allocated now without others having to give some back.
#[cfg(feature = "mlx")]
pub(crate) fn available_memory() -> Option<u64> {
    let system = sysinfo::System::new_with_specifics(
        sysinfo::RefreshKind::nothing().with_memory(sysinfo::MemoryRefreshKind::nothing().with_ram()),
    );
    Some(system.available_memory()).filter(|&bytes| bytes > 0)
}

#[cfg(feature = "mlx")]
fn device() -> Device {
    mlx_engine_engine::mlx_device().unwrap_or(Device::Cpu)
}

#[cfg(not(feature = "mlx"))]
fn device() -> Device {
    Device::Cpu
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_has_memory_and_the_build_says_what_it_has() {
        let platform = platform();
        assert!(platform.memory_bytes.unwrap() > 1 << 28);
        assert_eq!(platform.mlx_compiled, cfg!(feature = "mlx"));
    }
}
