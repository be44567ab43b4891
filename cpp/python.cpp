// python.cpp - the extension module leetcore._core. It uses the C ABI and nothing else of leetcore.
//
// `lib`, an object of python/leetcore/arrays.py, knows the array library of a call. It exports
// arrays, copies those whose last dimension is not contiguous, makes empty ones, and turns results
// into arrays of the library.
//
// One file: nanobind's headers take most of its compile time, so two files would take twice as
// long.
#include <leetcore/leetcore.h>
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>
#if defined(__GLIBC__)
#include <cxxabi.h>
#endif

namespace nb = nanobind;

namespace {

// At least `bytes` of scratch for the CPU methods. Each calling thread keeps its scratch for the
// next call, since fresh pages cost as much as the work on them.
struct Scratch {
  void* memory;
  size_t bytes;
};
Scratch host_scratch(size_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<void, Free> memory;
  static thread_local size_t size = 0;
  if (bytes > size) {
    memory.reset();
    size = 0;
    memory.reset(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
    if (!memory) throw std::bad_alloc();
    size = bytes;
  }
  return {memory.get(), size};
}

[[noreturn]] void raise(PyObject* kind, const std::string& text) {
  PyErr_SetString(kind, text.c_str());
  throw nb::python_error();
}

// A name of lc_args and the name of the same argument in Python.
struct Name {
  const char *c, *python;
};
using Names = std::vector<Name>;
const Names kNames = {{"o", "out"}};
const Names kDecodeNames = {{"o", "out"}, {"final_state", "state"}};
const Names kConvNames = {{"y", "out"}};
const Names kConvStepNames = {{"y", "out"}, {"final_state", "state"}};
const Names kSsdNames = {{"q", "C"},
                         {"k", "B"},
                         {"v", "x"},
                         {"log_decay", "A"},
                         {"skip", "D"},
                         {"gate", "z"},
                         {"o", "out"},
                         {"d_o", "d_y"},
                         {"final_state", "state"},
                         {"q, k and v", "C, B and x"},
                         {"k and v", "B and x"}};

// The text of lc_last_error, in which arguments have their Python names: the one that the text
// begins with, the one that it is like, and those with which it shares a rule.
std::string last_error(const Names& names) {
  std::string text = lc_last_error();
  const auto rename = [&](size_t at, size_t length) {
    for (const Name& name : names)
      if (!text.compare(at, length, name.c)) {
        text.replace(at, length, name.python);
        return;
      }
  };
  for (const char* before : {" like ", "the most of "})
    if (const size_t found = text.find(before); found != std::string::npos) {
      const size_t at = found + std::strlen(before);
      rename(at, std::min(text.find(", got", at), text.size()) - at);
    }
  if (const size_t colon = text.find(": "); colon != std::string::npos) rename(0, colon);
  return text;
}

void check(lc_status status, const Names& names = kNames) {
  if (status == LC_OK) return;
  if (status == LC_INTERRUPTED) throw nb::python_error();  // the exception of the signal's handler
  PyObject* kinds[] = {nullptr,
                       PyExc_ValueError,
                       PyExc_NotImplementedError,
                       PyExc_RuntimeError,
                       PyExc_MemoryError,
                       PyExc_RuntimeError,
                       PyExc_TypeError};
  raise(kinds[status], last_error(names));
}

// Calls f, which may run Python or wait for the interpreter's lock. After the interpreter's end,
// CPython before 3.14 unwinds the stack of a daemon thread that does this, and the unwinding would
// release Python objects without the lock. Here such a thread waits for the end of the process
// instead, as in CPython 3.14.
template <class F>
decltype(auto) in_python(F&& f) {
#if defined(__GLIBC__)
  try {
    return f();
  } catch (const abi::__forced_unwind&) {
    for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
  }
#else
  return f();
#endif
}

// The thread in which Python runs signal handlers. Calls of other threads have no interrupt
// function.
unsigned long main_thread = 0;

// Whether the handler of a signal, such as Ctrl-C, raised an exception. The caller does not hold
// the interpreter's lock.
int interrupted(void*) {
  const PyGILState_STATE state = PyGILState_Ensure();
  const int raised = PyErr_CheckSignals();
  PyGILState_Release(state);
  return raised;
}

// Runs a call without the interpreter's lock.
template <class Args>
lc_status unlocked(lc_status (*run)(const Args*), const Args& args) {
  PyThreadState* const thread = PyEval_SaveThread();
  const lc_status status = run(&args);
  in_python([&] { PyEval_RestoreThread(thread); });
  return status;
}

// Runs a call with the scratch of the calling thread. If another thread changes the number of
// threads or the tuning table after `measure` has asked for the scratch, the call may need more:
// `measure` then asks again, and the scratch grows.
template <class Args, class F>
void run_on_host(lc_status (*run)(const Args*), Args& args, const Names& names, F&& measure) {
  if (PyThread_get_thread_ident() == main_thread) args.interrupt = interrupted;
  for (int tries = 1;; ++tries) {
    const Scratch scratch = host_scratch(args.workspace_bytes);
    args.workspace = scratch.memory;
    args.workspace_bytes = scratch.bytes;
    const lc_status status = unlocked(run, args);
    if (status != LC_MEMORY || tries == 100) return check(status, names);
    measure();
  }
}

// An array library of arrays.py.
struct Library {
  nb::object object;
  bool plain;  // arrays export themselves, and results need no conversion
  explicit Library(nb::object library) : object(std::move(library)), plain(nb::cast<bool>(object.attr("plain"))) {}

  nb::object empty(const std::vector<int64_t>& shape, nb::handle like, int float_bits = 0) const {
    const nb::tuple sizes = nb::steal<nb::tuple>(PyTuple_New(Py_ssize_t(shape.size())));
    for (size_t i = 0; i < shape.size(); ++i) PyTuple_SET_ITEM(sizes.ptr(), i, PyLong_FromLongLong(shape[i]));
    return call("empty", sizes, like, float_bits);
  }
  nb::object result(nb::object array) const { return plain ? array : call("result", array); }

  template <class... A>
  nb::object call(const char* method, const A&... arguments) const {
    return in_python([&]() -> nb::object { return object.attr(method)(arguments...); });
  }
};

bool is_number(nb::handle x) { return PyFloat_Check(x.ptr()) || PyLong_Check(x.ptr()); }

// One array argument as an lc_tensor. It keeps the array alive and converts nothing: lc_run refuses
// wrong dtypes.
class Argument {
 public:
  const lc_tensor* tensor() const { return present_ ? &tensor_ : nullptr; }
  lc_tensor& get() { return tensor_; }

  void read(const Library& lib, const char* name, nb::handle array, bool contiguous = true) {
    if (array.is_none()) return;
    take<nb::ndarray<nb::ro>>(lib, name, array, false);
    if (contiguous && scattered()) take<nb::ndarray<nb::ro>>(lib, name, lib.call("contiguous", array), false);
  }
  void write(const Library& lib, const char* name, nb::handle array) {
    if (!array.is_none()) take<nb::ndarray<>>(lib, name, array, true);
  }

  void number(double x, bool f64) {
    present_ = true;
    tensor_ = {};
    single_ = float(x);
    double_ = x;
    tensor_.data = f64 ? static_cast<void*>(&double_) : &single_;
    tensor_.device = {LC_CPU, 0};
    tensor_.dtype = {LC_FLOAT, uint8_t(f64 ? 64 : 32), 1};
  }

  // Makes [B, H, 1, K] of [B, H, K] (rank 3), or [B, H, 1] of [B, H] (rank 2).
  void insert_token(int rank = 3) {
    if (!present_ || tensor_.ndim != rank) return;
    for (int i = 0; i <= rank; ++i) {
      shape_[i] = i == 2 ? 1 : tensor_.shape[i < 2 ? i : 2];
      strides_[i] = i == 2 ? 1 : tensor_.strides[i < 2 ? i : 2];
    }
    adopt(rank + 1);
  }

  // Reads a state [B, H, V, K], of which either of the last two dimensions is contiguous, as
  // [B, H, K, V].
  void read_transposed(const Library& lib, const char* name, nb::handle array) {
    read(lib, name, array, false);
    if (scattered() && (tensor_.ndim < 2 || tensor_.strides[tensor_.ndim - 2] != 1)) read(lib, name, array);
    transpose();
  }
  void write_transposed(const Library& lib, const char* name, nb::handle array) {
    write(lib, name, array);
    transpose();
  }

 private:
  // Swaps the last two of four dimensions.
  void transpose() {
    if (!present_ || tensor_.ndim != 4) return;
    for (int i = 0; i < 4; ++i) {
      const int from = i < 2 ? i : 5 - i;
      shape_[i] = tensor_.shape[from];
      strides_[i] = tensor_.strides[from];
    }
    adopt(4);
  }

  void adopt(int rank) {
    tensor_.ndim = rank;
    tensor_.shape = shape_;
    tensor_.strides = strides_;
  }

  template <class Array>
  void take(const Library& lib, const char* name, nb::handle array, bool writable) {
    if (is_number(array)) raise(PyExc_TypeError, std::string(name) + ": expected an array, got a number");
    Array view;
    const auto import = [&](nb::handle from) { return in_python([&] { return nb::try_cast(from, view, false); }); };
    if (!import(lib.plain ? nb::borrow(array) : lib.call("export", name, array, writable)) &&
        !import(lib.call("repair", name, array, writable)))
      raise(PyExc_TypeError, std::string(name) + ": expected an array that can be exported" +
                                 (writable ? " for writing" : "") + ", got one that cannot");
    hold_ = nb::ndarray<nb::ro>(view);
    present_ = true;
    tensor_.data = const_cast<void*>(hold_.data());
    tensor_.device = {hold_.device_type(), hold_.device_id()};
    tensor_.ndim = int32_t(hold_.ndim());
    tensor_.dtype = {uint8_t(hold_.dtype().code), hold_.dtype().bits, hold_.dtype().lanes};
    tensor_.shape = const_cast<int64_t*>(hold_.shape_ptr());
    tensor_.strides = const_cast<int64_t*>(hold_.stride_ptr());
    tensor_.byte_offset = 0;
  }

  bool scattered() const {
    const int last = tensor_.ndim - 1;
    return last >= 0 && tensor_.shape[last] > 1 && tensor_.strides[last] != 1;
  }

  nb::ndarray<nb::ro> hold_;
  lc_tensor tensor_ = {};
  int64_t shape_[4], strides_[4];
  float single_;
  double double_;
  bool present_ = false;
};

bool is_f64(const lc_tensor& t) { return t.dtype.code == LC_FLOAT && t.dtype.bits == 64; }

// The options of a call, one field for each of lc_args that is no tensor: the NamedTuple Options of
// api.py.
struct Options {
  double scale;
  std::string method;
  bool bnhd, tf32;
  uintptr_t stream;
  int threads;
  bool dt_softplus;
  double dt_min, dt_max;
  explicit Options(const nb::tuple& t)
      : scale(nb::cast<double>(t[0])),
        method(nb::cast<std::string>(t[1])),
        bnhd(nb::cast<bool>(t[2])),
        tf32(nb::cast<bool>(t[3])),
        stream(nb::cast<uintptr_t>(t[4])),
        threads(nb::cast<int>(t[5])),
        dt_softplus(nb::cast<bool>(t[6])),
        dt_min(nb::cast<double>(t[7])),
        dt_max(nb::cast<double>(t[8])) {}
};

// One call: its arrays and its lc_args.
struct Call {
  Library lib;
  nb::handle like;  // v: results are made on its device
  Options options;
  const Names& names;
  Argument q, k, v, log_decay, initial_state, cu_seqlens, state_indices, o, final_state;
  Argument d_o, d_final_state, d_q, d_k, d_v, d_log_decay, d_initial_state;
  Argument dt, dt_bias, skip, gate, d_dt;
  lc_args args = {};

  Call(nb::object library, lc_op op, nb::handle q_, nb::handle k_, nb::handle v_, nb::handle decay,
       const nb::tuple& given, const Names& names_ = kNames)
      : lib(std::move(library)), like(v_), options(given), names(names_) {
    q.read(lib, python_name("q"), q_);
    k.read(lib, python_name("k"), k_);
    v.read(lib, python_name("v"), v_);
    if (is_number(decay))
      log_decay.number(nb::cast<double>(decay), is_f64(q.get()));
    else
      log_decay.read(lib, python_name("log_decay"), decay, false);
    args.struct_size = sizeof args;
    args.op = op;
    args.method = options.method.c_str();
    args.scale = options.scale;
    args.flags = (options.bnhd ? LC_LAYOUT_BNHD : 0) | (options.tf32 ? LC_ALLOW_TF32 : 0) |
                 (options.dt_softplus ? LC_DT_SOFTPLUS : 0);
    args.stream = reinterpret_cast<void*>(options.stream);
    args.num_threads = options.threads;
    args.dt_min = options.dt_min;
    args.dt_max = options.dt_max;
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  void fill() {
    args.q = q.tensor();
    args.k = k.tensor();
    args.v = v.tensor();
    args.log_decay = log_decay.tensor();
    args.initial_state = initial_state.tensor();
    args.cu_seqlens = cu_seqlens.tensor();
    args.state_indices = state_indices.tensor();
    args.o = o.tensor();
    args.final_state = final_state.tensor();
    args.d_o = d_o.tensor();
    args.d_final_state = d_final_state.tensor();
    args.d_q = d_q.tensor();
    args.d_k = d_k.tensor();
    args.d_v = d_v.tensor();
    args.d_log_decay = d_log_decay.tensor();
    args.d_initial_state = d_initial_state.tensor();
    args.dt = dt.tensor();
    args.dt_bias = dt_bias.tensor();
    args.skip = skip.tensor();
    args.gate = gate.tensor();
    args.d_dt = d_dt.tensor();
  }

  // Checks everything except values. After it the shapes are known to fit.
  void check_structure() {
    fill();
    check(lc_workspace(&args, &args.workspace_bytes), names);
  }

  // Scratch on a device is an array like the results, which the array library frees in the order of
  // the stream.
  void run() {
    fill();
    Argument scratch;
    if (args.q->device.type == LC_CPU) return run_on_host(lc_run, args, names, [&] { check_structure(); });
    if (args.workspace_bytes) {
      scratch.write(lib, "workspace", lib.empty({int64_t((args.workspace_bytes + 3) / 4)}, like, 32));
      args.workspace = scratch.get().data;
    }
    check(run_unlocked(), names);
  }

  lc_status run_unlocked() const { return unlocked(lc_run, args); }

  // The shape of o and of its gradient. v has it too, except that o has the most heads.
  std::vector<int64_t> output_shape() const {
    std::vector<int64_t> shape(args.v->shape, args.v->shape + 4);
    for (const lc_tensor* t : {args.q, args.k})
      shape[head_axis()] = std::max(shape[head_axis()], t->shape[head_axis()]);
    return shape;
  }

  // The shape of initial_state, final_state and their gradients.
  std::vector<int64_t> state_shape() const {
    const int64_t sequences = args.cu_seqlens ? args.cu_seqlens->shape[0] - 1 : args.q->shape[0];
    return {sequences, std::max(args.k->shape[head_axis()], args.v->shape[head_axis()]), args.k->shape[3],
            args.v->shape[3]};
  }
  std::vector<int64_t> transposed_state_shape() const {
    std::vector<int64_t> shape = state_shape();
    std::swap(shape[2], shape[3]);
    return shape;
  }
  int state_bits() const { return is_f64(*args.q) ? 64 : 32; }

 private:
  int head_axis() const { return options.bnhd ? 2 : 1; }

  const char* python_name(const char* name) const {
    for (const Name& n : names)
      if (!std::strcmp(n.c, name)) return n.python;
    return name;
  }
};

nb::object forward(nb::object lib, nb::handle q, nb::handle k, nb::handle v, nb::handle log_decay,
                   nb::handle initial_state, nb::handle cu_seqlens, nb::object out, bool return_state,
                   const nb::tuple& options) {
  Call c(std::move(lib), LC_FORWARD, q, k, v, log_decay, options);
  c.initial_state.read(c.lib, "initial_state", initial_state);
  c.cu_seqlens.read(c.lib, "cu_seqlens", cu_seqlens);
  c.o.write(c.lib, "out", out);
  c.check_structure();

  if (out.is_none()) {
    out = c.lib.empty(c.output_shape(), v);
    c.o.write(c.lib, "out", out);
  }
  nb::object state;
  if (return_state) {
    state = c.lib.empty(c.state_shape(), v, c.state_bits());
    c.final_state.write(c.lib, "final_state", state);
    c.check_structure();  // the final state may change the scratch that is needed, or the choice of method
  }
  c.run();
  out = c.lib.result(out);
  return return_state ? nb::object(nb::make_tuple(out, c.lib.result(state))) : out;
}

// wants: d_q, d_k, d_v, d_log_decay, d_initial_state. An unwanted gradient is None in the result.
nb::tuple backward(nb::object lib, nb::handle q, nb::handle k, nb::handle v, nb::handle log_decay,
                   nb::handle initial_state, nb::handle cu_seqlens, nb::handle d_o, nb::handle d_final_state,
                   std::array<bool, 5> wants, const nb::tuple& options) {
  Call c(std::move(lib), LC_FORWARD, q, k, v, log_decay, options);
  c.initial_state.read(c.lib, "initial_state", initial_state);
  c.cu_seqlens.read(c.lib, "cu_seqlens", cu_seqlens);
  c.check_structure();  // as a forward pass, whose shapes the gradients have

  c.args.op = LC_BACKWARD;
  c.d_o.read(c.lib, "d_o", d_o);
  c.d_final_state.read(c.lib, "d_final_state", d_final_state);
  nb::object made[5];
  const auto make = [&](int i, Argument& gradient, const char* name, const std::vector<int64_t>& shape, nb::handle like,
                        int float_bits) {
    if (!wants[i]) return;
    made[i] = c.lib.empty(shape, like, float_bits);
    gradient.write(c.lib, name, made[i]);
  };
  const auto shape_of = [](const lc_tensor* t) {
    return t ? std::vector<int64_t>(t->shape, t->shape + t->ndim) : std::vector<int64_t>();
  };
  const bool number = !c.args.log_decay || is_number(log_decay);
  make(0, c.d_q, "d_q", shape_of(c.args.q), q, 0);
  make(1, c.d_k, "d_k", shape_of(c.args.k), k, 0);
  make(2, c.d_v, "d_v", shape_of(c.args.v), v, 0);
  make(3, c.d_log_decay, "d_log_decay", shape_of(c.args.log_decay), q,
       number ? c.state_bits() : c.args.log_decay->dtype.bits);
  make(4, c.d_initial_state, "d_initial_state", c.state_shape(), q, c.state_bits());
  c.check_structure();
  c.run();
  nb::object results[5];
  for (int i = 0; i < 5; ++i) results[i] = wants[i] ? c.lib.result(made[i]) : nb::none();
  return nb::make_tuple(results[0], results[1], results[2], results[3], results[4]);
}

nb::object decode(nb::object lib, nb::handle q, nb::handle k, nb::handle v, nb::handle state, nb::handle log_decay,
                  nb::handle state_indices, nb::object out, const nb::tuple& options) {
  Call c(std::move(lib), LC_DECODE, q, k, v, log_decay, options, kDecodeNames);
  c.final_state.write(c.lib, "state", state);
  c.state_indices.read(c.lib, "state_indices", state_indices);
  c.o.write(c.lib, "out", out);
  const bool one_token = c.q.get().ndim == 3;
  if (one_token)
    for (Argument* a : {&c.q, &c.k, &c.v, &c.o}) a->insert_token();
  c.check_structure();
  if (out.is_none()) {
    std::vector<int64_t> shape = c.output_shape();
    if (one_token) shape.erase(shape.begin() + 2);
    out = c.lib.empty(shape, v);
    c.o.write(c.lib, "out", out);
    if (one_token) c.o.insert_token();
  }
  c.run();
  return c.lib.result(out);
}

// ---- Mamba-2: q is C, k is B, v is x, log_decay is A, and states are [B, H, V, K] ----------------

nb::object ssd(nb::object lib, nb::handle x, nb::handle dt, nb::handle A, nb::handle B, nb::handle C, nb::handle D,
               nb::handle z, nb::handle dt_bias, nb::handle initial_state, nb::handle cu_seqlens, nb::object out,
               bool return_state, const nb::tuple& options) {
  Call c(std::move(lib), LC_FORWARD, C, B, x, A, options, kSsdNames);
  c.dt.read(c.lib, "dt", dt, false);
  c.skip.read(c.lib, "D", D, false);
  c.gate.read(c.lib, "z", z);
  c.dt_bias.read(c.lib, "dt_bias", dt_bias, false);
  c.initial_state.read_transposed(c.lib, "initial_state", initial_state);
  c.cu_seqlens.read(c.lib, "cu_seqlens", cu_seqlens);
  c.o.write(c.lib, "out", out);
  c.check_structure();
  if (out.is_none()) {
    out = c.lib.empty(c.output_shape(), x);
    c.o.write(c.lib, "out", out);
  }
  nb::object state;
  if (return_state) {
    state = c.lib.empty(c.transposed_state_shape(), x, c.state_bits());
    c.final_state.write_transposed(c.lib, "final_state", state);
    c.check_structure();
  }
  c.run();
  out = c.lib.result(out);
  return return_state ? nb::object(nb::make_tuple(out, c.lib.result(state))) : out;
}

// wants: d_x, d_dt, d_A, d_B, d_C, d_initial_state. An unwanted gradient is None in the result. d_A
// has the shape of A.
nb::tuple ssd_backward(nb::object lib, nb::handle x, nb::handle dt, nb::handle A, nb::handle B, nb::handle C,
                       nb::handle dt_bias, nb::handle initial_state, nb::handle cu_seqlens, nb::handle d_y,
                       nb::handle d_final_state, std::array<bool, 6> wants, const nb::tuple& options) {
  Call c(std::move(lib), LC_FORWARD, C, B, x, A, options, kSsdNames);
  c.dt.read(c.lib, "dt", dt, false);
  c.dt_bias.read(c.lib, "dt_bias", dt_bias, false);
  c.initial_state.read_transposed(c.lib, "initial_state", initial_state);
  c.cu_seqlens.read(c.lib, "cu_seqlens", cu_seqlens);
  c.check_structure();  // as a forward pass, whose shapes the gradients have

  c.args.op = LC_BACKWARD;
  c.d_o.read(c.lib, "d_y", d_y);
  c.d_final_state.read_transposed(c.lib, "d_final_state", d_final_state);
  nb::object made[6];
  const auto make = [&](int i, Argument& gradient, const char* name, const lc_tensor* like, nb::handle array) {
    if (!wants[i]) return;
    made[i] = c.lib.empty({like->shape, like->shape + like->ndim}, array);
    gradient.write(c.lib, name, made[i]);
  };
  make(0, c.d_v, "d_x", c.args.v, x);
  make(1, c.d_dt, "d_dt", c.args.dt, dt);
  make(2, c.d_log_decay, "d_A", c.args.log_decay, A);
  make(3, c.d_k, "d_B", c.args.k, B);
  make(4, c.d_q, "d_C", c.args.q, C);
  if (wants[5]) {
    made[5] = c.lib.empty(c.transposed_state_shape(), x, c.state_bits());
    c.d_initial_state.write_transposed(c.lib, "d_initial_state", made[5]);
  }
  c.check_structure();
  c.run();
  nb::object results[6];
  for (int i = 0; i < 6; ++i) results[i] = wants[i] ? c.lib.result(made[i]) : nb::none();
  return nb::make_tuple(results[0], results[1], results[2], results[3], results[4], results[5]);
}

nb::object ssd_step(nb::object lib, nb::handle x, nb::handle dt, nb::handle A, nb::handle B, nb::handle C,
                    nb::handle state, nb::handle D, nb::handle z, nb::handle dt_bias, nb::handle state_indices,
                    nb::object out, const nb::tuple& options) {
  Call c(std::move(lib), LC_DECODE, C, B, x, A, options, kSsdNames);
  c.dt.read(c.lib, "dt", dt, false);
  c.skip.read(c.lib, "D", D, false);
  c.gate.read(c.lib, "z", z);
  c.dt_bias.read(c.lib, "dt_bias", dt_bias, false);
  c.final_state.write_transposed(c.lib, "state", state);
  c.state_indices.read(c.lib, "state_indices", state_indices);
  c.o.write(c.lib, "out", out);
  for (Argument* a : {&c.q, &c.k, &c.v, &c.gate, &c.o}) a->insert_token();
  c.dt.insert_token(2);
  c.check_structure();
  if (out.is_none()) {
    out = c.lib.empty({c.args.v->shape[0], c.args.v->shape[1], c.args.v->shape[3]}, x);
    c.o.write(c.lib, "out", out);
    c.o.insert_token();
  }
  c.run();
  return c.lib.result(out);
}

// Tensors of which a call reads the shapes alone. Their addresses are far apart, since written
// tensors must not overlap.
class Shapes {
 public:
  explicit Shapes(lc_device device) : device_(device) {}
  const lc_tensor* make(const std::vector<int64_t>& shape, lc_dtype dtype) {
    Tensor& t = all_[used_++];
    std::copy(shape.begin(), shape.end(), t.shape);
    t.c = {reinterpret_cast<void*>(used_ << 58), device_, int32_t(shape.size()), dtype, t.shape, nullptr, 0};
    return &t.c;
  }
  const lc_tensor* like(const lc_tensor& x) { return make({x.shape, x.shape + x.ndim}, x.dtype); }

 private:
  struct Tensor {
    lc_tensor c;
    int64_t shape[4];
  };
  lc_device device_;
  uintptr_t used_ = 0;
  Tensor all_[sizeof(lc_args) / sizeof(const lc_tensor*)];  // lc_args has fewer pointers
};

// A call of linear_attention, linear_attention_backward or decode_step as candidates() describes
// it: what the call would write, and the gradients that it would read, are shapes without memory.
struct Question {
  Call c;
  Shapes made;

  Question(nb::object lib, lc_op op, nb::handle q, nb::handle k, nb::handle v, nb::handle log_decay,
           nb::handle initial_state, nb::handle cu_seqlens, bool return_state, const nb::tuple& options)
      : c(std::move(lib), op == LC_BACKWARD ? LC_FORWARD : op, q, k, v, log_decay, options,
          op == LC_DECODE ? kDecodeNames : kNames),
        made(c.q.get().device) {
    if (op == LC_DECODE) {
      decode(initial_state);
      return;
    }
    c.initial_state.read(c.lib, "initial_state", initial_state);
    c.cu_seqlens.read(c.lib, "cu_seqlens", cu_seqlens);
    c.check_structure();
    if (op == LC_FORWARD) {
      if (return_state) c.args.final_state = exact_state();
      return;
    }
    c.args.op = LC_BACKWARD;
    c.args.d_o = made.make(c.output_shape(), c.args.q->dtype);
    if (return_state) c.args.d_final_state = exact_state();
    c.args.d_q = made.like(*c.args.q);
    c.args.d_k = made.like(*c.args.k);
    c.args.d_v = made.like(*c.args.v);
    if (c.args.log_decay) c.args.d_log_decay = made.like(*c.args.log_decay);
    if (c.args.initial_state) c.args.d_initial_state = exact_state();
  }

 private:
  const lc_tensor* exact_state() { return made.make(c.state_shape(), {LC_FLOAT, uint8_t(c.state_bits()), 1}); }

  // The pool has a slot for each sequence, or is the given one.
  void decode(nb::handle state) {
    if (c.q.get().ndim == 3)
      for (Argument* a : {&c.q, &c.k, &c.v}) a->insert_token();
    c.final_state.write(c.lib, "state", state);
    c.fill();
    const auto fits = [](const lc_tensor* t) { return t->ndim == 4; };
    if (!c.args.final_state && fits(c.args.q) && fits(c.args.k) && fits(c.args.v)) c.args.final_state = exact_state();
  }
};

// The index of the chosen method, what decided, the tuning table, and a row of each method.
nb::tuple candidates(nb::object lib, int op, nb::handle q, nb::handle k, nb::handle v, nb::handle log_decay,
                     nb::handle initial_state, nb::handle cu_seqlens, bool return_state, const nb::tuple& options) {
  const Question question(std::move(lib), lc_op(op), q, k, v, log_decay, initial_state, cu_seqlens, return_state,
                          options);
  const lc_args& args = question.c.args;
  lc_choice choice;
  check(lc_choose(&args, &choice, sizeof choice), question.c.names);
  nb::list rows;
  for (int i = 0; lc_method(i); ++i) {
    lc_candidate r;
    check(lc_candidate_at(&args, i, &r, sizeof r), question.c.names);
    if (r.refusal)
      rows.append(nb::make_tuple(r.method, r.device, r.refusal));
    else
      rows.append(nb::make_tuple(r.method, r.device, nb::none(), r.model_us, r.correction, r.microseconds, r.bound,
                                 r.flop, r.least_bytes, r.bytes, r.workspace, r.depth));
  }
  return nb::make_tuple(choice.index, choice.decided_by, choice.table, rows);
}

// The cost of linear_attention on tensors of these shapes. shape: B, N, K, V, Hq, Hk, Hv.
nb::tuple cost(std::array<int64_t, 7> shape, int dtype_code, int dtype_bits, bool per_token, bool initial_state,
               bool final_state, bool cuda, const nb::tuple& given) {
  const Options options(given);
  const auto [B, N, K, V, Hq, Hk, Hv] = shape;
  const int64_t Hs = std::max(Hk, Hv);
  const lc_dtype dtype = {uint8_t(dtype_code), uint8_t(dtype_bits), 1};
  const lc_dtype exact = {LC_FLOAT, uint8_t(dtype_bits == 64 ? 64 : 32), 1};
  Shapes made({cuda ? LC_CUDA : LC_CPU, 0});
  lc_args args = {};
  args.struct_size = sizeof args;
  args.op = LC_FORWARD;
  args.method = options.method.c_str();
  args.scale = options.scale;
  args.num_threads = options.threads;
  args.q = made.make({B, Hq, N, K}, dtype);
  args.k = made.make({B, Hk, N, K}, dtype);
  args.v = made.make({B, Hv, N, V}, dtype);
  args.log_decay = per_token ? made.make({B, Hs, N}, exact) : made.make({B, Hs}, exact);
  if (initial_state) args.initial_state = made.make({B, Hs, K, V}, exact);
  if (final_state) args.final_state = made.make({B, Hs, K, V}, exact);
  lc_cost c;
  check(lc_predict(&args, &c, sizeof c));
  return nb::make_tuple(c.method, c.flop, c.least_bytes, c.bytes, c.workspace, c.depth, c.microseconds);
}

// ---- the causal convolution ----------------------------------------------------------------------

using Shape = std::vector<int64_t>;

Shape shape_of(const lc_tensor& t) { return {t.shape, t.shape + t.ndim}; }

// One call of the convolution: its arrays and its lc_conv_args. Arrays of any strides are taken as
// they are. given: the NamedTuple ConvOptions of options.py.
struct ConvCall {
  Library lib;
  Argument x, weight, bias, initial_state, cu_seqlens, state_indices, y, final_state;
  Argument d_y, d_final_state, d_x, d_weight, d_bias, d_initial_state;
  lc_conv_args args = {};

  ConvCall(nb::object library, lc_op op, nb::handle x_, nb::handle weight_, nb::handle bias_, const nb::tuple& given)
      : lib(std::move(library)) {
    x.read(lib, "x", x_, false);
    weight.read(lib, "weight", weight_, false);
    bias.read(lib, "bias", bias_, false);
    args.struct_size = sizeof args;
    args.op = op;
    args.flags = nb::cast<bool>(given[0]) ? LC_CONV_SILU : 0;
    args.stream = reinterpret_cast<void*>(nb::cast<uintptr_t>(given[1]));
    args.num_threads = nb::cast<int>(given[2]);
  }
  ConvCall(const ConvCall&) = delete;
  ConvCall& operator=(const ConvCall&) = delete;

  const Names& names() const { return args.op == LC_DECODE ? kConvStepNames : kConvNames; }

  void check_structure() {
    args.x = x.tensor();
    args.weight = weight.tensor();
    args.bias = bias.tensor();
    args.initial_state = initial_state.tensor();
    args.cu_seqlens = cu_seqlens.tensor();
    args.state_indices = state_indices.tensor();
    args.y = y.tensor();
    args.final_state = final_state.tensor();
    args.d_y = d_y.tensor();
    args.d_final_state = d_final_state.tensor();
    args.d_x = d_x.tensor();
    args.d_weight = d_weight.tensor();
    args.d_bias = d_bias.tensor();
    args.d_initial_state = d_initial_state.tensor();
    check(lc_conv_workspace(&args, &args.workspace_bytes), names());
  }

  void run() {
    check_structure();
    if (args.x->device.type != LC_CPU) return check(lc_conv_run(&args));  // the refusal
    run_on_host(lc_conv_run, args, names(), [&] { check_structure(); });
  }

  // A new array with the shape and the layout of x: its channels are contiguous if those of x are.
  nb::object like_x(nb::handle array) const {
    const lc_tensor& t = *args.x;
    if (t.strides[1] != 1 || t.strides[2] == 1 || t.shape[1] < 2 || t.shape[2] < 2)
      return lib.empty(shape_of(t), array);
    return lib.call("swapped", lib.empty({t.shape[0], t.shape[2], t.shape[1]}, array));
  }

  // The shape of a state of which `like` is another one, or NULL.
  Shape state_shape(const lc_tensor* like) const {
    const int64_t sequences = args.cu_seqlens ? args.cu_seqlens->shape[0] - 1 : args.x->shape[0];
    return {sequences, args.x->shape[1], like ? like->shape[2] : args.weight->shape[1] - 1};
  }
};

nb::object conv_forward(nb::object lib, nb::handle x, nb::handle weight, nb::handle bias, nb::handle initial_state,
                        nb::handle cu_seqlens, nb::object out, bool return_state, const nb::tuple& options) {
  ConvCall c(std::move(lib), LC_FORWARD, x, weight, bias, options);
  c.initial_state.read(c.lib, "initial_state", initial_state, false);
  c.cu_seqlens.read(c.lib, "cu_seqlens", cu_seqlens);
  c.y.write(c.lib, "out", out);
  c.check_structure();
  if (out.is_none()) {
    out = c.like_x(x);
    c.y.write(c.lib, "out", out);
  }
  nb::object state;
  if (return_state) {
    state = c.lib.empty(c.state_shape(c.args.initial_state), initial_state.is_none() ? x : initial_state);
    c.final_state.write(c.lib, "final_state", state);
  }
  c.run();
  out = c.lib.result(out);
  return return_state ? nb::object(nb::make_tuple(out, c.lib.result(state))) : out;
}

// Refuses what a forward pass refuses, or a step where `state` is given. Values are not checked.
void conv_check(nb::object lib, nb::handle x, nb::handle weight, nb::handle bias, nb::handle initial_state,
                nb::handle cu_seqlens, nb::handle state, nb::handle state_indices, const nb::tuple& options) {
  ConvCall c(std::move(lib), state.is_none() ? LC_FORWARD : LC_DECODE, x, weight, bias, options);
  c.initial_state.read(c.lib, "initial_state", initial_state, false);
  c.cu_seqlens.read(c.lib, "cu_seqlens", cu_seqlens);
  c.final_state.write(c.lib, "state", state);
  c.state_indices.read(c.lib, "state_indices", state_indices);
  if (!state.is_none()) c.x.insert_token(2);
  c.check_structure();
}

// wants: d_x, d_weight, d_bias, d_initial_state. An unwanted gradient is None in the result.
nb::tuple conv_backward(nb::object lib, nb::handle x, nb::handle weight, nb::handle bias, nb::handle initial_state,
                        nb::handle cu_seqlens, nb::handle d_y, nb::handle d_final_state, std::array<bool, 4> wants,
                        const nb::tuple& options) {
  ConvCall c(std::move(lib), LC_FORWARD, x, weight, bias, options);
  c.initial_state.read(c.lib, "initial_state", initial_state, false);
  c.cu_seqlens.read(c.lib, "cu_seqlens", cu_seqlens);
  c.check_structure();  // as a forward pass, whose shapes the gradients have

  c.args.op = LC_BACKWARD;
  c.d_y.read(c.lib, "d_y", d_y, false);
  c.d_final_state.read(c.lib, "d_final_state", d_final_state, false);
  const nb::handle state = !initial_state.is_none() ? initial_state : !d_final_state.is_none() ? d_final_state : x;
  nb::object made[4];
  if (wants[0]) made[0] = c.like_x(x);
  if (wants[1]) made[1] = c.lib.empty(shape_of(*c.args.weight), weight);
  if (wants[2]) made[2] = c.lib.empty({c.args.x->shape[1]}, bias.is_none() ? weight : bias);
  if (wants[3]) {
    const lc_tensor* like = c.args.initial_state ? c.args.initial_state : c.d_final_state.tensor();
    made[3] = c.lib.empty(c.state_shape(like), state);
  }
  Argument* const gradients[] = {&c.d_x, &c.d_weight, &c.d_bias, &c.d_initial_state};
  const char* const names[] = {"d_x", "d_weight", "d_bias", "d_initial_state"};
  for (int i = 0; i < 4; ++i)
    if (wants[i]) gradients[i]->write(c.lib, names[i], made[i]);
  c.run();
  nb::object results[4];
  for (int i = 0; i < 4; ++i) results[i] = wants[i] ? c.lib.result(made[i]) : nb::none();
  return nb::make_tuple(results[0], results[1], results[2], results[3]);
}

nb::object conv_step(nb::object lib, nb::handle x, nb::handle weight, nb::handle bias, nb::handle state,
                     nb::handle state_indices, nb::object out, const nb::tuple& options) {
  ConvCall c(std::move(lib), LC_DECODE, x, weight, bias, options);
  c.final_state.write(c.lib, "state", state);
  c.state_indices.read(c.lib, "state_indices", state_indices);
  c.y.write(c.lib, "out", out);
  const bool one_token = c.x.get().ndim == 2;
  if (one_token)
    for (Argument* a : {&c.x, &c.y}) a->insert_token(2);
  c.check_structure();
  if (out.is_none()) {
    const Shape shape = shape_of(*c.args.x);
    out = one_token ? c.lib.empty({shape[0], shape[1]}, x) : c.like_x(x);
    c.y.write(c.lib, "out", out);
    if (one_token) c.y.insert_token(2);
  }
  c.run();
  return c.lib.result(out);
}

void set_tuning(std::optional<std::string> text) { check(lc_set_tuning(text ? text->c_str() : nullptr)); }

// An array of another dtype on the memory of `array`. It keeps `owner` alive.
template <class Array>
nb::object view(const Array& array, nb::dlpack::dtype dtype, nb::handle owner) {
  return nb::cast(Array(array.data(), array.ndim(), reinterpret_cast<const size_t*>(array.shape_ptr()), owner,
                        array.stride_ptr(), dtype, array.device_type(), array.device_id()));
}

// A bfloat16 view of a uint16 array, for libraries that have bfloat16 but cannot export it.
nb::object as_bfloat16(nb::handle array) {
  const nb::dlpack::dtype bfloat16 = {uint8_t(LC_BFLOAT), 16, 1};
  nb::ndarray<> writable;
  if (nb::try_cast(array, writable, false)) return view(writable, bfloat16, array);
  return view(nb::cast<nb::ndarray<nb::ro>>(array, false), bfloat16, array);
}

// The same array as a capsule that keeps `owner` alive.
nb::object owned(const nb::ndarray<>& array, nb::handle owner) { return view(array, array.dtype(), owner); }

nb::list methods() {
  nb::list rows;
  for (int i = 0; const lc_method_info* m = lc_method(i); ++i)
    rows.append(nb::make_tuple(m->name, m->device, m->idea, m->paper, lc_method_serves(i)));
  if (!nb::len(rows)) raise(PyExc_RuntimeError, lc_last_error());
  return rows;
}

std::pair<int, std::string> thread_count(int framework) {
  const char* source;
  const int count = lc_thread_count(framework, &source);
  return {count, source};
}

std::string build_info() {
  const std::string text = lc_build_info();
  if (text.empty()) raise(PyExc_RuntimeError, lc_last_error());
  return text;
}

}  // namespace

NB_MODULE(_core, m) {
  using namespace nb::literals;
  if (PyInterpreterState_Get() != PyInterpreterState_Main())
    throw std::runtime_error("leetcore: expected an import in the main interpreter, got one in a subinterpreter");
  main_thread = nb::cast<unsigned long>(nb::module_::import_("threading").attr("main_thread")().attr("ident"));
  m.attr("version") = std::to_string(LC_VERSION_MAJOR) + "." + std::to_string(LC_VERSION_MINOR) + "." +
                      std::to_string(LC_VERSION_PATCH);
  m.def("forward", &forward, "lib"_a, "q"_a.none(), "k"_a.none(), "v"_a.none(), "log_decay"_a.none(),
        "initial_state"_a.none(), "cu_seqlens"_a.none(), "out"_a.none(), "return_state"_a, "options"_a);
  m.def("backward", &backward, "lib"_a, "q"_a.none(), "k"_a.none(), "v"_a.none(), "log_decay"_a.none(),
        "initial_state"_a.none(), "cu_seqlens"_a.none(), "d_o"_a.none(), "d_final_state"_a.none(), "wants"_a,
        "options"_a);
  m.def("decode", &decode, "lib"_a, "q"_a, "k"_a, "v"_a, "state"_a, "log_decay"_a.none(), "state_indices"_a.none(),
        "out"_a.none(), "options"_a);
  m.def("ssd", &ssd, "lib"_a, "x"_a, "dt"_a, "A"_a, "B"_a, "C"_a, "D"_a.none(), "z"_a.none(), "dt_bias"_a.none(),
        "initial_state"_a.none(), "cu_seqlens"_a.none(), "out"_a.none(), "return_state"_a, "options"_a);
  m.def("ssd_backward", &ssd_backward, "lib"_a, "x"_a, "dt"_a, "A"_a, "B"_a, "C"_a, "dt_bias"_a.none(),
        "initial_state"_a.none(), "cu_seqlens"_a.none(), "d_y"_a.none(), "d_final_state"_a.none(), "wants"_a,
        "options"_a);
  m.def("ssd_step", &ssd_step, "lib"_a, "x"_a, "dt"_a, "A"_a, "B"_a, "C"_a, "state"_a, "D"_a.none(), "z"_a.none(),
        "dt_bias"_a.none(), "state_indices"_a.none(), "out"_a.none(), "options"_a);
  m.def("candidates", &candidates, "lib"_a, "op"_a, "q"_a, "k"_a, "v"_a, "log_decay"_a.none(), "initial_state"_a.none(),
        "cu_seqlens"_a.none(), "return_state"_a, "options"_a);
  m.def("cost", &cost, "shape"_a, "dtype_code"_a, "dtype_bits"_a, "per_token"_a, "initial_state"_a, "final_state"_a,
        "cuda"_a, "options"_a);
  m.def("conv_forward", &conv_forward, "lib"_a, "x"_a.none(), "weight"_a.none(), "bias"_a.none(),
        "initial_state"_a.none(), "cu_seqlens"_a.none(), "out"_a.none(), "return_state"_a, "options"_a);
  m.def("conv_check", &conv_check, "lib"_a, "x"_a, "weight"_a, "bias"_a.none(), "initial_state"_a.none(),
        "cu_seqlens"_a.none(), "state"_a.none(), "state_indices"_a.none(), "options"_a);
  m.def("conv_backward", &conv_backward, "lib"_a, "x"_a.none(), "weight"_a.none(), "bias"_a.none(),
        "initial_state"_a.none(), "cu_seqlens"_a.none(), "d_y"_a.none(), "d_final_state"_a.none(), "wants"_a,
        "options"_a);
  m.def("conv_step", &conv_step, "lib"_a, "x"_a.none(), "weight"_a.none(), "bias"_a.none(), "state"_a.none(),
        "state_indices"_a.none(), "out"_a.none(), "options"_a);
  m.def("set_tuning", &set_tuning, "text"_a.none());
  m.def("as_bfloat16", &as_bfloat16, "bits"_a);
  m.def("owned", &owned, "array"_a, "owner"_a);
  m.def("methods", &methods);
  m.def("build_info", &build_info);
  m.def("set_num_threads", &lc_set_num_threads, "n"_a);
  m.def("thread_count", &thread_count, "framework"_a);
}
