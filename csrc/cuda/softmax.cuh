// The softmax on mma.sync accumulators: score modification, masking, dropout and the online softmax
// of a warp's rows. Accumulator elements are named by (m, n, e): row m * 16 + e / 2 * 8 + g and key
// n * 8 + 2c + e % 2 of the warp's tile, g = lane / 4, c = lane % 4 (see mma_sm80.cuh).
#pragma once

#include "../core/online_softmax.h"
#include "../core/philox.h"
#include "../core/score_mod.h"
#include "mma_sm80.cuh"

namespace fal::cuda {

inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;
inline constexpr uint32_t kAllLanes = 0xffffffffu;

template <class ScoreMod>
__device__ __forceinline__ ScoreMod make_score_mod(const ScoreOptions& options, int b, int h,
                                                   int shift) {
  if constexpr (ScoreMod::kGeneral) {
    return ScoreMod::make(options, b, h, shift);
  } else {
    return {};
  }
}

// Whether the kernels for plain scores serve: nothing but a positive scale and the masks touches
// the scores, and rows may be copied 16 bytes at a time.
inline bool plain_scores(const ScoreOptions& options, bool aligned) {
  return options.plain() && options.scale > 0.f && aligned;
}

// The score of every visible element, in place: from q.k to the softmax's argument (natural log).
// (row, key) is the lane's first element. Only called for modifications beyond the plain scale.
template <class ScoreMod, int kM, int kN8>
__device__ __forceinline__ void modify_scores(float (&s)[kM][kN8][4], const ScoreMod& mod,
                                              float scale, int row, int key) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        s[m][n][e] =
            mod.value(s[m][n][e] * scale, row + m * 16 + e / 2 * 8, key + n * 8 + e % 2, 0.f);
      }
    }
  }
}

// `value` where the band hides a key from a row: -inf for scores, 0 for what is made of them.
template <int kM, int kN8>
__device__ __forceinline__ void hide(float (&s)[kM][kN8][4], const Band& band, int row, int key,
                                     float value) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Range keys = band.keys_of(row + m * 16 + half * 8);
      const int begin = keys.begin - key, end = keys.end - key;
#pragma unroll
      for (int n = 0; n < kN8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int j = n * 8 + e;
          if (j < begin || j >= end) s[m][n][half * 2 + e] = value;
        }
      }
    }
  }
}

// 0 in both where the band hides a key from a row, transposed: element (m, n, e) is key m * 16 + e
// / 2 * 8 + g and row n * 8 + 2c + e % 2. Rows and keys behind the last are hidden too.
template <int kM, int kN8>
__device__ __forceinline__ void hide_transposed(float (&p)[kM][kN8][4], float (&ds)[kM][kN8][4],
                                                const Band& band, int row, int key) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int j = key + m * 16 + half * 8;
      const Range rows = j < band.seqlen_k ? band.rows_of_any({j, j + 1}) : Range{0, 0};
      const int begin = rows.begin - row, end = rows.end - row;
#pragma unroll
      for (int n = 0; n < kN8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int i = n * 8 + e;
          if (i < begin || i >= end) p[m][n][half * 2 + e] = ds[m][n][half * 2 + e] = 0.f;
        }
      }
    }
  }
}

// Zeroes the probabilities that dropout drops; the survivors' scale is left to the epilogue. One
// Philox call serves the lane's eight elements of a 16 x 16 block; row and key begin such blocks.
template <int kM, int kN8>
__device__ __forceinline__ void drop(float (&p)[kM][kN8][4], const Dropout& dropout,
                                     uint32_t batch_head, int row, int key) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN8; n += 2) {
      const PhiloxBits bits = dropout.block(batch_head, row + m * 16, key + n * 8);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int draw = e / 2 * 4 + e % 2;  // Dropout::draw_index of the left 16 x 8 half
        if (bits.half(draw) < dropout.threshold) p[m][n][e] = 0.f;
        if (bits.half(draw + 2) < dropout.threshold) p[m][n + 1][e] = 0.f;
      }
    }
  }
}

// The online softmax of a warp's 16 * kM rows (FlashAttention-2, section 3.1.1): scores become
// exp(score - reference), and O is rescaled when the reference moves.
//
// The reference is a row's maximum when it was last moved, not always the latest maximum: as long
// as no row of a 16-row group has grown by more than kSlack (a factor of 2^8 in the probabilities,
// far from any overflow in fp16, bf16 or fp32), nothing is rescaled and no lane needs to know the
// others' maxima. Results differ from the textbook's by rounding only.
template <int kM>
struct OnlineSoftmax {
  static constexpr float kSlack = 8.f;  // base-2 log

  float reference[kM][2];  // in the unit of the scores; -inf before the first visible key
  float sum[kM][2];        // over this lane's keys only, until finish()

  __device__ __forceinline__ void init() {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      reference[m][0] = reference[m][1] = -FAL_INFINITY;
      sum[m][0] = sum[m][1] = 0.f;
    }
  }

  // scores -> probabilities; scale_log2 > 0 turns their unit into a base-2 logarithm. o is rescaled
  // when needed.
  template <int kN8, int kD8>
  __device__ __forceinline__ void step(float (&s)[kM][kN8][4], float (&o)[kM][kD8][4],
                                       float scale_log2) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      float max[2] = {reference[m][0], reference[m][1]};
#pragma unroll
      for (int n = 0; n < kN8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) max[e / 2] = fmaxf(max[e / 2], s[m][n][e]);
      }
      // -inf - -inf is NaN, and NaN > kSlack is false: a row that still sees nothing moves nothing.
      const bool moves = (max[0] - reference[m][0]) * scale_log2 > kSlack ||
                         (max[1] - reference[m][1]) * scale_log2 > kSlack;
      if (__any_sync(kAllLanes, moves)) move_reference(m, max, o[m], scale_log2);

#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float offset = -softmax_reference(reference[m][half]) * scale_log2;
#pragma unroll
        for (int n = 0; n < kN8; ++n) {
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            s[m][n][e] = ptx::ex2(fmaf(s[m][n][e], scale_log2, offset));
            sum[m][half] += s[m][n][e];
          }
        }
      }
    }
  }

  template <int kD8>
  __device__ __forceinline__ void move_reference(int m, const float (&lane_max)[2],
                                                 float (&o)[kD8][4], float scale_log2) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float max = fmaxf(lane_max[half], __shfl_xor_sync(kAllLanes, lane_max[half], 1));
      max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, 2));
      const float factor = ptx::ex2((reference[m][half] - softmax_reference(max)) * scale_log2);
      reference[m][half] = max;
      sum[m][half] *= factor;
#pragma unroll
      for (int d = 0; d < kD8; ++d) {
        o[d][2 * half] *= factor;
        o[d][2 * half + 1] *= factor;
      }
    }
  }

  // The row's state once every lane's keys are in; all four lanes of a row hold it. unit turns the
  // scores' unit into natural-log units.
  __device__ __forceinline__ SoftmaxState finish(int m, int half, float unit) const {
    float total = sum[m][half];
    total += __shfl_xor_sync(kAllLanes, total, 1);
    total += __shfl_xor_sync(kAllLanes, total, 2);
    return {reference[m][half] == -FAL_INFINITY ? -FAL_INFINITY : reference[m][half] * unit, total};
  }
};

}  // namespace fal::cuda
