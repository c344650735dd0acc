//! Where set-up puts what the build needs. Shared by this crate's build script and by `cargo xtask setup`, so that the
//! two cannot disagree.

use std::env;
use std::path::PathBuf;

/// The MLX that mlx-c 0.7.0 is written for.
pub const MLX_VERSION: &str = "0.32.2";

/// The unpacked `mlx-cpu` wheel: `mlx/lib/libmlx.so`, `mlx/include/`, `mlx_cpu.libs/`.
pub const MLX_CPU: &str = "mlx-cpu-0.32.2";

/// The unpacked `mlx-cuda-13` wheel, laid out as [`MLX_CPU`].
pub const MLX_CUDA: &str = "mlx-cuda-13-0.32.2";

/// The unpacked `mlx-metal` wheel, laid out as [`MLX_CPU`], with `libmlx.dylib` and `mlx.metallib`.
pub const MLX_METAL: &str = "mlx-metal-0.32.2";

/// The mlx-c sources: `mlx/c/*.h` and `mlx/c/*.cpp`.
pub const MLX_C: &str = "mlx-c-0.7.0";

/// The folder that holds libclang inside the cache, for machines that have none installed.
pub const LIBCLANG: &str = "libclang-18.1.1/clang/native";

/// The folder that `cargo xtask setup` fills: `MLX_ENGINE_CACHE` where that is set, else `mlx-engine` in the user's
/// cache folder.
pub fn cache_dir() -> Option<PathBuf> {
    let set = |name: &str| {
        env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    set("MLX_ENGINE_CACHE").or_else(|| {
        let user = if cfg!(target_os = "macos") {
            set("HOME")?.join("Library/Caches")
        } else {
            set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")))?
        };
        Some(user.join("mlx-engine"))
    })
}
