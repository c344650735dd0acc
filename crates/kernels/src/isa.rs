//! Which instructions the kernels use.

use std::fmt;
use std::sync::OnceLock;

use crate::KernelError;

/// The environment variable that names the instruction set to use, for tests and for finding faults.
pub const ISA_VARIABLE: &str = "MLX_ENGINE_ISA";

/// An instruction set that kernels are compiled for and that this processor has.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Isa(Level);

/// From the slowest to the fastest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Level {
    /// Whatever the target has by default: SSE2 on x86-64, NEON on aarch64.
    Portable,
    /// NEON by its own instructions.
    #[cfg(target_arch = "aarch64")]
    Neon,
    /// The dot products of Armv8.2 (FEAT_DotProd), besides the above.
    #[cfg(target_arch = "aarch64")]
    NeonDotprod,
    /// Products of unsigned bytes with signed ones (FEAT_I8MM), besides the above.
    #[cfg(target_arch = "aarch64")]
    NeonI8mm,
    /// AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F, BW and VL with VNNI, besides the above.
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
    /// AMX for bytes and bfloat16, besides the above.
    #[cfg(target_arch = "x86_64")]
    Amx,
}

impl Isa {
    /// Those that this processor has, slowest first. There is no other way to make one.
    pub fn available() -> Vec<Self> {
        static FOUND: OnceLock<Vec<Isa>> = OnceLock::new();
        FOUND.get_or_init(Self::find).clone()
    }

    fn find() -> Vec<Self> {
        #[cfg_attr(
            not(any(target_arch = "x86_64", target_arch = "aarch64")),
            expect(unused_mut, reason = "nothing is added there")
        )]
        let mut found = vec![Self(Level::Portable)];
        #[cfg(target_arch = "aarch64")]
        {
            use std::arch::is_aarch64_feature_detected as has;
            // What lies in memory as bytes is looked at as numbers of 32 bits.
            if cfg!(target_endian = "little") && has!("neon") {
                found.push(Self(Level::Neon));
                if has!("dotprod") {
                    found.push(Self(Level::NeonDotprod));
                    if has!("i8mm") {
                        found.push(Self(Level::NeonI8mm));
                    }
                }
            }
        }
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            if has!("avx2") && has!("fma") && has!("f16c") {
                found.push(Self(Level::Avx2));
                if has!("avx512f") && has!("avx512bw") && has!("avx512vl") && has!("avx512vnni") {
                    found.push(Self(Level::Avx512Vnni));
                    if crate::simd::MatrixUnit::detect().is_some() {
                        found.push(Self(Level::Amx));
                    }
                }
            }
        }
        found
    }

    /// The fastest that this processor has.
    pub fn fastest() -> Self {
        Self::available().last().copied().unwrap_or(Self(Level::Portable))
    }

    /// The one that [`ISA_VARIABLE`] names, or the fastest where it is not set.
    ///
    /// # Errors
    ///
    /// [`KernelError::UnknownIsa`] for a name that this processor does not have, with those it has.
    pub fn from_environment() -> Result<Self, KernelError> {
        let Some(name) = std::env::var_os(ISA_VARIABLE).filter(|name| !name.is_empty()) else {
            return Ok(Self::fastest());
        };
        let name = name.to_string_lossy();
        let available = Self::available();
        let named = available.iter().copied().find(|isa| isa.name() == name);
        named.ok_or_else(|| KernelError::UnknownIsa {
            name: name.into_owned(),
            available: available.iter().map(|isa| isa.name()).collect(),
        })
    }

    /// The name, as the environment variable spells it.
    pub fn name(self) -> &'static str {
        match self.0 {
            Level::Portable => "portable",
            #[cfg(target_arch = "aarch64")]
            Level::Neon => "neon",
            #[cfg(target_arch = "aarch64")]
            Level::NeonDotprod => "neon-dotprod",
            #[cfg(target_arch = "aarch64")]
            Level::NeonI8mm => "neon-i8mm",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Vnni => "avx512vnni",
            #[cfg(target_arch = "x86_64")]
            Level::Amx => "amx",
        }
    }

    pub(crate) fn level(self) -> Level {
        self.0
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl fmt::Debug for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
