// dQ, dK, dV in bf16 on AMX: attention_backward.h with other products. P and dS are rounded to
// bf16, as GPU kernels do; everything is summed in fp32.
//
// For each block of 32 keys x 32 query rows (lanes) that the band shows:
//
//   S^T = K Q^T      A = row tiles of K, B = pair tiles of Q       fp32 blocks [32 keys][32 lanes],
//   of dP^T = V dO^T    A = row tiles of V, B = pair tiles of dO      which three are alive P^T,
//   dS^T        bf16, as rows (A of dV and dK) and, dS^T alone, as pairs of keys (B of dQ)
//
// and when all blocks of the tile are there
//
//   dV += P^T dO     A = P^T rows, B = row pairs of dO             fp32 [key][dim]
//   dK += dS^T Q     A = dS^T rows, B = row pairs of Q
//   dQ^T = K^T dS^T  A = depth tiles of K, B = dS^T pairs          fp32 [dim][32 lanes], transposed
//
// The gradients of block u - 2 are computed between the tile instructions of block u, as in
// amx_forward.h.
//
// Scratch of one thread, head dim 128: K 128 KiB, V 64, Q 128, dO 128, P 128, dS 256, dK, dV and dQ
// 128 each.
#pragma once

#include "amx_forward.h"
#include "attention_backward.h"

namespace fal::cpu::FAL_CPU_ISA {

constexpr int kGradientTileBytes = kBlock * kBlock * 2;  // of P^T or dS^T of one block

struct AmxBackwardScratch {
  char *k_rows, *k_depth, *v_rows;                  // the key block
  char *q_pairs, *dout_pairs, *q_rows, *dout_rows;  // the query tile; *_rows are row pairs
  char *p, *ds, *ds_pairs;                          // bf16, a block after the other
  float *scores, *dscores, *dq_transposed, *dq, *dk, *dv, *bend, *bias;
  int32_t *keep, *mask_words;  // a panel's words after the other

  FAL_INLINE static AmxBackwardScratch place(ScratchCursor* cursor, const BackwardProblem& problem,
                                             int block_keys, int tile_rows) {
    const ForwardProblem& f = problem.forward;
    const int dim = round_up(f.shape.head_dim, kBlock),
              dim_v = round_up(f.shape.head_dim_v, kBlock);
    AmxBackwardScratch s;
    s.k_rows = cursor->take<char>(block_keys * dim * 2);
    s.k_depth = cursor->take<char>(block_keys * dim * 2);
    s.v_rows = cursor->take<char>(block_keys * dim_v * 2);
    s.q_pairs = cursor->take<char>(tile_rows * dim * 2);
    s.dout_pairs = cursor->take<char>(tile_rows * dim_v * 2);
    s.q_rows = cursor->take<char>(tile_rows * dim * 2);
    s.dout_rows = cursor->take<char>(tile_rows * dim_v * 2);
    s.p = cursor->take<char>(tile_rows * block_keys * 2);
    s.ds = cursor->take<char>(tile_rows * block_keys * 2);
    s.ds_pairs = cursor->take<char>(tile_rows * block_keys * 2);
    s.scores = cursor->take<float>(kScoreBlocks * kScoreBlockSize);
    s.dscores = cursor->take<float>(kScoreBlocks * kScoreBlockSize);
    s.dq_transposed = cursor->take<float>(dim * kPanel);
    s.dq = cursor->take<float>(tile_rows * dim);
    s.dk = cursor->take<float>(block_keys * dim);
    s.dv = cursor->take<float>(block_keys * dim_v);
    s.bend = f.score.softcap > 0.f ? cursor->take<float>(kScoreBlockSize) : nullptr;
    s.bias = f.score.bias.data ? cursor->take<float>(kPanel * block_keys) : nullptr;
    s.keep = f.score.dropout_threshold ? cursor->take<int32_t>(kPanel * block_keys) : nullptr;
    s.mask_words = f.block_mask.given()
                       ? cursor->take<int32_t>(tile_rows / kPanel *
                                               fal::cpu::FAL_CPU_ISA::mask_words(kAmxTileKeys))
                       : nullptr;
    return s;
  }
};

// Where the gradients of one block go.
struct GradientBlock {
  char *p, *ds;    // [2][16 keys][32 lanes], bf16
  char* ds_pairs;  // [16 pairs of keys][32 lanes]
};

FAL_INLINE __m512i bf16_row(Float first, Float second) {
  return (__m512i)_mm512_cvtne2ps_pbh(second, first);
}

// Two keys of P^T and dS^T -> bf16.
FAL_INLINE void store_gradients(const GradientBlock& block, int key, const Float (&p)[2][kVectors],
                                const Float (&ds)[2][kVectors]) {
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    _mm512_store_si512(block.p + (key + i) * 64, bf16_row(p[i][0], p[i][1]));
    _mm512_store_si512(block.ds + (key + i) * 64, bf16_row(ds[i][0], ds[i][1]));
  }
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    _mm512_store_si512(block.ds_pairs + key / 2 * 128 + v * 64,
                       (__m512i)make_pairs(ds[0][v], ds[1][v]).lanes);
  }
}

