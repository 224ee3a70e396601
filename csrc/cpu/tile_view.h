// What a tile of query rows sees of a tile of keys, as the products ask it: by the band alone, or
// by the band and a block mask. The band shows intervals, so its answers are exact; under a block
// mask they are the intervals that hold what is seen, and the elements between are masked.
#pragma once

#include "../core/tiles.h"
#include "score_panel.h"

namespace fal::cpu::FAL_CPU_ISA {

// The tiles that a work item visits: dense, or by a block mask.
struct TilesOfRows {
  const HeadMask* mask;
  DenseTilesOfRows dense;
  BlockSparseTilesOfRows sparse;

  FAL_INLINE static TilesOfRows make(const Band& band, const HeadMask* mask, Range rows,
                                     int tile_keys) {
    TilesOfRows tiles{mask, {}, {}};
    if (mask) {
      tiles.sparse = BlockSparseTilesOfRows::make(band, rows, tile_keys, *mask);
    } else {
      tiles.dense = DenseTilesOfRows::make(band, rows, tile_keys);
    }
    return tiles;
  }
  FAL_INLINE bool next(Tile* tile) { return mask ? sparse.next(tile) : dense.next(tile); }
};

struct TilesOfKeys {
  const HeadMask* mask;
  DenseTilesOfKeys dense;
  BlockSparseTilesOfKeys sparse;

  FAL_INLINE static TilesOfKeys make(const Band& band, const HeadMask* mask, Range keys,
                                     int tile_rows) {
    TilesOfKeys tiles{mask, {}, {}};
    if (mask) {
      tiles.sparse = BlockSparseTilesOfKeys::make(band, keys, tile_rows, *mask);
    } else {
      tiles.dense = DenseTilesOfKeys::make(band, keys, tile_rows);
    }
    return tiles;
  }
  FAL_INLINE bool next(Tile* tile) { return mask ? sparse.next(tile) : dense.next(tile); }
};

// The size of a tile that falls on the edges of blocks: whole blocks, or an even part of one.
// `most` where neither is a multiple of `unit`.
FAL_INLINE int tile_of_blocks(int most, int block, int unit) {
  const int parts = ceil_div(block, most);
  const int size = parts > 1 ? block / parts : most / block * block;
  return size % unit == 0 && (parts == 1 || block % parts == 0) ? size : most;
}

// Room for a panel's words: one for every 32 keys and lane.
constexpr int mask_words(int tile_keys) { return (tile_keys + 31) / 32 * kPanel; }

// words[key / 32][lane], bit key % 32: the lane's row sees the key by the mask.
static FAL_NOINLINE void fill_words(const HeadMask& mask, Range rows, Range keys, int32_t* words) {
  memset(words, 0, sizeof(int32_t) * mask_words(keys.size()));
  const Range lines = mask.block_rows(rows), columns = mask.block_columns(keys);
  for (int r = lines.begin; r < lines.end; ++r) {
    const Range inside = intersect(rows, mask.rows_of_block(r));
    for (int c = columns.begin; c < columns.end; ++c) {
      const int32_t rule = mask.rule_of(r, c);
      if (rule == HeadMask::kNone) continue;
      const Range span = intersect(keys, mask.keys_of_block(c));
      for (int j = span.begin; j < span.end;) {
        const int at = j - keys.begin, n = min_int(32 - at % 32, span.end - j);
        for (int i = inside.begin; i < inside.end; ++i) {
          const uint32_t bits = mask.rule_word(rule, i + mask.row_offset, j, n) << at % 32;
          words[at / 32 * kPanel + i - rows.begin] |= static_cast<int32_t>(bits);
        }
        j += n;
      }
    }
  }
}

// As panel_range() under a block mask; without the fill, which is the tile's.
static FAL_NOINLINE PanelRange sparse_panel_range(const Band& band, const HeadMask& mask,
                                                  Range rows, Range keys, int unit) {
  const int32_t first = mask.next_key(band, rows, keys.begin);
  if (first >= keys.end) return {0, 0, false, 0, 0};
  const int32_t limit = min_int(keys.end, band.keys_of_any(rows).end);
  int32_t last = first;
  for (int32_t key = first; key < limit;) {
    const int32_t block_end = (key / mask.block_k + 1) * mask.block_k;
    last = min_int(block_end, limit);
    key = mask.next_key(band, rows, block_end);
  }
  const int begin = round_down(first - keys.begin, unit);
  const int end = round_up(last - keys.begin, unit);
  const Range computed{keys.begin + begin, keys.begin + end};
  const bool whole = end <= keys.size() && mask.all_full(rows, computed) &&
                     band.classify(rows, computed) == TileKind::kFull;
  return {begin, end, !whole, 0, 0};
}

FAL_INLINE PanelRange panel_range(const Band& band, const HeadMask* mask, Range rows, Range keys,
                                  int unit, int reach) {
  return mask ? sparse_panel_range(band, *mask, rows, keys, unit)
              : panel_range(band, rows, keys, unit, reach);
}

// The mask of a panel's masked range. `words` has room for the tile's; they are filled only where
// the block mask hides some of what the panel computes.
FAL_INLINE PanelMask panel_mask(const Band& band, const HeadMask* mask, Range rows, Range keys,
                                PanelRange range, int32_t* words) {
  PanelMask lanes = PanelMask::make(band, rows.begin, keys);
  if (mask) {
    const Range computed{keys.begin + range.begin, min_int(keys.begin + range.end, keys.end)};
    if (!mask->all_full(rows, computed)) {
      fill_words(*mask, rows, keys, words);
      lanes.words = words;
    }
  }
  return lanes;
}

FAL_INLINE Range unite(Range a, Range b) {
  if (a.empty() || b.empty()) return a.empty() ? b : a;
  return {min_int(a.begin, b.begin), max_int(a.end, b.end)};
}

// The rows of the panel that begins at `row` of the tile.
FAL_INLINE Range rows_of_panel(Range rows, int row) {
  return {rows.begin + row, min_int(rows.begin + row + kPanel, rows.end)};
}

// What each panel of a tile computes under a block mask.
static FAL_NOINLINE void find_panels(const Band& band, const HeadMask& mask, Range rows, Range keys,
                                     PanelRange* panels) {
  Range hull{0, 0};
  for (int row = 0; row < rows.size(); row += kPanel) {
    const PanelRange panel = sparse_panel_range(band, mask, rows_of_panel(rows, row), keys, kRows);
    panels[row / kPanel] = panel;
    hull = unite(hull, {panel.begin, panel.end});
  }
  // Zeros wherever some panel of the tile is read and this one computes nothing.
  for (int row = 0; row < rows.size(); row += kPanel) {
    panels[row / kPanel].fill_begin = hull.begin;
    panels[row / kPanel].fill_end = hull.end;
  }
}

// A tile's answers for the vector products.
struct TileView {
  Band band;
  const HeadMask* mask;  // null without a block mask
  Range rows, keys;
  PanelRange panels[kTileRows / kPanel];  // under a block mask

