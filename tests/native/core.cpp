// csrc/core for Python: each function takes arrays and answers for all of them at once, so that
// tests/test_core.py can ask about thousands of shapes. No logic of its own.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <vector>

#include "csrc/core/convert.h"
#include "csrc/core/dispatch.h"
#include "csrc/core/kv.h"
#include "csrc/core/online_softmax.h"
#include "csrc/core/philox.h"
#include "csrc/core/rotary.h"
#include "csrc/core/score_mod.h"
#include "csrc/core/tiles.h"

namespace py = pybind11;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;
using Ints = Array<int32_t>;
using Floats = Array<float>;
using MaybeInts = std::optional<Ints>;

template <class T>
Array<T> array2(py::ssize_t rows, py::ssize_t columns) {
  return Array<T>(std::vector<py::ssize_t>{rows, columns});
}

const int32_t* data_or_null(const MaybeInts& a) { return a ? a->data() : nullptr; }

fal::Range range_at(const Ints& pairs, py::ssize_t n) { return {pairs.at(n, 0), pairs.at(n, 1)}; }

// (n, 2) from f(0), ..., f(n - 1)
template <class F>
Ints ranges(py::ssize_t n, F&& f) {
  Ints out = array2<int32_t>(n, 2);
  for (py::ssize_t k = 0; k < n; ++k) {
    const fal::Range range = f(k);
    out.mutable_at(k, 0) = range.begin;
    out.mutable_at(k, 1) = range.end;
  }
  return out;
}

// Every tile of a cursor: (n, 3) of begin, end, kind.
template <class Cursor>
Ints walk(Cursor cursor) {
  std::vector<fal::Tile> tiles;
  for (fal::Tile tile; cursor.next(&tile);) tiles.push_back(tile);
  Ints out = array2<int32_t>(static_cast<py::ssize_t>(tiles.size()), 3);
  for (size_t n = 0; n < tiles.size(); ++n) {
    out.mutable_at(n, 0) = tiles[n].range.begin;
    out.mutable_at(n, 1) = tiles[n].range.end;
    out.mutable_at(n, 2) = static_cast<int32_t>(tiles[n].kind);
  }
  return out;
}

void define_band(py::module_& m) {
  using fal::Band;
  py::class_<Band>(m, "Band")
      .def(py::init([](int32_t seqlen_q, int32_t seqlen_k, int32_t left, int32_t right) {
        return Band::make(seqlen_q, seqlen_k, {left, right});
      }))
      .def_readonly("left", &Band::left)
      .def_readonly("right", &Band::right)
      .def_property_readonly("shift", &Band::shift)
      .def_property_readonly("bounded", &Band::bounded)
      .def("visible",
           [](const Band& band) {
             Array<bool> out = array2<bool>(band.seqlen_q, band.seqlen_k);
             for (int32_t i = 0; i < band.seqlen_q; ++i) {
               for (int32_t j = 0; j < band.seqlen_k; ++j)
                 out.mutable_at(i, j) = band.visible(i, j);
             }
             return out;
           })
      .def("visible_at", &Band::visible)
      .def("keys_of",
           [](const Band& band, const Ints& i) {
             return ranges(i.size(), [&](py::ssize_t n) { return band.keys_of(i.at(n)); });
           })
      .def("keys_of_any",
           [](const Band& band, const Ints& rows) {
             return ranges(rows.shape(0),
                           [&](py::ssize_t n) { return band.keys_of_any(range_at(rows, n)); });
           })
      .def("keys_of_all",
           [](const Band& band, const Ints& rows) {
             return ranges(rows.shape(0),
                           [&](py::ssize_t n) { return band.keys_of_all(range_at(rows, n)); });
           })
      .def("rows_of_any",
           [](const Band& band, const Ints& keys) {
             return ranges(keys.shape(0),
                           [&](py::ssize_t n) { return band.rows_of_any(range_at(keys, n)); });
           })
      // kind of each (rows[a], keys[b])
      .def("classify", [](const Band& band, const Ints& rows, const Ints& keys) {
        Ints out = array2<int32_t>(rows.shape(0), keys.shape(0));
        for (py::ssize_t a = 0; a < rows.shape(0); ++a) {
          for (py::ssize_t b = 0; b < keys.shape(0); ++b) {
            out.mutable_at(a, b) =
                static_cast<int32_t>(band.classify(range_at(rows, a), range_at(keys, b)));
          }
        }
        return out;
      });
}

