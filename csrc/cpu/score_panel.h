// From the products of one panel of query rows (lanes) with a tile of keys to softmax arguments in
// base 2: visibility and score modifications, the vector twin of core/score_mod.h. Shared by
// forward and backward.
#pragma once

#include "../core/philox.h"
#include "../core/score_mod.h"
#include "pack.h"

namespace fal::cpu::FAL_CPU_ISA {

// True when S is more than a positive factor times Q K^T (which a maximum commutes with).
FAL_INLINE bool modifies_scores(const ScoreOptions& score) {
  return score.softcap > 0.f || score.alibi_slopes || score.bias.data || !(score.scale > 0.f);
}

// Keys of a tile that one panel of query rows works on, relative to the tile's first key.
struct PanelRange {
  int begin, end;                    // computed: multiples of a unit; what is not visible is masked
  bool masked;                       // something in [begin, end) is not visible
  int fill_begin = 0, fill_end = 0;  // zeros are needed outside [begin, end) as far as this
};

// `reach` query rows beyond the panel read this panel's P on both sides: kRows - 1 for the vector
// products, because the row groups of O = P V straddle panels and read P up to the last key that
// any of their rows sees. Where the panel's own rows do not see that far, P is 0.
FAL_INLINE PanelRange panel_range(const Band& band, Range rows, Range keys, int unit, int reach) {
  const Range reached{max_int(0, rows.begin - reach), min_int(band.seqlen_q, rows.end + reach)};
  const Range fill = intersect(band.keys_of_any(reached), keys);
  if (fill.empty()) return {0, 0, false, 0, 0};
  const Range any = intersect(band.keys_of_any(rows), keys);
  const int begin = any.empty() ? 0 : round_down(any.begin - keys.begin, unit);
  const int end = any.empty() ? 0 : round_up(any.end - keys.begin, unit);
  const Range all = band.keys_of_all(rows);
  const bool masked =
      keys.begin + begin < all.begin || keys.begin + end > all.end || end > keys.size();
  return {begin, end, masked, fill.begin - keys.begin, fill.end - keys.begin};
}

// Zeros in [fill_begin, fill_end) outside [begin, end), in whole words of keys.
template <class Word>
FAL_INLINE void fill_panel(PanelRange range, Word* p) {
  const auto zero = [p](int begin, int end) {
    for (int r = begin / kPerWord<Word>; r < words<Word>(end); ++r) {
      memset(p + r * kScoreStride, 0, sizeof(Word) * kPanel);
    }
  };
  zero(range.fill_begin, min_int(range.begin, range.fill_end));
  zero(max_int(range.end, range.fill_begin), range.fill_end);
}

// The same for words along query rows, from the panel's first one: [key][words of lanes].
template <class Word>
FAL_INLINE void fill_rows(PanelRange range, Word* p) {
  for (int r = range.fill_begin; r < range.fill_end; ++r) {
    if (r >= range.begin && r < range.end) continue;
    memset(p + r * kScoreStride, 0, sizeof(Word) * kPanel / kPerWord<Word>);
  }
}

// Lane-wise visibility: key r of the tile is visible to a lane iff begin <= r < end and, where a
// block mask hides something, its bit is set.
struct PanelMask {
  Int begin[kVectors], end[kVectors];
  const int32_t* words = nullptr;  // [key / 32][lane], bit key % 32; null = the band alone

  FAL_INLINE static PanelMask make(const Band& band, int first_row, Range keys) {
    PanelMask mask;
    for (int v = 0; v < kVectors; ++v) {
      const Int row = iota() + (first_row + v * kLanes + band.shift() - keys.begin);
      mask.begin[v] = band.left < 0 ? set1(0) : row - band.left;
      mask.end[v] = set1(keys.size());
      if (band.right >= 0) mask.end[v] = min(mask.end[v], row + (band.right + 1));
    }
    return mask;
  }
  FAL_INLINE Mask visible(int v, int r) const {
    const Int key = set1(r);
    const Mask within = less_equal(begin[v], key) & less(key, end[v]);
    if (!words) return within;
    const Int bit = (load(words + r / 32 * kPanel + v * kLanes) >> (r % 32)) & 1;
    return within & less(set1(0), bit);
  }
};

// S^T[key][lane] of one panel: rows of K times the Q^T panel, masked, and the running maximum
// beside it. The same for dP^T = V dO^T, which wants neither.
template <bool kMasked, bool kMaximum, class Word>
FAL_INLINE void score_panel(const Word* k, int64_t k_ld, const Word* q_panel, int depth,
                            PanelRange range, const PanelMask& mask, float* scores,
                            Float (&running_max)[kVectors]) {
  for (int r = range.begin; r < range.end; r += kRows) {
    Float c[kRows][kVectors];
    clear(c);
    multiply_add(c, k + r * k_ld, k_ld, 1, q_panel, depth);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        if constexpr (kMasked)
          c[i][v] = select(mask.visible(v, r + i), c[i][v], set1(-FAL_INFINITY));
        store(scores + (r + i) * kScoreStride + v * kLanes, c[i][v]);
        if constexpr (kMaximum) running_max[v] = max(c[i][v], running_max[v]);
      }
    }
  }
}

