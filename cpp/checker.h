// checker.h - checks the tensors of a call, for every operation that takes tensors: the words of
// refusals, shapes, dtypes, devices, memory and overlaps.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "problem.h"

namespace lc {

// ---- words --------------------------------------------------------------------------------------

inline std::string shape_text(const lc_tensor& t) {
  std::string s = "[";
  for (int i = 0; i < t.ndim; ++i) s += (i ? ", " : "") + std::to_string(t.shape[i]);
  return s + "]";
}

inline std::string dtype_text(lc_dtype d) {
  // The names of DLPack's codes, in order. From the eighth code on, the code alone determines the
  // number of bits.
  const char* kinds[] = {"int", "uint", "float", "handle", "bfloat", "complex", "bool"};
  const char* small[] = {"float8_e3m4",     "float8_e4m3",   "float8_e4m3b11fnuz", "float8_e4m3fn",
                         "float8_e4m3fnuz", "float8_e5m2",   "float8_e5m2fnuz",    "float8_e8m0fnu",
                         "float6_e2m3fn",   "float6_e3m2fn", "float4_e2m1fn"};
  std::string s = d.code < 7    ? kinds[d.code] + std::to_string(d.bits)
                  : d.code < 18 ? small[d.code - 7]
                                : "code " + std::to_string(d.code);
  if (d.lanes != 1) s += " in " + std::to_string(d.lanes) + " lanes";
  return s;
}

inline std::string device_text(lc_device d) {
  if (d.type == LC_CPU) return "the CPU";
  if (d.type == LC_CUDA) return "CUDA device " + std::to_string(d.id);
  return "a device of type " + std::to_string(d.type);
}

inline const char* type_text(Type t) {
  constexpr const char* names[] = {"float64", "float32", "float16", "bfloat16"};
  return names[int(t)];
}

inline constexpr lc_dtype kDtypes[] = {{LC_FLOAT, 64, 1}, {LC_FLOAT, 32, 1}, {LC_FLOAT, 16, 1}, {LC_BFLOAT, 16, 1}};

inline bool same(lc_dtype a, lc_dtype b) { return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes; }

inline Type type_among(const char* name, const lc_tensor& t, std::initializer_list<Type> allowed,
                       const char* reason = "") {
  std::string list;
  for (Type type : allowed) {
    if (same(t.dtype, kDtypes[int(type)])) return type;
    list += std::string(list.empty() ? "" : type == *(allowed.end() - 1) ? " or " : ", ") + type_text(type);
  }
  fail(LC_DTYPE, "%s: expected dtype %s%s, got %s", name, list.c_str(), reason, dtype_text(t.dtype).c_str());
}

// The width in bits of a tensor of int32 or int64.
inline int32_t integer_bits(const char* name, const lc_tensor& t) {
  if (!same(t.dtype, {LC_INT, 32, 1}) && !same(t.dtype, {LC_INT, 64, 1}))
    fail(LC_DTYPE, "%s: expected dtype int32 or int64, got %s", name, dtype_text(t.dtype).c_str());
  return t.dtype.bits;
}

// ---- tensors ------------------------------------------------------------------------------------

// One expected dimension: a size, or a letter that stands for any size of at least `least`.
struct Dim {
  const char* letter = "";
  int64_t size = -1;  // -1: any size
  int64_t least = 0;
};

// An expected shape.
struct Dims {
  Dim at[4];
  int rank;
  Dims(std::initializer_list<Dim> list) : at{}, rank(int(list.size())) { std::copy(list.begin(), list.end(), at); }
};

// A tensor and the range of addresses [low, high) of its elements.
struct Extent {
  const char* name;
  const lc_tensor* tensor;
  __int128 low, high;
};

inline int64_t stride_of(const lc_tensor& t, int i) {
  if (t.strides) return t.strides[i];
  int64_t dense = 1;
  for (int j = t.ndim - 1; j > i; --j)
    if (__builtin_mul_overflow(dense, t.shape[j], &dense)) return INT64_MAX;  // memory() refuses it
  return dense;
}

inline bool empty(const lc_tensor& t) {
  for (int i = 0; i < t.ndim; ++i)
    if (!t.shape[i]) return true;
  return false;
}

// Checks the tensors of one call.
class TensorChecker {
 public:
  // `first` is the name of the argument whose device all tensors share.
  TensorChecker(bool layout_bnhd, const char* first) : bnhd(layout_bnhd), first_(first) {}