void define_tiles(py::module_& m) {
  using fal::Band;
  m.def("tiles_of_rows", [](const Band& band, int32_t begin, int32_t end, int32_t tile_keys) {
    const auto cursor = fal::DenseTilesOfRows::make(band, {begin, end}, tile_keys);
    return py::make_tuple(walk(cursor), cursor.count());
  });
  // Whether every row of the tile sees tile_keys keys from key `from` on.
  m.def("full_from",
        [](const Band& band, int32_t begin, int32_t end, int32_t tile_keys, int32_t from) {
          return fal::DenseTilesOfRows::make(band, {begin, end}, tile_keys).full(from);
        });
  m.def("tiles_of_keys", [](const Band& band, int32_t begin, int32_t end, int32_t tile_rows) {
    const auto cursor = fal::DenseTilesOfKeys::make(band, {begin, end}, tile_rows);
    return py::make_tuple(walk(cursor), cursor.count());
  });
}

void define_lengths(py::module_& m) {
  // (batch, 6): row_q, row_k, seqlen_q, seqlen_k, allocated_q, allocated_k
  m.def(
      "sequences",
      [](int32_t batch, int32_t seqlen_q, int32_t seqlen_k, const MaybeInts& cu_seqlens_q,
         const MaybeInts& cu_seqlens_k, const MaybeInts& seqused_q, const MaybeInts& seqused_k,
         const MaybeInts& leftpad_k) {
        const fal::Lengths lengths{seqlen_q,
                                   seqlen_k,
                                   data_or_null(cu_seqlens_q),
                                   data_or_null(cu_seqlens_k),
                                   data_or_null(seqused_q),
                                   data_or_null(seqused_k),
                                   data_or_null(leftpad_k)};
        Array<int64_t> out = array2<int64_t>(batch, 6);
        for (int32_t b = 0; b < batch; ++b) {
          const fal::Sequence s = lengths.sequence(b);
          const int64_t row[] = {s.row_q,
                                 s.row_k,
                                 s.seqlen_q,
                                 s.seqlen_k,
                                 lengths.allocated_q(b),
                                 lengths.allocated_k(b)};
          for (int c = 0; c < 6; ++c) out.mutable_at(b, c) = row[c];
        }
        return out;
      },
      py::arg("batch"), py::arg("seqlen_q"), py::arg("seqlen_k"), py::kw_only(),
      py::arg("cu_seqlens_q") = py::none(), py::arg("cu_seqlens_k") = py::none(),
      py::arg("seqused_q") = py::none(), py::arg("seqused_k") = py::none(),
      py::arg("leftpad_k") = py::none());
  m.def("kv_heads", [](int32_t heads_q, int32_t heads_k) {
    fal::Shape shape{};
    shape.heads_q = heads_q;
    shape.heads_k = heads_k;
    Ints out(heads_q);
    for (int32_t h = 0; h < heads_q; ++h) out.mutable_at(h) = shape.kv_head(h);
    return out;
  });
}

// Addresses in the middle of the address space that nothing ever reads.
constexpr uintptr_t kK = uintptr_t{1} << 61, kV = uintptr_t{1} << 62;

// (n, 2): element offsets of k_row(j) and v_row(j) from the views' bases.
template <class T, class Policy>
Array<int64_t> offsets(const Policy& policy, const Ints& rows) {
  Array<int64_t> out = array2<int64_t>(rows.size(), 2);
  const auto elements = [](const T* row, uintptr_t base) {
    return static_cast<int64_t>(reinterpret_cast<uintptr_t>(row) - base) /
           static_cast<int64_t>(sizeof(T));
  };
  for (py::ssize_t n = 0; n < rows.size(); ++n) {
    out.mutable_at(n, 0) = elements(policy.k_row(rows.at(n)), kK);
    out.mutable_at(n, 1) = elements(policy.v_row(rows.at(n)), kV);
  }
  return out;
}

