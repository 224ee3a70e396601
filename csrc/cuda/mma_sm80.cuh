// Tensor-core building blocks for compute capability 8.0 and above: 16-bit tiles in shared memory,
// their fragments for mma.sync.m16n8k16, and the products that attention needs.
//
// A tile has rows of kDim elements (a multiple of 64), cut into 16-byte chunks of 8. Chunk c of row
// r lies at position c ^ (r & 7), so that eight rows of one chunk column (one 8 x 8 matrix of
// ldmatrix) and eight chunks of one row (a copy) both touch all 32 banks once.
//
// What a lane holds, with g = lane / 4 and c = lane % 4 (PTX manual, "Matrix fragments for
// mma.m16n8k16"): of a 16 x 8 accumulator the elements (g, 2c), (g, 2c + 1), (g + 8, 2c),
// (g + 8, 2c + 1). Two accumulators side by side, packed to 16 bits, are the A operand of a next
// product: P never leaves the registers between S = Q K^T and O = P V.
#pragma once

#include "ptx.cuh"

namespace fal::cuda {

inline constexpr int kWarpSize = 32;
inline constexpr size_t kMaxSmemBytes = 163 * 1024;  // of a block, on compute capability 8.0
inline constexpr int kChunkElements = 8;             // 16 bytes of 16-bit elements

// The instructions of one element type.
template <class T>
struct Mma;

template <>
struct Mma<__half> {
  static constexpr uint32_t kExponents = 0x7c007c00u;  // of two packed elements
  __device__ __forceinline__ static uint32_t pack(float low, float high) {
    return ptx::pack_f16x2(low, high);
  }
  __device__ __forceinline__ static void multiply(float (&d)[4], const uint32_t (&a)[4],
                                                  uint32_t b0, uint32_t b1) {
    ptx::mma_m16n8k16_f16(d, a, b0, b1);
  }
  __device__ __forceinline__ static float to_float(uint16_t bits) {
    return __half2float(__ushort_as_half(bits));
  }
};

template <>
struct Mma<__nv_bfloat16> {
  static constexpr uint32_t kExponents = 0x7f807f80u;
  __device__ __forceinline__ static uint32_t pack(float low, float high) {
    return ptx::pack_bf16x2(low, high);
  }
  __device__ __forceinline__ static void multiply(float (&d)[4], const uint32_t (&a)[4],
                                                  uint32_t b0, uint32_t b1) {
    ptx::mma_m16n8k16_bf16(d, a, b0, b1);
  }
  __device__ __forceinline__ static float to_float(uint16_t bits) {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  }
};

// ---- tiles ------------------------------------------------------------------------------------
template <int kDim>
struct TileLayout {
  static_assert(kDim % 64 == 0, "the swizzle permutes groups of eight 16-byte chunks");
  static constexpr int kChunks = kDim / kChunkElements;  // of one row
  static constexpr int kRowBytes = kDim * 2;

  // Byte offset of a chunk. A tile starts at a multiple of 128 bytes.
  __device__ __forceinline__ static uint32_t offset(int row, int chunk) {
    return row * kRowBytes + ((chunk ^ (row & 7)) << 4);
  }
};

// Bytes of a 16-byte chunk that lie within a row of `dim` elements.
__device__ __forceinline__ int chunk_bytes(int chunk, int dim) {
  return min(16, max(0, (dim - chunk * kChunkElements) * 2));
}

// The rows of a tile in device memory: `at(r)` is row r's address, asked for any row of the tile,
// valid or not; `move(p, r, step)` goes from row r to row r + step.
template <class T>
struct StridedRows {
  const T* first;
  int64_t stride;

