// Block-sparse masks: which keys a query row may see beyond the band. The rows and keys of a
// problem are cut into blocks; a block that is not listed hides all its elements, a listed one
// shows all of them or those that its element rule names. Stated here for C++, in
// flashattn_lite/block_mask.py for Python, in docs/kernels/block_sparse.md for people.
//
// A mask is drawn over seqlen_q x seqlen_k elements. In a problem of other lengths it keeps its
// place by position, as the band does: key j is column j, and row i is the row as far from the
// diagonal,
//
//     p = i + (shift of the problem - shift of the mask),      shift = seqlen_k - seqlen_q.
//
// So a mask of the problem's own shape is taken as it stands, and one square mask of the longest
// context serves every step of a decode, every chunk of a prefill and sequences of any length.
// Rows and keys outside the mask see nothing.
#pragma once

#include "band.h"

namespace fal {

// What decides the elements of a listed block: 0 shows all; otherwise an element is visible iff
// every test named passes. The bitmap's number is above the flags.
struct BlockRule {
  static constexpr int32_t kFull = 0, kBand = 1, kDocuments = 2, kBitmap = 4, kBitmapShift = 3;
  static constexpr int32_t kMixed = -1;  // of a tile that holds several blocks
};

// Compressed sparse lines: entries [start[l], start[l + 1]) of `index` are the blocks that line l
// lists, ascending; `rule` says what each shows.
struct BlockCsr {
  const int32_t *start, *index, *rule;
};

struct BlockMask {
  int32_t seqlen_q, seqlen_k;  // elements; 0 < and <= Band::kMaxLength
  int32_t block_q, block_k;    // elements of a block, multiples of 16
  int32_t batch, heads;        // tables: (batch or 1) x (heads_q or 1)
  BlockCsr rows;               // a line is a block row of a table, index = block column;
                               // start is (tables, blocks_q + 1), null = no block mask
  BlockCsr columns;            // the transpose: start is (tables, blocks_k + 1)
  const int32_t* bands;        // (tables, 2): Window::left, right of kBand, in the mask's shape
  const int32_t* documents_q;  // (tables, seqlen_q): kDocuments wants equal numbers; null = unused
  const int32_t* documents_k;  // (tables, seqlen_k)
  const uint32_t* bitmaps;     // (bitmaps, block_q, bitmap_words()): bit t % 32 of word t / 32 is
                               // key t of the block; null = unused

  FAL_HOST_DEVICE bool given() const { return rows.start != nullptr; }
  FAL_HOST_DEVICE int32_t blocks_q() const { return ceil_div(seqlen_q, block_q); }
  FAL_HOST_DEVICE int32_t blocks_k() const { return ceil_div(seqlen_k, block_k); }
  FAL_HOST_DEVICE int32_t bitmap_words() const { return ceil_div(block_k, 32); }
  FAL_HOST_DEVICE int32_t table(int32_t b, int32_t h) const {
    return (batch == 1 ? 0 : b) * heads + (heads == 1 ? 0 : h);
  }
};

// The lowest n bits, for any n.
FAL_HOST_DEVICE uint32_t low_bits(int32_t n) {
  return n >= 32 ? ~0u : n <= 0 ? 0u : (1u << n) - 1u;
}

// The mask of one (batch entry, query head) in the coordinates of its sequence.
struct HeadMask {
  static constexpr int32_t kNone = 0x7fffffff;

  int32_t seqlen_q, seqlen_k, block_q, block_k;
  int32_t row_offset;      // row i of the sequence is row i + row_offset of the mask
  BlockCsr rows, columns;  // start at this table
  Band band;               // of BlockRule::kBand
  const int32_t *documents_q, *documents_k;
  const uint32_t* bitmaps;