fal::KeyValue key_value(const Array<int64_t>& k_strides, const Array<int64_t>& v_strides) {
  fal::KeyValue kv{};
  kv.k = {reinterpret_cast<void*>(kK), k_strides.at(0), k_strides.at(1), k_strides.at(2)};
  kv.v = {reinterpret_cast<void*>(kV), v_strides.at(0), v_strides.at(1), v_strides.at(2)};
  return kv;
}

template <class T>
void define_kv(py::module_& m, const std::string& suffix) {
  // Strides are (batch or page, row, head), in elements.
  m.def(("contiguous_offsets_" + suffix).c_str(),
        [](const Array<int64_t>& k_strides, const Array<int64_t>& v_strides, int64_t first_row,
           int32_t b, int32_t head, const Ints& rows) {
          const fal::Sequence sequence{0, first_row, 0, 0};
          return offsets<T>(
              fal::ContiguousKv<T>::make(key_value(k_strides, v_strides), sequence, b, head), rows);
        });
  m.def(("paged_offsets_" + suffix).c_str(),
        [](const Array<int64_t>& k_strides, const Array<int64_t>& v_strides, const Ints& table,
           int32_t page_size, int64_t first_slot, int32_t b, int32_t head, const Ints& rows) {
          fal::KeyValue kv = key_value(k_strides, v_strides);
          kv.pages = {table.data(), table.shape(1), page_size};
          const fal::Sequence sequence{0, first_slot, 0, 0};
          return offsets<T>(fal::PagedKv<T>::make(kv, sequence, b, head), rows);
        });
}

void define_score_mod(py::module_& m) {
  using fal::GeneralScoreMod;
  py::class_<GeneralScoreMod>(m, "GeneralScoreMod")
      .def(py::init([](float softcap, const std::optional<Floats>& slopes, int64_t batch_stride,
                       int32_t b, int32_t h, int32_t shift) {
        fal::ScoreOptions options{};
        options.softcap = softcap;
        options.alibi_slopes = slopes ? slopes->data() : nullptr;
        options.alibi_batch_stride = batch_stride;
        return GeneralScoreMod::make(options, b, h, shift);
      }))
      .def("value",
           [](const GeneralScoreMod& mod, const Floats& scaled, int32_t i, int32_t j, float bias) {
             Floats out(scaled.size());
             for (py::ssize_t n = 0; n < scaled.size(); ++n)
               out.mutable_at(n) = mod.value(scaled.at(n), i, j, bias);
             return out;
           })
      .def("derivative", [](const GeneralScoreMod& mod, const Floats& scaled) {
        Floats out(scaled.size());
        for (py::ssize_t n = 0; n < scaled.size(); ++n)
          out.mutable_at(n) = mod.derivative(scaled.at(n));
        return out;
      });
  m.def("no_score_mod", [](float scaled, int32_t i, int32_t j, float bias) {
    return py::make_tuple(fal::NoScoreMod{}.value(scaled, i, j, bias),
                          fal::NoScoreMod{}.derivative(scaled));
  });
  m.def("plain", [](float softcap, bool alibi, bool sinks, bool bias, uint32_t dropout_threshold) {
    float something = 0;
    fal::ScoreOptions options{};
    options.softcap = softcap;
    options.alibi_slopes = alibi ? &something : nullptr;
    options.sinks = sinks ? &something : nullptr;
    options.bias.data = bias ? &something : nullptr;
    options.dropout_threshold = dropout_threshold;
    return options.plain();
  });
}

