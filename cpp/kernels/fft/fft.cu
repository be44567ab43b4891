// fft.cu - GPU: launches the kernels of fft.cuh, and cuFFT between them.
//
//   A pass has as many transforms of M >= 2N points as half of the L2 cache holds, in five launches
//   about B Hs (V K/2 (M (10 log2 M + 6) + N (2 + 4G)) + 2 N K V (G + 1)) flop; G = H / Hs
//   Qin et al. 2023 (Toeplitz neural network), arXiv:2305.04749
#include "fft.cuh"

#include "../../cuda/cost.h"
#include "../../cuda/cufft.h"
#include "../../cuda/launch.h"

namespace lc {
namespace {

using namespace cuda;

constexpr int64_t kTile = FftTiles<float>::kTokens;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Points of the transform for n tokens, such that the convolution does not wrap around.
int64_t points(int64_t n) {
  int64_t m = kTile;
  while (m < 2 * n) m *= 2;
  const int64_t less = m / 4 * 3;
  return less >= 2 * n && less % kTile == 0 ? less : m;
}

int64_t all_pairs(const Problem& p) { return divide_up(p.K, 2); }

// The division into passes of equal size. The last pass may have units, or pairs of ranks, that do
// not exist.
struct Cut {
  int64_t points, slices, columns, all_units, units, pairs;
  explicit Cut(const Problem& p)
      : points(lc::points(p.N)),
        slices(divide_up(p.V, FftTiles<float>::kMostColumns)),
        columns(divide_up(p.V, slices)),
        all_units(p.B * p.Hs * slices) {
    const int64_t transform_bytes = points * (p.type == Type::f64 ? 16 : 8);
    const int64_t most = std::max<int64_t>(1, limits(p.device.id).l2_bytes / 2 / (transform_bytes * columns));
    pairs = divide_up(all_pairs(p), divide_up(all_pairs(p), most));
    units = divide_up(all_units, divide_up(all_units, std::max<int64_t>(1, most / all_pairs(p))));
  }
  int64_t transforms() const { return units * columns * pairs; }
  double passes(const Problem& p) const {
    return double(divide_up(all_units, units)) * double(divide_up(all_pairs(p), pairs));
  }
};

Transforms transforms(const Problem& p, const Cut& cut) { return {p.type == Type::f64, cut.points, cut.transforms()}; }

// Offsets in the workspace, all multiples of 256, like the addresses of memory that cuFFT
// allocates.
struct Memory {
  size_t spectrum, x, sums, work, bytes;
  Memory(const Problem& p, const Cut& cut) {
    const size_t number = p.type == Type::f64 ? 8 : 4;
    const auto take = [&](int64_t numbers) {
      const size_t at = bytes;
      bytes += (size_t(numbers) * number + kAlign - 1) / kAlign * kAlign;
      return at;
    };
    bytes = 0;
    spectrum = take(2 * filters(p) * cut.points);
    x = take(2 * cut.transforms() * cut.points);
    sums = take(cut.pairs < all_pairs(p) ? cut.units * group(p) * cut.columns * p.N : 0);
    work = bytes;
    bytes += transform_bytes(p.device.id, transforms(p, cut));
  }
  static constexpr size_t kAlign = 256;
};

bool transforms_nothing(const Problem& p) { return p.N == 0 || p.B == 0; }

size_t workspace(const Problem& p) { return transforms_nothing(p) ? 0 : Memory(p, Cut(p)).bytes; }

template <class E>
void outputs(const Problem& p) {
  using T = Accumulator<E>;
  const Cut cut(p);
  const Memory memory(p, cut);
  const Transforms t = transforms(p, cut);
  auto* base = static_cast<unsigned char*>(p.workspace);
  const auto at = [&](size_t offset) { return reinterpret_cast<T*>(base + offset); };
  FftPass<T> pass = {p, cut.points,       cut.slices,          cut.units,    cut.pairs,      0,
                     0, int(cut.columns), at(memory.spectrum), at(memory.x), at(memory.sums)};
  const auto grid = [](int64_t blocks) { return dim3(unsigned(blocks)); };
  constexpr int kBlock = 256;
  const int64_t parts = divide_up(cut.points, FftMultiply<T>::kFrequencies);

  start<FftFilter<T>>(p, grid(divide_up(filters(p) * cut.points, kBlock)), kBlock, 0, pass);
  for (pass.unit = 0; pass.unit < cut.all_units; pass.unit += cut.units)
    for (pass.pair = 0; pass.pair < all_pairs(p); pass.pair += cut.pairs) {
      start<FftSpread<E>>(p, grid(cut.units * (cut.points / kTile)), kBlock, FftSpread<E>::kSmem, pass);
      transform(p, t, Direction::forward, pass.x, base + memory.work);
      start<FftMultiply<T>>(p, grid(cut.transforms() * parts), kBlock, 0, pass);
      transform(p, t, Direction::back, pass.x, base + memory.work);
      start<FftCollect<E>>(p, grid(cut.units * group(p) * divide_up(p.N, kTile)), kBlock, FftCollect<E>::kSmem, pass);
    }
}

void run(const Problem& p) {
  with_type(p.type, [&](auto e) {
    using E = decltype(e);
    using State = FftState<E>;
    if (!transforms_nothing(p)) outputs<E>(p);
    if (!p.final_state) return;
    const int64_t blocks = p.B * p.Hs * divide_up(p.K, State::kRanks) * divide_up(p.V, State::kColumns);
    start<State>(p, dim3(unsigned(blocks)), State::kMaxThreads, State::kSmem, {p});
  });
}

const char* refuses(const Problem&) { return cufft_missing(); }

Cost cost(const Problem& p) {
  if (transforms_nothing(p)) return predict(p, {});
  const Cut cut(p);
  const double n = mean_length(p), G = double(group(p)), M = double(cut.points), passes = cut.passes(p);
  const double transformed = passes * double(cut.transforms());
  const double states = 2 * n * double(p.B * p.Hs) * double(p.K * p.V);
  const double flop = transformed * (M * (10 * std::log2(M) + 6) + n * (2 + 4 * G)) +
                      states * (G * bool(p.initial_state) + bool(p.final_state));
  // Estimated: each number of a pass moves eight times, at five times the speed of memory, since it
  // stays in the cache.
  const double moved = transformed * M * 8 * (p.type == Type::f64 ? 16 : 8) / 5;
  return predict(p, {flop, moved, /*depth=*/2 * std::log2(M), /*launches=*/1 + 5 * passes, /*blocks=*/1,
                     /*steps=*/flop, /*step_us=*/4 / limits(p.device.id).flop_per_us});
}

}  // namespace

extern const Method fft_cuda = {
    {"fft", "cuda", "a Toeplitz mask times each rank's values, by Fourier transforms of cuFFT",
     "Qin et al. 2023 (Toeplitz neural network), arXiv:2305.04749"},
    {Feature::forward | kAllTypes | kDecaysPerHead | kSequences,
     {Feature::decay_per_token, "its Toeplitz mask needs one decay per head, not one per token"}},
    refuses,
    cost,
    workspace,
    run};

}  // namespace lc
