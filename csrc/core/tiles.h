// Tile cursors: which tiles of keys a tile of query rows visits (forward, dQ), and which tiles of
// rows a tile of keys visits (dK, dV). Sparsity is a cursor, never a copied kernel. All threads of
// a block walk the same cursor, so every decision is uniform.
#pragma once

#include "problem.h"

namespace fal {

struct Tile {
  Range range;  // keys (row-wise cursors) or rows (column-wise cursors), clipped to what is visible
                // at all
  TileKind kind;                    // kFull or kPartial; cursors never hand out kSkip
  int32_t rule = BlockRule::kFull;  // block-sparse cursors: the rule of the one block that the tile
                                    // lies in, else kMixed
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
  // Whether every row sees tile_keys keys from `begin` on: of a tile handed out, whether it is full
  // and not cut short by the sequence's end.
  FAL_HOST_DEVICE bool full(int32_t begin) const {
    return all.begin <= begin && begin + tile_keys <= all.end;
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

// The tiles of keys that a block mask and the band show to a tile of rows, first to last. A tile is
// part of one block (at a multiple of tile_keys within it) where blocks are larger than tile_keys,
// else as many neighbouring listed blocks as fit. A partial tile may hide every element: its rules
// are asked element by element, HeadMask::visible_word().
struct BlockSparseTilesOfRows {
  HeadMask mask;
  Band band;
  Range rows;
  int32_t tile_keys;
  int32_t from;        // keys before this have been handed out
  bool one_line;       // the rows within the mask lie in one block row, as small tiles do:
  int32_t entry, end;  // its entries not yet passed
  Range seen;          // and the keys that the band shows to some of the rows
  bool inside;         // no row lies outside the mask

  FAL_HOST_DEVICE static BlockSparseTilesOfRows make(const Band& band, Range rows,
                                                     int32_t tile_keys, const HeadMask& mask) {
    BlockSparseTilesOfRows c{mask, band, rows, tile_keys, 0, false, 0, 0, {0, 0}, false};
    const Range lines = mask.block_rows(rows);
    c.one_line = lines.size() == 1;
    if (c.one_line) {
      const Range within = intersect(rows, mask.rows_of_block(lines.begin));
      c.inside = within.size() == rows.size();
      c.seen = intersect(band.keys_of_any(within), {0, mask.seqlen_k});
      c.entry = mask.rows.start[lines.begin];
      c.end = mask.rows.start[lines.begin + 1];
    }
    return c;
  }

  // As HeadMask::next_key(), without a search where one block row is walked.
  FAL_HOST_DEVICE int32_t next_key(int32_t key) {
    if (!one_line) return rows.empty() ? HeadMask::kNone : mask.next_key(band, rows, key);
    key = max_int(key, seen.begin);
    while (entry < end && (mask.rows.index[entry] + 1) * mask.block_k <= key) ++entry;
    if (entry == end) return HeadMask::kNone;
    key = max_int(key, mask.rows.index[entry] * mask.block_k);
    return key < seen.end ? key : HeadMask::kNone;
  }

  FAL_HOST_DEVICE bool next(Tile* tile) {
    const int32_t key = next_key(from);
    if (key == HeadMask::kNone) return false;
    const int32_t block = key / mask.block_k * mask.block_k;
    const int32_t rule = inside ? mask.rows.rule[entry] : BlockRule::kMixed;
    const int32_t begin = block + (key - block) / tile_keys * tile_keys;
    int32_t last = min_int(begin + tile_keys, block + mask.block_k);
    bool one_block = true;
    while (last - begin + mask.block_k <= tile_keys && next_key(last) == last) {
      last += mask.block_k;
      one_block = false;
    }
    from = last;
    const Range keys{begin, min_int(last, min_int(band.seqlen_k, mask.seqlen_k))};
    const bool full = band.classify(rows, keys) == TileKind::kFull && mask.all_full(rows, keys);
    *tile = {keys, full ? TileKind::kFull : TileKind::kPartial,
             one_block ? rule : BlockRule::kMixed};
    return true;
  }
};

// The tiles of rows, at multiples of tile_rows, that see some of a tile of keys, first to last; by
// the transpose.
struct BlockSparseTilesOfKeys {
  HeadMask mask;
  Band band;
  Range keys;
  int32_t tile_rows;
  int32_t from;  // rows before this have been handed out

  FAL_HOST_DEVICE static BlockSparseTilesOfKeys make(const Band& band, Range keys,
                                                     int32_t tile_rows, const HeadMask& mask) {
    return {mask, band, keys, tile_rows, 0};
  }

  FAL_HOST_DEVICE bool next(Tile* tile) {
    const int32_t row = keys.empty() ? HeadMask::kNone : mask.next_row(band, keys, from);
    if (row == HeadMask::kNone) return false;
    const int32_t begin = row / tile_rows * tile_rows;
    from = begin + tile_rows;
    const Range rows{begin, min_int(from, band.seqlen_q)};
    const bool full = band.classify(rows, keys) == TileKind::kFull && mask.all_full(rows, keys);
    const Range lines = mask.block_rows(rows), blocks = mask.block_columns(keys);
    const bool one_block =
        lines.size() == 1 && blocks.size() == 1 && mask.contains(rows) && keys.end <= mask.seqlen_k;
    const int32_t rule = one_block ? mask.rule_of(lines.begin, blocks.begin) : BlockRule::kMixed;
    *tile = {rows, full ? TileKind::kFull : TileKind::kPartial, rule};
    return true;
  }
};

// What the band and, where one is given, a block mask show of one (batch entry, query head): for
// whoever looks at tiles in an order of its own.
struct Sight {
  Band band;
  bool masked;
  HeadMask mask;  // when masked

  FAL_HOST_DEVICE static Sight make(const BlockMask& m, int32_t b, int32_t h, const Band& band) {
    return {band, m.given(), m.given() ? HeadMask::make(m, b, h, band) : HeadMask{}};
  }

  // A tile of keys as a tile of rows sees it, both not empty; of the kind kSkip too, which is never
  // wrong, as kFull is exact. Asks the rows' lists.
  FAL_HOST_DEVICE Tile tile_of_keys(Range rows, Range keys) const {
    TileKind kind = band.classify(rows, keys);
    if (masked && mask.next_key(band, rows, keys.begin) >= keys.end) kind = TileKind::kSkip;
    return listed(keys, kind, rows, keys);
  }
  // A tile of rows as a tile of keys is seen by it. Asks the columns' lists.
  FAL_HOST_DEVICE Tile tile_of_rows(Range rows, Range keys) const {
    TileKind kind = band.classify(rows, keys);
    if (masked && mask.next_row(band, keys, rows.begin) >= rows.end) kind = TileKind::kSkip;
    return listed(rows, kind, rows, keys);
  }

  // Bit t: row i sees key j + t, of 32 keys. `rule` is that of a tile that holds them.
  FAL_HOST_DEVICE uint32_t word(int32_t rule, int32_t i, int32_t j) const {
    if (i >= band.seqlen_q) return 0;
    const Range seen = band.keys_of(i);
    const uint32_t word = low_bits(seen.end - j) & ~low_bits(seen.begin - j);
    if (!masked || word == 0) return word;
    if (rule == BlockRule::kMixed) return word & mask.visible_word(i, j);
    return word & mask.rule_word(rule, i + mask.row_offset, j, min_int(32, seen.end - j));
  }

 private:
  FAL_HOST_DEVICE Tile listed(Range range, TileKind kind, Range rows, Range keys) const {
    if (!masked || kind == TileKind::kSkip) return {range, kind, BlockRule::kFull};
    if (kind == TileKind::kFull && !mask.all_full(rows, keys)) kind = TileKind::kPartial;
    const Range lines = mask.block_rows(rows), blocks = mask.block_columns(keys);
    const bool one_block =
        lines.size() == 1 && blocks.size() == 1 && mask.contains(rows) && keys.end <= mask.seqlen_k;
    return {range, kind, one_block ? mask.rule_of(lines.begin, blocks.begin) : BlockRule::kMixed};
  }
};

}  // namespace fal