// The options of one (batch entry, query head) as vectors use them.
struct PanelScoreMod {
  GeneralScoreMod mod;
  float scale;
  const float* bias;  // panels [row / kPanel][keys][kPanel] of this tile; null = none

  // From scale * q.k of (lane's row, key) to the softmax's argument in base 2. rows = first row of
  // the vector + lane + shift - key.
  FAL_INLINE Float value(Float scaled, Int distance, Float bias_value) const {
    if (mod.softcap > 0.f) scaled = tanh(scaled * mod.inverse_softcap) * mod.softcap;
    scaled += bias_value;
    if (mod.slope != 0.f) scaled -= abs(to_float(distance)) * mod.slope;
    return scaled * kLog2E;
  }
  FAL_INLINE Float derivative(Float scaled) const {
    const Float t = tanh(scaled * mod.inverse_softcap);
    return 1.f - t * t;
  }
};

// The general path: modifies and masks the products that score_panel<false, false> stored.
//   first_row   row of the panel's lane 0 (within the sequence)
//   scores      [key - range.begin][kStride], unscaled
//   bend        the same; receives d value / d scaled; null unless softcap is on and needed
template <int kStride>
static FAL_NOINLINE void modify_panel(const PanelScoreMod& mod, int first_row, int panel_row,
                                      Range keys, PanelRange range, const PanelMask& mask,
                                      float* scores, float* bend, Float (&running_max)[kVectors]) {
  const float* bias = mod.bias ? mod.bias + static_cast<int64_t>(panel_row) * keys.size() : nullptr;
  for (int r = range.begin; r < range.end; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      const int at = (r - range.begin) * kStride + v * kLanes;
      const Int distance = iota() + (first_row + v * kLanes + mod.mod.shift - keys.begin - r);
      const bool has_bias = bias && r < keys.size();
      const Float scaled = load(scores + at) * mod.scale;
      if (bend) {
        const Float d = mod.derivative(scaled);
        store(bend + at, range.masked ? keep(mask.visible(v, r), d) : d);
      }
      Float x =
          mod.value(scaled, distance, has_bias ? load(bias + r * kPanel + v * kLanes) : set1(0.f));
      if (range.masked) x = select(mask.visible(v, r), x, set1(-FAL_INFINITY));
      store(scores + at, x);
      running_max[v] = max(x, running_max[v]);
    }
  }
}

// Bias of rows x keys -> panels [row / kPanel][keys][kPanel].
static FAL_NOINLINE void pack_bias(const Bias& bias, int b, int h, Range rows, Range keys,
                                   float* out) {
  dispatch_element(bias.dtype, [&](auto element) {
    using T = decltype(element);
    const T* base = static_cast<const T*>(bias.data) + b * bias.batch + h * bias.head +
                    rows.begin * bias.row + keys.begin * bias.col;
    if (bias.col == 1) {
      pack_transposed(StridedRows<T>{base, bias.row}, rows.size(), keys.size(), 1.f, out);
      return;
    }
    for (int i = 0; i < rows.size(); ++i) {
      float* lane = out + static_cast<int64_t>(i / kPanel * kPanel) * keys.size() + i % kPanel;
      for (int j = 0; j < keys.size(); ++j) {
        lane[j * kPanel] = load_one(base + i * bias.row + j * bias.col);
      }
    }
  });
}

// keep[key][kStride] = -1 where dropout keeps the element, 0 where it drops it. The tile's
// first row and key are multiples of 16, the generator's block; one call of it serves 8 elements.
template <int kStride>
static FAL_NOINLINE void fill_dropout(const Dropout& dropout, uint32_t batch_head, Range rows,
                                      Range keys, int32_t* keep) {
  constexpr int kGroups = 32;  // (key pair, row) of a block: 4 x 8
  for (int j = 0; j < keys.size(); j += 16) {
    for (int i = 0; i < rows.size(); i += 16) {
      uint32_t word[4][kGroups];
      for (int g = 0; g < kGroups; ++g) {
        const PhiloxBits bits =
            dropout.block(batch_head, static_cast<uint32_t>(rows.begin + i + (g & 7)),
                          static_cast<uint32_t>(keys.begin + j + (g >> 3) * 2));
        for (int w = 0; w < 4; ++w) word[w][g] = bits.word[w];
      }
      for (int key = 0; key < 16; ++key) {
        for (int row = 0; row < 16; ++row) {
          const int draw = Dropout::draw_index(row, key), group = ((key & 7) >> 1) * 8 + (row & 7);
          const uint32_t half = (word[draw >> 1][group] >> (16 * (draw & 1))) & 0xffffu;
          keep[(j + key) * kStride + i + row] = half >= dropout.threshold ? -1 : 0;
        }
      }
    }
  }
}

}  // namespace fal::cpu::FAL_CPU_ISA
