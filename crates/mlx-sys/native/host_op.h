// A function of the host inside MLX's graph. See src/host_op.rs for the contract in Rust's terms.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "mlx/c/array.h"
#include "mlx/c/stream.h"
#include "mlx/c/vector.h"

#ifdef __cplusplus
extern "C" {
#endif

// An array that a host function reads or writes: row-major, `bytes` long, alive until the function returns.
typedef struct mlx_host_array_ {
  void* data;
  size_t bytes;
  const int* shape;
  size_t ndim;
  mlx_dtype dtype;
} mlx_host_array;

// What a host operation yields. Where `start_from` is an input's index, the output begins as that input's contents,
// in the same memory if nobody else holds it; it is -1 where the function writes all of the output.
typedef struct mlx_host_output_ {
  const int* shape;
  size_t ndim;
  mlx_dtype dtype;
  int start_from;
} mlx_host_output;

// Returns 0, or another number after it has written a text of at most `error_bytes` with its final zero to `error`.
typedef int (*mlx_host_function)(
    void* context,
    const mlx_host_array* inputs,
    size_t inputs_len,
    const mlx_host_array* outputs,
    size_t outputs_len,
    char* error,
    size_t error_bytes);

// Builds the graph node. `name` must live forever. `release` is called once, with `context`, when the last array that
// needs the function is gone or has been evaluated, or before this returns where it returns an error. Returns 0, or 1
// after it has written a text to `error`: mlx-c's own way of telling errors ends the process where nobody has changed it.
int mlx_host_op(
    mlx_vector_array* res,
    const char* name,
    const mlx_array* inputs,
    size_t inputs_len,
    const mlx_host_output* outputs,
    size_t outputs_len,
    mlx_host_function function,
    void* context,
    void (*release)(void*),
    const mlx_stream stream,
    char* error,
    size_t error_bytes);

#ifdef __cplusplus
}
#endif
