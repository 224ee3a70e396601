// The steps of decode.cuh on one warp's tile of 16 keys: which rows its lanes hold, masks, score
// modifications, factors of quantised rows, and O += P V.
#pragma once

#include "decode.h"
#include "decode_split.h"
#include "kv_rows.cuh"
#include "kv_storage.cuh"
#include "softmax.cuh"

namespace fal::cuda {

template <class T, int kHeadDim_, int kRowGroups_, class Storage_>
struct DecodeConfig {
  using Element = T;
  using Storage = Storage_;
  static constexpr int kHeadDim = kHeadDim_;  // of Q, K, V and O, padded on load
  static_assert(kHeadDim % 64 == 0 && kHeadDim <= 256, "the swizzle's unit; the register file");
  static constexpr int kRowGroups = kRowGroups_;  // of 16 rows, each held by every warp
  static_assert(kRowGroups == 1 || kHeadDim <= 128, "O takes kRowGroups * kHeadDim / 2 registers");
  static constexpr int kTileM = kRowGroups * 16;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kWarpSize;
  static_assert(kWarps * kWarpKeys == DecodeParts::kStep, "a block takes a step at a time");
  static constexpr int kStages = 2;  // tiles of K and of V that a warp holds: one each in use
  static constexpr int kSlice = 16;  // columns of O that warps exchange at a time
  // Q's fragments take kHeadDim / 4 registers; else they are read again for every tile. Widening
  // takes registers too.
  static constexpr bool kKeepsQ = kRowGroups == 1 && kHeadDim <= (Storage::kQuantised ? 64 : 128);
  // By registers a thread: 4 blocks have 128, 3 have 168, 2 have 255. Shared memory allows as many
  // on compute capability 9.0, and 2 (64: 4) on 8.0, where up to 48 KB a block are in flight.
  static constexpr int kBlocksPerSm = kRowGroups == 2   ? (kHeadDim == 64 ? 3 : 2)
                                      : kHeadDim == 64  ? 4
                                      : kHeadDim == 128 ? 3
                                                        : 2;
};

template <class Config>
struct DecodeSmem {
  using Element = typename Config::Element;
  static constexpr int kTileBytes = kWarpKeys * Config::kHeadDim * Config::Storage::kBytes;
  alignas(128) uint8_t tiles[Config::kWarps][Config::kStages][2][kTileBytes];
  alignas(128) Element q[Config::kTileM][Config::kHeadDim];
  alignas(128) float exchange[Config::kWarps][Config::kTileM][Config::kSlice];
  float2 states[Config::kWarps][Config::kTileM];
  float factors[Config::kWarps][Config::kStages][2][kWarpKeys];
};

// The rows of Q that are one tile: row r is query token r / group of the group's head r % group.
template <class T>
struct GroupedRows {
  View<const T> q;
  int64_t first_token;  // of the sequence, within the view
  int32_t b, first_head, group;
  int32_t first_row;

  __device__ __forceinline__ const T* at(int row) const {
    const int r = first_row + row;
    return q.at(b, first_token + r / group, first_head + r % group);
  }
  __device__ __forceinline__ const T* move(const T*, int row, int step) const {
    return at(row + step);
  }
};

// Which rows a tile holds: `rows` of them from first_row on, of the group from first_head on.
struct TileRows {
  int32_t b, first_head, first_row, rows, group;

  // The lane's row of a (16-row group, half), or the tile's last.
  __device__ __forceinline__ int of_lane(int m, int half, int lane) const {
    return first_row + min(m * 16 + half * 8 + lane / 4, rows - 1);
  }
};

// The rows that a lane's accumulators belong to, by (16-row group, half).
template <int kM>
struct LaneRows {
  int token[kM][2];  // of rows behind the last: the last one's
  float slope[kM][2];

  __device__ __forceinline__ void init(const ScoreOptions& score, TileRows tile, int lane) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = tile.of_lane(m, half, lane);
        token[m][half] = row / tile.group;
        slope[m][half] =
            score.alibi_slope(tile.b, tile.first_head + row - token[m][half] * tile.group);
      }
    }
  }
};

// `hidden` where the band hides a key from a row. key: the lane's first.
template <int kM>
__device__ __forceinline__ void mask_keys(float (&s)[kM][2][4], const Band& band,
                                          const LaneRows<kM>& rows, int key, float hidden) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Range seen = band.keys_of(rows.token[m][half]);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (!seen.contains(key + n * 8 + e)) s[m][n][half * 2 + e] = hidden;
        }
      }
    }
  }
}

// Softcap, ALiBi, and scales that are not positive: to the softmax's argument in natural log.
template <int kM>
__device__ __forceinline__ void modify_keys(float (&s)[kM][2][4], const ScoreOptions& score,
                                            const LaneRows<kM>& rows, int shift, int key) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const GeneralScoreMod mod{score.softcap, score.softcap > 0.f ? 1.f / score.softcap : 0.f,
                                rows.slope[m][half], shift};
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[m][n][half * 2 + e];
          x = mod.value(x * score.scale, rows.token[m][half], key + n * 8 + e, 0.f);
        }
      }
    }
  }
}

