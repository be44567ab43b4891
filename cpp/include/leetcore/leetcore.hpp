// leetcore.hpp - the C++17 interface of leetcore.h: header-only, reports errors by exceptions, and
// owns only scratch.
//
//     const leetcore::Tensor q(q_data, {B, Hq, N, K});
//     const leetcore::Tensor k(k_data, {B, Hk, N, K});
//     const leetcore::Tensor v(v_data, {B, Hv, N, V});
//     const leetcore::Tensor o(o_data, {B, H, N, V});
//     const leetcore::Tensor log_decay(g_data, {Hs});
//     leetcore::linear_attention(q, k, v, log_decay, o);
//
// A Tensor is a view of the caller's memory. Every function may be called from any number of
// threads at once, if each thread has its own Workspace. leetcore.h documents shapes, dtypes and
// refusals.
//
// On a GPU every tensor except a scalar is Tensor(data, shape, {}, {LC_CUDA, 0}), Options::stream
// is the stream, and a method that needs scratch takes a Workspace of the caller's device memory.
// Calls return before their work is done.
#ifndef LEETCORE_HPP
#define LEETCORE_HPP
#include <leetcore/leetcore.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace leetcore {

// A call that failed: what() is the library's sentence, which begins with the argument's name.
class Error : public std::runtime_error {
 public:
  Error(lc_status status, const std::string& text) : std::runtime_error(text), status_(status) {}
  lc_status status() const noexcept { return status_; }

 private:
  lc_status status_;
};

// Storage types of the 16-bit formats. A pointer to another such type may be cast to a pointer to
// these.
struct half {
  std::uint16_t bits;
};
struct bfloat16 {
  std::uint16_t bits;
};

// The dtype of an element type. A program may specialise it for its own types.
template <class T>
struct dtype_of;
template <>
struct dtype_of<double> {
  static constexpr lc_dtype value = {LC_FLOAT, 64, 1};
};
template <>
struct dtype_of<float> {
  static constexpr lc_dtype value = {LC_FLOAT, 32, 1};
};
template <>
struct dtype_of<half> {
  static constexpr lc_dtype value = {LC_FLOAT, 16, 1};
};
template <>
struct dtype_of<bfloat16> {
  static constexpr lc_dtype value = {LC_BFLOAT, 16, 1};
};
template <>
struct dtype_of<std::int32_t> {
  static constexpr lc_dtype value = {LC_INT, 32, 1};
};
template <>
struct dtype_of<std::int64_t> {
  static constexpr lc_dtype value = {LC_INT, 64, 1};
};

// A strided view of the caller's memory, or, default-constructed, an absent argument.
class Tensor {
 public:
  static constexpr std::size_t kMaxRank = 4;

  Tensor() = default;

  // shape {} is a scalar; strides count elements and default to dense row-major.
  template <class T>
  Tensor(T* data, std::initializer_list<std::int64_t> shape, std::initializer_list<std::int64_t> strides = {},
         lc_device device = {LC_CPU, 0})
      : data_(const_cast<std::remove_const_t<T>*>(data)),
        dtype_(dtype_of<std::remove_const_t<T>>::value),
        device_(device),
        rank_(shape.size()),
        dense_(strides.size() == 0) {
    if (rank_ > kMaxRank) throw Error(LC_INVALID, "shape: expected at most 4 sizes, got " + std::to_string(rank_));
    if (!dense_ && strides.size() != rank_)
      throw Error(LC_INVALID, "strides: expected " + std::to_string(rank_) +
                                  " numbers, one for each size of the shape, got " + std::to_string(strides.size()));
    std::size_t i = 0;
    for (std::int64_t n : shape) shape_[i++] = n;
    i = 0;
    for (std::int64_t n : strides) strides_[i++] = n;
  }

  explicit operator bool() const noexcept { return dtype_.bits != 0; }  // present?

  // This Tensor for the C ABI; valid as long as this Tensor. The library writes neither shape nor
  // strides.
  lc_tensor c_tensor() const noexcept {
    lc_tensor t = {};
    t.data = data_;
    t.device = device_;
    t.ndim = static_cast<std::int32_t>(rank_);
    t.dtype = dtype_;
    t.shape = const_cast<std::int64_t*>(shape_);
    t.strides = dense_ ? nullptr : const_cast<std::int64_t*>(strides_);
    return t;
  }

 private:
  void* data_ = nullptr;
  lc_dtype dtype_ = {};
  lc_device device_ = {LC_CPU, 0};
  std::size_t rank_ = 0;
  bool dense_ = true;
  std::int64_t shape_[kMaxRank] = {}, strides_[kMaxRank] = {};
};