  FAL_INLINE TileView(const Band& band, const HeadMask* mask, Range rows, Range keys)
      : band(band), mask(mask), rows(rows), keys(keys) {
    if (mask) find_panels(band, *mask, rows, keys, panels);
  }

  FAL_INLINE Range panel_rows(int row) const { return rows_of_panel(rows, row); }
  FAL_INLINE PanelRange panel(int row) const {
    if (mask) return panels[row / kPanel];
    return panel_range(band, panel_rows(row), keys, kRows, kRows - 1);
  }

  // Keys, relative to the tile, that some row of [begin, end) of the tile sees.
  FAL_INLINE Range keys_of_rows(int begin, int end) const {
    end = min_int(end, rows.size());
    if (mask) {
      Range hull{0, 0};
      for (int p = begin / kPanel; p * kPanel < end; ++p) {
        hull = unite(hull, {panels[p].begin, panels[p].end});
      }
      return {hull.begin, min_int(hull.end, keys.size())};
    }
    const Range seen = intersect(band.keys_of_any({rows.begin + begin, rows.begin + end}), keys);
    return seen.empty() ? Range{0, 0} : Range{seen.begin - keys.begin, seen.end - keys.begin};
  }
  // Rows, relative to the tile, that see some key of [begin, end) of the tile.
  FAL_INLINE Range rows_of_keys(int begin, int end) const {
    end = min_int(end, keys.size());
    if (mask) {
      Range hull{0, 0};
      for (int row = 0; row < rows.size(); row += kPanel) {
        const PanelRange& panel = panels[row / kPanel];
        if (panel.begin < end && begin < panel.end) hull = unite(hull, {row, row + kPanel});
      }
      return {hull.begin, min_int(hull.end, rows.size())};
    }
    const Range seen = intersect(band.rows_of_any({keys.begin + begin, keys.begin + end}), rows);
    return seen.empty() ? Range{0, 0} : Range{seen.begin - rows.begin, seen.end - rows.begin};
  }
  // Of an element within keys_of_rows() of its row alone, or within rows_of_keys() of its key
  // alone.
  FAL_INLINE bool shows(int row, int key) const {
    const int i = rows.begin + row, j = keys.begin + key;
    return !mask || (band.visible(i, j) && mask->visible(i, j));
  }
};

}  // namespace fal::cpu::FAL_CPU_ISA