  const bool bnhd;
  lc_device device = {};

  const lc_tensor& required(const char* name, const lc_tensor* t) {
    if (!t) fail(LC_INVALID, "%s: required, but absent", name);
    return *t;
  }

  void absent(const char* name, const lc_tensor* t, const char* who) {
    if (t) fail(LC_INVALID, "%s: only %s takes it; expected NULL", name, who);
  }

  // Checks rank and sizes; dims are in the order of the default layout.
  void shape(const char* name, const lc_tensor& t, Dims dims, bool swap = false) {
    if (swap && bnhd) std::swap(dims.at[1], dims.at[2]);
    bool good = t.ndim == dims.rank && (t.shape || !t.ndim);
    for (int i = 0; good && i < dims.rank; ++i)
      good = t.shape[i] >= std::max<int64_t>(0, dims.at[i].least) &&
             (dims.at[i].size < 0 || t.shape[i] == dims.at[i].size);
    if (good) return;
    std::string want = "[";
    for (int i = 0; i < dims.rank; ++i)
      want +=
          (i ? ", " : "") + (dims.at[i].size < 0 ? std::string(dims.at[i].letter) : std::to_string(dims.at[i].size));
    if (t.ndim < 0 || t.ndim > 16 || (!t.shape && t.ndim))
      fail(LC_INVALID, "%s: expected shape %s], got no valid shape (ndim %d)", name, want.c_str(), t.ndim);
    std::string least;
    for (int i = 0; least.empty() && t.ndim == dims.rank && i < dims.rank; ++i)
      if (dims.at[i].size < 0 && t.shape[i] < dims.at[i].least)
        least = std::string("; ") + dims.at[i].letter + " is at least " + std::to_string(dims.at[i].least);
    fail(LC_INVALID, "%s: expected shape %s], got %s%s", name, want.c_str(), shape_text(t).c_str(), least.c_str());
  }

  // Checks device, address and strides of a tensor whose shape was checked.
  void memory(const char* name, const lc_tensor& t, bool contiguous_last = true) {
    const bool host_scalar = t.ndim == 0 && !std::strcmp(name, "log_decay");  // its gradient is on the device
    if (host_scalar ? t.device.type != LC_CPU
                    : t.device.type != device.type || (t.device.type != LC_CPU && t.device.id != device.id))
      fail(LC_INVALID, "%s: expected on %s%s, got %s", name, host_scalar ? "the CPU" : device_text(device).c_str(),
           host_scalar ? " as every scalar" : (std::string(" like ") + first_).c_str(), device_text(t.device).c_str());
    if (empty(t)) return;
    const int64_t item = t.dtype.bits / 8;
    constexpr int64_t kMost = INT64_MAX / 16;
    __int128 low = 0, high = item;
    bool far = false;
    for (int i = 0; i < t.ndim && !far; ++i) {
      if (t.shape[i] < 2) continue;  // the stride is not used
      const int64_t stride = stride_of(t, i);
      far = stride > kMost || stride < -kMost;
      const __int128 reach = far ? 0 : __int128(t.shape[i] - 1) * stride * item;
      (reach < 0 ? low : high) += reach;
    }
    if (far || high - low > kMost || -low > kMost)
      fail(LC_INVALID, "%s: expected an extent below 2^59 bytes, got shape %s with larger strides", name,
           shape_text(t).c_str());
    if (!t.data) fail(LC_INVALID, "%s: expected data, got NULL for shape %s", name, shape_text(t).c_str());
    const uintptr_t first = reinterpret_cast<uintptr_t>(t.data) + t.byte_offset;
    if (first % uintptr_t(item))
      fail(LC_INVALID, "%s: expected an address that is a multiple of %d, as a copy has, got %p", name, int(item),
           reinterpret_cast<void*>(first));
    const int last = t.ndim - 1;
    if (contiguous_last && last >= 0 && t.shape[last] > 1 && stride_of(t, last) != 1)
      fail(LC_INVALID, "%s: expected a contiguous last dimension, got stride %lld", name,
           static_cast<long long>(stride_of(t, last)));
    extents.push_back({name, &t, __int128(first) + low, __int128(first) + high});
  }