  FAL_HOST_DEVICE static HeadMask make(const BlockMask& m, int32_t b, int32_t h,
                                       const Band& sequence) {
    const int64_t table = m.table(b, h);
    const int32_t* window = m.bands + 2 * table;
    return {m.seqlen_q,
            m.seqlen_k,
            m.block_q,
            m.block_k,
            sequence.shift() - (m.seqlen_k - m.seqlen_q),
            {m.rows.start + table * (m.blocks_q() + 1), m.rows.index, m.rows.rule},
            {m.columns.start ? m.columns.start + table * (m.blocks_k() + 1) : nullptr,
             m.columns.index, m.columns.rule},
            Band::make(m.seqlen_q, m.seqlen_k, {window[0], window[1]}),
            m.documents_q ? m.documents_q + table * m.seqlen_q : nullptr,
            m.documents_k ? m.documents_k + table * m.seqlen_k : nullptr,
            m.bitmaps};
  }

  // True when the mask has a row for each of the tile.
  FAL_HOST_DEVICE bool contains(Range tile) const {
    return tile.begin + row_offset >= 0 && tile.end + row_offset <= seqlen_q;
  }
  // Block rows that a tile of rows of the sequence lies in, half-open.
  FAL_HOST_DEVICE Range block_rows(Range tile) const {
    const Range p = intersect({tile.begin + row_offset, tile.end + row_offset}, {0, seqlen_q});
    return p.empty() ? Range{0, 0} : Range{p.begin / block_q, ceil_div(p.end, block_q)};
  }
  FAL_HOST_DEVICE Range block_columns(Range tile) const {
    const Range j = intersect(tile, {0, seqlen_k});
    return j.empty() ? Range{0, 0} : Range{j.begin / block_k, ceil_div(j.end, block_k)};
  }
  // Rows of the sequence that block row r covers.
  FAL_HOST_DEVICE Range rows_of_block(int32_t r) const {
    return {r * block_q - row_offset, min_int((r + 1) * block_q, seqlen_q) - row_offset};
  }
  FAL_HOST_DEVICE Range keys_of_block(int32_t c) const {
    return {c * block_k, min_int((c + 1) * block_k, seqlen_k)};
  }

  // The first entry of a line whose index is at least `from`; the line's end if there is none.
  FAL_HOST_DEVICE static int32_t lower_bound(const BlockCsr& csr, int32_t line, int32_t from) {
    int32_t begin = csr.start[line], end = csr.start[line + 1];
    while (begin < end) {
      const int32_t middle = begin + (end - begin) / 2;
      if (csr.index[middle] < from) {
        begin = middle + 1;
      } else {
        end = middle;
      }
    }
    return begin;
  }

  // The rule of block (r, c), or kNone when it is not listed.
  FAL_HOST_DEVICE int32_t rule_of(int32_t r, int32_t c) const {
    const int32_t e = lower_bound(rows, r, c);
    return e < rows.start[r + 1] && rows.index[e] == c ? rows.rule[e] : kNone;
  }

  // The first key >= from in a listed block that the band shows to some of the block's rows within
  // the tile; kNone when there is none. Element rules are not asked: such a block may still turn
  // out to hide everything.
  FAL_HOST_DEVICE int32_t next_key(const Band& sequence, Range tile, int32_t from) const {
    const Range lines = block_rows(tile);
    int32_t nearest = kNone;
    for (int32_t r = lines.begin; r < lines.end; ++r) {
      const Range any = sequence.keys_of_any(intersect(tile, rows_of_block(r)));
      const int32_t begin = max_int(from, any.begin), end = min_int(any.end, seqlen_k);
      if (begin >= end) continue;
      const int32_t e = lower_bound(rows, r, begin / block_k);
      if (e == rows.start[r + 1]) continue;
      const int32_t key = max_int(begin, rows.index[e] * block_k);
      if (key < end) nearest = min_int(nearest, key);
    }
    return nearest;
  }

