// The brute-force part of the core's tests as a program, so that it runs under AddressSanitizer and
// UndefinedBehaviorSanitizer with nothing else in the process: what the definitions say, and that
// no index array is read past its end and no integer overflows. Exits with 1 at the first
// difference.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <memory>
#include <vector>

#include "csrc/core/dispatch.h"
#include "csrc/core/kv.h"
#include "csrc/core/online_softmax.h"
#include "csrc/core/philox.h"
#include "csrc/core/score_mod.h"
#include "csrc/core/tiles.h"

using namespace fal;

namespace {

int64_t checks = 0;

#define REQUIRE(condition)                                                          \
  do {                                                                              \
    ++checks;                                                                       \
    if (!(condition)) {                                                             \
      fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition); \
      exit(1);                                                                      \
    }                                                                               \
  } while (0)

// The definition, in 64 bits.
bool defined_visible(int64_t seqlen_q, int64_t seqlen_k, Window window, int64_t i, int64_t j) {
  const int64_t diagonal = i + seqlen_k - seqlen_q;
  return (window.left < 0 || diagonal - window.left <= j) &&
         (window.right < 0 || j <= diagonal + window.right);
}

template <class F>
void for_each_small_band(F&& f) {
  for (int32_t seqlen_q = 0; seqlen_q <= 7; ++seqlen_q) {
    for (int32_t seqlen_k = 0; seqlen_k <= 7; ++seqlen_k) {
      for (const int32_t left : {-1, 0, 1, 2, 4, 9}) {
        for (const int32_t right : {-1, 0, 1, 2, 4, 9}) {
          const Window window{left, right};
          f(Band::make(seqlen_q, seqlen_k, window), window);
        }
      }
    }
  }
}

void test_band() {
  for_each_small_band([](const Band& band, Window window) {
    const int32_t seqlen_q = band.seqlen_q, seqlen_k = band.seqlen_k;
    const auto seen = [&](int32_t i, int32_t j) {
      return defined_visible(seqlen_q, seqlen_k, window, i, j);
    };
    for (int32_t i = 0; i < seqlen_q; ++i)
      for (int32_t j = 0; j < seqlen_k; ++j) REQUIRE(band.visible(i, j) == seen(i, j));
    for (int32_t r0 = 0; r0 < seqlen_q; ++r0) {
      for (int32_t r1 = r0 + 1; r1 <= seqlen_q; ++r1) {
        for (int32_t k0 = 0; k0 < seqlen_k; ++k0) {
          for (int32_t k1 = k0 + 1; k1 <= seqlen_k; ++k1) {
            int32_t count = 0;
            for (int32_t i = r0; i < r1; ++i)
              for (int32_t j = k0; j < k1; ++j) count += seen(i, j);
            const TileKind kind = count == 0                       ? TileKind::kSkip
                                  : count == (r1 - r0) * (k1 - k0) ? TileKind::kFull
                                                                   : TileKind::kPartial;
            REQUIRE(band.classify({r0, r1}, {k0, k1}) == kind);
          }
        }
      }
    }
  });
}

void test_band_of_long_sequences() {
  constexpr int32_t kMax = Band::kMaxLength, kHuge = 2147483647;
  const int32_t lengths[] = {1, 2, 17, kMax / 2, kMax - 1, kMax};
  const int32_t sides[] = {-1, 0, 1, 1000, kMax - 1, kMax, kMax + 1, kHuge - 1, kHuge};
  for (const int32_t seqlen_q : lengths) {
    for (const int32_t seqlen_k : lengths) {
      for (const int32_t left : sides) {
        for (const int32_t right : sides) {
          const Window window{left, right};
          const Band band = Band::make(seqlen_q, seqlen_k, window);
          for (const int32_t i : {0, seqlen_q / 2, seqlen_q - 1}) {
            const Range keys = band.keys_of(i);
            for (const int32_t j : {0, seqlen_k / 2, seqlen_k - 1, keys.begin - 1, keys.begin,
                                    keys.end - 1, keys.end}) {
              if (j < 0 || j >= seqlen_k) continue;
              REQUIRE(band.visible(i, j) == defined_visible(seqlen_q, seqlen_k, window, i, j));
              const Range rows = band.rows_of_any({j, j + 1});
              REQUIRE(rows.contains(i) == band.visible(i, j));
              const TileKind kind = band.classify({i, i + 1}, {j, j + 1});
              REQUIRE(kind == (band.visible(i, j) ? TileKind::kFull : TileKind::kSkip));
            }
          }
          const Range rows{0, seqlen_q}, keys{0, seqlen_k};
          REQUIRE(band.keys_of_any(rows).size() <= seqlen_k);
          REQUIRE(band.keys_of_all(rows).size() <= band.keys_of_any(rows).size());
          REQUIRE(band.rows_of_any(keys).size() <= seqlen_q);
          // The last few tiles of each kind of cursor: large starts, no overflow at the end.
          Tile tile{};
          auto of_rows = DenseTilesOfRows::make(band, {seqlen_q - 1, seqlen_q}, kMax / 2 + 3);
          const int32_t count = of_rows.count();
          int32_t walked = 0;
          for (; of_rows.next(&tile); ++walked) REQUIRE(tile.range.end <= seqlen_k);
          REQUIRE(walked == count);
        }
      }
    }
  }
}

