//! A Rust function as a node of MLX's graph.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::slice;
use std::sync::Arc;

use crate::{
    mlx_array, mlx_dtype, mlx_host_array, mlx_host_op, mlx_host_output, mlx_stream, mlx_vector_array,
};

/// What a host function returns where it fails; the text reaches whoever evaluates the array.
pub type HostError = String;

type Function = dyn Fn(&[HostArray<'_>], &mut [HostArrayMut<'_>]) -> Result<(), HostError> + Send + Sync;

/// A Rust function that MLX runs when it evaluates the arrays that [`call`](Self::call) returns.
///
/// The function runs on the thread of the CPU stream, reads its inputs as dense row-major bytes whatever their strides
/// were (strided inputs are copied first), and writes its outputs. Inputs live until it has returned. An `Err` or a
/// panic becomes an error of the evaluation. The outputs are not differentiable, and a GPU stream refuses them.
///
/// ```
/// use mlx_rs::{Array, Stream};
/// use mlx_sys::{HostOp, HostOutput};
///
/// let double = HostOp::new(c"double", |inputs, outputs| {
///     for (out, x) in outputs[0].as_mut_slice::<f32>()?.iter_mut().zip(inputs[0].as_slice::<f32>()?) {
///         *out = 2.0 * x;
///     }
///     Ok(())
/// });
/// let x = Array::from_slice(&[1.0_f32, 2.0, 3.0], &[3]);
/// let stream = Stream::cpu();
/// let outputs = [HostOutput::new(&[3], mlx_sys::mlx_dtype__MLX_FLOAT32)];
/// // SAFETY: both handles are alive, and the results are owned by the arrays made of them.
/// let y = unsafe {
///     let mut results = double.call(&[x.as_ptr()], &outputs, stream.as_ptr()).expect("the graph is built");
///     Array::from_ptr(results.remove(0))
/// };
/// assert_eq!(y.as_slice::<f32>(), &[2.0, 4.0, 6.0]);
/// ```
#[derive(Clone)]
pub struct HostOp {
    name: &'static CStr,
    function: Arc<Box<Function>>,
}

impl fmt::Debug for HostOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostOp")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

/// The shape and type of an output, and what it starts from.
#[derive(Clone, Copy, Debug)]
pub struct HostOutput<'a> {
    shape: &'a [i32],
    dtype: mlx_dtype,
    start_from: Option<usize>,
}

impl<'a> HostOutput<'a> {
    /// An output that the function writes in full; its contents before that are arbitrary.
    pub fn new(shape: &'a [i32], dtype: mlx_dtype) -> Self {
        Self {
            shape,
            dtype,
            start_from: None,
        }
    }

    /// An output that begins as the contents of this input, which has the same shape and type: in the same memory
    /// where nobody else holds the input when it is evaluated, else in a copy. The function finds the contents in the
    /// output; where the memory is shared, the input is empty.
    pub fn starting_from(mut self, input: usize) -> Self {
        self.start_from = Some(input);
        self
    }
}

/// An input: dense, row-major.
#[derive(Debug)]
pub struct HostArray<'a> {
    shape: &'a [i32],
    dtype: mlx_dtype,
    bytes: &'a [u8],
}

impl HostArray<'_> {
    /// The lengths of the axes.
    pub fn shape(&self) -> &[i32] {
        self.shape
    }

    /// The type of the elements.
    pub fn dtype(&self) -> mlx_dtype {
        self.dtype
    }

    /// The contents.
    pub fn bytes(&self) -> &[u8] {
        self.bytes
    }

    /// The contents as elements.
    ///
    /// # Errors
    ///
    /// Where the array has elements of another type.
    pub fn as_slice<T: HostElement>(&self) -> Result<&[T], HostError> {
        check_type::<T>(self.dtype)?;
        // SAFETY: any bits are a value of `T`.
        match unsafe { self.bytes.align_to() } {
            ([], elements, []) => Ok(elements),
            _ => Err(MISALIGNED.to_owned()),
        }
    }
}

/// An output: dense, row-major.
#[derive(Debug)]
pub struct HostArrayMut<'a> {
    shape: &'a [i32],
    dtype: mlx_dtype,
    bytes: &'a mut [u8],
}