// Adds the bias of the pairs that are seen; of the others nothing is read. Element by element, from
// device memory: right for the masks of a few drafts.
template <class T, int kM>
__device__ __forceinline__ void add_bias(float (&s)[kM][2][4], const Bias& bias, const Band& band,
                                         const LaneRows<kM>& rows, TileRows tile, int key,
                                         int lane) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = rows.token[m][half];
      const int head = tile.first_head + tile.of_lane(m, half, lane) - token * tile.group;
      const Range seen = band.keys_of(token);
      const int64_t row = tile.b * bias.batch + head * bias.head + token * bias.row;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int j = key + n * 8 + e;
          if (!seen.contains(j)) continue;
          const int64_t at = row + j * bias.col;
          s[m][n][half * 2 + e] +=
              bias.dtype == DType::kFloat32
                  ? static_cast<const float*>(bias.data)[at]
                  : Mma<T>::to_float(static_cast<const uint16_t*>(bias.data)[at]);
        }
      }
    }
  }
}

// Multiplies each key's column by its factor.
template <int kM>
__device__ __forceinline__ void scale_keys(float (&s)[kM][2][4], const float2 (&factor)[2]) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      s[m][n][0] *= factor[n].x, s[m][n][1] *= factor[n].y;
      s[m][n][2] *= factor[n].x, s[m][n][3] *= factor[n].y;
    }
  }
}

// O += P V over a tile of 16 keys, whose elements are read as `values` says (kv_storage.cuh).
template <class Config, class Elements>
__device__ __forceinline__ void add_values(
    float (&acc_o)[Config::kRowGroups][Config::kHeadDim / 8][4], Elements values,
    const FragmentsA<Config::kRowGroups, 1>& frag_p, uint32_t smem_v, int lane) {
  constexpr int kTiles = Elements::kColumns / 8;
#pragma unroll
  for (int group = 0; group < Config::kHeadDim / Elements::kColumns; ++group) {
    uint32_t b[kTiles][2];
    values.load_values(b, smem_v, group, lane);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int m = 0; m < Config::kRowGroups; ++m) {
        Mma<typename Config::Element>::multiply(acc_o[m][group * kTiles + n], frag_p.r[0][m],
                                                b[n][0], b[n][1]);
      }
    }
  }
}

// The same for a tile with an infinity or a NaN at a key that some row does not see: key by key and
// row by row, since 0 times either is NaN.
template <class Config, class Elements>
__device__ __forceinline__ void add_seen_values(
    float (&acc_o)[Config::kRowGroups][Config::kHeadDim / 8][4], Elements values,
    const FragmentsA<Config::kRowGroups, 1>& frag_p, uint32_t smem_v, const Band& band,
    const LaneRows<Config::kRowGroups>& rows, int first_key, int lane) {
  using ToFloat = Mma<typename Config::Element>;
  constexpr int kM = Config::kRowGroups;
#pragma unroll 1
  for (int j = 0; j < kWarpKeys; ++j) {
    const int holder = (lane & ~3) | (j % 8 / 2);
    float p[kM][2];
    bool seen[kM][2];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t pair =
            __shfl_sync(kAllLanes, j < 8 ? frag_p.r[0][m][half] : frag_p.r[0][m][half + 2], holder);
        p[m][half] = ToFloat::to_float(static_cast<uint16_t>(j % 2 ? pair >> 16 : pair));
        seen[m][half] = band.keys_of(rows.token[m][half]).contains(first_key + j);
      }
    }
#pragma unroll
    for (int n = 0; n < Config::kHeadDim / 8; ++n) {
      const uint32_t pair = values.value_pair(smem_v, j, n, lane);
      const float v[2] = {ToFloat::to_float(static_cast<uint16_t>(pair)),
                          ToFloat::to_float(static_cast<uint16_t>(pair >> 16))};
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (seen[m][e / 2]) acc_o[m][n][e] = fmaf(p[m][e / 2], v[e % 2], acc_o[m][n][e]);
        }
      }
    }
  }
}

// Keeps P times the values' factors in float16's range: O counts in units of a power of two that
// grows to the largest factor met. bfloat16 needs no unit.
template <class Config>
struct ValueUnit {
  static constexpr bool kNeeded =
      Config::Storage::kQuantised && std::is_same_v<typename Config::Element, __half>;
  float unit = kNeeded ? 0.f : 1.f;

  // Returns what to multiply the factors by.
  __device__ __forceinline__ float take(
      const float2 (&factor)[2], float (&acc_o)[Config::kRowGroups][Config::kHeadDim / 8][4]) {
    if constexpr (!kNeeded) return 1.f;
    float largest = fmaxf(fmaxf(fabsf(factor[0].x), fabsf(factor[0].y)),
                          fmaxf(fabsf(factor[1].x), fabsf(factor[1].y)));
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
    if (largest > unit) {  // the same in all lanes
      const float next = __uint_as_float(
          min(__float_as_uint(largest) + 0x7fffffu, __float_as_uint(0x1p126f)) & 0x7f800000u);
      const float rescale = unit * inverse(next);
#pragma unroll
      for (int m = 0; m < Config::kRowGroups; ++m) {
#pragma unroll
        for (int d = 0; d < Config::kHeadDim / 8; ++d) {
#pragma unroll
          for (int e = 0; e < 4; ++e) acc_o[m][d][e] *= rescale;
        }
      }
      unit = next;
    }
    return unit == 0.f ? 1.f : inverse(unit);
  }
  // Of a power of two, 2^-126 to 2^126.
  __device__ __forceinline__ static float inverse(float power) {
    return __uint_as_float((254u << 23) - __float_as_uint(power));
  }
};

}  // namespace fal::cuda
