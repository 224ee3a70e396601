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
  bool sums_delta;           // delta lacks rowsum(P * dP), which the tile sums up itself

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

// P^T from scale * S^T (base 2) and dP^T of one panel at (key r, vector v): dropped and scaled
// where dropout says so, nothing where nothing is visible.
template <int kStride, class Word>
struct GradientTerms {
  PanelRange range;
  const PanelMask& mask;
  const int32_t* keep_panel;
  Float lse[kVectors], scale, keep_scale;

  FAL_INLINE Float probability(Float s, int r, int v) const {
    const Float x = exp2(kScaledQ<Word> ? s - lse[v] : fma(s, scale, -lse[v]));
    return visible(x, r, v);
  }
  FAL_INLINE Float visible(Float x, int r, int v) const {
    return range.masked ? keep(mask.visible(v, r), x) : x;
  }
  FAL_INLINE Float drop(Float x, int r, int v) const {
    if (!keep_panel) return x;
    return keep_bits(load(keep_panel + (r - range.begin) * kStride + v * kLanes), x) * keep_scale;
  }
};

// rowsum(P * dP) / rowsum(P), of all keys that the panel's rows see; P takes the place of S. The
// divisor, in which a sink takes part, is 1 but for the rounding of the LSE: with one key dS is 0.
template <int kStride, class Word>
FAL_INLINE void sum_delta(const GradientTerms<kStride, Word>& terms, const BackwardTile& t,
                          float* p_panel, const float* ds_panel, Float (&delta)[kVectors]) {
  const float* sinks = t.plan->problem.forward.score.sinks;
  Float sums[kVectors] = {}, weights[kVectors] = {};
  if (sinks) {
    for (int v = 0; v < kVectors; ++v) {
      weights[v] = exp2(set1(sinks[t.head] * kLog2E) - terms.lse[v]);
    }
  }
  for (int r = terms.range.begin; r < terms.range.end; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int at = (r - terms.range.begin) * kStride + v * kLanes;
      const Float p = terms.probability(load(p_panel + at), r, v);
      store(p_panel + at, p);
      weights[v] = weights[v] + p;
      sums[v] = sums[v] + terms.visible(p * terms.drop(load(ds_panel + at), r, v), r, v);
    }
  }
  const Float smallest = set1(1e-30f);  // a row that sees nothing: 0 / 0
  for (int v = 0; v < kVectors; ++v) delta[v] = delta[v] + sums[v] / max(weights[v], smallest);
}

// P^T and dS^T to where the products want them. A branch on kSummed in the loop costs 1.5 % of
// backward.
template <bool kSummed, int kStride, class Word>
FAL_INLINE void store_panel(const GradientTerms<kStride, Word>& terms,
                            const Float (&delta)[kVectors], const float* p_panel,
                            const float* ds_panel, Word* p_rows, Word* ds_rows, Word* ds_of_keys) {
  constexpr int kKeys = kPerWord<Word>;
  const PanelRange range = terms.range;
  for (int r = range.begin; r < range.end; r += kKeys) {
    Float p[kKeys][kVectors], ds[kKeys][kVectors];
#pragma GCC unroll 2
    for (int i = 0; i < kKeys; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const int at = (r + i - range.begin) * kStride + v * kLanes;
        const Float s = load(p_panel + at);
        const Float x = kSummed ? s : terms.probability(s, r + i, v);
        const Float dp = terms.drop(load(ds_panel + at), r + i, v);
        p[i][v] = terms.drop(x, r + i, v);
        ds[i][v] = terms.visible(x * (dp - delta[v]), r + i, v);
      }
    }
    store_gradients<kStride>(p_rows, ds_rows, ds_of_keys, (r - range.begin) / kKeys, p, ds);
  }
}

// From scale * S^T (in `p`, base 2) and dP^T (in `ds`) of one panel to P^T (dropped and scaled
// where dropout says so) and dS^T. All are [key - range.begin][kStride], lanes from panel_row on;
// the words' places too. The scale is 1 for words of fp32.
template <int kStride, class Word>
static FAL_NOINLINE void gradient_panel(const BackwardTile& t, int panel_row, PanelRange range,
                                        const PanelMask& mask, float scale, float* p_panel,
                                        const float* ds_panel, const int32_t* keep_panel,
                                        Word* p_rows, Word* ds_rows, Word* ds_of_keys) {
  GradientTerms<kStride, Word> terms{range, mask,        keep_panel,
                                     {},    set1(scale), set1(t.dropout.keep_scale())};
  Float delta[kVectors];
  t.load_stats(panel_row, terms.lse, delta);
  if (!t.sums_delta) {
    store_panel<false>(terms, delta, p_panel, ds_panel, p_rows, ds_rows, ds_of_keys);
    return;
  }
  sum_delta(terms, t, p_panel, ds_panel, delta);
  store_panel<true>(terms, delta, p_panel, ds_panel, p_rows, ds_rows, ds_of_keys);
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
