//! Compiles mlx-c and the host operations against a prebuilt MLX, into a shared library of their own.
//!
//! On ELF targets the library is opened at run time and not linked: a program then starts without MLX and can say that it is missing,
//! and crates that depend on this one need no run path, which cargo does not hand on. It lies in the cache beside MLX
//! itself, under a name that says what it was made from, so that a second checkout finds it made.
//!
//! A program that is taken elsewhere takes the library along (`cargo xtask package`): it looks for MLX beside itself before it looks where
//! MLX was when it was built.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use crate::bindings;
use crate::cache;
use crate::locate::{self, Mlx};

pub fn build(mlx: &Mlx, mlx_c: &Path, out: &Path) -> Result<(), String> {
    let native = PathBuf::from(locate::env("CARGO_MANIFEST_DIR")?).join("native");
    let text = bindings::generate(mlx_c, &[native.join("host_op.h")], out, true)?;
    let library = library(mlx, mlx_c, &native, out)?;
    // What packs a program reads these two among what cargo tells of build scripts.
    println!("cargo::rustc-env=BUILT_MLXC={}", library.display());
    println!("cargo::rustc-env=BUILT_MLX={}", mlx.lib.display());
    if apple_target()? {
        // Its install name is its path, so what links it finds it without a run path.
        println!("cargo::rustc-link-search=native={}", parent(&library).display());
        println!("cargo::rustc-link-lib=dylib={}", link_name(&library));
    } else {
        loader(&text, &library, &native, out)?;
        println!("cargo::rustc-cfg=mlx_dynamic");
    }
    println!(
        "cargo::metadata=include={}:{}",
        mlx.include.display(),
        mlx_c.display()
    );
    println!("cargo::metadata=lib={}", mlx.lib.display());
    println!("cargo::metadata=version={}", cache::MLX_VERSION);
    Ok(())
}

/// The path of the compiled library.
fn library(mlx: &Mlx, mlx_c: &Path, native: &Path, out: &Path) -> Result<PathBuf, String> {
    let mut sources = files(&mlx_c.join("mlx/c"), "cpp")?;
    sources.extend(files(native, "cpp")?);
    let mut key = Fnv::new();
    for file in sources.iter().chain(&files(native, "h")?) {
        key.add(&std::fs::read(file).map_err(|error| format!("failed to read {}: {error}", file.display()))?);
    }
    let apple = apple_target()?;
    let run_paths = run_paths(mlx, apple);
    key.add(run_paths.join(":").as_bytes());
    let extension = if apple { "dylib" } else { "so" };
    let name = format!("libmlxc-{}-{:016x}.{extension}", cache::MLX_VERSION, key.0);
    let folder = cache::cache_dir().map_or_else(|| out.to_owned(), |root| root.join("lib"));
    let library = folder.join(&name);
    if library.is_file() {
        return Ok(library);
    }

    let mut compile = cc::Build::new();
    compile
        .cpp(true)
        .std("c++20")
        .pic(true)
        .opt_level(2)
        .debug(false)
        .include(mlx_c)
        .include(&mlx.include)
        .include(native)
        .flag("-include")
        .flag(native.join("format.h").to_string_lossy().as_ref())
        .flag("-fvisibility-inlines-hidden")
        .warnings(false)
        .cargo_metadata(false)
        .files(&sources);
    let objects = compile.try_compile_intermediates().map_err(|error| {
        format!("failed to compile mlx-c: {error}\nA C++20 compiler is needed (Debian: apt install g++).")
    })?;

    // Made beside its place and renamed, so that two builds at once do no harm.
    std::fs::create_dir_all(&folder)
        .map_err(|error| format!("failed to create {}: {error}", folder.display()))?;
    let partial = folder.join(format!(".{name}.{}", std::process::id()));
    let mut link = compile
        .try_get_compiler()
        .map_err(|error| error.to_string())?
        .to_command();
    link.arg("-shared").arg("-o").arg(&partial).args(&objects);
    if apple {
        link.arg(format!("-Wl,-install_name,{}", library.display()));
    }
    link.arg(format!("-L{}", mlx.lib.display())).arg("-lmlx");
    link.args(run_paths.iter().map(|path| format!("-Wl,-rpath,{path}")));
    let linked = link
        .output()
        .map_err(|error| format!("failed to run the linker: {error}"))?;
    if !linked.status.success() {
        return Err(format!(
            "failed to link mlx-c:\n{}",
            String::from_utf8_lossy(&linked.stderr)
        ));
    }
    std::fs::rename(&partial, &library)
        .map_err(|error| format!("failed to write {}: {error}", library.display()))?;
    Ok(library)
}

/// Where the library looks for MLX: below itself, as it is packed, then where MLX is on this machine.
fn run_paths(mlx: &Mlx, apple: bool) -> [String; 2] {
    let own_folder = if apple { "@loader_path" } else { "$ORIGIN" };
    [format!("{own_folder}/mlx/lib"), mlx.lib.display().to_string()]
}

fn apple_target() -> Result<bool, String> {
    Ok(locate::env("CARGO_CFG_TARGET_VENDOR")? == "apple")
}

fn parent(library: &Path) -> &Path {
    library.parent().unwrap_or(library)
}

/// `libNAME.dylib` as the linker is told of it: `NAME`.
fn link_name(library: &Path) -> String {
    let stem = library
        .file_stem()
        .map_or_else(String::new, |stem| stem.to_string_lossy().into_owned());
    stem.trim_start_matches("lib").to_owned()
}

/// Compiles the jump table that stands for the library's functions in the program.
fn loader(bindings: &str, library: &Path, native: &Path, out: &Path) -> Result<(), String> {
    // Not line by line: without a rustfmt at hand bindgen writes all in one.
    let mut names: Vec<&str> = bindings
        .split("pub fn ")
        .skip(1)
        .filter_map(|rest| rest.split('(').next())
        .filter(|name| name.starts_with("mlx_") || name.starts_with("_mlx_"))
        .collect();
    names.extend([
        "mlx_array_item_float16",
        "mlx_array_item_bfloat16",
        "mlx_array_data_float16",
        "mlx_array_data_bfloat16",
    ]);
    names.sort_unstable();
    names.dedup();
    let mut symbols = format!("#define SYMBOL_COUNT {}\n#define SYMBOLS \\\n", names.len());
    for (index, name) in names.iter().enumerate() {
        writeln!(symbols, "  X({index}, {name}) \\").map_err(|error| error.to_string())?;
    }
    symbols.push('\n');
    let path = out.join("symbols.inc");
    std::fs::write(&path, symbols).map_err(|error| format!("failed to write {}: {error}", path.display()))?;
    cc::Build::new()
        .file(native.join("loader.c"))
        .include(out)
        .opt_level(2)
        .define(
            "MLX_ENGINE_LIBRARY",
            format!("\"{}\"", library.display()).as_str(),
        )
        .try_compile("mlx_engine_loader")
        .map_err(|error| format!("failed to compile the loader: {error}"))
}

fn files(folder: &Path, extension: &str) -> Result<Vec<PathBuf>, String> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder)
        .and_then(|entries| entries.map(|entry| entry.map(|entry| entry.path())).collect())
        .map_err(|error| format!("failed to list {}: {error}", folder.display()))?;
    files.retain(|path| path.extension().is_some_and(|found| found == extension));
    files.sort();
    Ok(files)
}

/// The 64-bit FNV-1a hash: the name only has to differ where the contents do.
struct Fnv(u64);

impl Fnv {
    fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}
