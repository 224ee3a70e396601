// The tiles that a block visits, as a list in shared memory: what kernels walk that take a block
// mask. One warp looks at 32 tiles at once, so that the searches in a mask's tables run side by
// side and once for up to 63 tiles; all threads then read the list. A skipped tile costs its share
// of that look, no byte of Q, K, V or dO and no product.
//
// Walking core/tiles.h's cursors in every thread instead puts those searches, dependent loads from
// device memory, between any two tiles, and holds a dozen registers in the main loop.
#pragma once

#include "../core/tiles.h"
#include "softmax.cuh"

namespace fal::cuda {

// How a kernel finds its tiles: as the band alone has them, or from a list.
struct BandTiles {};
struct ListedTiles {};

struct TileList {
  static constexpr int kTiles = 63;
  static constexpr int32_t kEnd = -1;    // instead of a first row or key: all tiles are listed
  static constexpr int32_t kMore = -2;   // the same: look on from the candidate told as a head
  static constexpr int32_t kShown = -2;  // instead of a rule: every row sees every key
  alignas(16) uint4 entry[kTiles + 1];   // as ListedTile
};

struct ListedTile {
  int32_t begin;  // first row or key, or a mark
  int32_t head;
  int32_t rule;  // kShown, or what Sight::word() asks
  int32_t size;  // rows or keys

  __device__ __forceinline__ static ListedTile read(uint32_t entry) {
    const uint4 e = ptx::load_shared<uint4>(entry);
    return {static_cast<int32_t>(e.x), static_cast<int32_t>(e.y), static_cast<int32_t>(e.z),
            static_cast<int32_t>(e.w)};
  }
  __device__ __forceinline__ void write(uint32_t entry) const {
    ptx::store_shared(entry, make_uint4(static_cast<uint32_t>(begin), static_cast<uint32_t>(head),
                                        static_cast<uint32_t>(rule), static_cast<uint32_t>(size)));
  }
  __device__ __forceinline__ bool valid() const { return begin >= 0; }
  // False for a mark.
  __device__ __forceinline__ bool put(Tile* tile) const {
    const bool shown = rule == TileList::kShown;
    *tile = {{begin, begin + size},
             shown ? TileKind::kFull : TileKind::kPartial,
             shown ? BlockRule::kFull : rule};
    return valid();
  }
};

// `Tiles` and a list behind it.
template <class Tiles>
struct WithTileList {
  Tiles tiles;
  TileList list;
};

// One warp: lists what is visited of the candidates from `next` on, as far as there is room.
template <class Candidates>
__device__ __forceinline__ void write_list(uint32_t list, int next, const Candidates& candidates) {
  const int lane = ptx::opaque(threadIdx.x), end = candidates.end();
  uint32_t entry = list;
  const auto room = [&] { return list + sizeof(TileList) - entry > kWarpSize * sizeof(uint4); };
#pragma unroll 1
  while (next < end && room()) {
    Tile tile{{0, 0}, TileKind::kSkip};
    int head = 0;
    if (next + lane < end) tile = candidates.look(next + lane, &head);
    const bool visited = tile.kind != TileKind::kSkip;
    const uint32_t found = __ballot_sync(kAllLanes, visited);
    const int32_t rule = tile.kind == TileKind::kFull ? TileList::kShown : tile.rule;
    if (visited) {
      ListedTile{tile.range.begin, head, rule, tile.range.size()}.write(
          entry + __popc(found & low_bits(lane)) * static_cast<uint32_t>(sizeof(uint4)));
    }
    entry += __popc(found) * static_cast<uint32_t>(sizeof(uint4));
    next += kWarpSize;
    if (!found && next < end) next = candidates.skip(next);
  }
  if (lane == 0) {
    ListedTile{next < end ? TileList::kMore : TileList::kEnd, next, 0, 0}.write(entry);
  }
}

// The walk of all threads of a block. `find` makes the candidates when they are asked: held in a
// kernel's loop they would cost it registers.
struct ListCursor {
  uint32_t list, entry;  // shared addresses

