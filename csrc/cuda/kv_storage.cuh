// How K and V as they are stored become the B operands of mma.m16n8k16, and Q the A operand that
// goes with them. Two kinds of storage, one interface:
//
//   Layout                    where 16-byte chunks of a tile of 16 keys lie in shared memory
//   load_queries(a, ...)      the A fragments of four 16-wide steps, 64 dims, of Q
//   with_elements(type, f)    f(elements), once, with the functions below; int8 and fp8 share a
//                             kernel, and branch here, outside the loops: twice a tile
//   add_scores(s, a, ...)     s += Q K^T over those 64 dims
//   load_values(b, ...)       the B fragments of kColumns columns of V
//   value_pair(...)           of one key, the two values that belong to a lane's accumulators of an
//                             8-column tile: neighbours, or, quantised, every second column of 16
//   holds_nonfinite(...)      whether a tile of V has an infinity or a NaN
//
// The factors of quantised rows never meet the elements: a key's multiplies its scores, a value's
// its probabilities.
#pragma once

#include "mma_sm80.cuh"

namespace fal::cuda {

inline constexpr int kWarpKeys = 16;  // of a tile, one warp's

// Whether the test holds for any word of a tile; the same in all lanes.
template <class Test>
__device__ __forceinline__ bool any_word(uint32_t smem_tile, int bytes, int lane, Test test) {
  bool found = false;
#pragma unroll 1
  for (int at = lane * 16; at < bytes; at += kWarpSize * 16) {
    const uint4 w = ptx::load_shared<uint4>(smem_tile + at);
    found |= test(w.x) || test(w.y) || test(w.z) || test(w.w);
  }
  return __any_sync(0xffffffffu, found);
}

// float16 or bfloat16, as ldmatrix deals it.
template <class T, int kDim>
struct PlainKvTile {
  using Layout = TileLayout<kDim>;
  static constexpr int kBytes = 2;
  static constexpr bool kQuantised = false;
  static constexpr int kColumns = 16;

  template <class Use>
  __device__ __forceinline__ static void with_elements(DType, Use use) {
    use(PlainKvTile{});
  }

  template <int kM>
  __device__ __forceinline__ static void load_queries(uint32_t (&a)[4][kM][4], uint32_t smem_q,
                                                      int block, int lane) {
    const auto address = address_rows_first<kDim>(smem_q, 0, lane);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int m = 0; m < kM; ++m) ptx::ldmatrix_x4(a[k][m], address.at(m * 16, block * 4 + k));
    }
  }
  template <int kM>
  __device__ __forceinline__ static void add_scores(float (&s)[kM][2][4],
                                                    const uint32_t (&a)[4][kM][4], uint32_t smem_k,
                                                    int block, int lane) {
    const auto address = address_columns_first<kDim>(smem_k, 0, lane);
#pragma unroll
    for (int k = 0; k < 4; ++k) multiply_step_nt<T>(s, a[k], address, block * 4 + k);
  }
  __device__ __forceinline__ static void load_values(uint32_t (&b)[kColumns / 8][2],
                                                     uint32_t smem_v, int group, int lane) {
    uint32_t r[4];
    ptx::ldmatrix_x4_trans(r, address_rows_first<kDim>(smem_v, 0, lane).at(0, group));
    b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
  }
  __device__ __forceinline__ static uint32_t value_pair(uint32_t smem_v, int row, int tile,
                                                        int lane) {
    return ptx::load_shared<uint32_t>(smem_v + Layout::offset(row, tile) + lane % 4 * 4);
  }
  __device__ __forceinline__ static bool holds_nonfinite(uint32_t smem_v, int lane) {
    constexpr uint32_t kExponent = std::is_same_v<T, __half> ? 0x7c00u : 0x7f80u;
    return any_word(smem_v, kWarpKeys * kDim * kBytes, lane, [](uint32_t word) {
      return (word & kExponent) == kExponent || (word >> 16 & kExponent) == kExponent;
    });
  }
};

