//! llama.cpp: built from its sources, and what it reaches.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use super::ours::Speeds;
use super::process::measured;
use crate::downloads::{self, Host};
use crate::error::{Context, Error, Result};
use crate::setup;
use crate::workspace::{executable, on_path, run as go};

/// Programs of llama.cpp, made for this machine, and its fastest kind of the test model.
pub(crate) struct Llama {
    bench: PathBuf,
    batched: PathBuf,
    model: PathBuf,
    threads: u32,
}

/// What the build may use: all that kernels for x86-64 have but AMX, with which it has ended at its first product on
/// machines that have it.
const OPTIONS: [&str; 18] = [
    "CMAKE_BUILD_TYPE=Release",
    "BUILD_SHARED_LIBS=OFF",
    "GGML_NATIVE=OFF",
    "GGML_AVX=ON",
    "GGML_AVX2=ON",
    "GGML_FMA=ON",
    "GGML_F16C=ON",
    "GGML_BMI2=ON",
    "LLAMA_BUILD_TESTS=OFF",
    "LLAMA_BUILD_EXAMPLES=OFF",
    "LLAMA_BUILD_SERVER=OFF",
    "LLAMA_BUILD_APP=OFF",
    "LLAMA_BUILD_UI=OFF",
    "LLAMA_USE_PREBUILT_UI=OFF",
    "LLAMA_OPENSSL=OFF",
    "GGML_AMX_TILE=OFF",
    "GGML_AMX_INT8=OFF",
    "GGML_AMX_BF16=OFF",
];

/// Options of the build, and the flags of Linux without which the machine would not run it.
const AVX512: [(&str, &[&str]); 4] = [
    (
        "GGML_AVX512",
        &["avx512f", "avx512cd", "avx512vl", "avx512dq", "avx512bw"],
    ),
    ("GGML_AVX512_VBMI", &["avx512vbmi"]),
    ("GGML_AVX512_VNNI", &["avx512_vnni"]),
    ("GGML_AVX512_BF16", &["avx512_bf16"]),
];

const PROGRAMS: [&str; 3] = ["llama-bench", "llama-batched-bench", "llama-quantize"];

impl Llama {
    /// Fetches and builds what is not there yet, below `folder`, and makes the file in Q4_0.
    pub(crate) fn ready(folder: &Path, model: &Path, threads: u32) -> Result<Self> {
        let build = folder.join("llama-build");
        let programs = PROGRAMS.map(|name| build.join("bin").join(name));
        if !programs.iter().all(|program| program.is_file()) {
            build_in(folder, &build)?;
        }
        let [bench, batched, quantize] = programs;
        let name = model
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let q4_0 = folder.join(format!("{name}.Q4_0.gguf"));
        if !q4_0.is_file() {
            let partial = q4_0.with_extension("partial");
            let mut command = Command::new(&quantize);
            command
                .arg("--allow-requantize")
                .arg(model)
                .arg(&partial)
                .arg("Q4_0");
            measured(&mut command)?;
            fs::rename(&partial, &q4_0).context("put in place", &q4_0)?;
        }
        Ok(Self {
            bench,
            batched,
            model: q4_0,
            threads,
        })
    }

    /// Tokens a second of a prompt, over `repeats` of it.
    pub(crate) fn prefill(&self, prompt: u32, threads: u32, repeats: u32) -> Result<f64> {
        self.test([prompt, 0, 0], threads, repeats)
    }

    /// Tokens a second of an answer behind `depth` tokens, over `repeats` of it.
    pub(crate) fn decode(&self, depth: u32, answer: u32, threads: u32, repeats: u32) -> Result<f64> {
        self.test([0, answer, depth], threads, repeats)
    }

    /// The one figure that `llama-bench` has for tokens fed, made, and before them.
    fn test(&self, [fed, made, depth]: [u32; 3], threads: u32, repeats: u32) -> Result<f64> {
        let mut command = Command::new(&self.bench);
        command.arg("-m").arg(&self.model).args(["-o", "json"]);
        let numbers = [
            ("-t", threads),
            ("-r", repeats),
            ("-p", fed),
            ("-n", made),
            ("-d", depth),
        ];
        command.args(
            numbers
                .into_iter()
                .flat_map(|(name, number)| [name.to_owned(), number.to_string()]),
        );
        let done = measured(&mut command)?;
        let rows: Vec<Value> =
            serde_json::from_str(&done.stdout).map_err(|_| unread("llama-bench", &done.stdout))?;
        match &rows[..] {
            [row] => row["avg_ts"].as_f64(),
            _ => None,
        }
        .ok_or_else(|| unread("llama-bench", &done.stdout))
    }

