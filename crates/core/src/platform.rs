//! Where the program runs, and whether MLX can be there.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::EngineError;

/// What executes the operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Device {
    /// The GPU of Apple silicon.
    Metal,
    /// An NVIDIA GPU.
    Cuda,
    /// The processor.
    Cpu,
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Metal => "metal",
            Self::Cuda => "cuda",
            Self::Cpu => "cpu",
        })
    }
}

/// Where the program runs.
///
/// ```
/// use mlx_engine_core::{Device, Platform};
///
/// let platform = Platform::detect(false, Device::Cpu, None);
/// assert!(platform.require_mlx().is_err(), "a build without MLX has none");
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// The operating system, as Rust names it: `macos`, `ios`, `linux`, `windows`.
    pub os: String,
    /// The processor, as Rust names it: `aarch64`, `x86_64`.
    pub arch: String,
    /// Whether this is a simulator of an Apple device, which has no Metal that MLX could use.
    pub simulator: bool,
    /// Whether MLX is part of this build.
    pub mlx_compiled: bool,
    /// What executes the operations.
    pub device: Device,
    /// Memory that the device can use; `None` where nobody could tell.
    pub memory_bytes: Option<u64>,
}

impl Platform {
    /// The platform that this program was compiled for. What takes MLX or the system to find out is handed in.
    pub fn detect(mlx_compiled: bool, device: Device, memory_bytes: Option<u64>) -> Self {
        Self {
            os: std::env::consts::OS.to_owned(),
            arch: std::env::consts::ARCH.to_owned(),
            simulator: cfg!(target_abi = "sim"),
            mlx_compiled,
            device,
            memory_bytes,
        }
    }

    /// Whether MLX can run here.
    ///
    /// # Errors
    ///
    /// [`EngineError::MlxUnavailable`] with the reason, on a simulator or in a build without MLX.
    pub fn require_mlx(&self) -> Result<(), EngineError> {
        let reason = if self.simulator {
            format!("the {} simulator has no Metal device that MLX can use", self.os)
        } else if !self.mlx_compiled {
            format!("this build for {} {} does not include MLX", self.os, self.arch)
        } else {
            return Ok(());
        };
        Err(EngineError::MlxUnavailable { reason })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn iphone() -> Platform {
        Platform {
            os: "ios".to_owned(),
            arch: "aarch64".to_owned(),
            simulator: false,
            mlx_compiled: true,
            device: Device::Metal,
            memory_bytes: Some(8 << 30),
        }
    }

    #[test]
    fn the_reason_for_no_mlx_is_said() {
        let reason = |platform: Platform| platform.require_mlx().unwrap_err().to_string();
        assert!(iphone().require_mlx().is_ok());
        assert_eq!(
            reason(Platform {
                simulator: true,
                ..iphone()
            }),
            "mlx is unavailable: the ios simulator has no Metal device that MLX can use"
        );
        assert_eq!(
            reason(Platform {
                mlx_compiled: false,
                ..iphone()
            }),
            "mlx is unavailable: this build for ios aarch64 does not include MLX"
        );
    }

    #[test]
    fn detection_keeps_what_it_is_handed() {
        let platform = Platform::detect(true, Device::Cuda, Some(1));
        assert_eq!((platform.mlx_compiled, platform.device), (true, Device::Cuda));
        assert_eq!(
            (platform.memory_bytes, platform.os.as_str()),
            (Some(1), std::env::consts::OS)
        );
    }

    #[test]
    fn a_platform_round_trips_and_names_its_device() {
        let json = serde_json::to_value(iphone()).unwrap();
        assert_eq!(json["device"], Device::Metal.to_string());
        assert_eq!(serde_json::from_value::<Platform>(json).unwrap(), iphone());
    }
}