// What gradient_panel does where nothing is masked, modified or dropped: two keys of one block.
struct PlainGradient {
  Float scale, minus_lse[kVectors], delta[kVectors];

  FAL_INLINE void operator()(const float* scores, const float* dscores, int key,
                             const GradientBlock& block) const {
    Float p[2][kVectors], ds[2][kVectors];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        const int at = (key + i) * kPanel + v * kLanes;
        p[i][v] = exp2_by_scalef(fma(load(scores + at), scale, minus_lse[v]));
        ds[i][v] = p[i][v] * (load(dscores + at) - delta[v]);
      }
    }
    store_gradients(block, key, p, ds);
  }
};

// One panel of query rows and the key block.
struct AmxGradientPanel {
  int row;         // of lane 0, within the tile
  int first_row;   // within the sequence
  int begin, end;  // blocks of keys that some lane sees
  Range all;       // keys of the block that every lane sees
  PanelMask mask;  // set when `masked`
  bool masked;
};

// The same in general.
static FAL_NOINLINE void general_gradient(const BackwardTile& t, const AmxBackwardScratch& s,
                                          const AmxGradientPanel& panel, Range keys, int b,
                                          bool masked, float* scores, float* dscores,
                                          const GradientBlock& block) {
  const PanelRange range{b * kBlock, (b + 1) * kBlock, masked};
  Float unused[kVectors] = {};
  modify_panel<kPanel>(t.mod, panel.first_row, 0, keys, range, panel.mask, scores, s.bend, unused);
  gradient_panel<kPanel>(t, panel.row, range, panel.mask, 1.f, scores, dscores,
                         s.keep ? s.keep + range.begin * kPanel : nullptr, scores, dscores,
                         dscores);
  finish_scores<kPanel>(t, panel.row, keys, range, dscores, s.bend);
  for (int key = 0; key < kBlock; key += 2) {
    Float p[2][kVectors], ds[2][kVectors];
    for (int i = 0; i < 2; ++i) {
      for (int v = 0; v < kVectors; ++v) {
        p[i][v] = load(scores + (key + i) * kPanel + v * kLanes);
        ds[i][v] = load(dscores + (key + i) * kPanel + v * kLanes);
      }
    }
    store_gradients(block, key, p, ds);
  }
}