// ---- quantised ----------------------------------------------------------------------------------
// A tile of bytes: chunk c of row r lies at c ^ swizzle(r), so that the eight rows of a chunk
// column (ldmatrix) and two rows of four chunks (16-byte loads) both touch all 32 banks once.
template <int kDim>
struct ByteTileLayout {
  static_assert(kDim % 64 == 0, "the swizzle permutes groups of four or eight chunks");
  static constexpr int kChunks = kDim / 16;

  __device__ __forceinline__ static uint32_t offset(int row, int chunk) {
    const int swizzle = (row >> 1 & 3) | (kDim % 128 == 0 ? (row & 1) << 2 : 0);
    return row * kDim + ((chunk ^ swizzle) << 4);
  }
};

// Two of a word's four stored bytes as a pair of T, exactly: byte kLow in bits 0-15.
template <class Stored, class T>
struct Widen;
struct StoredInt8 {};
struct StoredFloat8 {};  // e4m3

template <>
struct Widen<StoredInt8, __half> {
  // 0x6400 | u is 1024 + u; u = x + 128.
  template <int kLow, int kHigh>
  __device__ __forceinline__ static uint32_t pair(uint32_t word) {
    const uint32_t biased =
        __byte_perm(word ^ 0x80808080u, 0x64646464u, 0x4040 | kHigh << 8 | kLow);
    return ptx::fma_f16x2(biased, 0x3c003c00u, 0xe480e480u);  // * 1 - 1152
  }
};
template <>
struct Widen<StoredInt8, __nv_bfloat16> {
  // 0x4300 | u is 128 + u for seven bits u; with the sign bit it is 256: x = low bits - sign bit.
  template <int kLow, int kHigh>
  __device__ __forceinline__ static uint32_t pair(uint32_t word) {
    const uint32_t spread = __byte_perm(word, 0x43434343u, 0x4040 | kHigh << 8 | kLow);
    return ptx::fma_bf16x2(spread & 0xff7fff7fu, 0x3f803f80u, (spread & 0xff80ff80u) | 0x80008000u);
  }
};
// e4m3's bits, moved to the exponent and mantissa of T, are the value times a power of two. What
// overflows in the second product is NaN's pattern alone (480 as a number): inf * 0 makes it NaN.
template <>
struct Widen<StoredFloat8, __half> {
  template <int kLow, int kHigh>
  __device__ __forceinline__ static uint32_t pair(uint32_t word) {
    const uint32_t spread = __byte_perm(word, 0, 0x0404 | kHigh << 12 | kLow << 4);
    const uint32_t bits = (spread >> 1 & 0x3f803f80u) | (spread & 0x80008000u);
    const uint32_t value = ptx::fma_f16x2(bits, 0x5c005c00u, 0x80008000u);    // * 2^8
    const uint32_t or_inf = ptx::fma_f16x2(value, 0x58905890u, 0x80008000u);  // * 146
    return ptx::fma_f16x2(or_inf, 0u, value);
  }
};
template <>
struct Widen<StoredFloat8, __nv_bfloat16> {
  template <int kLow, int kHigh>
  __device__ __forceinline__ static uint32_t pair(uint32_t word) {
    const uint32_t spread = __byte_perm(word, 0, 0x0404 | kHigh << 12 | kLow << 4);
    const uint32_t bits = (spread >> 4 & 0x07f007f0u) | (spread & 0x80008000u);
    const uint32_t value = ptx::fma_bf16x2(bits, 0x7b807b80u, 0x80008000u);    // * 2^120
    const uint32_t or_inf = ptx::fma_bf16x2(value, 0x7b107b10u, 0x80008000u);  // * 1.125 * 2^119
    return ptx::fma_bf16x2(or_inf, 0u, value);
  }
};

template <class Stored, class T, int kDim>
struct QuantisedElements;