impl HostArrayMut<'_> {
    /// The lengths of the axes.
    pub fn shape(&self) -> &[i32] {
        self.shape
    }

    /// The type of the elements.
    pub fn dtype(&self) -> mlx_dtype {
        self.dtype
    }

    /// The contents as elements.
    ///
    /// # Errors
    ///
    /// Where the array has elements of another type.
    pub fn as_mut_slice<T: HostElement>(&mut self) -> Result<&mut [T], HostError> {
        check_type::<T>(self.dtype)?;
        // SAFETY: any bits are a value of `T`, and any value of `T` is bytes.
        match unsafe { self.bytes.align_to_mut() } {
            ([], elements, []) => Ok(elements),
            _ => Err(MISALIGNED.to_owned()),
        }
    }
}

/// The element types that a host function reads and writes.
///
/// # Safety
///
/// Any bits must be a value of the type, it must have no padding, and `DTYPE` must be MLX's name of it.
pub unsafe trait HostElement: Copy {
    /// MLX's name of the type.
    const DTYPE: mlx_dtype;
}

macro_rules! host_element {
    ($($type:ty => $dtype:ident),* $(,)?) => {
        $(
            // SAFETY: a number, all of whose bit patterns are values.
            unsafe impl HostElement for $type {
                const DTYPE: mlx_dtype = crate::$dtype;
            }
        )*
    };
}

host_element! {
    u8 => mlx_dtype__MLX_UINT8,
    u16 => mlx_dtype__MLX_UINT16,
    u32 => mlx_dtype__MLX_UINT32,
    u64 => mlx_dtype__MLX_UINT64,
    i8 => mlx_dtype__MLX_INT8,
    i16 => mlx_dtype__MLX_INT16,
    i32 => mlx_dtype__MLX_INT32,
    i64 => mlx_dtype__MLX_INT64,
    f32 => mlx_dtype__MLX_FLOAT32,
    f64 => mlx_dtype__MLX_FLOAT64,
}

/// MLX aligns its buffers to 16 bytes and offsets into them by whole elements, so that this is not seen.
const MISALIGNED: &str = "an array is not aligned to its elements";

fn check_type<T: HostElement>(dtype: mlx_dtype) -> Result<(), HostError> {
    if dtype == T::DTYPE {
        Ok(())
    } else {
        Err(format!(
            "an array of dtype {dtype} was read as {}",
            std::any::type_name::<T>()
        ))
    }
}

/// Room for the text of an error.
const ERROR_BYTES: usize = 1024;

