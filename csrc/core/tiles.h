// Tile cursors: which tiles of keys a tile of query rows visits (forward, dQ), and which tiles of
// rows a tile of keys visits (dK, dV). Sparsity is a cursor, never a copied kernel. All threads of
// a block walk the same cursor, so every decision is uniform.
#pragma once

#include "problem.h"

namespace fal {

struct Tile {
  Range range;  // keys (row-wise cursors) or rows (column-wise cursors), clipped to what is visible
                // at all
  TileKind kind;  // kFull or kPartial; cursors never hand out kSkip
};

// Every tile that the band touches, first to last, at multiples of tile_keys. What a tile of rows
// sees is an interval, so no tile between its ends is skipped, and two intervals classify them all.
struct DenseTilesOfRows {
  Range all;  // keys that every row sees
  int32_t seqlen_k, tile_keys;
  int32_t next_begin, end;

  FAL_HOST_DEVICE static DenseTilesOfRows make(const Band& band, Range rows, int32_t tile_keys) {
    if (rows.empty()) return {{0, 0}, 0, tile_keys, 0, 0};
    const Range any = band.keys_of_any(rows);
    return {band.keys_of_all(rows), band.seqlen_k, tile_keys, any.begin / tile_keys * tile_keys,
            any.end};
  }
  FAL_HOST_DEVICE int32_t count() const {
    return next_begin < end ? ceil_div(end - next_begin, tile_keys) : 0;
  }
  FAL_HOST_DEVICE bool next(Tile* tile) {
    if (next_begin >= end) return false;
    const Range keys{next_begin, min_int(next_begin + tile_keys, seqlen_k)};
    next_begin += tile_keys;
    const bool full = all.begin <= keys.begin && keys.end <= all.end;
    *tile = {keys, full ? TileKind::kFull : TileKind::kPartial};
    return true;
  }
};

// Every tile of rows that sees a key of the tile, first to last, at multiples of tile_rows. Rows
// that see a key are an interval too.
struct DenseTilesOfKeys {
  Range all;  // rows that see every key
  int32_t seqlen_q, tile_rows;
  int32_t next_begin, end;

  FAL_HOST_DEVICE static DenseTilesOfKeys make(const Band& band, Range keys, int32_t tile_rows) {
    if (keys.empty()) return {{0, 0}, 0, tile_rows, 0, 0};
    const Range any = band.rows_of_any(keys);
    return {band.rows_of_all(keys), band.seqlen_q, tile_rows, any.begin / tile_rows * tile_rows,
            any.end};
  }
  FAL_HOST_DEVICE int32_t count() const {
    return next_begin < end ? ceil_div(end - next_begin, tile_rows) : 0;
  }
  FAL_HOST_DEVICE bool next(Tile* tile) {
    if (next_begin >= end) return false;
    const Range rows{next_begin, min_int(next_begin + tile_rows, seqlen_q)};
    next_begin += tile_rows;
    const bool full = all.begin <= rows.begin && rows.end <= all.end;
    *tile = {rows, full ? TileKind::kFull : TileKind::kPartial};
    return true;
  }
};

// Compressed sparse rows over blocks of block_rows x block_keys elements: entries [row_start[r],
// row_start[r + 1]) of `column` are the blocks that block row r visits, ascending. The column-wise
// cursor takes the transpose.
struct BlockCsr {
  const int32_t* row_start;
  const int32_t* column;
  int32_t block_rows, block_keys;
};

// Walks one block row of a BlockCsr in tiles of at most tile_keys keys. `rows` lies within one
// block row.
struct BlockSparseTilesOfRows {
  Band band;
  Range rows;
  int32_t tile_keys;
  const int32_t* column;
  int32_t block_keys;
  int32_t entry, entry_end;
  int32_t within;  // keys of the current block already handed out

  FAL_HOST_DEVICE static BlockSparseTilesOfRows make(const Band& band, Range rows,
                                                     int32_t tile_keys, const BlockCsr& csr) {
    const int32_t row = rows.begin / csr.block_rows;
    return {band,
            rows,
            tile_keys,
            csr.column,
            csr.block_keys,
            rows.empty() ? 0 : csr.row_start[row],
            rows.empty() ? 0 : csr.row_start[row + 1],
            0};
  }
  FAL_HOST_DEVICE bool next(Tile* tile) {
    while (entry < entry_end) {
      const int32_t block_begin = column[entry] * block_keys;
      const int32_t begin = block_begin + within;
      const int32_t block_end = min_int(block_begin + block_keys, band.seqlen_k);
      const Range keys{begin, min_int(begin + tile_keys, block_end)};
      within += tile_keys;
      if (within >= block_keys) {
        within = 0;
        ++entry;
      }
      if (keys.empty()) continue;
      const TileKind kind = band.classify(rows, keys);
      if (kind != TileKind::kSkip) {
        *tile = {keys, kind};
        return true;
      }
    }
    return false;
  }
};

}  // namespace fal
