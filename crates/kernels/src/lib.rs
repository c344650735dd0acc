//! Kernels for language models on a CPU: plain functions over slices, without MLX.
//!
//! [`Matrix`] holds weights in the layout that the kernels read, quantized to 2, 3, 4, 5, 6 or 8 bits as in MLX's affine
//! format, or as floats. [`Activations`] go in, [`project`] and [`gated`] multiply them ([`gated_each`] and
//! [`sum_experts`] with the matrices of the experts that rows have chosen), [`attend`] looks at keys and
//! values in pages, and [`rms_norm`], [`layer_norm`] and [`rotate`] do the rest. [`argmax`], [`top_k`] and [`draw`]
//! choose from a vocabulary.
//!
//! Every kernel is written once, over vectors of sixteen lanes, and compiled for each [`Isa`]; the one to use is chosen
//! when the program runs. Work is shared by the threads of a [`Pool`].
//!
//! ```
//! use mlx_engine_kernels::{Activations, DenseSource, Isa, Matrix, Pool, Precision, Product, project};
//!
//! let (isa, pool) = (Isa::from_environment()?, Pool::new(Pool::physical_cores()));
//! let matrix = Matrix::dense(2, 3, DenseSource::F32(&[1.0, 0.0, 0.0, 0.0, 1.0, 1.0]))?;
//! let mut x = Activations::new();
//! x.resize(1, 3).copy_from_slice(&[1.0, 2.0, 3.0]);
//! x.prepare(isa, &pool, Precision::Integer);
//! let mut out = [0.0; 2];
//! project(isa, &pool, &x, &mut [Product::write(&matrix, None, &mut out)])?;
//! assert_eq!(out, [1.0, 5.0]);
//! # Ok::<(), mlx_engine_kernels::KernelError>(())
//! ```

#![expect(
    clippy::inline_always,
    reason = "a kernel is compiled with the features of its caller only where it is part of it"
)]

mod activations;
mod attention;
mod ceilings;
mod disjoint;
mod error;
mod experts;
mod isa;
mod kv;
mod matmul;
mod matrix;
mod norm;
mod pool;
mod rope;
mod simd;
mod softmax;
mod top;

pub use activations::{Activations, Precision};
pub use attention::{AttentionSpec, Queries, attend};
pub use ceilings::{Ceilings, ceilings};
pub use error::KernelError;
pub use experts::{Expert, ExpertSum, gated_each, sum_experts};
pub use isa::{ISA_VARIABLE, Isa};
pub use kv::{KvFloat, KvFormat, KvIntegers, KvLayer, KvLayout, KvPage, PAGE};
pub use matmul::{Gate, Product, apply_gate, gated, project};
pub use matrix::{AffineSource, DenseSource, Matrix};
pub use norm::{layer_norm, rms_norm};
pub use pool::{Pool, Reading};
pub use rope::{RopeLayout, Rotation, rotate};
pub use softmax::{draw, draw_among, log_sum_exp, softmax};
pub use top::{all_finite, argmax, at_least, top_k};