impl HostOp {
    /// Wraps `function` under a name, which errors begin with.
    pub fn new<F>(name: &'static CStr, function: F) -> Self
    where
        F: Fn(&[HostArray<'_>], &mut [HostArrayMut<'_>]) -> Result<(), HostError> + Send + Sync + 'static,
    {
        Self {
            name,
            function: Arc::new(Box::new(function)),
        }
    }

    /// Adds a call to the graph and returns one owned handle an output.
    ///
    /// # Errors
    ///
    /// An output that starts from an input of another shape or type, a stream or an input that is empty.
    ///
    /// # Safety
    ///
    /// `inputs` and `stream` must be live handles.
    pub unsafe fn call(
        &self,
        inputs: &[mlx_array],
        outputs: &[HostOutput<'_>],
        stream: mlx_stream,
    ) -> Result<Vec<mlx_array>, HostError> {
        let described: Vec<mlx_host_output> = outputs
            .iter()
            .map(|output| mlx_host_output {
                shape: output.shape.as_ptr(),
                ndim: output.shape.len(),
                dtype: output.dtype,
                start_from: output.start_from.map_or(-1, |index| index as c_int),
            })
            .collect();
        let context = Arc::into_raw(Arc::clone(&self.function));
        let mut error = [0_u8; ERROR_BYTES];
        // SAFETY: the handles are live by this function's contract, the arrays outlive the call, and the name is
        // static. `context` is a counted reference that `release` gives back once; `trampoline` takes it as such.
        unsafe {
            let mut vector: mlx_vector_array = crate::mlx_vector_array_new();
            let status = mlx_host_op(
                &raw mut vector,
                self.name.as_ptr(),
                inputs.as_ptr(),
                inputs.len(),
                described.as_ptr(),
                described.len(),
                Some(trampoline),
                context.cast_mut().cast(),
                Some(release),
                stream,
                error.as_mut_ptr().cast(),
                error.len(),
            );
            let results = if status == 0 {
                take(vector, outputs.len())
            } else {
                let text = CStr::from_bytes_until_nul(&error).unwrap_or_default();
                Err(text.to_string_lossy().into_owned())
            };
            crate::mlx_vector_array_free(vector);
            results
        }
    }
}

/// Takes the arrays out of a vector.
///
/// # Safety
///
/// `vector` must be a live handle of at least `len` arrays.
unsafe fn take(vector: mlx_vector_array, len: usize) -> Result<Vec<mlx_array>, HostError> {
    (0..len)
        .map(|index| {
            // SAFETY: the index is in range by this function's contract, and the handle written is owned by us.
            unsafe {
                let mut array = crate::mlx_array_new();
                let status = crate::mlx_vector_array_get(&raw mut array, vector, index);
                if status == 0 {
                    Ok(array)
                } else {
                    Err(format!("output {index} could not be taken"))
                }
            }
        })
        .collect()
}

unsafe extern "C" fn release(context: *mut c_void) {
    // SAFETY: `context` came from `Arc::into_raw` on this type, and C++ releases it once.
    drop(unsafe { Arc::from_raw(context.cast_const().cast::<Box<Function>>()) });
}

unsafe extern "C" fn trampoline(
    context: *mut c_void,
    inputs: *const mlx_host_array,
    inputs_len: usize,
    outputs: *const mlx_host_array,
    outputs_len: usize,
    error: *mut c_char,
    error_bytes: usize,
) -> c_int {
    // An unwind must not cross into C++.
    let result = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: the context lives until `release`; the arrays are valid for the length of the call.
        let (function, inputs, outputs) = unsafe {
            (
                &*context.cast_const().cast::<Box<Function>>(),
                span(inputs, inputs_len),
                span(outputs, outputs_len),
            )
        };
        let given_over = |input: &mlx_host_array| outputs.iter().any(|output| output.data == input.data);
        let inputs: Vec<HostArray<'_>> = inputs
            .iter()
            .map(|array| HostArray {
                // SAFETY: C++ gives the length with the pointer.
                shape: unsafe { span(array.shape, array.ndim) },
                dtype: array.dtype,
                bytes: if given_over(array) {
                    &[]
                } else {
                    // SAFETY: as above; nobody writes to an input while the function runs, as one whose memory an output
                    // took over is not among them.
                    unsafe { span(array.data.cast_const().cast(), array.bytes) }
                },
            })
            .collect();
        let mut outputs: Vec<HostArrayMut<'_>> = outputs
            .iter()
            .map(|array| HostArrayMut {
                // SAFETY: as above.
                shape: unsafe { span(array.shape, array.ndim) },
                dtype: array.dtype,
                bytes: if array.bytes == 0 {
                    &mut []
                } else {
                    // SAFETY: an output's memory was allocated for it, or belongs to an input that is given over to
                    // it; no two outputs share any.
                    unsafe { slice::from_raw_parts_mut(array.data.cast(), array.bytes) }
                },
            })
            .collect();
        function(&inputs, &mut outputs)
    }));
    let message = match result {
        Ok(Ok(())) => return 0,
        Ok(Err(message)) => message,
        Err(panic) => {
            let text = panic
                .downcast_ref::<&str>()
                .map(|text| (*text).to_owned())
                .or_else(|| panic.downcast_ref::<String>().cloned());
            format!("panicked: {}", text.unwrap_or_else(|| "no message".to_owned()))
        }
    };
    // SAFETY: C++ gives a buffer of `error_bytes` bytes.
    let buffer = unsafe { slice::from_raw_parts_mut(error.cast::<u8>(), error_bytes) };
    let text = message.as_bytes();
    let len = text.len().min(buffer.len().saturating_sub(1));
    buffer[..len].copy_from_slice(&text[..len]);
    buffer[len] = 0;
    1
}

/// A slice that is empty where the pointer may be null.
///
/// # Safety
///
/// `data` must point to `len` values that are alive and not written for `'a`, unless `len` is 0.
unsafe fn span<'a, T>(data: *const T, len: usize) -> &'a [T] {
    if len == 0 {
        &[]
    } else {
        // SAFETY: by this function's contract.
        unsafe { slice::from_raw_parts(data, len) }
    }
}
