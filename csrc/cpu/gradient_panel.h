// From S^T and dP^T of one panel of query rows (lanes) and a tile of keys to P^T and dS^T, laid out
// as the products of backward want them: the counterpart of score_panel.h.
#pragma once

#include "attention_forward.h"
#include "backward_rows.h"

namespace fal::cpu::FAL_CPU_ISA {

struct BackwardTile {
  const BackwardPlan* plan;
  Band band;
  const HeadMask* mask;  // null without a block mask
  Range rows;            // the query tile
  Range block;           // the key block
  int batch, head;
  bool general;
  PanelScoreMod mod;
  Dropout dropout;
  const float *lse, *delta;  // of the tile's rows: base-2 LSE (+inf for an empty row), delta

  // Of a panel's lanes; padded ones have lse +inf, so that P = 0.
  FAL_INLINE void load_stats(int panel_row, Float (&lse_of_lane)[kVectors],
                             Float (&delta_of_lane)[kVectors]) const {
    for (int v = 0; v < kVectors; ++v) {
      const int row = panel_row + v * kLanes, left = max_int(0, rows.size() - row);
      const bool whole = left >= kLanes;
      lse_of_lane[v] = whole ? load(lse + row) : load_first(lse + row, left);
      delta_of_lane[v] = whole ? load(delta + row) : load_first(delta + row, left);
      if (!whole) {
        lse_of_lane[v] = select(less(iota(), set1(left)), lse_of_lane[v], set1(FAL_INFINITY));
      }
    }
  }
};

// P^T and dS^T of kPerWord keys and one panel's lanes, at word row `row`, as the products want
// them: P and dS along query rows, dS along keys.
template <int kStride>
FAL_INLINE void store_gradients(float* p_rows, float* ds_rows, float*, int row,
                                const Float (&p)[1][kVectors], const Float (&ds)[1][kVectors]) {
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    store(p_rows + row * kStride + v * kLanes, p[0][v]);
    store(ds_rows + row * kStride + v * kLanes, ds[0][v]);
  }
}
#if defined(__AVX512BF16__)
FAL_INLINE Pairs pair_lanes(const Float (&x)[kVectors]) {
  return {(Int)(__m512i)_mm512_cvtne2ps_pbh(x[1], x[0])};
}
template <int kStride>
FAL_INLINE void store_gradients(Pair* p_rows, Pair* ds_rows, Pair* ds_of_keys, int row,
                                const Float (&p)[2][kVectors], const Float (&ds)[2][kVectors]) {
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    store(p_rows + (2 * row + i) * kStride, pair_lanes(p[i]));
    store(ds_rows + (2 * row + i) * kStride, pair_lanes(ds[i]));
  }
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    store(ds_of_keys + row * kStride + v * kLanes, make_pairs(ds[0][v], ds[1][v]));
  }
}
#endif

// From scale * S^T (in `p`, base 2) and dP^T (in `ds`) of one panel to P^T (dropped and scaled
// where dropout says so) and dS^T. All are [key - range.begin][kStride], lanes from panel_row on;
// the words' places too. The scale is 1 for words of fp32.
template <int kStride, class Word>
static FAL_NOINLINE void gradient_panel(const BackwardTile& t, int panel_row, PanelRange range,
                                        const PanelMask& mask, float scale, const float* p_panel,
                                        const float* ds_panel, const int32_t* keep_panel,
                                        Word* p_rows, Word* ds_rows, Word* ds_of_keys) {
  constexpr int kKeys = kPerWord<Word>;
  Float lse[kVectors], delta[kVectors];
  t.load_stats(panel_row, lse, delta);
  const Float keep_scale = set1(t.dropout.keep_scale()), scale_of_lane = set1(scale);
  for (int r = range.begin; r < range.end; r += kKeys) {
    Float p[kKeys][kVectors], ds[kKeys][kVectors];
#pragma GCC unroll 2
    for (int i = 0; i < kKeys; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const int at = (r + i - range.begin) * kStride + v * kLanes;
        const Float s = load(p_panel + at);
        Float x = exp2(kScaledQ<Word> ? s - lse[v] : fma(s, scale_of_lane, -lse[v]));
        Float dp = load(ds_panel + at);
        if (range.masked) x = keep(mask.visible(v, r + i), x);
        Float dropped = x;
        if (keep_panel) {
          const Int kept = load(keep_panel + at);
          dp = keep_bits(kept, dp) * keep_scale;
          dropped = keep_bits(kept, x) * keep_scale;
        }
        Float gradient = x * (dp - delta[v]);
        if (range.masked) gradient = keep(mask.visible(v, r + i), gradient);
        p[i][v] = dropped;
        ds[i][v] = gradient;
      }
    }
    store_gradients<kStride>(p_rows, ds_rows, ds_of_keys, (r - range.begin) / kKeys, p, ds);
  }
}

// dS^T of one panel -> the bias gradient, then through the softcap. Laid out as above.
template <int kStride>
static FAL_NOINLINE void finish_scores(const BackwardTile& t, int panel_row, Range keys,
                                       PanelRange range, float* ds, const float* bend) {
  const Bias& dbias = t.plan->problem.dbias;
  if (dbias.data) {
    dispatch_element(dbias.dtype, [&](auto element) {
      using T = decltype(element);
      T* base = static_cast<T*>(dbias.data) + t.batch * dbias.batch + t.head * dbias.head;
      for (int i = panel_row; i < min_int(panel_row + kPanel, t.rows.size()); ++i) {
        T* row = base + (t.rows.begin + i) * dbias.row + keys.begin * dbias.col;
        for (int r = range.begin; r < min_int(range.end, keys.size()); ++r) {
          store_one(row + r * dbias.col, ds[(r - range.begin) * kStride + i - panel_row]);
        }
      }
    });
  }
  if (!bend) return;
  for (int r = 0; r < range.end - range.begin; ++r) {
    for (int v = 0; v < kPanel; v += kLanes) {
      const int at = r * kStride + v;
      store(ds + at, load(ds + at) * load(bend + at));
    }
  }
}

// P and dS in fp32 -> words.
FAL_INLINE void round_gradients(PanelRange, const float*, const float*, float*, float*, float*) {}
#if defined(__AVX512BF16__)
FAL_INLINE void round_gradients(PanelRange range, const float* p_panel, const float* ds_panel,
                                Pair* p_rows, Pair* ds_rows, Pair* ds_of_keys) {
  for (int r = 0; r < range.end - range.begin; r += 2) {
    Float p[2][kVectors], ds[2][kVectors];
    for (int i = 0; i < 2; ++i) {
      for (int v = 0; v < kVectors; ++v) {
        p[i][v] = load(p_panel + (r + i) * kScoreStride + v * kLanes);
        ds[i][v] = load(ds_panel + (r + i) * kScoreStride + v * kLanes);
      }
    }
    store_gradients<kScoreStride>(p_rows, ds_rows, ds_of_keys, r / 2, p, ds);
  }
}
#endif

}  // namespace fal::cpu::FAL_CPU_ISA
