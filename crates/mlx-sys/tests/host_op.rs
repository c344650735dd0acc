//! Rust functions inside MLX's graph.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use mlx_rs::ops::indexing::{IndexOp, IntoStrideBy};
use mlx_rs::{Array, Device, Stream};
use mlx_sys::{
    HostArray, HostArrayMut, HostOp, HostOutput, mlx_dtype__MLX_FLOAT32 as F32, mlx_dtype__MLX_INT32 as I32,
};

/// Calls `op` on the CPU stream and takes its outputs.
fn call(op: &HostOp, inputs: &[&Array], outputs: &[HostOutput<'_>]) -> Vec<Array> {
    let handles: Vec<_> = inputs.iter().map(|array| array.as_ptr()).collect();
    let stream = Stream::cpu();
    // SAFETY: the arrays and the stream are alive, and each result is owned by one array.
    #[expect(unsafe_code, reason = "the call takes handles")]
    unsafe {
        let results = op
            .call(&handles, outputs, stream.as_ptr())
            .expect("the graph is built");
        results
            .into_iter()
            .map(|handle| Array::from_ptr(handle))
            .collect()
    }
}

/// Copies its first input to its first output.
fn copy() -> HostOp {
    HostOp::new(c"copy", |inputs, outputs| {
        outputs[0]
            .as_mut_slice::<f32>()?
            .copy_from_slice(inputs[0].as_slice::<f32>()?);
        Ok(())
    })
}

fn counting(shape: &[i32]) -> Array {
    let n: i32 = shape.iter().product();
    let values: Vec<f32> = (0..n).map(|i| i as f32).collect();
    Array::from_slice(&values, shape)
}

#[test]
fn strided_inputs_arrive_dense() {
    Device::set_default(&Device::cpu());
    let x = counting(&[3, 4, 5]);
    let check = |view: Array| {
        let shape = view.shape().to_vec();
        let copied = call(&copy(), &[&view], &[HostOutput::new(&shape, F32)]).remove(0);
        let equal = copied.eq_values(&view).expect("same shapes");
        assert!(equal, "{shape:?}: {copied:?} is not {view:?}");
    };
    check(x.clone());
    check(x.transpose_axes(&[2, 0, 1]).expect("three axes"));
    check(x.transpose_axes(&[0, 2, 1]).expect("three axes"));
    check(x.index((.., 1..3, ..)));
    check(x.index((.., .., (1..5).stride_by(2))));
    check(mlx_rs::ops::broadcast_to(x.index((0, 0, ..)), &[2, 3, 5]).expect("broadcasts"));
    check(x.index((1, 2, 3)));
    check(mlx_rs::ops::zeros::<f32>(&[0, 4]).expect("empty"));
}

#[test]
fn several_outputs_of_several_types() {
    let op = HostOp::new(
        c"split",
        |inputs: &[HostArray<'_>], outputs: &mut [HostArrayMut<'_>]| {
            let x = inputs[0].as_slice::<f32>()?;
            let (whole, rest) = outputs.split_at_mut(1);
            for (i, value) in x.iter().enumerate() {
                whole[0].as_mut_slice::<i32>()?[i] = value.trunc() as i32;
                rest[0].as_mut_slice::<f32>()?[i] = value.fract();
            }
            assert_eq!((inputs[0].shape(), rest[0].shape()), (&[2][..], &[2, 1][..]));
            Ok(())
        },
    );
    let x = Array::from_slice(&[1.25_f32, -7.5], &[2]);
    let outputs = call(
        &op,
        &[&x],
        &[HostOutput::new(&[2], I32), HostOutput::new(&[2, 1], F32)],
    );
    assert_eq!(outputs[0].as_slice::<i32>(), &[1, -7]);
    assert_eq!(outputs[1].as_slice::<f32>(), &[0.25, -0.5]);
}

#[test]
fn host_operations_chain_with_those_of_mlx() {
    let mut x = counting(&[4, 8]);
    for _ in 0..100 {
        let y = x.add(counting(&[8])).expect("broadcasts").t();
        x = call(&copy(), &[&y], &[HostOutput::new(&[8, 4], F32)])
            .remove(0)
            .t();
    }
    let expect: Vec<f32> = (0..32).map(|i| (i + 100 * (i % 8)) as f32).collect();
    assert_eq!(
        x.contiguous().expect("dense").as_slice::<f32>(),
        expect.as_slice()
    );
}

#[test]
fn an_error_ends_the_evaluation_and_not_the_process() {
    let op = HostOp::new(c"refuse", |_, _| Err("no room for 7 widgets".to_owned()));
    let y = call(&op, &[&counting(&[2])], &[HostOutput::new(&[2], F32)]).remove(0);
    let error = y.eval().expect_err("the function refuses").to_string();
    assert!(error.contains("[refuse] no room for 7 widgets"), "{error}");
    // The stream goes on.
    let y = call(&copy(), &[&counting(&[2])], &[HostOutput::new(&[2], F32)]).remove(0);
    assert_eq!(y.as_slice::<f32>(), &[0.0, 1.0]);
}

#[test]
fn a_panic_is_an_error() {
    let op = HostOp::new(c"panic", |inputs, _| {
        let nothing: &[f32] = &inputs[0].as_slice::<f32>()?[..0];
        panic!("item {} is missing", nothing.len());
    });
    let y = call(&op, &[&counting(&[2])], &[HostOutput::new(&[2], F32)]).remove(0);
    let error = y.eval().expect_err("the function panics").to_string();
    assert!(error.contains("[panic] panicked: item 0 is missing"), "{error}");
}

#[test]
fn a_wrong_type_is_an_error() {
    let y = call(
        &copy(),
        &[&Array::from_slice(&[1_i32], &[1])],
        &[HostOutput::new(&[1], F32)],
    )
    .remove(0);
    let error = y.eval().expect_err("the types differ").to_string();
    assert!(error.contains("was read as f32"), "{error}");
}

#[test]
fn an_output_that_starts_from_an_input_of_another_shape_is_refused() {
    let x = counting(&[2]);
    let stream = Stream::cpu();
    let outputs = [HostOutput::new(&[3], F32).starting_from(0)];
    // SAFETY: the handles are alive.
    #[expect(unsafe_code, reason = "the call takes handles")]
    let result = unsafe { copy().call(&[x.as_ptr()], &outputs, stream.as_ptr()) };
    let error = result.expect_err("the shapes differ");
    assert_eq!(
        error,
        "[copy] output 0 starts from an input of another shape or type"
    );
}

/// Adds 100 to the first element of what the output starts from.
fn bump() -> HostOp {
    HostOp::new(c"bump", |_, outputs| {
        outputs[0].as_mut_slice::<f32>()?[0] += 100.0;
        Ok(())
    })
}

#[test]
fn an_output_starts_from_its_input_and_leaves_a_held_one_alone() {
    let x = counting(&[3]);
    let y = call(&bump(), &[&x], &[HostOutput::new(&[3], F32).starting_from(0)]).remove(0);
    assert_eq!(y.as_slice::<f32>(), &[100.0, 1.0, 2.0]);
    assert_eq!(x.as_slice::<f32>(), &[0.0, 1.0, 2.0]);
}

#[test]
fn an_output_takes_over_the_memory_of_an_input_that_nobody_holds() {
    let mut x = counting(&[3]).add(Array::from_f32(0.0)).expect("a scalar");
    x.eval().expect("evaluates");
    let before = x.as_slice::<f32>().as_ptr();
    for _ in 0..3 {
        x = call(&bump(), &[&x], &[HostOutput::new(&[3], F32).starting_from(0)]).remove(0);
        x.eval().expect("evaluates");
    }
    assert_eq!(x.as_slice::<f32>(), &[300.0, 1.0, 2.0]);
    assert_eq!(x.as_slice::<f32>().as_ptr(), before);
    // An input whose memory was taken over cannot be read beside the output.
    let lengths = HostOp::new(c"lengths", |inputs, outputs| {
        outputs[0].as_mut_slice::<f32>()?[0] = inputs[0].bytes().len() as f32;
        Ok(())
    });
    let y = call(&lengths, &[&x], &[HostOutput::new(&[3], F32).starting_from(0)]).remove(0);
    assert_eq!(y.as_slice::<f32>()[0], 12.0, "`x` is held, so that it was copied");
    x = call(&lengths, &[&x], &[HostOutput::new(&[3], F32).starting_from(0)]).remove(0);
    assert_eq!(x.as_slice::<f32>()[0], 0.0, "nobody holds it");
}

#[test]
fn inputs_live_until_the_function_has_run() {
    let op = HostOp::new(c"sum", |inputs, outputs| {
        outputs[0].as_mut_slice::<f32>()?[0] = inputs[0].as_slice::<f32>()?.iter().sum();
        Ok(())
    });
    // The handles are gone before the evaluation; the buffers of 64 other arrays would take their place.
    let sums: Vec<Array> = (0..64)
        .map(|i| {
            let x = mlx_rs::ops::full::<f32>(&[1 << 14], Array::from_f32(i as f32)).expect("fills");
            call(&op, &[&x], &[HostOutput::new(&[1], F32)]).remove(0)
        })
        .collect();
    mlx_rs::transforms::async_eval(&sums).expect("starts");
    for (i, sum) in sums.into_iter().enumerate() {
        assert!((sum.item_exact::<f32>() - (i << 14) as f32).abs() < 1.0);
    }
}

/// Counts how often it is dropped.
struct Dropped(Arc<AtomicUsize>);

impl Drop for Dropped {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn the_function_is_dropped_once_whether_it_ran_or_not() {
    let (drops, ran) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let (held, seen) = (Dropped(Arc::clone(&drops)), Arc::clone(&ran));
    let op = HostOp::new(c"held", move |_, _| {
        seen.store(held.0.load(Ordering::SeqCst) == 0, Ordering::SeqCst);
        Ok(())
    });
    let output = [HostOutput::new(&[1], F32)];
    let never_run = call(&op, &[], &output);
    let run = call(&op, &[], &output);
    drop(op);
    run[0].eval().expect("evaluates");
    assert!(ran.load(Ordering::SeqCst));
    assert_eq!(drops.load(Ordering::SeqCst), 0);
    drop(never_run);
    drop(run);
    mlx_rs::transforms::eval([&counting(&[1]).add(Array::from_f32(1.0)).expect("a scalar")])
        .expect("flushes");
    assert_eq!(drops.load(Ordering::SeqCst), 1);
}