void define_softmax(py::module_& m) {
  m.def("softmax_reference", py::vectorize(fal::softmax_reference));
  m.def("lse_reference", py::vectorize(fal::lse_reference));
  m.def("empty_state", [] {
    const auto state = fal::SoftmaxState::empty();
    return py::make_tuple(state.max, state.sum);
  });
  m.def("lse",
        py::vectorize([](float max, float sum) { return fal::SoftmaxState{max, sum}.lse(); }));
  m.def("inverse_sum", py::vectorize([](float max, float sum) {
          return fal::SoftmaxState{max, sum}.inverse_sum();
        }));
  // (n, 3): max, sum, alpha
  m.def("absorb_sink", [](const Floats& max, const Floats& sum, const Floats& sink) {
    Floats out = array2<float>(max.size(), 3);
    for (py::ssize_t n = 0; n < max.size(); ++n) {
      fal::SoftmaxState state{max.at(n), sum.at(n)};
      out.mutable_at(n, 2) = state.absorb_sink(sink.at(n));
      out.mutable_at(n, 0) = state.max;
      out.mutable_at(n, 1) = state.sum;
    }
    return out;
  });
  // (n, 3): a, b, lse
  m.def("merge_weights", [](const Floats& lse_a, const Floats& lse_b) {
    Floats out = array2<float>(lse_a.size(), 3);
    for (py::ssize_t n = 0; n < lse_a.size(); ++n) {
      const fal::MergeWeights w = fal::merge_weights(lse_a.at(n), lse_b.at(n));
      out.mutable_at(n, 0) = w.a;
      out.mutable_at(n, 1) = w.b;
      out.mutable_at(n, 2) = w.lse;
    }
    return out;
  });
}

void define_philox(py::module_& m) {
  // keys (n), counters (n, 4) -> (n, 4)
  m.def("philox4x32_7", [](const Array<uint64_t>& keys, const Array<uint32_t>& c) {
    Array<uint32_t> out = array2<uint32_t>(keys.size(), 4);
    for (py::ssize_t n = 0; n < keys.size(); ++n) {
      const fal::PhiloxBits bits =
          fal::philox4x32_7(keys.at(n), c.at(n, 0), c.at(n, 1), c.at(n, 2), c.at(n, 3));
      for (int w = 0; w < 4; ++w) out.mutable_at(n, w) = bits.word[w];
    }
    return out;
  });
  // The draw of every element of rows [i0, i0 + rows) x keys [j0, j0 + keys), asked element by
  // element through block() and draw_index().
  m.def("draws", [](uint64_t seed, uint32_t batch_head, uint32_t i0, uint32_t rows, uint32_t j0,
                    uint32_t keys) {
    const fal::Dropout dropout{seed, 0};
    Array<uint32_t> out = array2<uint32_t>(rows, keys);
    for (uint32_t i = 0; i < rows; ++i) {
      for (uint32_t j = 0; j < keys; ++j) {
        out.mutable_at(i, j) = dropout.block(batch_head, i0 + i, j0 + j)
                                   .half(fal::Dropout::draw_index(i0 + i, j0 + j));
      }
    }
    return out;
  });
  m.def("keeps", [](uint64_t seed, uint32_t threshold, uint32_t batch_head, uint32_t i0,
                    uint32_t rows, uint32_t j0, uint32_t keys) {
    const fal::Dropout dropout{seed, threshold};
    Array<bool> out = array2<bool>(rows, keys);
    for (uint32_t i = 0; i < rows; ++i) {
      for (uint32_t j = 0; j < keys; ++j)
        out.mutable_at(i, j) = dropout.keeps(batch_head, i0 + i, j0 + j);
    }
    return out;
  });
  // The draws of the 16 x 16 block at (i0, j0) as a tensor-core lane takes them: one block() a
  // lane, lane (g, c) owns rows {g, g + 8} x keys {2c, 2c + 1, 2c + 8, 2c + 9}, in the order of its
  // accumulator registers. -1 where no lane wrote, and each element must be written once.
  m.def("draws_by_lane", [](uint64_t seed, uint32_t batch_head, uint32_t i0, uint32_t j0) {
    const fal::Dropout dropout{seed, 0};
    Ints out = array2<int32_t>(16, 16);
    std::fill_n(out.mutable_data(), 256, -1);
    int writes = 0;
    for (uint32_t g = 0; g < 8; ++g) {
      for (uint32_t c = 0; c < 4; ++c) {
        const fal::PhiloxBits bits = dropout.block(batch_head, i0 + g, j0 + 2 * c);
        int32_t draw = 0;
        for (const uint32_t i : {g, g + 8}) {
          for (const uint32_t j : {2 * c, 2 * c + 1, 2 * c + 8, 2 * c + 9}) {
            out.mutable_at(i, j) = static_cast<int32_t>(bits.half(draw++));
            ++writes;
          }
        }
      }
    }
    return py::make_tuple(out, writes);
  });
  m.def("threshold_of", &fal::Dropout::threshold_of);
  m.def("keep_scale", [](uint32_t threshold) { return fal::Dropout{0, threshold}.keep_scale(); });
}