// Of a checkerboard of blocks, in exactly sized arrays.
struct Lines {
  std::unique_ptr<int32_t[]> start, index, rule;

  BlockCsr csr() const { return {start.get(), index.get(), rule.get()}; }
};

Lines every_second_block(int32_t lines, int32_t blocks) {
  std::vector<int32_t> listed;
  Lines out{std::unique_ptr<int32_t[]>(new int32_t[lines + 1]), nullptr, nullptr};
  for (int32_t line = 0; line < lines; ++line) {
    out.start[line] = static_cast<int32_t>(listed.size());
    for (int32_t n = line % 2; n < blocks; n += 2) listed.push_back(n);
  }
  out.start[lines] = static_cast<int32_t>(listed.size());
  out.index.reset(new int32_t[listed.size()]);
  out.rule.reset(new int32_t[listed.size()]());
  for (size_t n = 0; n < listed.size(); ++n) out.index[n] = listed[n];
  return out;
}

void test_cursors() {
  for_each_small_band([](const Band& band, Window) {
    for (const int32_t outer : {1, 3, 4}) {
      for (const int32_t inner : {1, 2, 4, 8}) {
        std::vector<int> visits(band.seqlen_q * band.seqlen_k + 1);
        const auto visit = [&](Range rows, Range keys) {
          for (int32_t i = rows.begin; i < rows.end; ++i)
            for (int32_t j = keys.begin; j < keys.end; ++j) ++visits.at(i * band.seqlen_k + j);
        };
        const auto require_each_once = [&] {
          for (int32_t i = 0; i < band.seqlen_q; ++i) {
            for (int32_t j = 0; j < band.seqlen_k; ++j) {
              int& n = visits.at(i * band.seqlen_k + j);
              REQUIRE(n <= 1 && (n == 1 || !band.visible(i, j)));
              n = 0;
            }
          }
        };
        Tile tile{};
        for (int32_t begin = 0; begin < band.seqlen_q; begin += outer) {
          const Range rows{begin, min_int(begin + outer, band.seqlen_q)};
          auto cursor = DenseTilesOfRows::make(band, rows, inner);
          while (cursor.next(&tile)) visit(rows, tile.range);
        }
        require_each_once();
        for (int32_t begin = 0; begin < band.seqlen_k; begin += outer) {
          const Range keys{begin, min_int(begin + outer, band.seqlen_k)};
          auto cursor = DenseTilesOfKeys::make(band, keys, inner);
          while (cursor.next(&tile)) visit(tile.range, keys);
        }
        require_each_once();

        // Every second block, in exactly sized heap arrays: a read past either end is caught.
        const int32_t block_rows = outer, block_keys = 2;
        const Lines by_row = every_second_block(ceil_div(band.seqlen_q, block_rows),
                                                ceil_div(band.seqlen_k, block_keys));
        const Lines by_key = every_second_block(ceil_div(band.seqlen_k, block_keys),
                                                ceil_div(band.seqlen_q, block_rows));
        const std::unique_ptr<int32_t[]> bands(new int32_t[2]{-1, -1});
        const BlockMask mask{
            band.seqlen_q, band.seqlen_k, block_rows,  block_keys, 1,       1,
            by_row.csr(),  by_key.csr(),  bands.get(), nullptr,    nullptr, nullptr};
        const HeadMask head = HeadMask::make(mask, 3, 4, band);
        for (int32_t begin = 0; begin < band.seqlen_q; begin += outer) {
          const Range rows{begin, min_int(begin + outer, band.seqlen_q)};
          auto cursor = BlockSparseTilesOfRows::make(band, rows, inner, head);
          while (cursor.next(&tile)) visit(rows, tile.range);
        }
        const auto require_listed_once = [&] {
          for (int32_t i = 0; i < band.seqlen_q; ++i) {
            for (int32_t j = 0; j < band.seqlen_k; ++j) {
              const bool listed = (i / block_rows + j / block_keys) % 2 == 0;
              int& n = visits.at(i * band.seqlen_k + j);
              REQUIRE(head.visible(i, j) == listed && n <= 1);
              REQUIRE(n == 1 || !listed || !band.visible(i, j));
              n = 0;
            }
          }
        };
        require_listed_once();
        for (int32_t begin = 0; begin < band.seqlen_k; begin += inner) {
          const Range keys{begin, min_int(begin + inner, band.seqlen_k)};
          auto cursor = BlockSparseTilesOfKeys::make(band, keys, outer, head);
          while (cursor.next(&tile)) visit(tile.range, keys);
        }
        require_listed_once();
      }
    }
  });
}