  // The tensor with the axes [b, h, n, d] of View, whatever the layout.
  View view(const lc_tensor& t, bool swap) const {
    View w;
    const bool none = empty(t);  // strides and offset of an empty tensor have no meaning and were not checked
    w.data = none ? t.data : static_cast<char*>(t.data) + t.byte_offset;
    for (int i = 0; i < t.ndim; ++i)
      w.stride[swap && bnhd && (i == 1 || i == 2) ? 3 - i : i] = t.shape[i] > 1 && !none ? stride_of(t, i) : 0;
    return w;
  }

  View tensor(const char* name, const lc_tensor& t, const Dims& dims, Type type, const char* reason, bool swap) {
    shape(name, t, dims, swap);
    type_among(name, t, {type}, reason);
    memory(name, t);
    return view(t, swap);
  }

  // A state, of which either of the last two dimensions is contiguous. Sets `type`, one of `types`.
  View state(const char* name, const lc_tensor& t, const Dims& dims, Type& type, std::initializer_list<Type> types,
             const char* reason) {
    shape(name, t, dims);
    type = type_among(name, t, types, reason);
    memory(name, t, false);
    View w = view(t, false);
    const bool transposed = w.stride[3] != 1 && t.shape[3] > 1 && !empty(t);
    if (transposed && t.shape[2] > 1 && w.stride[2] != 1)
      fail(LC_INVALID, "%s: expected one of the last two dimensions to be contiguous, got strides %lld and %lld", name,
           static_cast<long long>(w.stride[2]), static_cast<long long>(w.stride[3]));
    if (transposed) w.stride[2] = 1;
    return w;
  }

  // log_decay or its gradient, of rank 0 to 3, with the axes [b, h, n, -].
  View decay_view(const char* name, const lc_tensor& t) {
    memory(name, t, false);
    View w = view(t, t.ndim == 3);
    if (t.ndim == 1) w.stride[1] = w.stride[0], w.stride[0] = 0;
    return w;
  }

  int64_t heads(const lc_tensor& t) const { return t.shape[bnhd ? 2 : 1]; }

  // Refuses a written tensor two of whose elements share memory.
  void distinct(const char* name, const lc_tensor& t) const {
    std::pair<int64_t, int64_t> steps[4];  // stride, size
    int n = 0;
    for (int i = 0; i < t.ndim; ++i)
      if (t.shape[i] > 1) steps[n++] = {std::llabs(stride_of(t, i)), t.shape[i]};
    for (int i = 1; i < n; ++i)
      for (int j = i; j > 0 && steps[j] < steps[j - 1]; --j) std::swap(steps[j], steps[j - 1]);
    __int128 reach = 0;
    for (int i = 0; i < n; ++i) {
      const auto [stride, size] = steps[i];
      if (stride <= reach)
        fail(LC_INVALID, "%s: expected elements that do not overlap, as it is written; got shape %s with stride %lld",
             name, shape_text(t).c_str(), static_cast<long long>(stride));
      reach += __int128(stride) * (size - 1);
    }
  }