  __device__ __forceinline__ const T* at(int row) const { return first + row * stride; }
  __device__ __forceinline__ const T* move(const T* p, int, int step) const {
    return p + step * stride;
  }
};

// Starts the copy of the `valid` rows of a tile; what lies beyond, in rows or in dim, becomes 0 and
// is not read. Rows start at multiples of 16 bytes and dim is a multiple of 8.
template <class T, int kDim, int kRows, int kThreads, class Rows>
__device__ __forceinline__ void load_tile_async(uint32_t smem_tile, Range valid, int dim,
                                                const Rows& rows) {
  using Layout = TileLayout<kDim>;
  static_assert(kRows * Layout::kChunks % kThreads == 0, "every thread copies as many chunks");
  if constexpr (kThreads % (8 * Layout::kChunks) == 0) {
    // A thread keeps its chunk and moves by whole groups of eight rows: one swizzled address.
    constexpr int kRowStep = kThreads / Layout::kChunks;
    const int first_row = threadIdx.x / Layout::kChunks, chunk = threadIdx.x % Layout::kChunks;
    // A chunk beyond dim wants no rows at all.
    const uint32_t wanted = chunk * kChunkElements < dim ? valid.size() : 0;
    const uint32_t first_valid = first_row - valid.begin;
    const uint32_t target = smem_tile + Layout::offset(first_row, chunk);
    const T* source = rows.at(first_row);
#pragma unroll
    for (int i = 0; i < kRows / kRowStep; ++i) {
      ptx::cp_async_16(target + i * kRowStep * Layout::kRowBytes, source + chunk * kChunkElements,
                       first_valid + i * kRowStep < wanted);
      if (i + 1 < kRows / kRowStep) {
        source = rows.move(source, first_row + i * kRowStep, kRowStep);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kRows * Layout::kChunks / kThreads; ++i) {
      const int id = i * kThreads + threadIdx.x;
      const int row = id / Layout::kChunks, chunk = id % Layout::kChunks;
      ptx::cp_async_16(smem_tile + Layout::offset(row, chunk),
                       rows.at(row) + chunk * kChunkElements,
                       valid.contains(row) && chunk * kChunkElements < dim);
    }
  }
}

// The same for rows that are not 16-byte aligned: element by element, through registers. kInLoop:
// in the kernel's main loop, whose registers it must not hold.
template <class T, int kDim, int kRows, int kThreads, bool kInLoop = true, class Rows>
__device__ __forceinline__ void load_tile_elements(uint32_t smem_tile, Range valid, int dim,
                                                   const Rows& rows) {
  using Layout = TileLayout<kDim>;
#pragma unroll 1
  for (int id = kInLoop ? ptx::opaque(threadIdx.x) : static_cast<int>(threadIdx.x);
       id < kRows * Layout::kChunks; id += kThreads) {
    const int row = id / Layout::kChunks, chunk = id % Layout::kChunks;
    uint32_t word[4] = {0, 0, 0, 0};
    if (valid.contains(row)) {
      const uint16_t* source = reinterpret_cast<const uint16_t*>(rows.at(row));
#pragma unroll
      for (int e = 0; e < kChunkElements; ++e) {
        const int d = chunk * kChunkElements + e;
        if (d < dim) word[e / 2] |= static_cast<uint32_t>(source[d]) << (16 * (e & 1));
      }
    }
    ptx::store_shared(smem_tile + Layout::offset(row, chunk),
                      make_uint4(word[0], word[1], word[2], word[3]));
  }
}

// kMayBeUnaligned: the kernel has both paths and `aligned`, the same for the whole launch, chooses.
template <class T, int kDim, int kRows, int kThreads, bool kMayBeUnaligned, bool kInLoop = true,
          class Rows>
__device__ __forceinline__ void load_tile(uint32_t smem_tile, Range valid, int dim, bool aligned,
                                          const Rows& rows) {
  if (kMayBeUnaligned && !aligned) {
    load_tile_elements<T, kDim, kRows, kThreads, kInLoop>(smem_tile, valid, dim, rows);
  } else {
    load_tile_async<T, kDim, kRows, kThreads>(smem_tile, valid, dim, rows);
  }
}

// ---- fragments --------------------------------------------------------------------------------
// Where a lane points ldmatrix within a tile. Rows move by multiples of 8 and columns by 16
// elements, so the swizzle costs one XOR a column step and everything else is an immediate.
template <int kDim>
struct FragmentAddress {
  uint32_t base;

  __device__ __forceinline__ uint32_t at(int row, int column_step) const {
    return (base ^ ((column_step & 3) << 5)) + ((column_step >> 2) << 7) +
           row * TileLayout<kDim>::kRowBytes;
  }
};

// For A operands of a tile stored [m][k], and for B operands of a tile stored [k][n], transposed.
//
// Warps that share columns are dealt 16-column groups in turn: with `stride` warps, warp w has the
// groups w, w + stride, ... (stride 1, 2 or 4). Then the XOR of FragmentAddress still never
// carries.
template <int kDim>
__device__ __forceinline__ FragmentAddress<kDim> address_rows_first(uint32_t smem_tile, int row,
                                                                    int lane, int group = 0) {
  return {smem_tile + TileLayout<kDim>::offset(row + lane % 16, 2 * group + lane / 16)};
}

// For B operands of a tile stored [n][k], and for A operands of a tile stored [k][m], transposed.
template <int kDim>
__device__ __forceinline__ FragmentAddress<kDim> address_columns_first(uint32_t smem_tile, int row,
                                                                       int lane, int group = 0) {
  return {smem_tile +
          TileLayout<kDim>::offset(row + lane % 8 + lane / 16 * 8, 2 * group + lane / 8 % 2)};
}

template <int kM, int kN8>
__device__ __forceinline__ void clear(float (&acc)[kM][kN8][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[m][n][e] = 0.f;
    }
  }
}

// A fragments of 16 * kM rows and 16 * kSteps columns, held in registers.
template <int kM, int kSteps>
struct FragmentsA {
  uint32_t r[kSteps][kM][4];
};

template <int kDim, int kM, int kSteps>
__device__ __forceinline__ void load_fragments(FragmentsA<kM, kSteps>& frag,
                                               FragmentAddress<kDim> address) {
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
#pragma unroll
    for (int m = 0; m < kM; ++m) ptx::ldmatrix_x4(frag.r[k][m], address.at(m * 16, k));
  }
}