  // A barrier. The list must be nobody's any more.
  template <class Find>
  __device__ __forceinline__ static ListCursor make(uint32_t list, const Find& find) {
    if (threadIdx.x == 0) ListedTile{TileList::kMore, find().begin(), 0, 0}.write(list);
    __syncthreads();
    return {list, list};
  }
  // Not valid behind the last tile. Barriers where a part of the list is used up.
  template <class Find>
  __device__ __forceinline__ ListedTile next(const Find& find) {
    const ListedTile mark = ListedTile::read(entry);
    if (mark.begin == TileList::kMore) {
      __syncthreads();  // everybody has read the mark
      if (threadIdx.x < kWarpSize) write_list(list, mark.head, find());
      __syncthreads();
      entry = list;
    }
    entry += sizeof(uint4);
    return current();
  }
  // What next() gave last, read again: it need not be held.
  __device__ __forceinline__ ListedTile current() const {
    return ListedTile::read(entry - static_cast<uint32_t>(sizeof(uint4)));
  }
};

// ---- candidates ---------------------------------------------------------------------------------
// The tiles of keys that the band shows to a tile of rows, numbered along the sequence.
template <int kTileKeys>
struct KeyTileCandidates {
  Sight sight;
  Range rows;
  int h;

  // Of the tile that begins with a row; blockIdx.y and .z are the query head and the batch entry.
  __device__ __forceinline__ static KeyTileCandidates of_block(const ForwardProblem& problem,
                                                               int row, int tile_rows) {
    const int h = ptx::opaque(blockIdx.y), b = ptx::opaque(blockIdx.z);
    const Sequence seq = problem.lengths.sequence(b);
    const Band band = Band::make(seq.seqlen_q, seq.seqlen_k, problem.window);
    return {
        Sight::make(problem.block_mask, b, h, band), {row, min(row + tile_rows, seq.seqlen_q)}, h};
  }
  __device__ __forceinline__ int begin() const {
    return sight.band.keys_of_any(rows).begin / kTileKeys;
  }
  __device__ __forceinline__ int end() const {
    return ceil_div(sight.band.keys_of_any(rows).end, kTileKeys);
  }
  __device__ __forceinline__ Tile look(int n, int* head) const {
    const Range keys{n * kTileKeys, min((n + 1) * kTileKeys, sight.band.seqlen_k)};
    Tile tile = sight.tile_of_keys(rows, keys);
    // Keys behind the last one that is visible are not read; the zeros there have scores too.
    tile.range.end = min(keys.end, sight.band.keys_of_any(rows).end);
    if (tile.range.size() < kTileKeys && tile.kind == TileKind::kFull) {
      tile.kind = TileKind::kPartial;
    }
    *head = h;
    return tile;
  }
  // The first candidate from n on that may be visited.
  __device__ __forceinline__ int skip(int n) const {
    if (!sight.masked) return n;
    const int key = sight.mask.next_key(sight.band, rows, n * kTileKeys);
    return key == HeadMask::kNone ? end() : key / kTileKeys;
  }
};

// The tiles of rows that see a tile of keys, of each query head of a group in turn. Their number
// fits 32 bits, since all those rows are in memory.
template <int kTileRows>
struct RowTileCandidates {
  const ForwardProblem& problem;
  Band band;
  Range keys;
  int b, first_head, group;

  // Of the tile that begins with a key; blockIdx.y and .z are the K/V head and the batch entry.
  __device__ __forceinline__ static RowTileCandidates of_block(const ForwardProblem& problem,
                                                               int key, int tile_keys) {
    const int head_k = ptx::opaque(blockIdx.y), b = ptx::opaque(blockIdx.z);
    const int group = problem.shape.heads_q / problem.shape.heads_k;
    const Sequence seq = problem.lengths.sequence(b);
    return {problem,
            Band::make(seq.seqlen_q, seq.seqlen_k, problem.window),
            {key, min(key + tile_keys, seq.seqlen_k)},
            b,
            head_k * group,
            group};
  }
  __device__ __forceinline__ Sight sight(int h) const {
    return Sight::make(problem.block_mask, b, h, band);
  }
  __device__ __forceinline__ Range tiles() const {
    const Range any = band.rows_of_any(keys);
    return any.empty() ? Range{0, 0} : Range{any.begin / kTileRows, ceil_div(any.end, kTileRows)};
  }
  __device__ __forceinline__ int begin() const { return 0; }
  __device__ __forceinline__ int end() const { return tiles().size() * group; }
  __device__ __forceinline__ Tile look(int n, int* head) const {
    const Range all = tiles();
    const int number = n / all.size(), row = (all.begin + n - number * all.size()) * kTileRows;
    *head = first_head + number;
    return sight(*head).tile_of_rows({row, min(row + kTileRows, band.seqlen_q)}, keys);
  }
  __device__ __forceinline__ int skip(int n) const {
    const Range all = tiles();
    const int number = n / all.size();
    const Sight head = sight(first_head + number);
    if (!head.masked) return n;
    const int row =
        head.mask.next_row(band, keys, (all.begin + n - number * all.size()) * kTileRows);
    return number * all.size() +
           (row == HeadMask::kNone ? all.size() : row / kTileRows - all.begin);
  }
};

}  // namespace fal::cuda