// Scratch for one call at a time. A default Workspace owns host memory, aligned to 64 bytes, which
// grows on demand. A Workspace of the caller's memory never grows. On a GPU, where the library
// allocates nothing, that memory is aligned to 256 bytes and may be used again after the stream has
// done the call.
class Workspace {
 public:
  Workspace() = default;
  Workspace(void* memory, std::size_t bytes) noexcept : given_(memory), size_(bytes), is_given_(true) {}

  void* reserve(std::size_t bytes) {
    if (is_given_) return given_;
    if (bytes > size_) {
      memory_.reset();
      size_ = 0;
      memory_.reset(::operator new(bytes, kAlignment));
      size_ = bytes;
    }
    return memory_.get();
  }
  std::size_t size() const noexcept { return size_; }
  bool is_given() const noexcept { return is_given_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(void* p) const noexcept { ::operator delete(p, kAlignment); }
  };
  std::unique_ptr<void, Free> memory_;
  void* given_ = nullptr;
  std::size_t size_ = 0;
  bool is_given_ = false;
};

enum class Layout { bhnd, bnhd };  // the order of heads and tokens in every tensor that has both

// Options that most calls leave at their defaults. Shapes are those of layout bhnd; S is B, or with
// cu_seqlens the number of packed sequences. decode_step reads scale, layout, state_indices, and
// all members from workspace on, so the Options of a prompt may be passed to its decode steps.
struct Options {
  double scale = 1;             // multiplies o
  const char* method = "auto";  // a name of methods()
  Layout layout = Layout::bhnd;
  bool allow_tf32 = false;         // GPU: float32 products rounded to tf32
  Tensor initial_state;            // [S, Hs, K, V]; absent: zeros
  Tensor final_state;              // linear_attention: [S, Hs, K, V], written; may be initial_state
  Tensor cu_seqlens;               // int32 or int64 [S + 1]: offsets of packed sequences, B = 1
  Tensor state_indices;            // decode_step: int32 or int64 [B], slot of each sequence, -1 skips; absent: slot b
  Workspace* workspace = nullptr;  // nullptr: the call allocates its scratch (CPU only)
  void* stream = nullptr;          // cudaStream_t; nullptr on the CPU
  int num_threads = 0;             // threads of the caller's framework, 0: not known; see lc_num_threads
  int (*interrupt)(void*) = nullptr;  // called during a long call; an answer other than 0 throws Error LC_INTERRUPTED
  void* interrupt_context = nullptr;
};

namespace detail {

// lc_args and the lc_tensors that it points to.
class Call {
 public:
  Call(lc_op op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& log_decay, const Options& options) {
    args.struct_size = sizeof args;
    args.op = op;
    args.scale = options.scale;
    if (options.layout == Layout::bnhd) args.flags |= LC_LAYOUT_BNHD;
    if (options.allow_tf32) args.flags |= LC_ALLOW_TF32;
    args.q = add(q);
    args.k = add(k);
    args.v = add(v);
    args.log_decay = add(log_decay);
    args.state_indices = add(options.state_indices);
    args.stream = options.stream;
    args.num_threads = options.num_threads;
    args.interrupt = options.interrupt;
    args.interrupt_context = options.interrupt_context;
    if (op == LC_DECODE) return;
    args.method = options.method;
    args.initial_state = add(options.initial_state);
    args.cu_seqlens = add(options.cu_seqlens);
    args.final_state = add(options.final_state);
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  // nullptr when absent; t must outlive the call
  const lc_tensor* add(const Tensor& t) {
    if (!t) return nullptr;
    tensors_[used_] = t.c_tensor();
    return &tensors_[used_++];
  }

  static void require(lc_status status) {
    if (status != LC_OK) throw Error(status, lc_last_error());
  }

  std::size_t workspace_bytes() const {
    std::size_t bytes = 0;
    require(lc_workspace(&args, &bytes));
    return bytes;
  }

  void run(Workspace* workspace) {
    Workspace local;
    if (!workspace) workspace = &local;
    // Another thread may change settings between lc_workspace and lc_run: lc_workspace is then
    // asked again.
    for (int tries = 1;; ++tries) {
      if (const std::size_t bytes = workspace_bytes()) {
        if (args.q->device.type != LC_CPU && !workspace->is_given())
          throw Error(LC_MEMORY, "workspace: expected Workspace(memory, bytes) with " + std::to_string(bytes) +
                                     " bytes on the device of q, got none");
        args.workspace = workspace->reserve(bytes);
        args.workspace_bytes = workspace->size();
      }
      const lc_status status = lc_run(&args);
      if (status != LC_MEMORY || workspace->is_given() || tries == 100) return require(status);
    }
  }

  lc_args args = {};

 private:
  lc_tensor tensors_[sizeof(lc_args) / sizeof(const lc_tensor*)];  // lc_args has fewer pointers
  std::size_t used_ = 0;
};

}  // namespace detail

// o_t = scale * q_t^T S_t with S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T, for all tokens.
//   q [B, Hq, N, K], k [B, Hk, N, K], v [B, Hv, N, V], o [B, H, N, V] (written), H = max(Hq, Hk,
//   Hv), Hs = max(Hk, Hv) log_decay: natural log, <= 0, -inf allowed: [], [Hs], [B, Hs] or [B, Hs,
//   N]; Tensor() for no decay
// Throws Error before it writes anything.
inline void linear_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& log_decay,
                             const Tensor& o, const Options& options = {}) {
  detail::Call call(LC_FORWARD, q, k, v, log_decay, options);
  call.args.o = call.add(o);
  call.run(options.workspace);
}