namespace {

// A tile of query rows and the key block that it passes.
class AmxBackwardTile {
 public:
  FAL_INLINE AmxBackwardTile(const BackwardTile& t, const AmxBackwardScratch& s, Range keys)
      : t_(t), s_(s), keys_(keys) {
    const Shape& shape = t.plan->problem.forward.shape;
    dim_ = round_up(shape.head_dim, kBlock);
    dim_v_ = round_up(shape.head_dim_v, kBlock);
    panels_ = round_up(t.rows.size(), kPanel) / kPanel;
    blocks_ = round_up(keys.size(), kBlock) / kBlock;
    for (int p = 0; p < panels_; ++p) {
      const Range rows{t.rows.begin + p * kPanel,
                       min_int(t.rows.begin + (p + 1) * kPanel, t.rows.end)};
      const PanelRange range = panel_range(t.band, t.mask, rows, keys, kBlock, 0);
      AmxGradientPanel& panel = panel_[p];
      panel.row = p * kPanel;
      panel.first_row = rows.begin;
      panel.begin = range.begin / kBlock;
      panel.end = range.end / kBlock;
      panel.masked = range.masked;
      const Range all = intersect(t.band.keys_of_all(rows), keys);
      panel.all = {all.begin - keys.begin, all.end - keys.begin};
      if (range.masked) {
        int32_t* words = s.mask_words + p * mask_words(kAmxTileKeys);
        panel.mask = panel_mask(t.band, t.mask, rows, keys, range, words);
        if (panel.mask.words) panel.all = {0, 0};
      }
    }
  }

  FAL_NOINLINE void run() {
    for (int p = 0; p < panels_; ++p) gradients(panel_[p]);
    for (int b = 0; b < blocks_; ++b) {
      accumulate_keys(b, s_.p, s_.dout_rows, dim_v_, s_.dv);
      accumulate_keys(b, s_.ds, s_.q_rows, dim_, s_.dk);
    }
    for (int p = 0; p < panels_; ++p) accumulate_queries(panel_[p]);
  }

  static constexpr int kMaxPanels = 8;

 private:
  FAL_INLINE GradientBlock block(const AmxGradientPanel& panel, int b) const {
    // Of one block of keys, the panels are neighbours: the depth of dV and dK.
    const int64_t rows =
        (static_cast<int64_t>(b) * panels_ + panel.row / kPanel) * kGradientTileBytes;
    const int64_t pairs =
        (static_cast<int64_t>(panel.row / kPanel) * blocks_ + b) * kGradientTileBytes;
    return {s_.p + rows, s_.ds + rows, s_.ds_pairs + pairs};
  }

  // S^T, dP^T, P^T and dS^T of one panel.
  FAL_NOINLINE void gradients(const AmxGradientPanel& panel) {
    const int steps = dim_ / kTileDepth, steps_v = dim_v_ / kTileDepth;
    const int keys_per_step = max_int(2, (kBlock / (steps + steps_v)) & ~1);
    const char* q = s_.q_pairs + static_cast<int64_t>(panel.row) * dim_ * 2;
    const char* dout = s_.dout_pairs + static_cast<int64_t>(panel.row) * dim_v_ * 2;
    const ForwardProblem& f = t_.plan->problem.forward;
    if (s_.bias) {
      const Range rows{panel.first_row, min_int(panel.first_row + kPanel, t_.rows.end)};
      pack_bias(f.score.bias, t_.batch, t_.head, rows, keys_, s_.bias);
    }
    if (s_.keep) {
      const Range rows{panel.first_row, min_int(panel.first_row + kPanel, t_.rows.end)};
      const uint32_t batch_head = static_cast<uint32_t>(t_.batch) * f.shape.heads_q + t_.head;
      fill_dropout<kPanel>(t_.dropout, batch_head, rows, keys_, s_.keep);
    }
    PlainGradient plain;
    plain.scale = set1(f.score.scale * kLog2E);
    t_.load_stats(panel.row, plain.minus_lse, plain.delta);
    for (int v = 0; v < kVectors; ++v) plain.minus_lse[v] = -plain.minus_lse[v];

    const auto at = [](int b) { return b % kScoreBlocks * kScoreBlockSize; };
    for (int b = panel.begin; b < panel.end + 2; ++b) {
      const int e = b - 2;
      const bool finish = e >= panel.begin;
      const bool masked = finish && panel.masked &&
                          (e * kBlock < panel.all.begin || (e + 1) * kBlock > panel.all.end);
      const bool general = t_.general || s_.keep || t_.plan->problem.dbias.data || masked;
      float* scores = s_.scores + at(b + 1);  // of block e
      float* dscores = s_.dscores + at(b + 1);
      const GradientBlock target = block(panel, finish ? e : panel.begin);
      int key = finish && !general ? 0 : kBlock;  // of block e, the next one
      const auto alternate = [&] {
        for (const int end = min_int(key + keys_per_step, kBlock); key < end; key += 2) {
          plain(scores, dscores, key, target);
        }
      };
      if (b < panel.end) {
        const char* k = s_.k_rows + static_cast<int64_t>(b) * 2 * steps * kTileBytes;
        clear_block();
        for (int step = 0; step < steps; ++step) {
          const char* pairs = q + step * 2 * kTileBytes;
          multiply_block(k + step * kTileBytes, k + (steps + step) * kTileBytes, 64, pairs,
                         pairs + kTileBytes, 64);
          alternate();
        }
        store_block(s_.scores + at(b), kPanel);
        const char* v = s_.v_rows + static_cast<int64_t>(b) * 2 * steps_v * kTileBytes;
        clear_block();
        for (int step = 0; step < steps_v; ++step) {
          const char* pairs = dout + step * 2 * kTileBytes;
          multiply_block(v + step * kTileBytes, v + (steps_v + step) * kTileBytes, 64, pairs,
                         pairs + kTileBytes, 64);
          alternate();
        }
        store_block(s_.dscores + at(b), kPanel);
      }
      while (key < kBlock) alternate();
      if (finish && general) {
        general_gradient(t_, s_, panel, keys_, e, masked, scores, dscores, target);
      }
    }
  }

