// shape.cuh - the sizes of a walk's kernel: its operands, its threads, the layout of its shared
// memory.
#pragma once
#include "../../simt/tile.cuh"
#include "../decay.cuh"
#include "../lengths.cuh"
#include "place.cuh"

namespace lc::cuda {

// E: the type of the inputs. X: the type of computed operands. kRows: rows of a state, K padded.
// kColumnsOfWarp: columns of V that one warp has.
template <class E_, class X_, int kRows, int kColumnsOfWarp, Aim kAim>
struct WalkShape {
  using E = E_;
  using X = X_;
  static constexpr bool kGradient = kAim != Aim::outputs, kDecays = kAim == Aim::decays;
  // Two warps where the factor leaves no room in shared memory for four.
  static constexpr int K = kRows, kColumns = kColumnsOfWarp;
  static constexpr int kWarps = kDecays && sizeof(E) == 4 && K > 64 ? 2 : 4;
  static constexpr int C = kChunk, V = kWarps * kColumns;
  // Walks of one launch: a block that has to look for its own walk needs registers.
  static constexpr int kWalks = !kGradient || K > 128 ? 1 : kDecays ? 2 : 3;
  static constexpr int kMinBlocks = is_16_bit<X> && K <= 64 && kColumns == 16 && !kGradient ? 3 : 2;

  using Own = std::conditional_t<is_16_bit<E>, E, X>;        // inputs as operands
  using Score = std::conditional_t<is_16_bit<X>, X, float>;  // A in shared memory
  using At = Place<E, kGradient>;

  // A stage of the ring: q, whose memory later holds o; k; v; the factor. Offsets are in numbers.
  static constexpr int kKeys = C * (K > V ? K : V), kValues = kKeys + C * K, kFactor = kValues + C * V;
  static constexpr int kStage = kFactor + (kDecays ? C * V : 0);
  static constexpr bool kOneStage = 2 * kStage * sizeof(E) > 227 * 1024;  // shared memory has no room for two stages
  static constexpr int kSums = kDecays ? kWarps * C : 0;                  // sums of products: one row per warp

  // Whether lengths have a unit, for which K = 256 has no registers; whether the sum of a chunk has
  // a scale, that of the keys or the unit.
  static constexpr bool kUnits = std::is_same_v<Own, f16> && K <= 128, kSumScale = kGradient || kUnits;

  // A thread has 255 registers. kHolds: V^T stays in registers while all of S is updated. kAhead:
  // log-decays are loaded one chunk before their use.
  static constexpr bool kHolds = K <= 128 || !std::is_same_v<Own, float>;
  static constexpr bool kAhead = K <= 128 && !(kGradient && K > 64 && sizeof(E) == 4);

  static constexpr int shared_bytes(int stages) {
    return stages * kStage * int(sizeof(E)) + C * C * int(sizeof(Score)) + 2 * ChunkDecay::kNumbers * 4 + kSums * 4 +
           int(sizeof(At)) + 128;
  }
};

}  // namespace lc::cuda