void define_dispatch(py::module_& m) {
  m.def("dispatch_int", [](int value) {
    std::vector<int> calls;
    const bool found = fal::dispatch_int<64, 128, 256>(value, [&](auto d) {
      static_assert(decltype(d)::value >= 64, "a compile-time value");
      calls.push_back(d.value);
    });
    return py::make_tuple(found, py::cast(calls));
  });
  m.def("dispatch_at_least", [](int value) {
    std::vector<int> calls;
    const bool found =
        fal::dispatch_at_least<64, 128, 256>(value, [&](auto d) { calls.push_back(d.value); });
    return py::make_tuple(found, py::cast(calls));
  });
  m.def("dispatch_bool", [](bool value) {
    std::vector<bool> calls;
    fal::dispatch_bool(value, [&](auto b) { calls.push_back(decltype(b)::value); });
    return calls;
  });
}

void define_convert(py::module_& m) {
  m.def("bfloat16_to_float", py::vectorize(fal::bfloat16_to_float));
  m.def("float_to_bfloat16", py::vectorize(fal::float_to_bfloat16));
  m.def("float16_to_float", py::vectorize(fal::float16_to_float));
  m.def("float_to_float16", py::vectorize(fal::float_to_float16));
  m.def("float8_e4m3_to_float", py::vectorize(fal::float8_e4m3_to_float));
  m.def("float_to_float8_e4m3", py::vectorize(fal::float_to_float8_e4m3));
  m.def("quantise_int8",
        py::vectorize([](float x) { return fal::quantise(x, fal::DType::kInt8); }));
  m.def("dequantise_int8",
        py::vectorize([](uint8_t x) { return fal::dequantise(x, fal::DType::kInt8); }));
  // One row x (head_dim) at each of `positions`: (positions, head_dim). cos, sin (table, pairs).
  m.def("rotate_row", [](const Floats& x, const Floats& cos, const Floats& sin, bool interleaved,
                         const Ints& positions) {
    const fal::Rotary rotary{cos.data(),
                             sin.data(),
                             cos.shape(1),
                             static_cast<int32_t>(cos.shape(1)),
                             static_cast<int32_t>(cos.shape(0)),
                             interleaved,
                             fal::DType::kFloat32};
    Floats out = array2<float>(positions.size(), x.size());
    for (py::ssize_t n = 0; n < positions.size(); ++n) {
      for (int32_t d = 0; d < x.size(); ++d) {
        out.mutable_at(n, d) =
            fal::rotated_element(rotary, x.data(), fal::DType::kFloat32, 0, positions.at(n), d);
      }
    }
    return out;
  });
}

}  // namespace

PYBIND11_MODULE(core, m) {
  define_band(m);
  define_tiles(m);
  define_lengths(m);
  define_kv<float>(m, "float");
  define_kv<int8_t>(m, "int8");
  define_score_mod(m);
  define_softmax(m);
  define_philox(m);
  define_dispatch(m);
  define_convert(m);
  m.attr("SKIP") = static_cast<int>(fal::TileKind::kSkip);
  m.attr("FULL") = static_cast<int>(fal::TileKind::kFull);
  m.attr("PARTIAL") = static_cast<int>(fal::TileKind::kPartial);
}
