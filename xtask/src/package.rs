//! `cargo xtask package`: the command and what it needs of MLX, as one archive that runs on another machine.
//!
//! ```text
//! mlx-engine-v0.1.0-x86_64-unknown-linux-gnu/
//!   mlx-engine                    looks for lib/libmlxc.so beside itself
//!   lib/libmlxc.so                looks for mlx/lib/ beside itself
//!   lib/mlx/lib/libmlx.so         and what came with it lie as in MLX's wheel, so that they find each other
//!   lib/mlx_cpu.libs/
//!   licenses/
//! ```
//!
//! What was packed is unpacked again and started before it gets its name: it has to open MLX, and nothing of it from
//! where this machine has it.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use serde_json::Value;

use crate::cache;
use crate::error::{Context, Error, Result};
use crate::fetch::sha256;
use crate::staging::Staging;
use crate::workspace::{self, cargo, executable, output, run as go, spell};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The folder that the archive and its hash are written to [default: `packed` in cargo's target folder]
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,

    /// The profile that the command is built with
    #[arg(long, value_name = "NAME", default_value = "release")]
    profile: String,
}

/// The package that has the command, and the command.
const PACKAGE: &str = "mlx-engine-cli";
const PROGRAM: &str = "mlx-engine";

/// What of the repository goes along.
const PAGES: [&str; 4] = ["README.md", "CHANGELOG.md", "LICENSE-MIT", "LICENSE-APACHE"];

/// What is said of the libraries that others made.
const LICENSES: &str = include_str!("package/licenses.md");

pub(crate) fn run(args: &Args) -> Result<()> {
    let out = match &args.out {
        Some(folder) => folder.clone(),
        None => crate::packages::read()?.target.join("packed"),
    };
    let name = format!("{PROGRAM}-v{}-{}", env!("CARGO_PKG_VERSION"), workspace::host()?);
    for path in assemble(&build(&args.profile)?, &name, &out)? {
        println!("package: {}", path.display());
    }
    Ok(())
}

/// Packs a build under a name, and returns the archive and the file with its hash.
fn assemble(built: &Built, name: &str, out: &Path) -> Result<[PathBuf; 2]> {
    let staging = Staging::new(out)?;
    let files = files(built, &workspace::root())?;
    let folder = staging.folder("packed")?;
    for (place, source) in &files {
        let to = folder.join(place);
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent).context("make the folder", parent)?;
        }
        fs::copy(source, &to).context("copy", source)?;
    }
    let notice = folder.join("licenses/README.md");
    fs::write(&notice, LICENSES).context("write", &notice)?;
    executable(&folder.join(PROGRAM))?;
    if cfg!(target_os = "macos") {
        lead_to_each_other(built, &folder)?;
    }

    let archive = staging.path().join(format!("{name}.tar.gz"));
    pack(&folder, name, &archive)?;
    let elsewhere = staging.folder("elsewhere")?;
    unpack(&archive, &elsewhere)?;
    prove(&elsewhere.join(name), &staging.folder("home")?)?;

    let hash = sha256(&archive)?;
    let hashed = staging.path().join(format!("{name}.tar.gz.sha256"));
    fs::write(&hashed, format!("{hash}  {name}.tar.gz\n")).context("write", &hashed)?;
    let place = |from: &Path| {
        let to = out.join(from.file_name().unwrap_or_default());
        fs::rename(from, &to).context("put in place", &to)?;
        Ok(to)
    };
    Ok([place(&archive)?, place(&hashed)?])
}

/// What a build made, and where what it opens is on this machine.
#[derive(Debug, PartialEq, Eq)]
struct Built {
    program: PathBuf,
    /// The library with MLX's C interface.
    library: PathBuf,
    /// The folder of MLX's own library, `mlx/lib` of the wheel.
    mlx: PathBuf,
}

fn build(profile: &str) -> Result<Built> {
    let mut command = cargo();
    command.args(["build", "--locked", "--package", PACKAGE, "--profile", profile]);
    command.args(["--message-format", "json-render-diagnostics"]);
    println!("package: {}", spell(&command));
    let told = output(command.stderr(Stdio::inherit()))?;
    if !told.status.success() {
        return Err(Error::Failed {
            command: spell(&command),
            status: told.status.to_string(),
        });
    }
    told_by_cargo(&String::from_utf8_lossy(&told.stdout))
}

