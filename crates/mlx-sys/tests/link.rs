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