void test_lengths() {
  const std::unique_ptr<int32_t[]> cu(new int32_t[4]{0, 5, 5, 12});
  const std::unique_ptr<int32_t[]> used(new int32_t[3]{3, 4, 9});
  const std::unique_ptr<int32_t[]> leftpad(new int32_t[3]{1, 2, 30});
  const Lengths lengths{7, 7, cu.get(), cu.get(), used.get(), used.get(), leftpad.get()};
  const Sequence expected[] = {{0, 1, 3, 2}, {5, 7, 0, 0}, {5, 35, 7, 0}};
  for (int32_t b = 0; b < 3; ++b) {
    const Sequence s = lengths.sequence(b);
    REQUIRE(s.row_q == expected[b].row_q && s.row_k == expected[b].row_k);
    REQUIRE(s.seqlen_q == expected[b].seqlen_q && s.seqlen_k == expected[b].seqlen_k);
    REQUIRE(lengths.allocated_q(b) == cu[b + 1] - cu[b]);
    REQUIRE(lengths.allocated_k(b) == cu[b + 1] - cu[b]);
  }
}

// Real memory, pages in any order, a block table that ends right after the last page in use.
void test_paged_kv() {
  constexpr int32_t kHeads = 2, kDim = 3, kPages = 7;
  for (const int32_t page_size : {1, 5, 16}) {
    for (int32_t length = 1; length <= 6 * page_size && length <= 40; ++length) {
      for (const int32_t leftpad : {0, 1, length / 2}) {
        const int32_t used_pages = ceil_div(length, page_size);
        if (leftpad >= length || used_pages > kPages) continue;
        std::vector<float> memory(kPages * page_size * kHeads * kDim, -1.f);
        std::unique_ptr<int32_t[]> table(new int32_t[used_pages]);
        for (int32_t p = 0; p < used_pages; ++p) table[p] = (3 * p + 5) % kPages;
        const int64_t row = kHeads * kDim, page = page_size * row;
        for (int32_t slot = 0; slot < length; ++slot)
          memory.at(table[slot / page_size] * page + slot % page_size * row + kDim) =
              static_cast<float>(slot);
        const AnyView view{memory.data(), page, row, kDim};
        KeyValue kv{};
        kv.k = kv.v = view;
        kv.pages = {table.get(), used_pages, page_size};
        const Sequence sequence{0, leftpad, 0, length - leftpad};
        const auto policy = PagedKv<float>::make(kv, sequence, 0, /*head_k=*/1);
        for (int32_t j = 0; j < sequence.seqlen_k; ++j) {
          REQUIRE(*policy.k_row(j) == static_cast<float>(leftpad + j));
          REQUIRE(policy.v_row(j) == policy.k_row(j));
        }
      }
    }
  }
}

void test_contiguous_kv() {
  constexpr int32_t kBatch = 2, kRows = 5, kHeads = 3, kDim = 4;
  std::vector<float> k(kBatch * kRows * kHeads * kDim), v(k.size());
  for (size_t n = 0; n < k.size(); ++n) {
    k[n] = static_cast<float>(n);
    v[n] = -static_cast<float>(n);
  }
  KeyValue kv{};
  kv.k = {k.data(), kRows * kHeads * kDim, kHeads * kDim, kDim};
  kv.v = {v.data(), kRows * kHeads * kDim, kHeads * kDim, kDim};
  for (int32_t b = 0; b < kBatch; ++b) {
    for (int32_t h = 0; h < kHeads; ++h) {
      for (int32_t first = 0; first < kRows; ++first) {
        const auto policy = ContiguousKv<float>::make(kv, {0, first, 0, kRows - first}, b, h);
        for (int32_t j = 0; j < kRows - first; ++j) {
          const int32_t at = ((b * kRows + first + j) * kHeads + h) * kDim;
          REQUIRE(*policy.k_row(j) == static_cast<float>(at));
          REQUIRE(*policy.v_row(j) == -static_cast<float>(at));
        }
      }
    }
  }
}