/// What cargo says of a build, a JSON object a line: the program, and the variables that the build script of `mlx-sys` sets.
fn told_by_cargo(text: &str) -> Result<Built> {
    let mut program = None;
    let mut variables = BTreeMap::new();
    for message in text
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
    {
        if message["target"]["name"] == PROGRAM
            && let Some(path) = message["executable"].as_str()
        {
            program = Some(PathBuf::from(path));
        }
        for pair in message["env"].as_array().into_iter().flatten() {
            if let (Some(name), Some(value)) = (pair[0].as_str(), pair[1].as_str()) {
                variables.insert(name.to_owned(), PathBuf::from(value));
            }
        }
    }
    let mut variable = |name: &str| {
        variables.remove(name).ok_or_else(|| {
            Error::Refused(
                "the command was not built with a prebuilt MLX, which is what can be packed\n  run cargo xtask setup, which brings it"
                    .to_owned(),
            )
        })
    };
    Ok(Built {
        library: variable("BUILT_MLXC")?,
        mlx: variable("BUILT_MLX")?,
        program: program.ok_or_else(|| Error::Refused("cargo built no command".to_owned()))?,
    })
}

/// The name of the library in the archive.
fn library_name(library: &Path) -> String {
    let extension = library.extension().unwrap_or(OsStr::new("so"));
    format!("libmlxc.{}", extension.to_string_lossy())
}

/// What goes where in the archive. The folders of MLX's wheel stay as they are to each other: `mlx/lib`, and beside `mlx` those of the
/// libraries that came with it.
fn files(built: &Built, root: &Path) -> Result<BTreeMap<PathBuf, PathBuf>> {
    let mut files = BTreeMap::from([
        (PathBuf::from(PROGRAM), built.program.clone()),
        (
            Path::new("lib").join(library_name(&built.library)),
            built.library.clone(),
        ),
    ]);
    for page in PAGES {
        files.insert(PathBuf::from(page), root.join(page));
    }
    for file in inside(&built.mlx)?.into_iter().filter(|path| path.is_file()) {
        files.insert(
            Path::new("lib/mlx/lib").join(file.file_name().unwrap_or_default()),
            file,
        );
    }
    let wheel = built.mlx.ancestors().nth(2).unwrap_or(&built.mlx);
    let mut licensed = false;
    for folder in inside(wheel)? {
        let name = folder
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let kind = folder.extension();
        let of_mlx = ["mlx_cpu", "mlx_cuda", "mlx_metal"]
            .iter()
            .any(|wheel| name.starts_with(wheel));
        let to = if of_mlx && kind == Some(OsStr::new("libs")) {
            vec![(folder.clone(), Path::new("lib").join(&name))]
        } else if of_mlx && kind == Some(OsStr::new("dist-info")) {
            let from = |part| folder.join(part);
            vec![
                (from("licenses"), "licenses/mlx".into()),
                (from("sboms"), "licenses/mlx".into()),
            ]
        } else {
            continue;
        };
        for (from, to) in to.into_iter().filter(|(from, _)| from.is_dir()) {
            for file in inside(&from)?.into_iter().filter(|path| path.is_file()) {
                licensed |= from.ends_with("licenses");
                files.insert(to.join(file.file_name().unwrap_or_default()), file);
            }
        }
    }
    if !licensed {
        return Err(Error::Refused(format!(
            "the licence of MLX has to go along, and there is none beside {}\n  run cargo xtask setup, which brings MLX with it",
            built.mlx.display()
        )));
    }
    let sources = cache::cache_dir().map(|cache| cache.join(cache::MLX_C));
    if let Some(sources) = sources {
        files.insert("licenses/mlx-c/LICENSE".into(), sources.join("LICENSE"));
    }
    Ok(files)
}

/// What a folder holds, sorted.
fn inside(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).context("list", folder)? {
        found.push(entry.context("list", folder)?.path());
    }
    found.sort();
    Ok(found)
}

/// On a Mac the program names the library that it was linked with by its path. It is to look beside itself. A file that was changed has
/// to be signed anew, which needs no identity.
fn lead_to_each_other(built: &Built, folder: &Path) -> Result<()> {
    let name = library_name(&built.library);
    let (program, library) = (folder.join(PROGRAM), folder.join("lib").join(&name));
    go(Command::new("install_name_tool")
        .arg("-change")
        .arg(&built.library)
        .arg(format!("@executable_path/lib/{name}"))
        .arg(&program))?;
    go(Command::new("install_name_tool")
        .args(["-id", &format!("@rpath/{name}")])
        .arg(&library))?;
    go(Command::new("codesign")
        .args(["--force", "--sign", "-"])
        .args([&program, &library]))
}

/// Packs a folder under a name, sorted and without times and users, so that the same files give the same archive.
fn pack(folder: &Path, name: &str, archive: &Path) -> Result<()> {
    let file = File::create_new(archive).context("write", archive)?;
    let mut tar = tar::Builder::new(GzEncoder::new(file, Compression::best()));
    tar.mode(tar::HeaderMode::Deterministic);
    let mut folders = vec![folder.to_owned()];
    let mut found = Vec::new();
    while let Some(next) = folders.pop() {
        for path in inside(&next)? {
            if path.is_dir() {
                folders.push(path);
            } else {
                found.push(path);
            }
        }
    }
    found.sort();
    for path in found {
        let place = Path::new(name).join(path.strip_prefix(folder).unwrap_or(&path));
        tar.append_path_with_name(&path, place).context("pack", &path)?;
    }
    let done = tar.into_inner().and_then(GzEncoder::finish);
    done.and_then(|file| file.sync_all()).context("write", archive)
}

