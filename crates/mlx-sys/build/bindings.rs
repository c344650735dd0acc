//! Generates the Rust declarations of mlx-c.

use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::locate;

/// Writes `bindings.rs` to `out` and returns its text. With `half_types`, the half-precision types and their
/// accessors are left out: `src/half.rs` declares them the same way for every target.
pub fn generate(mlx_c: &Path, extra: &[PathBuf], out: &Path, half_types: bool) -> Result<String, String> {
    if let Some(folder) = locate::libclang() {
        #[expect(
            unsafe_code,
            reason = "bindgen takes the place of libclang from the environment alone"
        )]
        // SAFETY: nothing else runs in this process yet that could read the environment at the same time.
        unsafe {
            std::env::set_var("LIBCLANG_PATH", folder);
        }
    }
    let mut headers: Vec<PathBuf> = std::fs::read_dir(mlx_c.join("mlx/c"))
        .and_then(|entries| entries.map(|entry| entry.map(|entry| entry.path())).collect())
        .map_err(|error| format!("failed to list {}: {error}", mlx_c.display()))?;
    headers.retain(|path| path.extension().is_some_and(|extension| extension == "h"));
    headers.sort();
    headers.extend_from_slice(extra);

    let mut builder = bindgen::Builder::default()
        .clang_arg(format!("-I{}", mlx_c.display()))
        // bindgen's sizes for these trip a lint of newer compilers, and nobody calls them through here.
        .blocklist_function("malloc")
        .blocklist_function("realloc");
    // The libclang of a wheel comes without the compiler's own headers.
    if let Some(folder) = compiler_headers() {
        builder = builder.clang_arg("-isystem").clang_arg(folder);
    }
    if half_types {
        builder = builder
            .blocklist_type("b?float16_t")
            .blocklist_function("mlx_array_(item|data)_b?float16");
    }
    for header in &headers {
        builder = builder.header(header.to_string_lossy());
    }
    // bindgen panics where libclang is missing, with a text that does not say how to get one here.
    let generated = std::panic::catch_unwind(AssertUnwindSafe(|| builder.generate())).map_err(|_| {
        "libclang was not found, which generates the declarations of MLX; run `cargo xtask setup`, which brings it, \
         install it (Debian: libclang-dev), or set LIBCLANG_PATH to its folder"
            .to_owned()
    })?;
    let text = generated
        .map_err(|error| format!("failed to generate the bindings: {error}"))?
        .to_string();
    let path = out.join("bindings.rs");
    std::fs::write(&path, &text).map_err(|error| format!("failed to write {}: {error}", path.display()))?;
    Ok(text)
}

fn compiler_headers() -> Option<String> {
    if cfg!(target_os = "macos") {
        return None;
    }
    let output = Command::new("gcc")
        .arg("-print-file-name=include")
        .output()
        .ok()?;
    let folder = String::from_utf8(output.stdout).ok()?.trim().to_owned();
    Path::new(&folder).is_absolute().then_some(folder)
}