void test_arithmetic() {
  constexpr float kInf = FAL_INFINITY, kNan = __builtin_nanf("");
  const float values[] = {-kInf, -3.4e38f, -1.f, -0.f, 0.f, 1e-45f, 2.f, 3.4e38f, kInf, kNan};
  for (const float a : values) {
    for (const float b : values) {
      const MergeWeights x = merge_weights(a, b), y = merge_weights(b, a);
      REQUIRE(x.a == y.b || (isnan(x.a) && isnan(y.b)));
      REQUIRE(isnan(x.lse) == (isnan(a) || isnan(b)));
      SoftmaxState state = SoftmaxState::empty();
      state.absorb_sink(a);
      state.absorb_sink(b);
      const bool finite_or_nothing = a < kInf && b < kInf;  // false for a NaN
      REQUIRE(isnan(state.lse()) == !finite_or_nothing);
    }
    for (const float cap : {0.f, 20.f}) {
      const GeneralScoreMod mod{cap, cap > 0 ? 1 / cap : 0, 0.5f, Band::kMaxLength - 1};
      REQUIRE(isnan(mod.value(a, 0, 0, 1.f)) == isnan(a));
      REQUIRE(isnan(mod.derivative(a)) == (isnan(a) && cap > 0));
    }
  }
}

void test_dropout() {
  const PhiloxBits zeros = philox4x32_7(0, 0, 0, 0, 0);
  const uint32_t expected[] = {0x5f6fb709u, 0x0d893f64u, 0x4f121f81u, 0x4f730a48u};
  for (int w = 0; w < 4; ++w) REQUIRE(zeros.word[w] == expected[w]);
  const Dropout dropout{~uint64_t{0}, 32768};
  for (uint32_t i0 : {0u, 48u, (1u << 30) - 16}) {
    for (uint32_t j0 : {0u, 16u, (1u << 30) - 16}) {
      int owners[16][16] = {};
      for (uint32_t g = 0; g < 8; ++g) {
        for (uint32_t c = 0; c < 4; ++c) {
          const PhiloxBits bits = dropout.block(7, i0 + g, j0 + 2 * c);
          int draw = 0;
          for (const uint32_t i : {g, g + 8}) {
            for (const uint32_t j : {2 * c, 2 * c + 1, 2 * c + 8, 2 * c + 9}) {
              REQUIRE((bits.half(draw++) >= dropout.threshold) == dropout.keeps(7, i0 + i, j0 + j));
              ++owners[i][j];
            }
          }
        }
      }
      for (const auto& row : owners)
        for (const int n : row) REQUIRE(n == 1);
    }
  }
  for (int n = 0; n < 1000; ++n) {
    const double probability = n / 1000.0;
    const double applied = Dropout::threshold_of(probability) / 65536.0;
    REQUIRE(applied - probability <= 1.0 / 131072 && probability - applied <= 1.0 / 131072);
  }
}

void test_dispatch() {
  for (int value = 0; value < 300; ++value) {
    int calls = 0, got = 0;
    const bool found = dispatch_at_least<64, 128, 256>(value, [&](auto d) {
      ++calls;
      got = d.value;
    });
    REQUIRE(found == (value <= 256) && calls == found && got >= (found ? value : 0));
    calls = 0;
    REQUIRE((dispatch_int<64, 128, 256>(value, [&](auto) { ++calls; })) == (calls == 1));
    REQUIRE(calls == (value == 64 || value == 128 || value == 256));
  }
}

// What the sanitizers must stop: shows that they are on.
int plant_signed_overflow(int argc) {
  int32_t length = 2147483645 + argc;  // argc is 2
  return ++length > 0;
}

int plant_read_past_end(int argc) {
  const std::unique_ptr<int32_t[]> table(new int32_t[argc]());
  return table[argc];
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && !strcmp(argv[1], "signed-overflow")) return plant_signed_overflow(argc);
  if (argc == 2 && !strcmp(argv[1], "read-past-end")) return plant_read_past_end(argc);
  test_band();
  test_band_of_long_sequences();
  test_cursors();
  test_lengths();
  test_paged_kv();
  test_contiguous_kv();
  test_arithmetic();
  test_dropout();
  test_dispatch();
  printf("%lld checks hold\n", static_cast<long long>(checks));
  return 0;
}