// Two accumulators side by side, rounded to 16 bits, are one A fragment.
template <class T, int kM, int kN8>
__device__ __forceinline__ void pack_fragments(FragmentsA<kM, kN8 / 2>& frag,
                                               const float (&acc)[kM][kN8][4]) {
#pragma unroll
  for (int k = 0; k < kN8 / 2; ++k) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      frag.r[k][m][0] = Mma<T>::pack(acc[m][2 * k][0], acc[m][2 * k][1]);
      frag.r[k][m][1] = Mma<T>::pack(acc[m][2 * k][2], acc[m][2 * k][3]);
      frag.r[k][m][2] = Mma<T>::pack(acc[m][2 * k + 1][0], acc[m][2 * k + 1][1]);
      frag.r[k][m][3] = Mma<T>::pack(acc[m][2 * k + 1][2], acc[m][2 * k + 1][3]);
    }
  }
}

// ---- products ---------------------------------------------------------------------------------
// One 16-wide step: acc += a b, b being 16 x 8 kN8 from 16-row groups of a [n][k] tile.
template <class T, int kDim, int kM, int kN8>
__device__ __forceinline__ void multiply_step_nt(float (&acc)[kM][kN8][4],
                                                 const uint32_t (&a)[kM][4],
                                                 FragmentAddress<kDim> b, int step) {
#pragma unroll
  for (int n = 0; n < kN8 / 2; ++n) {
    uint32_t frag_b[4];
    ptx::ldmatrix_x4(frag_b, b.at(n * 16, step));
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      Mma<T>::multiply(acc[m][2 * n], a[m], frag_b[0], frag_b[1]);
      Mma<T>::multiply(acc[m][2 * n + 1], a[m], frag_b[2], frag_b[3]);
    }
  }
}

// acc += A B^T: A (16 kM rows) and B (8 kN8 rows) both stored [row][k], A read at every step.
// Unrolled whole, ptxas fetches so many fragments ahead that kernels close to 255 registers spill.
template <class T, int kSteps, int kUnroll = kSteps / 2, int kDim, int kM, int kN8>
__device__ __forceinline__ void multiply_nt(float (&acc)[kM][kN8][4], FragmentAddress<kDim> a,
                                            FragmentAddress<kDim> b) {
#pragma unroll kUnroll
  for (int k = 0; k < kSteps; ++k) {
    uint32_t frag_a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) ptx::ldmatrix_x4(frag_a[m], a.at(m * 16, k));
    multiply_step_nt<T>(acc, frag_a, b, k);
  }
}

// acc += A B: A in registers (16 kM rows, 16 kSteps columns), B stored [k][n], of which every
// kColumnStride-th 16-column group from b's is taken.
template <class T, int kSteps, int kColumnStride = 1, int kDim, int kM, int kN8>
__device__ __forceinline__ void multiply_nn(float (&acc)[kM][kN8][4],
                                            const FragmentsA<kM, kSteps>& a,
                                            FragmentAddress<kDim> b) {
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
#pragma unroll
    for (int n = 0; n < kN8 / 2; ++n) {
      uint32_t frag_b[4];
      ptx::ldmatrix_x4_trans(frag_b, b.at(k * 16, n * kColumnStride));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        Mma<T>::multiply(acc[m][2 * n], a.r[k][m], frag_b[0], frag_b[1]);
        Mma<T>::multiply(acc[m][2 * n + 1], a.r[k][m], frag_b[2], frag_b[3]);
      }
    }
  }
}

