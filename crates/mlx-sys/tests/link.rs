//! What `mlx-rs` needs of this crate beside the declarations.

use mlx_rs::{Array, Dtype};

#[test]
fn mlx_is_there() {
    assert_eq!(mlx_sys::load_error(), None);
}

#[test]
fn half_precision_values_come_back() {
    for dtype in [Dtype::Float16, Dtype::Bfloat16] {
        let x = Array::from_slice(&[1.5_f32, -0.375], &[2])
            .as_dtype(dtype)
            .expect("a float type");
        x.eval().expect("evaluates");
        let values: Vec<f32> = match dtype {
            Dtype::Float16 => x
                .as_slice::<half::f16>()
                .iter()
                .map(|value| value.to_f32())
                .collect(),
            _ => x
                .as_slice::<half::bf16>()
                .iter()
                .map(|value| value.to_f32())
                .collect(),
        };
        assert_eq!(values, [1.5, -0.375]);
    }
    let one = Array::from_f32(1.0)
        .as_dtype(Dtype::Float16)
        .expect("a float type");
    assert_eq!(one.item_exact::<half::f16>().to_f32(), 1.0);
    let one = Array::from_f32(1.0)
        .as_dtype(Dtype::Bfloat16)
        .expect("a float type");
    assert_eq!(one.item_exact::<half::bf16>().to_f32(), 1.0);
}

#[test]
fn random_numbers_are_seeded_by_a_clock_that_runs() {
    let first = mlx_sys::mach_approximate_time();
    assert!(first > 1_600_000_000_000_000_000, "{first}");
}

/// Where a program looks for MLX, which is asked of copies of this test that lie elsewhere.
#[cfg(target_os = "linux")]
mod packed {
    use std::fs;
    use std::path::{Path, PathBuf};
    use std::process::Command;

    /// What a copy does: it says which library it has, or why it has none.
    #[test]
    fn told() {
        let error = mlx_sys::load_error();
        println!("<{}>", error.unwrap_or_else(|| opened().display().to_string()));
    }

    /// The library with MLX's C interface that this process has.
    fn opened() -> PathBuf {
        let maps = fs::read_to_string("/proc/self/maps").expect("Linux says what is mapped");
        let paths = maps
            .lines()
            .filter_map(|line| Some(Path::new(&line[line.find('/')?..])));
        paths
            .filter(|path| {
                path.file_name()
                    .is_some_and(|name| name.to_string_lossy().starts_with("libmlxc"))
            })
            .map(Path::to_owned)
            .next()
            .expect("MLX is loaded")
    }

    fn ask(program: &Path, library: Option<&str>) -> String {
        let mut command = Command::new(program);
        command.args(["--exact", "packed::told", "--nocapture"]);
        command.env_remove("MLX_ENGINE_LIBRARY");
        command.envs(library.map(|path| ("MLX_ENGINE_LIBRARY", path)));
        let output = command.output().expect("the copy starts");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let told = said.split_once('<').and_then(|(_, rest)| rest.split_once('>'));
        told.unwrap_or_else(|| panic!("the copy says what it has: {said}"))
            .0
            .to_owned()
    }

    #[test]
    fn what_came_with_a_program_is_taken_before_what_the_build_made() {
        let folder = tempfile::tempdir().expect("a folder");
        let root = folder.path().canonicalize().expect("it is there");
        let program = root.join("bin/program");
        let put = |path: &Path, from: Option<&Path>| {
            fs::create_dir_all(path.parent().expect("a folder")).expect("made");
            match from {
                Some(from) => fs::copy(from, path).map(drop),
                None => fs::write(path, "no library"),
            }
            .expect("written");
        };
        put(
            &program,
            Some(&std::env::current_exe().expect("a test runs from a file")),
        );
        let built = opened();
        assert_eq!(ask(&program, None), built.display().to_string());

        // Another library of that name may lie beside a `bin`.
        put(&root.join("lib/libmlxc.so"), None);
        assert_eq!(ask(&program, None), built.display().to_string());

        let installed = root.join("lib/mlx-engine/libmlxc.so");
        put(&installed, Some(&built));
        let shown = |path: &Path| path.display().to_string();
        let reached =
            |told: &str| fs::canonicalize(told).map_or_else(|_| told.to_owned(), |path| shown(&path));
        assert_eq!(reached(&ask(&program, None)), shown(&installed));

        // Beside the program is nearer, and what is there and no library is not passed over.
        let beside = root.join("bin/lib/libmlxc.so");
        put(&beside, None);
        let told = ask(&program, None);
        assert!(
            told.contains(&shown(&beside)) && told.contains("could not be opened"),
            "{told}"
        );
        fs::remove_file(&beside).expect("removed");
        put(&beside, Some(&built));
        assert_eq!(ask(&program, None), shown(&beside));

        // What the environment names goes before all.
        let told = ask(&program, Some("no/such/libmlxc.so"));
        assert!(told.contains("no/such/libmlxc.so"), "{told}");
        assert_eq!(ask(&program, Some(&shown(&built))), shown(&built));
    }
}

/// A program that links this crate starts without MLX and says what is missing.
#[test]
fn a_missing_library_is_an_answer_and_not_a_crash() {
    if std::env::var_os("MLX_ENGINE_LIBRARY").is_some() {
        let error = mlx_sys::load_error().expect("there is no such library");
        assert!(
            error.contains("could not be opened") && error.contains("no/such/libmlxc.so"),
            "{error}"
        );
        return;
    }
    let this = std::env::current_exe().expect("a test runs from a file");
    let status = std::process::Command::new(this)
        .args(["--exact", "a_missing_library_is_an_answer_and_not_a_crash"])
        .env("MLX_ENGINE_LIBRARY", "no/such/libmlxc.so")
        .status()
        .expect("the test starts again");
    assert!(status.success());
}
