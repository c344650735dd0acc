//! A node of MLX's graph that fails, for tests of what becomes of it.

use mlx_rs::{Array, Stream};
use mlx_sys::{HostOp, HostOutput, mlx_dtype__MLX_FLOAT32};

use crate::ModelError;

/// Evaluates a graph whose node does something and then fails, on the thread that MLX runs it on.
///
/// For the tests of crates above this one: they reach MLX through this crate alone, as what they test does.
///
/// # Errors
///
/// What the node failed with.
#[doc(hidden)]
pub fn fail_in_a_node(does: impl Fn() + Send + Sync + 'static) -> Result<(), ModelError> {
    let op = HostOp::new(c"faulty", move |_, _| {
        does();
        Err("told to fail".to_owned())
    });
    let outputs = [HostOutput::new(&[1], mlx_dtype__MLX_FLOAT32)];
    let stream = Stream::cpu();
    #[expect(unsafe_code, reason = "the graph is built through MLX's C interface")]
    // SAFETY: the handle of the stream is alive; the results are owned and taken once.
    let arrays: Vec<Array> = unsafe {
        let results = op.call(&[], &outputs, stream.as_ptr());
        results
            .map_err(ModelError::Mlx)?
            .into_iter()
            .map(|array| Array::from_ptr(array))
            .collect()
    };
    Ok(mlx_rs::transforms::eval(&arrays)?)
}