// acc += A^T B: A stored [k][m], B stored [k][n], both in shared memory and read transposed; B's
// columns as in multiply_nn.
template <class T, int kSteps, int kColumnStride, int kDimA, int kDimB, int kM, int kN8>
__device__ __forceinline__ void multiply_tn(float (&acc)[kM][kN8][4], FragmentAddress<kDimA> a,
                                            FragmentAddress<kDimB> b) {
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    uint32_t frag_a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) ptx::ldmatrix_x4_trans(frag_a[m], a.at(k * 16, m));
#pragma unroll
    for (int n = 0; n < kN8 / 2; ++n) {
      uint32_t frag_b[4];
      ptx::ldmatrix_x4_trans(frag_b, b.at(k * 16, n * kColumnStride));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        Mma<T>::multiply(acc[m][2 * n], frag_a[m], frag_b[0], frag_b[1]);
        Mma<T>::multiply(acc[m][2 * n + 1], frag_a[m], frag_b[2], frag_b[3]);
      }
    }
  }
}

// ---- from registers to tiles, from tiles to device memory -------------------------------------
// One factor for all rows.
template <int kM>
__device__ __forceinline__ void fill(float (&factor)[kM][2], float value) {
#pragma unroll
  for (int m = 0; m < kM; ++m) factor[m][0] = factor[m][1] = value;
}

// Writes 16 * kM rows of accumulators, times a factor per row, into rows row0 .. of a tile; their
// columns are the 16-column groups `group`, group + kColumnStride, ...
template <class T, int kDim, int kColumnStride = 1, int kM, int kN8>
__device__ __forceinline__ void stage_rows(uint32_t smem_tile, int row0,
                                           const float (&acc)[kM][kN8][4],
                                           const float (&factor)[kM][2], int lane, int group = 0) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + m * 16 + half * 8 + lane / 4;
#pragma unroll
      for (int n = 0; n < kN8; ++n) {
        const int chunk = 2 * (group + n / 2 * kColumnStride) + n % 2;
        ptx::store_shared(smem_tile + TileLayout<kDim>::offset(row, chunk) + lane % 4 * 4,
                          Mma<T>::pack(acc[m][n][2 * half] * factor[m][half],
                                       acc[m][n][2 * half + 1] * factor[m][half]));
      }
    }
  }
}

// Copies rows [first_row, first_row + kRows) of a tile to device memory, 16 bytes a thread where
// rows are aligned; rows from rows_valid on and columns from dim on are not written. row_of(r) is
// the address of tile row r. `thread` of kThreads.
template <class T, int kDim, int kRows, int kThreads, class RowOf>
__device__ __forceinline__ void store_rows(uint32_t smem_tile, int first_row, int rows_valid,
                                           int dim, bool aligned, int thread, RowOf row_of) {
  using Layout = TileLayout<kDim>;
  static_assert(kRows * Layout::kChunks % kThreads == 0, "every thread copies as many chunks");
#pragma unroll 4
  for (int i = 0; i < kRows * Layout::kChunks / kThreads; ++i) {
    const int id = i * kThreads + thread, row = first_row + id / Layout::kChunks,
              chunk = id % Layout::kChunks;
    const int bytes = chunk_bytes(chunk, dim);
    if (row >= rows_valid || bytes == 0) continue;
    const uint4 value = ptx::load_shared<uint4>(smem_tile + Layout::offset(row, chunk));
    T* target = row_of(row) + chunk * kChunkElements;
    if (aligned && bytes == 16) {
      ptx::store_global(reinterpret_cast<uint4*>(target), value);
    } else {
      const uint32_t word[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
      for (int e = 0; e < kChunkElements; ++e) {
        if (2 * e < bytes) {
          reinterpret_cast<uint16_t*>(target)[e] =
              static_cast<uint16_t>(word[e / 2] >> (16 * (e & 1)));
        }
      }
    }
  }
}

}  // namespace fal::cuda