fn unpack(archive: &Path, into: &Path) -> Result<()> {
    let file = File::open(archive).context("read", archive)?;
    tar::Archive::new(GzDecoder::new(file))
        .unpack(into)
        .context("unpack", archive)
}

/// Starts what was unpacked, with nothing of this user's around it: it has to open MLX, and every library that was packed from where it was
/// unpacked.
fn prove(folder: &Path, home: &Path) -> Result<()> {
    let folder = folder.canonicalize().context("find", folder)?;
    let mut command = Command::new(folder.join(PROGRAM));
    command.args(["doctor", "--json"]);
    command.current_dir(home).env_clear().env("HOME", home);
    // The system's own loader says what it opens.
    command.env("LD_DEBUG", "libs").env("DYLD_PRINT_LIBRARIES", "1");
    let told = output(&mut command)?;
    let answer: Value = serde_json::from_slice(&told.stdout).unwrap_or_default();
    if !told.status.success() || answer["mlx"] != true {
        return Err(Error::Refused(format!(
            "what was packed does not run elsewhere: {}",
            answer["problem"].as_str().unwrap_or("it does not say why")
        )));
    }
    let foreign = foreign(&folder, &String::from_utf8_lossy(&told.stderr))?;
    if foreign.is_empty() {
        return Ok(());
    }
    Err(Error::Refused(format!(
        "what was packed opens this machine's libraries: {}",
        foreign.join(", ")
    )))
}

/// The libraries that were opened elsewhere although they are in the folder, by what the system's loader says.
fn foreign(folder: &Path, said: &str) -> Result<Vec<String>> {
    let mut packed = Vec::new();
    let mut folders = vec![folder.join("lib")];
    while let Some(next) = folders.pop() {
        for path in inside(&next)? {
            if path.is_dir() {
                folders.push(path);
            } else {
                packed.push(path);
            }
        }
    }
    let opened: Vec<&Path> = said.lines().filter_map(opened).map(Path::new).collect();
    if !opened.iter().any(|path| packed.iter().any(|ours| ours == path)) {
        return Err(Error::Refused(
            "the system does not say which libraries what was packed opens".to_owned(),
        ));
    }
    let is_packed = |path: &Path| packed.iter().any(|ours| ours.file_name() == path.file_name());
    let foreign = opened.iter().filter(|path| {
        let real = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
        (is_packed(path) || is_mlx(path)) && !real.starts_with(folder)
    });
    Ok(foreign.map(|path| path.display().to_string()).collect())
}

/// A library of MLX, whatever comes behind its name.
fn is_mlx(path: &Path) -> bool {
    path.file_name()
        .is_some_and(|name| name.to_string_lossy().starts_with("libmlx"))
}