  // out[32 keys][dims] += the block's rows x row pairs, over the panels that see the block.
  FAL_NOINLINE void accumulate_keys(int b, const char* rows, const char* pairs, int dims,
                                    float* out) {
    int begin = 0, end = panels_;
    const auto sees = [&](int p) { return panel_[p].begin <= b && b < panel_[p].end; };
    while (begin < end && !sees(begin)) ++begin;
    while (begin < end && !sees(end - 1)) --end;
    if (begin == end) return;
    rows += static_cast<int64_t>(b) * panels_ * kGradientTileBytes;
    out += static_cast<int64_t>(b) * kBlock * dims;
    for (int d = 0; d < dims; d += kBlock) {
      load_block(out + d, dims);
      for (int p = begin; p < end; ++p) {
        if (!sees(p)) continue;
        const char* a = rows + p * kGradientTileBytes;
        const char* b0 = pairs + (static_cast<int64_t>(p) * dims + d) / 16 * kTileBytes;
        multiply_block(a, a + kTileBytes, 64, b0, b0 + kTileBytes, 64);
      }
      store_block(out + d, dims);
    }
  }

  // dQ of one panel.
  FAL_NOINLINE void accumulate_queries(const AmxGradientPanel& panel) {
    float* dq = s_.dq + static_cast<int64_t>(panel.row) * dim_;
    if (panel.begin >= panel.end) {
      memset(dq, 0, sizeof(float) * kPanel * dim_);
      return;
    }
    const char* pairs = block(panel, 0).ds_pairs;
    const int64_t depth = static_cast<int64_t>(t_.plan->scratch_keys) / kTileDepth * kTileBytes;
    for (int d = 0; d < dim_; d += kBlock) {
      const char* k = s_.k_depth + d / 16 * depth;
      clear_block();
      for (int b = panel.begin; b < panel.end; ++b) {
        const char* b0 = pairs + b * kGradientTileBytes;
        multiply_block(k + b * kTileBytes, k + depth + b * kTileBytes, 64, b0, b0 + 64, 128);
      }
      store_block(s_.dq_transposed + d * kPanel, kPanel);
    }
    transpose_panel(s_.dq_transposed, dim_, dq);
  }

  const BackwardTile& t_;
  const AmxBackwardScratch& s_;
  const Range keys_;
  int dim_, dim_v_, panels_, blocks_;
  AmxGradientPanel panel_[kMaxPanels];
};

}  // namespace

// True unless an infinity or a NaN of Q, K or dO could meet a masked element in a product over
// whole blocks, where it would make 0 * NaN. (V only enters dP, which is masked afterwards.)
struct OperandCheck {
  const BackwardProblem* problem;
  int32_t* special;

