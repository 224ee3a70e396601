// csrc/core/block_mask.h and the block-sparse cursors for Python: a mask of one table, asked in the
// coordinates of one sequence. No logic of its own.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <vector>

#include "csrc/core/tiles.h"

namespace py = pybind11;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;
using Ints = Array<int32_t>;

// Owns the arrays that a fal::BlockMask points to.
struct Mask {
  Ints row_start, column, row_rule, column_start, row, column_rule, bands, documents_q, documents_k;
  Array<uint32_t> bitmaps;
  fal::BlockMask mask{};

  Mask(std::pair<int32_t, int32_t> seqlens, std::pair<int32_t, int32_t> block, int32_t batch,
       int32_t heads, Ints row_start_, Ints column_, Ints row_rule_, Ints column_start_, Ints row_,
       Ints column_rule_, Ints bands_, Ints documents_q_, Ints documents_k_,
       Array<uint32_t> bitmaps_)
      : row_start(row_start_),
        column(column_),
        row_rule(row_rule_),
        column_start(column_start_),
        row(row_),
        column_rule(column_rule_),
        bands(bands_),
        documents_q(documents_q_),
        documents_k(documents_k_),
        bitmaps(bitmaps_) {
    mask.seqlen_q = seqlens.first;
    mask.seqlen_k = seqlens.second;
    mask.block_q = block.first;
    mask.block_k = block.second;
    mask.batch = batch;
    mask.heads = heads;
    mask.rows = {row_start.data(), column.data(), row_rule.data()};
    mask.columns = {column_start.data(), row.data(), column_rule.data()};
    mask.bands = bands.data();
    mask.documents_q = documents_q.size() ? documents_q.data() : nullptr;
    mask.documents_k = documents_k.size() ? documents_k.data() : nullptr;
    mask.bitmaps = bitmaps.size() ? bitmaps.data() : nullptr;
  }
};

struct Head {
  fal::Band band;
  fal::HeadMask mask;

  fal::Sight sight() const { return {band, true, mask}; }
};

std::pair<int32_t, int32_t> kind_and_rule(const fal::Tile& tile) {
  return {static_cast<int32_t>(tile.kind), tile.rule};
}

// (n, 4): begin, end, kind, rule
template <class Cursor>
Ints walk(Cursor cursor) {
  std::vector<fal::Tile> tiles;
  for (fal::Tile tile; cursor.next(&tile);) tiles.push_back(tile);
  Ints out(std::vector<py::ssize_t>{static_cast<py::ssize_t>(tiles.size()), 4});
  for (size_t n = 0; n < tiles.size(); ++n) {
    out.mutable_at(n, 0) = tiles[n].range.begin;
    out.mutable_at(n, 1) = tiles[n].range.end;
    out.mutable_at(n, 2) = static_cast<int32_t>(tiles[n].kind);
    out.mutable_at(n, 3) = tiles[n].rule;
  }
  return out;
}

}  // namespace

PYBIND11_MODULE(block_mask, m) {
  py::class_<Mask>(m, "Mask").def(
      py::init<std::pair<int32_t, int32_t>, std::pair<int32_t, int32_t>, int32_t, int32_t, Ints,
               Ints, Ints, Ints, Ints, Ints, Ints, Ints, Ints, Array<uint32_t>>());
  py::class_<Head>(m, "Head")
      .def(py::init([](const Mask& mask, int32_t b, int32_t h, int32_t seqlen_q, int32_t seqlen_k,
                       int32_t left, int32_t right) {
             const fal::Band band = fal::Band::make(seqlen_q, seqlen_k, {left, right});
             return Head{band, fal::HeadMask::make(mask.mask, b, h, band)};
           }),
           py::keep_alive<1, 2>())
      .def("visible",
           [](const Head& head) {
             Array<bool> out(std::vector<py::ssize_t>{head.band.seqlen_q, head.band.seqlen_k});
             for (int32_t i = 0; i < head.band.seqlen_q; ++i) {
               for (int32_t j = 0; j < head.band.seqlen_k; ++j) {
                 out.mutable_at(i, j) = head.mask.visible(i, j);
               }
             }
             return out;
           })
      .def("visible_word",
           [](const Head& head, int32_t i, int32_t j) { return head.mask.visible_word(i, j); })
      // Of the single-rule tile: the word of n keys.
      .def("rule_word",
           [](const Head& head, int32_t rule, int32_t i, int32_t j, int32_t n) {
             return head.mask.rule_word(rule, i + head.mask.row_offset, j, n);
           })
      .def(
          "classify",
          [](const Head& head, std::pair<int32_t, int32_t> rows, std::pair<int32_t, int32_t> keys) {
            return static_cast<int32_t>(head.mask.classify(head.band, {rows.first, rows.second},
                                                           {keys.first, keys.second}));
          })
      // By tables of rows and of columns: (kind, rule).
      .def(
          "tile_of_keys",
          [](const Head& head, std::pair<int32_t, int32_t> rows, std::pair<int32_t, int32_t> keys) {
            return kind_and_rule(
                head.sight().tile_of_keys({rows.first, rows.second}, {keys.first, keys.second}));
          })
      .def(
          "tile_of_rows",
          [](const Head& head, std::pair<int32_t, int32_t> rows, std::pair<int32_t, int32_t> keys) {
            return kind_and_rule(
                head.sight().tile_of_rows({rows.first, rows.second}, {keys.first, keys.second}));
          })
      .def("word", [](const Head& head, int32_t rule, int32_t i,
                      int32_t j) { return head.sight().word(rule, i, j); })
      .def("next_key",
           [](const Head& head, int32_t begin, int32_t end, int32_t from) {
             return head.mask.next_key(head.band, {begin, end}, from);
           })
      .def("next_row",
           [](const Head& head, int32_t begin, int32_t end, int32_t from) {
             return head.mask.next_row(head.band, {begin, end}, from);
           })
      .def("tiles_of_rows",
           [](const Head& head, int32_t begin, int32_t end, int32_t tile_keys) {
             return walk(
                 fal::BlockSparseTilesOfRows::make(head.band, {begin, end}, tile_keys, head.mask));
           })
      .def("tiles_of_keys", [](const Head& head, int32_t begin, int32_t end, int32_t tile_rows) {
        return walk(
            fal::BlockSparseTilesOfKeys::make(head.band, {begin, end}, tile_rows, head.mask));
      });
  m.attr("SKIP") = static_cast<int>(fal::TileKind::kSkip);
  m.attr("FULL") = static_cast<int>(fal::TileKind::kFull);
  m.attr("PARTIAL") = static_cast<int>(fal::TileKind::kPartial);
  m.attr("MIXED") = static_cast<int>(fal::BlockRule::kMixed);
  m.attr("NONE") = static_cast<int>(fal::HeadMask::kNone);
}