// int8 or fp8 e4m3, widened in registers. Lane (g, c) = (lane / 4, lane % 4) loads 16 consecutive
// dims of a key at once and deals them over four steps; any order of the dims is right as long as Q
// has the same: step s, k = 2c, 2c + 1, 2c + 8, 2c + 9 are dims 64 block + 16 c + 4 s + 0 .. 3.
template <class T, int kDim>
struct QuantisedKvTile {
  using Layout = ByteTileLayout<kDim>;
  static constexpr int kBytes = 1;
  static constexpr bool kQuantised = true;
  static constexpr int kColumns = 32;

  template <class Use>
  __device__ __forceinline__ static void with_elements(DType stored, Use use) {
    if (stored == DType::kInt8) {
      use(QuantisedElements<StoredInt8, T, kDim>{});
    } else {
      use(QuantisedElements<StoredFloat8, T, kDim>{});
    }
  }
  template <int kM>
  __device__ __forceinline__ static void load_queries(uint32_t (&a)[4][kM][4], uint32_t smem_q,
                                                      int block, int lane) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = m * 16 + half * 8 + lane / 4;
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          const int chunk = block * 8 + lane % 4 * 2 + pair;
          const uint4 dims = ptx::load_shared<uint4>(smem_q + TileLayout<kDim>::offset(row, chunk));
          a[2 * pair][m][half] = dims.x, a[2 * pair][m][half + 2] = dims.y;
          a[2 * pair + 1][m][half] = dims.z, a[2 * pair + 1][m][half + 2] = dims.w;
        }
      }
    }
  }
};

template <class Stored, class T, int kDim>
struct QuantisedElements {
  using Layout = ByteTileLayout<kDim>;
  using ToT = Widen<Stored, T>;
  static constexpr int kColumns = QuantisedKvTile<T, kDim>::kColumns;

  template <int kM>
  __device__ __forceinline__ static void add_scores(float (&s)[kM][2][4],
                                                    const uint32_t (&a)[4][kM][4], uint32_t smem_k,
                                                    int block, int lane) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const uint4 dims =
          ptx::load_shared<uint4>(smem_k + Layout::offset(n * 8 + lane / 4, block * 4 + lane % 4));
      const uint32_t word[4] = {dims.x, dims.y, dims.z, dims.w};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const uint32_t b0 = ToT::template pair<0, 1>(word[k]);
        const uint32_t b1 = ToT::template pair<2, 3>(word[k]);
#pragma unroll
        for (int m = 0; m < kM; ++m) Mma<T>::multiply(s[m][n], a[k][m], b0, b1);
      }
    }
  }
  // ldmatrix moves pairs of bytes: a lane gets dims 2g, 2g + 1 of keys 2c, 2c + 1. The even dims
  // are one 8-column tile, the odd ones the next.
  __device__ __forceinline__ static void load_values(uint32_t (&b)[kColumns / 8][2],
                                                     uint32_t smem_v, int group, int lane) {
    uint32_t r[4];
    ptx::ldmatrix_x4_trans(r, smem_v + Layout::offset(lane % 16, 2 * group + lane / 16));
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        b[2 * n][half] = ToT::template pair<0, 2>(r[2 * n + half]);
        b[2 * n + 1][half] = ToT::template pair<1, 3>(r[2 * n + half]);
      }
    }
  }
  __device__ __forceinline__ static uint32_t value_pair(uint32_t smem_v, int row, int tile,
                                                        int lane) {
    const uint32_t word =
        ptx::load_shared<uint32_t>(smem_v + Layout::offset(row, tile / 2) + lane % 4 * 4);
    return tile % 2 ? ToT::template pair<1, 3>(word) : ToT::template pair<0, 2>(word);
  }
  __device__ __forceinline__ static bool holds_nonfinite(uint32_t smem_v, int lane) {
    if constexpr (std::is_same_v<Stored, StoredInt8>) return false;
    return any_word(smem_v, kWarpKeys * kDim, lane, [](uint32_t word) {
      return (((word & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u) != 0;
    });
  }
};

}  // namespace fal::cuda