  FAL_INLINE static void item(const void* arg, int64_t item, char*) {
    const OperandCheck& check = *static_cast<const OperandCheck*>(arg);
    const ForwardProblem& f = check.problem->forward;
    const int b = static_cast<int>(item / f.shape.heads_q),
              h = static_cast<int>(item % f.shape.heads_q);
    const Sequence seq = f.lengths.sequence(b);
    const auto finite = [&](const AnyView& view, int64_t row, int head, int n, int dims) {
      const StridedRows<BFloat16> rows{view.as<BFloat16>().at(b, row, head), view.row};
      return n == 0 || rows_finite(rows, n, dims);
    };
    const int dim = f.shape.head_dim;
    const bool first_of_group = h % (f.shape.heads_q / f.shape.heads_k) == 0;
    if (!finite(f.q, seq.row_q, h, seq.seqlen_q, dim) ||
        !finite(check.problem->dout, seq.row_q, h, seq.seqlen_q, f.shape.head_dim_v) ||
        (first_of_group && !finite(f.kv.k, seq.row_k, f.shape.kv_head(h), seq.seqlen_k, dim))) {
      __atomic_store_n(check.special, 1, __ATOMIC_RELAXED);
    }
  }
};

static bool operands_finite(const BackwardProblem& problem, const ThreadPool& pool) {
  const ForwardProblem& f = problem.forward;
  const bool masked = f.window.left >= 0 || f.window.right >= 0 || f.block_mask.given();
  if (!masked) return true;
  int32_t special = 0;
  const OperandCheck check{&problem, &special};
  const int64_t items = static_cast<int64_t>(f.shape.batch) * f.shape.heads_q;
  const double elements = static_cast<double>(f.shape.rows_q) * f.shape.heads_q * f.shape.head_dim;
  run_items(
      pool, items, elements, 0,
      [](const void* arg, int64_t item, char* scratch) { OperandCheck::item(arg, item, scratch); },
      &check);
  return special == 0;
}

struct AmxBackward {
  using Scratch = AmxBackwardScratch;
  static constexpr int kTileKeys = kAmxTileKeys;  // and of a key block, at most
  static constexpr bool kCanSumDelta = false;  // dS of a block follows while the next is multiplied

  FAL_INLINE static int max_tile_rows(const Shape& shape) {
    return (shape.head_dim + shape.head_dim_v > 256 ? 4 : AmxBackwardTile::kMaxPanels) * kPanel;
  }

  // Fewer keys where there would be too few items to share; never depending on the number of
  // threads, because the order of additions does.
  FAL_INLINE static int block_keys(const Shape& shape, int64_t longest) {
    constexpr int kFewItems = 16;
    int keys = kTileKeys;
    const int64_t heads = static_cast<int64_t>(shape.batch) * shape.heads_k;
    while (keys > kTileKeys / 4 && heads * ((longest + keys - 1) / keys) < kFewItems) keys /= 2;
    return keys;
  }

  template <class Rows>
  FAL_INLINE static void pack_keys(const Rows& k, const Rows& v, int n, int dim, int dim_v, int,
                                   int block_keys, Scratch* s) {
    pack_row_tiles(k, n, dim, s->k_rows);
    pack_depth_tiles(k, n, block_keys, dim, s->k_depth);
    pack_row_tiles(v, n, dim_v, s->v_rows);
  }

  template <class Rows>
  FAL_INLINE static void pack_queries(const Rows& q, const Rows& dout, int n,
                                      const ForwardProblem& f, Scratch* s) {
    pack_pair_tiles(q, n, f.shape.head_dim, s->q_pairs);
    pack_row_pairs(q, n, f.shape.head_dim, s->q_rows);
    pack_pair_tiles(dout, n, f.shape.head_dim_v, s->dout_pairs);
    pack_row_pairs(dout, n, f.shape.head_dim_v, s->dout_rows);
  }

  FAL_INLINE static void tile(const BackwardTile& t, const Scratch& s, Range keys, int, bool,
                              bool) {
    const TileSession session;
    AmxBackwardTile(t, s, keys).run();
  }
};

}  // namespace fal::cpu::FAL_CPU_ISA
