#include "host_op.h"

#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/c/private/mlx.h"
#include "mlx/mlx.h"
#include "mlx/primitives.h"

namespace {

namespace mx = mlx::core;

constexpr size_t message_bytes = 1024;

// Owns the context of one call; shared by the graph node and the tasks that it has dispatched.
struct Call {
  const char* name;
  mlx_host_function function;
  void* context;
  void (*release)(void*);

  Call(const char* name, mlx_host_function function, void* context, void (*release)(void*))
      : name(name), function(function), context(context), release(release) {}
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;
  ~Call() {
    release(context);
  }
};

// One input or output of a dispatched task. It holds the buffer, not the array: the array belongs to the graph, which
// MLX takes apart on the thread that evaluates.
struct Slot {
  std::shared_ptr<mx::array::Data> buffer;
  char* data;
  size_t bytes;
  std::vector<int> shape;
  mlx_dtype dtype;
  // Where the contents come from, row by row, before the function runs. Strides count elements.
  std::shared_ptr<mx::array::Data> source_buffer;
  const char* source = nullptr;
  std::vector<int64_t> source_strides;
  size_t item = 0;
};

Slot slot(const mx::array& a) {
  Slot s;
  s.buffer = a.data_shared_ptr();
  // `data` is not const in the C interface; that inputs are only read is the contract of the function.
  s.data = const_cast<char*>(a.data<char>());
  s.bytes = a.nbytes();
  s.shape.assign(a.shape().begin(), a.shape().end());
  s.dtype = static_cast<mlx_dtype>(a.dtype().val());
  s.item = a.itemsize();
  return s;
}

void fill_from(Slot& s, const mx::array& source) {
  s.source_buffer = source.data_shared_ptr();
  s.source = source.data<char>();
  s.source_strides.assign(source.strides().begin(), source.strides().end());
}

template <size_t N>
void copy_row(char* to, const char* from, int n, int64_t stride) {
  for (int i = 0; i < n; i++) {
    std::memcpy(to + i * N, from + i * stride * static_cast<int64_t>(N), N);
  }
}

char* copy_strided(const Slot& s, size_t axis, const char* from, char* to) {
  if (axis == s.shape.size()) {
    std::memcpy(to, from, s.item);
    return to + s.item;
  }
  auto n = s.shape[axis];
  auto stride = s.source_strides[axis];
  auto item = static_cast<int64_t>(s.item);
  if (axis + 1 == s.shape.size()) {
    if (stride == 1) {
      std::memcpy(to, from, s.item * n);
    } else {
      switch (s.item) {
        case 1: copy_row<1>(to, from, n, stride); break;
        case 2: copy_row<2>(to, from, n, stride); break;
        case 4: copy_row<4>(to, from, n, stride); break;
        default: copy_row<8>(to, from, n, stride); break;
      }
    }
    return to + s.item * n;
  }
  for (int i = 0; i < n; i++) {
    to = copy_strided(s, axis + 1, from + i * stride * item, to);
  }
  return to;
}

void run(const Call& call, std::vector<Slot>& inputs, std::vector<Slot>& outputs) {
  std::vector<mlx_host_array> arrays;
  arrays.reserve(inputs.size() + outputs.size());
  for (auto* slots : {&inputs, &outputs}) {
    for (auto& s : *slots) {
      if (s.source != nullptr && s.bytes > 0) {
        copy_strided(s, 0, s.source, s.data);
      }
      arrays.push_back({s.data, s.bytes, s.shape.data(), s.shape.size(), s.dtype});
    }
  }
  char error[message_bytes] = {0};
  auto* first_output = arrays.data() + inputs.size();
  int status = call.function(
      call.context, arrays.data(), inputs.size(), first_output, outputs.size(), error, sizeof(error));
  if (status != 0) {
    throw std::runtime_error(std::string("[") + call.name + "] " + error);
  }
}

class HostOp : public mx::Primitive {
 public:
  HostOp(mx::Stream stream, std::shared_ptr<Call> call, std::vector<int> start_from)
      : Primitive(stream), call_(std::move(call)), start_from_(std::move(start_from)) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    std::vector<Slot> ins;
    std::vector<Slot> outs;
    ins.reserve(inputs.size());
    outs.reserve(outputs.size());
    for (size_t j = 0; j < outputs.size(); j++) {
      auto& out = outputs[j];
      auto from = start_from_[j];
      // In place only where this node is the last to hold the input, which must be asked before `ins` holds it too.
      if (from >= 0 && inputs[from].is_donatable() && inputs[from].flags().row_contiguous &&
          inputs[from].nbytes() == out.nbytes()) {
        out.copy_shared_buffer(inputs[from]);
        outs.push_back(slot(out));
      } else {
        out.set_data(mx::allocator::malloc(out.nbytes()));
        outs.push_back(slot(out));
        if (from >= 0) {
          fill_from(outs.back(), inputs[from]);
        }
      }
    }
    for (auto& in : inputs) {
      if (in.flags().row_contiguous || in.size() == 0) {
        ins.push_back(slot(in));
      } else {
        mx::array dense(in.shape(), in.dtype(), nullptr, {});
        dense.set_data(mx::allocator::malloc(in.nbytes()));
        ins.push_back(slot(dense));
        fill_from(ins.back(), in);
      }
    }
    mx::cpu::get_command_encoder(stream()).dispatch(
        [call = call_, ins = std::move(ins), outs = std::move(outs)]() mutable { run(*call, ins, outs); });
  }

  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw std::runtime_error(std::string("[") + call_->name + "] host operations run on a CPU stream");
  }

  const char* name() const override {
    return call_->name;
  }

 private:
  std::shared_ptr<Call> call_;
  std::vector<int> start_from_;
};

mx::Dtype dtype_of(mlx_dtype dtype) {
  return mlx_dtype_to_cpp(dtype);
}

} // namespace

extern "C" int mlx_host_op(
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
    size_t error_bytes) {
  auto call = std::make_shared<Call>(name, function, context, release);
  try {
    std::vector<mx::array> ins;
    ins.reserve(inputs_len);
    for (size_t i = 0; i < inputs_len; i++) {
      ins.push_back(mlx_array_get_(inputs[i]));
    }
    std::vector<mx::Shape> shapes;
    std::vector<mx::Dtype> dtypes;
    std::vector<int> start_from;
    for (size_t j = 0; j < outputs_len; j++) {
      auto& out = outputs[j];
      mx::Shape shape(out.shape, out.shape + out.ndim);
      if (out.start_from >= 0) {
        auto from = static_cast<size_t>(out.start_from);
        if (from >= inputs_len || ins[from].shape() != shape || ins[from].dtype() != dtype_of(out.dtype)) {
          throw std::invalid_argument(
              std::string("[") + name + "] output " + std::to_string(j) +
              " starts from an input of another shape or type");
        }
      }
      shapes.push_back(std::move(shape));
      dtypes.push_back(dtype_of(out.dtype));
      start_from.push_back(out.start_from);
    }
    auto primitive =
        std::make_shared<HostOp>(mlx_stream_get_(stream), std::move(call), std::move(start_from));
    mlx_vector_array_set_(*res, mx::array::make_arrays(std::move(shapes), dtypes, primitive, ins));
    return 0;
  } catch (std::exception& e) {
    std::snprintf(error, error_bytes, "%s", e.what());
    return 1;
  }
}