  // Refuses a written tensor that shares memory with another argument. The argument `except` may be
  // the same tensor.
  void apart(const char* name, const char* except) const {
    const Extent* mine = extents.data();
    while (std::strcmp(mine->name, name)) ++mine;
    for (const Extent& other : extents) {
      if (&other == mine || other.high <= mine->low || mine->high <= other.low) continue;
      if (!std::strcmp(other.name, except) && identical(*mine->tensor, *other.tensor)) continue;
      if (!interleaved(*mine, other))
        fail(LC_INVALID, "%s: expected memory of its own, as it is written; got an overlap with %s", name, other.name);
    }
  }

  std::vector<Extent> extents;

 private:
  const char* first_;

  static bool identical(const lc_tensor& x, const lc_tensor& y) {
    bool good = static_cast<char*>(x.data) + x.byte_offset == static_cast<char*>(y.data) + y.byte_offset;
    for (int i = 0; i < x.ndim; ++i) good = good && (x.shape[i] == 1 || stride_of(x, i) == stride_of(y, i));
    return good;
  }

  // Whether x and y are columns of one buffer, like q, k and v of a fused projection. Modulo a row
  // length P, the addresses of a tensor whose strides are multiples of P, or stay within a row, are
  // one interval. Tensors whose intervals are disjoint share no memory.
  static bool interleaved(const Extent& x, const Extent& y) {
    for (const Extent* e : {&x, &y}) {
      const lc_tensor& t = *e->tensor;
      for (int i = 0; i < t.ndim; ++i) {
        if (t.shape[i] < 2 || !stride_of(t, i)) continue;
        const int64_t period = std::llabs(stride_of(t, i)) * (t.dtype.bits / 8);
        const int64_t distance = int64_t(((y.low - x.low) % period + period) % period);
        if (distance >= width(*x.tensor, period) && distance + width(*y.tensor, period) <= period) return true;
      }
    }
    return false;
  }

  static __int128 width(const lc_tensor& t, int64_t period) {
    const int64_t item = t.dtype.bits / 8;
    __int128 bytes = item;
    for (int i = 0; i < t.ndim; ++i) {
      if (t.shape[i] < 2) continue;  // the stride is not used
      const int64_t step = std::llabs(stride_of(t, i)) * item;
      if (step % period) bytes += __int128(step) * (t.shape[i] - 1);
    }
    return bytes;
  }
};

// ---- values that the host can read, for any struct P with the fields of Problem -----------------

template <class P>
void check_cu_seqlens_values(const P& p) {
  const auto refuse = [&](const char* rule, int64_t i) {
    fail(LC_INVALID, "cu_seqlens: expected %s, got %lld at [%lld]", rule, static_cast<long long>(cu_seqlen(p, i)),
         static_cast<long long>(i));
  };
  if (cu_seqlen(p, 0) != 0) refuse("0 as the first value", 0);
  for (int64_t i = 1; i <= p.B; ++i)
    if (cu_seqlen(p, i) < cu_seqlen(p, i - 1)) refuse("values that do not decrease", i);
  if (cu_seqlen(p, p.B) != p.N)
    refuse(("the number of tokens, " + std::to_string(p.N) + ", as the last value").c_str(), p.B);
}

template <class P>
void check_state_indices_values(const P& p) {
  std::vector<bool> taken(size_t(p.slots));
  for (int64_t b = 0; b < p.B; ++b) {
    const int64_t i = slot(p, b);
    if (i < -1 || i >= p.slots)
      fail(LC_INVALID, "state_indices: expected -1 or a slot below %lld, got %lld at [%lld]",
           static_cast<long long>(p.slots), static_cast<long long>(i), static_cast<long long>(b));
    if (i < 0) continue;
    if (taken[size_t(i)])
      fail(LC_INVALID, "state_indices: expected slots that differ, got %lld again at [%lld]", static_cast<long long>(i),
           static_cast<long long>(b));
    taken[size_t(i)] = true;
  }
}

}  // namespace lc
