// mlx-c declares its accessors of half-precision arrays only where the C compiler has such types, which is on Arm.
// mlx-rs reads the bits as 16-bit integers, so these are the same functions over integers, for every other machine.
#include <cstdint>
#include <exception>

#include "mlx/c/error.h"
#include "mlx/c/half.h"
#include "mlx/c/private/array.h"

#ifndef HAS_FLOAT16

namespace {

template <class Half>
int item(uint16_t* res, mlx_array arr) {
  static_assert(sizeof(Half) == sizeof(uint16_t));
  try {
    auto value = mlx_array_get_(arr).item<Half>();
    *res = *reinterpret_cast<const uint16_t*>(&value);
    return 0;
  } catch (std::exception& e) {
    mlx_error("%s", e.what());
    return 1;
  }
}

template <class Half>
const uint16_t* data(mlx_array arr) {
  try {
    return reinterpret_cast<const uint16_t*>(mlx_array_get_(arr).data<Half>());
  } catch (std::exception& e) {
    mlx_error("%s", e.what());
    return nullptr;
  }
}

} // namespace

extern "C" {

int mlx_array_item_float16(uint16_t* res, const mlx_array arr) {
  return item<mlx::core::float16_t>(res, arr);
}

int mlx_array_item_bfloat16(uint16_t* res, const mlx_array arr) {
  return item<mlx::core::bfloat16_t>(res, arr);
}

const uint16_t* mlx_array_data_float16(const mlx_array arr) {
  return data<mlx::core::float16_t>(arr);
}

const uint16_t* mlx_array_data_bfloat16(const mlx_array arr) {
  return data<mlx::core::bfloat16_t>(arr);
}

} // extern "C"

#endif