  // The same over rows, from the transpose. A tile of rows and a tile of keys touch each other by
  // next_key() exactly when they do by next_row().
  FAL_HOST_DEVICE int32_t next_row(const Band& sequence, Range tile, int32_t from) const {
    const Range lines = block_columns(tile);
    int32_t nearest = kNone;
    for (int32_t c = lines.begin; c < lines.end; ++c) {
      const Range any = sequence.rows_of_any(intersect(tile, keys_of_block(c)));
      const int32_t begin = max_int(from, max_int(any.begin, -row_offset));
      const int32_t end = min_int(any.end, seqlen_q - row_offset);
      if (begin >= end) continue;
      const int32_t e = lower_bound(columns, c, (begin + row_offset) / block_q);
      if (e == columns.start[c + 1]) continue;
      const int32_t row = max_int(begin, columns.index[e] * block_q - row_offset);
      if (row < end) nearest = min_int(nearest, row);
    }
    return nearest;
  }

  // True when every block of a non-empty tile is listed and shows all its elements.
  FAL_HOST_DEVICE bool all_full(Range tile_rows, Range keys) const {
    if (!contains(tile_rows) || keys.end > seqlen_k) return false;
    const Range lines = block_rows(tile_rows), blocks = block_columns(keys);
    for (int32_t r = lines.begin; r < lines.end; ++r) {
      const int32_t e = lower_bound(rows, r, blocks.begin);
      if (e + blocks.size() > rows.start[r + 1]) return false;
      for (int32_t n = 0; n < blocks.size(); ++n) {
        if (rows.index[e + n] != blocks.begin + n || rows.rule[e + n] != BlockRule::kFull) {
          return false;
        }
      }
    }
    return true;
  }

  // Of mask and band together: kFull is exact, kSkip is never wrong.
  FAL_HOST_DEVICE TileKind classify(const Band& sequence, Range tile_rows, Range keys) const {
    const TileKind kind = sequence.classify(tile_rows, keys);
    if (kind == TileKind::kSkip) return kind;
    if (next_key(sequence, tile_rows, keys.begin) >= keys.end) return TileKind::kSkip;
    return kind == TileKind::kFull && all_full(tile_rows, keys) ? kind : TileKind::kPartial;
  }

  // Bit t: row p of the mask sees key j + t, for n <= 32 keys of one block with that rule.
  FAL_HOST_DEVICE uint32_t rule_word(int32_t rule, int32_t p, int32_t j, int32_t n) const {
    uint32_t word = low_bits(n);
    if (rule & BlockRule::kBand) {
      const Range seen = band.keys_of(p);
      word &= low_bits(seen.end - j) & ~low_bits(seen.begin - j);
    }
    if (rule & BlockRule::kDocuments) {
      const int32_t document = documents_q[p];
      for (int32_t t = 0; t < n; ++t) {
        if (documents_k[j + t] != document) word &= ~(1u << t);
      }
    }
    if (rule & BlockRule::kBitmap) {
      const int32_t words = ceil_div(block_k, 32), at = j % block_k, bit = at % 32;
      const int64_t line = static_cast<int64_t>(rule >> BlockRule::kBitmapShift) * block_q;
      const uint32_t* row = bitmaps + (line + p % block_q) * words + at / 32;
      uint32_t bits = row[0] >> bit;
      if (bit && at / 32 + 1 < words) bits |= row[1] << (32 - bit);
      word &= bits;
    }
    return word;
  }

  // Bit t: row i of the sequence sees key j + t by the mask alone, for 32 keys of any blocks.
  FAL_HOST_DEVICE uint32_t visible_word(int32_t i, int32_t j) const {
    const int32_t p = i + row_offset;
    if (p < 0 || p >= seqlen_q) return 0;
    uint32_t word = 0;
    const int32_t end = min_int(j + 32, seqlen_k);
    for (int32_t key = j; key < end;) {
      const int32_t c = key / block_k, n = min_int((c + 1) * block_k, end) - key;
      const int32_t rule = rule_of(p / block_q, c);
      if (rule != kNone) word |= rule_word(rule, p, key, n) << (key - j);
      key += n;
    }
    return word;
  }
  FAL_HOST_DEVICE bool visible(int32_t i, int32_t j) const { return visible_word(i, j) & 1u; }
};

}  // namespace fal