/// The library that a line of the system's loader says is opened: `calling init: PATH` on Linux, `dyld[N]: <UUID> PATH` on a Mac.
fn opened(line: &str) -> Option<&str> {
    let path = match line.split_once("calling init: ") {
        Some((_, path)) => path,
        None => line.strip_prefix("dyld[")?.split_once("> ")?.1,
    };
    path.starts_with('/').then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A build as cargo leaves it, with the folders of a wheel.
    fn built(root: &Path) -> Built {
        let put = |path: &str, text: &str| {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            path
        };
        for page in PAGES {
            put(page, page);
        }
        let wheel = "cache/mlx-cpu-1.0";
        put(&format!("{wheel}/mlx/lib/libmlx.so"), "mlx");
        put(&format!("{wheel}/mlx/include/mlx/mlx.h"), "header");
        put(&format!("{wheel}/mlx_cpu.libs/libblas.so.3"), "blas");
        put(&format!("{wheel}/mlx_cpu-1.0.dist-info/licenses/LICENSE"), "MIT");
        put(&format!("{wheel}/mlx_cpu-1.0.dist-info/sboms/all.json"), "{}");
        put(
            &format!("{wheel}/mlx_lm-1.0.dist-info/licenses/LICENSE"),
            "of another",
        );
        let program = put("target/release/mlx-engine", "program");
        executable(&program).unwrap();
        Built {
            program,
            library: put("cache/lib/libmlxc-1.0-abc.so", "c"),
            mlx: root.join(wheel).join("mlx/lib"),
        }
    }

    #[test]
    fn the_libraries_lie_to_each_other_as_in_the_wheel_and_licences_go_along() {
        let root = tempfile::tempdir().unwrap();
        let built = built(root.path());
        let mut files = files(&built, root.path()).unwrap();
        files.remove(Path::new("licenses/mlx-c/LICENSE"));
        let places: Vec<_> = files.keys().map(|place| place.to_str().unwrap()).collect();
        assert_eq!(
            places,
            [
                "CHANGELOG.md",
                "LICENSE-APACHE",
                "LICENSE-MIT",
                "README.md",
                "lib/libmlxc.so",
                "lib/mlx/lib/libmlx.so",
                "lib/mlx_cpu.libs/libblas.so.3",
                "licenses/mlx/LICENSE",
                "licenses/mlx/all.json",
                "mlx-engine",
            ]
        );
        assert_eq!(
            fs::read_to_string(&files[Path::new("licenses/mlx/LICENSE")]).unwrap(),
            "MIT"
        );

        fs::remove_dir_all(root.path().join("cache/mlx-cpu-1.0/mlx_cpu-1.0.dist-info")).unwrap();
        let error = super::files(&built, root.path()).unwrap_err();
        assert!(error.to_string().contains("the licence of MLX"), "{error}");
    }

    #[test]
    fn the_same_files_give_the_same_archive_and_tar_reads_it() {
        let root = tempfile::tempdir().unwrap();
        built(root.path());
        let (one, two) = (root.path().join("one.tar.gz"), root.path().join("two.tar.gz"));
        let folder = root.path().join("target");
        pack(&folder, "name", &one).unwrap();
        File::open(folder.join("release/mlx-engine"))
            .unwrap()
            .set_modified(std::time::SystemTime::UNIX_EPOCH)
            .unwrap();
        pack(&folder, "name", &two).unwrap();
        assert_eq!(fs::read(&one).unwrap(), fs::read(&two).unwrap());

        let listed = output(Command::new("tar").arg("tvzf").arg(&one)).unwrap();
        let text = String::from_utf8_lossy(&listed.stdout).into_owned();
        assert!(text.starts_with("-rwxr-xr-x"), "{text}");
        assert!(text.trim_end().ends_with("name/release/mlx-engine"), "{text}");
        let out = root.path().join("out");
        unpack(&one, &out).unwrap();
        assert_eq!(
            fs::read_to_string(out.join("name/release/mlx-engine")).unwrap(),
            "program"
        );
    }

    #[test]
    fn what_cargo_says_names_the_program_and_the_libraries() {
        let text = r#"
            {"reason":"build-script-executed","package_id":"x","env":[["OTHER","1"],["BUILT_MLXC","/c/libmlxc.so"],["BUILT_MLX","/m/mlx/lib"]]}
            {"reason":"compiler-artifact","target":{"name":"mlx-engine"},"executable":null}
            {"reason":"compiler-artifact","target":{"name":"mlx-engine"},"executable":"/t/mlx-engine"}
            {"reason":"build-finished","success":true}"#;
        let told = told_by_cargo(text).unwrap();
        assert_eq!(
            told,
            Built {
                program: "/t/mlx-engine".into(),
                library: "/c/libmlxc.so".into(),
                mlx: "/m/mlx/lib".into()
            }
        );
        let error =
            told_by_cargo(r#"{"target":{"name":"mlx-engine"},"executable":"/t/mlx-engine"}"#).unwrap_err();
        assert!(error.to_string().contains("prebuilt MLX"), "{error}");
    }

    #[test]
    fn a_library_from_elsewhere_is_named() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().canonicalize().unwrap();
        let put = |path: &str| {
            let path = folder.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, "").unwrap();
            path.display().to_string()
        };
        let ours = [put("lib/libmlxc.so"), put("lib/mlx_cpu.libs/libblas.so.3")];
        let line = |path: &str| format!("      4711:\tcalling init: {path}\n");
        let mut said = line(&ours[0]) + &line(&ours[1]) + &line("/lib/libc.so.6");
        said += "      4711:\t trying file=/usr/lib/libblas.so.3\n";
        assert_eq!(foreign(&folder, &said).unwrap(), Vec::<String>::new());
        said += &line("/usr/lib/libblas.so.3");
        said += &line("/home/somebody/libmlxc-1.0-abc.so");
        assert_eq!(
            foreign(&folder, &said).unwrap(),
            ["/usr/lib/libblas.so.3", "/home/somebody/libmlxc-1.0-abc.so"]
        );
        let mac = format!(
            "dyld[4711]: <0A-1B> {}\ndyld[4711]: <0A-1B> /opt/libmlx.dylib\n",
            ours[0]
        );
        assert_eq!(foreign(&folder, &mac).unwrap(), ["/opt/libmlx.dylib"]);
        // Where nothing is said nothing is proven.
        assert!(foreign(&folder, &line("/lib/libc.so.6")).is_err());
    }
}