    /// Tokens a second of all streams together, for each number of streams.
    pub(crate) fn together(&self, prompt: u32, answer: u32, streams: &[u32]) -> Result<Vec<Speeds>> {
        let most = streams.iter().max().copied().unwrap_or(1);
        let list = streams.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
        let mut command = Command::new(&self.batched);
        command
            .arg("-m")
            .arg(&self.model)
            .args(["--output-format", "jsonl", "-t"]);
        command.arg(self.threads.to_string()).args(["-npl", &list]);
        let numbers = [
            ("-npp", prompt),
            ("-ntg", answer),
            ("-c", most * (prompt + answer)),
        ];
        command.args(
            numbers
                .into_iter()
                .flat_map(|(name, number)| [name.to_owned(), number.to_string()]),
        );
        let done = measured(&mut command)?;
        let rows: Vec<Value> = done
            .stdout
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect();
        streams
            .iter()
            .map(|&streams| {
                let row = rows.iter().find(|row| row["pl"] == streams);
                let speed = |key: &str| {
                    row.and_then(|row| row[key].as_f64())
                        .ok_or_else(|| unread("llama-batched-bench", &done.stdout))
                };
                Ok(Speeds {
                    prefill: speed("speed_pp")?,
                    decode: speed("speed_tg")?,
                })
            })
            .collect()
    }
}

fn unread(program: &str, output: &str) -> Error {
    Error::Refused(format!(
        "{program} did not print the figures that were asked for: {output}"
    ))
}

fn build_in(folder: &Path, build: &Path) -> Result<()> {
    let mut pieces = vec![downloads::llama_cpp()];
    let own = Path::new("cmake");
    let cmake = if on_path("cmake") {
        own.to_path_buf()
    } else {
        pieces.push(downloads::cmake(Host::here()?).ok_or(Error::MissingTool {
            tool: "CMake".to_owned(),
            purpose: "building llama.cpp",
            install: "install it (macOS: brew install cmake, Debian: apt install cmake) and run the command again",
        })?);
        folder.join(downloads::CMAKE).join("bin/cmake")
    };
    setup::fill_beside(&pieces, folder)?;
    if cmake != own {
        executable(&cmake)?;
    }
    println!(
        "bench: llama.cpp is built in {}, which takes about ten minutes",
        build.display()
    );
    let mut configure = Command::new(&cmake);
    configure
        .arg("-S")
        .arg(folder.join(downloads::LLAMA_CPP))
        .arg("-B")
        .arg(build);
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    configure.args(OPTIONS.iter().map(|option| format!("-D{option}")));
    configure.args(instructions(&flags).map(|option| format!("-D{option}=ON")));
    go(&mut configure)?;
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut make = Command::new(&cmake);
    make.arg("--build")
        .arg(build)
        .args(["-j", &threads.to_string(), "--target"])
        .args(PROGRAMS);
    go(&mut make)
}

/// The options of AVX-512 that this processor has.
fn instructions(cpuinfo: &str) -> impl Iterator<Item = &'static str> {
    let line = cpuinfo
        .lines()
        .find(|line| line.starts_with("flags"))
        .unwrap_or_default();
    let flags: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
    AVX512
        .into_iter()
        .filter(move |(_, needed)| needed.iter().all(|need| flags.iter().any(|flag| flag == need)))
        .map(|(option, _)| option)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_build_uses_what_the_processor_has() {
        let check = |flags: &str, expected: &[&str]| {
            let found: Vec<_> = instructions(&format!("flags\t\t: fpu {flags}\n")).collect();
            assert_eq!(found, expected);
        };
        check("avx2 avx512f", &[]);
        check(
            "avx512f avx512cd avx512vl avx512dq avx512bw avx512_vnni amx_int8",
            &["GGML_AVX512", "GGML_AVX512_VNNI"],
        );
    }
}
