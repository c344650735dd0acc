//! Builds MLX from source through mlx-c's CMake project, as upstream's mlx-sys does on Apple targets.

#[cfg(target_vendor = "apple")]
pub use imp::build;

#[cfg(not(target_vendor = "apple"))]
pub fn build(_mlx_c: &std::path::Path, _out: &std::path::Path) -> Result<(), String> {
    Err("MLX for an Apple target is built on a Mac".to_owned())
}

#[cfg(target_vendor = "apple")]
mod imp {
    use std::path::{Path, PathBuf};
    use std::process::Command;

    use crate::{bindings, cache, locate};

    pub fn build(mlx_c: &Path, out: &Path) -> Result<(), String> {
        println!("cargo::rerun-if-env-changed=MLX_RS_METAL_PATH");
        let native = PathBuf::from(locate::env("CARGO_MANIFEST_DIR")?).join("native");
        let on = |feature: bool| if feature { "ON" } else { "OFF" };
        let mut config = cmake::Config::new(mlx_c);
        config
            .define("CMAKE_INSTALL_PREFIX", ".")
            // Xcode's compiler, which fits the SDK.
            .define("CMAKE_C_COMPILER", "/usr/bin/cc")
            .define("CMAKE_CXX_COMPILER", "/usr/bin/c++")
            .define("CMAKE_BUILD_TYPE", "Release")
            .define("MLX_C_BUILD_EXAMPLES", "OFF")
            .define("MLX_BUILD_METAL", on(cfg!(feature = "metal")))
            .define("MLX_METAL_JIT", on(cfg!(feature = "metal-jit")))
            .define("MLX_BUILD_ACCELERATE", on(cfg!(feature = "accelerate")));
        if cfg!(feature = "metal") {
            let folder = metallib_folder()?;
            std::fs::create_dir_all(&folder)
                .map_err(|error| format!("failed to create {}: {error}", folder.display()))?;
            config.define("MLX_METAL_PATH", &folder);
        }
        let built = config.build().join("build");
        bindings::generate(mlx_c, &[native.join("host_op.h")], out, true)?;
        cc::Build::new()
            .cpp(true)
            .std("c++20")
            .include(mlx_c)
            .include(built.join("_deps/mlx-src"))
            .include(&native)
            .file(native.join("host_op.cpp"))
            .try_compile("mlx_engine_host_op")
            .map_err(|error| format!("failed to compile the host operations: {error}"))?;
        for folder in ["lib", "_deps/mlx-build/mlx/io", "jaccl"] {
            println!("cargo::rustc-link-search=native={}", built.join(folder).display());
        }
        for library in ["mlxc", "mlx", "gguflib"] {
            println!("cargo::rustc-link-lib=static={library}");
        }
        if built.join("jaccl/libjaccl.a").is_file() {
            println!("cargo::rustc-link-lib=static=jaccl");
        }
        println!("cargo::rustc-link-lib=c++");
        println!("cargo::rustc-link-lib=dylib=objc");
        println!("cargo::rustc-link-lib=framework=Foundation");
        if cfg!(feature = "metal") {
            println!("cargo::rustc-link-lib=framework=Metal");
        }
        if cfg!(feature = "accelerate") {
            println!("cargo::rustc-link-lib=framework=Accelerate");
        }
        // MLX asks for the version of the system through a function of the compiler's run-time library.
        if let Some(folder) = clang_runtime() {
            println!("cargo::rustc-link-search={}", folder.display());
            println!("cargo::rustc-link-lib=static=clang_rt.osx");
        }
        println!(
            "cargo::metadata=include={}:{}",
            built.join("_deps/mlx-src").display(),
            mlx_c.display()
        );
        println!("cargo::metadata=defines=MLX_STATIC");
        println!("cargo::metadata=version={}", cache::MLX_VERSION);
        Ok(())
    }

    /// Where MLX looks for its kernels at run time; outside the build folder, as the path is compiled in.
    fn metallib_folder() -> Result<PathBuf, String> {
        if let Some(folder) = std::env::var_os("MLX_RS_METAL_PATH").filter(|path| !path.is_empty()) {
            return Ok(folder.into());
        }
        let name = if cfg!(feature = "metal-jit") {
            "metallib-jit"
        } else {
            "metallib"
        };
        cache::cache_dir()
            .map(|root| root.join("lib").join(format!("{name}-{}", cache::MLX_VERSION)))
            .ok_or_else(|| "HOME must be set, or MLX_RS_METAL_PATH".to_owned())
    }

    fn clang_runtime() -> Option<PathBuf> {
        let output = Command::new("xcode-select").arg("--print-path").output().ok()?;
        let developer = String::from_utf8(output.stdout).ok()?;
        let clang = Path::new(developer.trim()).join("Toolchains/XcodeDefault.xctoolchain/usr/lib/clang");
        std::fs::read_dir(clang)
            .ok()?
            .flatten()
            .map(|entry| entry.path().join("lib/darwin"))
            .find(|folder| folder.join("libclang_rt.osx.a").is_file())
    }
}