// The gradients that linear_attention_backward reads and writes. Each has the shape and the dtype
// of the tensor in its name.
struct Gradients {
  Tensor d_o, d_final_state;                           // read; absent means zeros, and one of them is present
  Tensor d_q, d_k, d_v, d_log_decay, d_initial_state;  // written where present
};

// The gradients of linear_attention, whichever method computed the forward pass.
// Throws Error before it writes anything.
inline void linear_attention_backward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& log_decay,
                                      const Gradients& gradients, const Options& options = {}) {
  detail::Call call(LC_BACKWARD, q, k, v, log_decay, options);
  call.args.d_o = call.add(gradients.d_o);
  call.args.d_final_state = call.add(gradients.d_final_state);
  call.args.d_q = call.add(gradients.d_q);
  call.args.d_k = call.add(gradients.d_k);
  call.args.d_v = call.add(gradients.d_v);
  call.args.d_log_decay = call.add(gradients.d_log_decay);
  call.args.d_initial_state = call.add(gradients.d_initial_state);
  call.run(options.workspace);
}

// linear_attention for a few new tokens of each sequence; state [slots, Hs, K, V] is read and
// updated in place. Throws Error before it writes anything.
inline void decode_step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& log_decay, const Tensor& state,
                        const Tensor& o, const Options& options = {}) {
  detail::Call call(LC_DECODE, q, k, v, log_decay, options);
  call.args.final_state = call.add(state);
  call.args.o = call.add(o);
  call.run(options.workspace);
}

// The scratch that a call needs, in bytes. On a GPU the caller allocates scratch once, for its
// largest call.
inline std::size_t linear_attention_workspace(const Tensor& q, const Tensor& k, const Tensor& v,
                                              const Tensor& log_decay = {}, const Options& options = {}) {
  return detail::Call(LC_FORWARD, q, k, v, log_decay, options).workspace_bytes();
}
inline std::size_t decode_step_workspace(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& log_decay,
                                         const Tensor& state, const Options& options = {}) {
  detail::Call call(LC_DECODE, q, k, v, log_decay, options);
  call.args.final_state = call.add(state);
  return call.workspace_bytes();
}

// The cost of this linear_attention call by options.method; "auto" stands for the method that the
// call would take.
inline lc_cost cost(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& log_decay = {},
                    const Options& options = {}) {
  const detail::Call call(LC_FORWARD, q, k, v, log_decay, options);
  lc_cost result;
  detail::Call::require(lc_predict(&call.args, &result, sizeof result));
  return result;
}

// What each method of methods() answers to this linear_attention call, in that order;
// options.method does not matter.
inline std::vector<lc_candidate> candidates(const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& log_decay = {}, const Options& options = {}) {
  const detail::Call call(LC_FORWARD, q, k, v, log_decay, options);
  std::vector<lc_candidate> all;
  while (lc_method(static_cast<int>(all.size()))) {
    lc_candidate row;
    detail::Call::require(lc_candidate_at(&call.args, static_cast<int>(all.size()), &row, sizeof row));
    all.push_back(row);
  }
  return all;
}

// Which method serves this linear_attention call, what decided, and the candidates: one line per
// method.
inline std::string explain(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& log_decay = {},
                           const Options& options = {}) {
  const detail::Call call(LC_FORWARD, q, k, v, log_decay, options);
  for (std::string text(1024, '\0');; text.resize(2 * text.size())) {
    detail::Call::require(lc_explain(&call.args, &text[0], text.size()));
    const std::size_t length = std::strlen(text.c_str());
    if (length + 1 == text.size()) continue;  // cut off
    text.resize(length);
    return text;
  }
}

// The methods of this build, on every device.
inline std::vector<lc_method_info> methods() {
  std::vector<lc_method_info> all;
  while (const lc_method_info* info = lc_method(static_cast<int>(all.size()))) all.push_back(*info);
  return all;
}

// The version of the library that was loaded, as "0.1.0".
inline std::string version() {
  const int n = lc_version();
  return std::to_string(n / 10000) + "." + std::to_string(n / 100 % 100) + "." + std::to_string(n % 100);
}

}  // namespace leetcore
#endif
