//! The environment variables that are read, all of them.

use mlx_engine_hub::env as hub;

/// Who reads a variable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Reader {
    /// A program, when it runs.
    Program,
    /// The build of a program, and `cargo xtask setup`.
    Build,
    /// The tests of this workspace; `cargo xtask test` sets them.
    Tests,
}

/// An environment variable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Variable {
    /// Its name.
    pub name: &'static str,
    /// Who reads it.
    pub reader: Reader,
    /// What it says, and what holds where it is not set.
    pub meaning: &'static str,
}

const fn variable(name: &'static str, reader: Reader, meaning: &'static str) -> Variable {
    Variable {
        name,
        reader,
        meaning,
    }
}

/// Every variable that is read, those of programs first.
///
/// ```
/// use mlx_engine::environment::{Reader, VARIABLES};
///
/// let isa = VARIABLES.iter().find(|variable| variable.name == "MLX_ENGINE_ISA").unwrap();
/// assert_eq!(isa.reader, Reader::Program);
/// ```
pub const VARIABLES: &[Variable] = &[
    variable(
        "MLX_ENGINE_ISA",
        Reader::Program,
        "The instructions that kernels on a CPU use: `portable`, `avx2`, `avx512vnni` or `amx`, on Arm `portable`, `neon`, `neon-dotprod` or `neon-i8mm`. The fastest that the machine has unless set",
    ),
    variable(
        "MLX_ENGINE_LIBRARY",
        Reader::Program,
        "The library with MLX that is opened when a program starts, on Linux. The one that came with the program, `lib/libmlxc.so` beside it or `../lib/mlx-engine/libmlxc.so`, else the one that the build made, unless set",
    ),
    variable(
        crate::resolve::MODELS_VARIABLE,
        Reader::Program,
        "A TOML file with models of your own, laid over the built-in registry. None unless set",
    ),
    variable(
        hub::HF_HUB_CACHE,
        Reader::Program,
        "The folder of the models that were fetched. `$HF_HOME/hub` unless set",
    ),
    variable(
        hub::HUGGINGFACE_HUB_CACHE,
        Reader::Program,
        "The older name of `HF_HUB_CACHE`",
    ),
    variable(
        hub::HF_HOME,
        Reader::Program,
        "The folder of everything that Hugging Face's programs keep. `$XDG_CACHE_HOME/huggingface` or `~/.cache/huggingface` unless set",
    ),
    variable(
        hub::HF_ENDPOINT,
        Reader::Program,
        "Where the hub is. `https://huggingface.co` unless set",
    ),
    variable(
        hub::HF_TOKEN,
        Reader::Program,
        "An access token of the hub. It is sent to no other host, and never printed",
    ),
    variable(
        hub::HUGGING_FACE_HUB_TOKEN,
        Reader::Program,
        "The older name of `HF_TOKEN`",
    ),
    variable(
        hub::HF_TOKEN_PATH,
        Reader::Program,
        "The file that holds the access token. `$HF_HOME/token` unless set",
    ),
    variable(
        hub::HF_HUB_DISABLE_IMPLICIT_TOKEN,
        Reader::Program,
        "`1` sends no token unless a program gives one",
    ),
    variable(
        hub::HF_HUB_OFFLINE,
        Reader::Program,
        "`1` keeps off the network: what is not in the cache is an error",
    ),
    variable(
        hub::TRANSFORMERS_OFFLINE,
        Reader::Program,
        "Another name of `HF_HUB_OFFLINE`",
    ),
    variable(
        hub::XDG_CACHE_HOME,
        Reader::Program,
        "Where caches lie unless a variable says it closer: that of the hub, and that of MLX. `~/.cache` unless set",
    ),
    variable(
        "MLX_PREFIX",
        Reader::Build,
        "A folder with `include/mlx/mlx.h` and `lib/libmlx.so` to link. What `cargo xtask setup` left in the cache, or an installed Python package, unless set",
    ),
    variable(
        "MLX_ENGINE_CACHE",
        Reader::Build,
        "The folder that `cargo xtask setup` fills and the build reads. `mlx-engine` in the user's cache folder unless set",
    ),
    variable(
        "LIBCLANG_PATH",
        Reader::Build,
        "The folder of libclang, which reads MLX's headers. The system's, or the one that set-up fetched, unless set",
    ),
    variable("CXX", Reader::Build, "The C++ compiler. `c++` unless set"),
    variable(
        "MLX_RS_METAL_PATH",
        Reader::Build,
        "On a Mac where MLX is built from source: the folder of its Metal kernels at run time",
    ),
    variable(
        "MLX_ENGINE_TEST_MODEL",
        Reader::Tests,
        "The GGUF file of the test model",
    ),
    variable(
        "MLX_ENGINE_TEST_DATA",
        Reader::Tests,
        "The folder of templates, vocabularies and schemas that tests compare with",
    ),
    variable(
        "MLX_ENGINE_TEST_PYTHONPATH",
        Reader::Tests,
        "The Python packages that tests compare with",
    ),
    variable(
        "MLX_ENGINE_TEST_GEMMA",
        Reader::Tests,
        "The GGUF file of Gemma 3, where set-up was asked for it",
    ),
    variable(
        "MLX_ENGINE_REFUSED",
        Reader::Tests,
        "A file for the list of schemas that are refused, where it has changed",
    ),
    variable(
        "WRITE_METRICS_PROM",
        Reader::Tests,
        "Set to anything: the test that compares Prometheus' text with a recorded one writes it",
    ),
    variable(
        "MLX_ENGINE_WRITE_REFERENCE",
        Reader::Tests,
        "Set by `cargo xtask docs`: the tests that compare these references with the code write them",
    ),
];
