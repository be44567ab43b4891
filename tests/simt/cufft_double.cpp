// cufft_double.cpp - a shared library that replaces cuFFT in tests without a GPU. It has the entry
// points that cpp/cuda/cufft.cu uses, on host memory, as described in "cuFFT API Reference": the
// advanced data layout, the signs, no scaling. It fills the caller's work area with NaN. Results: 1
// for an unknown plan, 4 for a wrong value, 9 for a plan that is not set up.
#include <algorithm>
#include <complex>
#include <cstring>
#include <deque>
#include <vector>

namespace {

using Number = std::complex<double>;

enum { kSuccess, kInvalidPlan, kInvalidValue = 4, kSetupFailed = 9 };
constexpr int kC2C = 0x29, kZ2Z = 0x69, kMostFactor = 7, kAtOnce = 8;

struct Plan {
  long long n = 0, batch = 0;
  long long stride[2], distance[2];  // input, output
  int type = 0;
  bool own_area = true, stream_set = false;
  size_t work_bytes = 0;
  void* work = nullptr;
};
std::deque<Plan> plans;

Plan* find(int plan) { return plan >= 0 && plan < int(plans.size()) ? &plans[size_t(plan)] : nullptr; }

// One number of each sequence.
struct Numbers {
  double re[kAtOnce] = {}, im[kAtOnce] = {};
  void add(const Numbers& x, Number w) {
    for (int i = 0; i < kAtOnce; ++i) {
      re[i] += x.re[i] * w.real() - x.im[i] * w.imag();
      im[i] += x.re[i] * w.imag() + x.im[i] * w.real();
    }
  }
};

// y[k] = sum_j w^(jk) x[j stride], k < n, by the smallest factor of n first; powers[i] = w^i for i
// < n stride.
void transform(const Numbers* x, long long stride, Numbers* y, long long n, const std::vector<Number>& powers) {
  if (n == 1) return void(y[0] = x[0]);
  long long p = 2;
  while (n % p) ++p;
  const long long m = n / p;
  for (long long j = 0; j < p; ++j) transform(x + j * stride, stride * p, y + j * m, m, powers);
  for (long long k = 0; k < m; ++k) {
    Numbers sum[kMostFactor];
    for (long long i = 0; i < p; ++i)
      for (long long j = 0; j < p; ++j) sum[i].add(y[j * m + k], powers[size_t(j * (k + i * m) % n * stride)]);
    for (long long i = 0; i < p; ++i) y[i * m + k] = sum[i];
  }
}

template <class T>
int execute(int plan, const std::complex<T>* in, std::complex<T>* out, int direction, int type) {
  Plan* p = find(plan);
  if (!p || p->type != type) return kInvalidPlan;
  if (!in || !out || (direction != -1 && direction != 1)) return kInvalidValue;
  if (p->own_area || !p->work || !p->stream_set) return kSetupFailed;
  std::memset(p->work, 0xFF, p->work_bytes);
  const auto n = size_t(p->n);
  std::vector<Numbers> x(n), y(n);
  std::vector<Number> powers(n);
  for (size_t i = 0; i < n; ++i)
    powers[i] = std::polar(1., direction * 6.283185307179586476925 * double(i) / double(n));
  for (long long first = 0; first < p->batch; first += kAtOnce) {
    const int count = int(std::min<long long>(kAtOnce, p->batch - first));
    const auto each = [&](int way, auto&& f) {  // f(sequence, number, index in memory)
      for (int b = 0; b < count; ++b)
        for (size_t i = 0; i < n; ++i)
          f(b, i, (first + b) * p->distance[way] + static_cast<long long>(i) * p->stride[way]);
    };
    each(0, [&](int b, size_t i, long long at) { x[i].re[b] = in[at].real(), x[i].im[b] = in[at].imag(); });
    transform(x.data(), 1, y.data(), p->n, powers);
    each(1, [&](int b, size_t i, long long at) { out[at] = std::complex<T>(T(y[i].re[b]), T(y[i].im[b])); });
  }
  // A plan is shared, so every call has to set its work area and stream.
  p->work = nullptr;
  p->stream_set = false;
  return kSuccess;
}

}  // namespace

extern "C" {

int cufftCreate(int* plan) {
  *plan = int(plans.size());
  plans.emplace_back();
  return kSuccess;
}
int cufftDestroy(int plan) {
  if (!find(plan)) return kInvalidPlan;
  *find(plan) = {};
  return kSuccess;
}
int cufftSetAutoAllocation(int plan, int on) {
  if (!find(plan)) return kInvalidPlan;
  find(plan)->own_area = on;
  return kSuccess;
}
int cufftMakePlanMany64(int plan, int rank, long long* n, long long* inembed, long long istride, long long idist,
                        long long* onembed, long long ostride, long long odist, int type, long long batch,
                        size_t* work_bytes) {
  Plan* p = find(plan);
  if (!p) return kInvalidPlan;
  if (rank != 1 || !n || *n < 1 || batch < 1 || (type != kC2C && type != kZ2Z) || !work_bytes) return kInvalidValue;
  long long rest = *n;
  for (long long factor : {2, 3, 5, 7})
    while (rest % factor == 0) rest /= factor;
  if (rest != 1) return kInvalidValue;  // cuFFT has all sizes; the library uses only the fast ones
  p->n = *n;
  p->batch = batch;
  p->type = type;
  const bool basic = !inembed || !onembed;  // "If either is NULL, strides and distances are ignored"
  p->stride[0] = basic ? 1 : istride;
  p->distance[0] = basic ? *n : idist;
  p->stride[1] = basic ? 1 : ostride;
  p->distance[1] = basic ? *n : odist;
  *work_bytes = p->work_bytes = size_t(*n * batch) * (type == kZ2Z ? 16 : 8) + 24;
  return kSuccess;
}
int cufftSetStream(int plan, void*) {
  if (!find(plan)) return kInvalidPlan;
  find(plan)->stream_set = true;
  return kSuccess;
}
int cufftSetWorkArea(int plan, void* work) {
  if (!find(plan)) return kInvalidPlan;
  find(plan)->work = work;
  return kSuccess;
}
int cufftExecC2C(int plan, std::complex<float>* in, std::complex<float>* out, int direction) {
  return execute(plan, in, out, direction, kC2C);
}
int cufftExecZ2Z(int plan, std::complex<double>* in, std::complex<double>* out, int direction) {
  return execute(plan, in, out, direction, kZ2Z);
}

}  // extern "C"
