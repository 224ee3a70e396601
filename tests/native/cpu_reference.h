// Attention and its gradients written out element by element, in any floating type: double is the
// truth, float the budget's "same formula in low precision".
#pragma once

#include "../../csrc/core/philox.h"
#include "cpu_tensors.h"

namespace fal::test {

// Dense (batch, row, head, dim) results: rows are tensor rows, unowned ones 0 (LSE -inf).
struct Results {
  std::vector<double> out, lse, dq, dk, dv, dbias, dsinks;
  // Largest sum of the absolute terms of an element: gradients cancel (a row that sees one key has
  // dS exactly 0), and rounding is relative to the terms.
  double dq_terms = 0, dk_terms = 0;
};

// Reads element values through functions, so that pages, varlen and layouts are the caller's
// business.
struct Inputs {
  int batch, heads_q, heads_k, head_dim, head_dim_v;
  std::vector<Sequence> sequences;
  Window window;
  ScoreOptions score;
  int64_t rows_q, rows_k;                   // tensor rows over all batch entries
  std::vector<int64_t> q_offset, k_offset;  // tensor row of a sequence's row 0 in these results
  const Tensor *q, *k, *v, *dout;
  std::vector<int64_t> k_batch, k_row;  // [k_offset + j] -> (batch, row) of `k` and `v`
  const Tensor* bias;                   // (batch, heads_q, seqlen_q, seqlen_k); null = none
  bool bias_one_head, bias_one_row;     // broadcast
  std::vector<double> dlse;             // (heads_q, rows_q); empty = none
  int64_t max_q, max_k;                 // extents of dbias
  bool backward;
};

template <class Real>
Results reference(const Inputs& in, DType dtype, bool round) {
  const auto rounded = [&](Real x) { return round ? static_cast<Real>(round_to(x, dtype)) : x; };
  Results r;
  r.out.assign(in.rows_q * in.heads_q * in.head_dim_v, 0.0);
  r.lse.assign(in.heads_q * in.rows_q, -INFINITY);
  std::vector<Real> dk(in.rows_k * in.heads_k * in.head_dim, Real(0)), dk_terms(dk.size(), Real(0)),
      dv(in.rows_k * in.heads_k * in.head_dim_v, Real(0));
  std::vector<Real> dsinks(in.heads_q, Real(0));
  r.dq.assign(in.rows_q * in.heads_q * in.head_dim, 0.0);
  if (in.backward && in.bias) r.dbias.assign(in.batch * in.heads_q * in.max_q * in.max_k, 0.0);
  const ScoreOptions& o = in.score;
  const Dropout dropout{o.dropout_seed, o.dropout_threshold};
  const Real keep_scale = Real(65536.0 / (65536.0 - o.dropout_threshold));

  for (int b = 0; b < in.batch; ++b) {
    const Sequence& s = in.sequences[b];
    const int64_t shift = int64_t(s.seqlen_k) - s.seqlen_q;
    for (int h = 0; h < in.heads_q; ++h) {
      const int hk = h / (in.heads_q / in.heads_k);
      // (seqlen_k, dim) copies of K and V.
      std::vector<Real> k(int64_t(s.seqlen_k) * in.head_dim),
          v(int64_t(s.seqlen_k) * in.head_dim_v);
      for (int j = 0; j < s.seqlen_k; ++j) {
        const int64_t krow = in.k_offset[b] + j;
        for (int d = 0; d < in.head_dim; ++d)
          k[j * in.head_dim + d] = in.k->get(in.k_batch[krow], in.k_row[krow], hk, d);
        for (int d = 0; d < in.head_dim_v; ++d)
          v[j * in.head_dim_v + d] = in.v->get(in.k_batch[krow], in.k_row[krow], hk, d);
      }
      std::vector<Real> q(in.head_dim), g(in.head_dim_v);
      for (int i = 0; i < s.seqlen_q; ++i) {
        const int64_t qrow = in.q_offset[b] + i;
        const int64_t tensor_batch = in.q->extent(0) > 1 ? b : 0;
        for (int d = 0; d < in.head_dim; ++d) q[d] = in.q->get(tensor_batch, s.row_q + i, h, d);
        for (int d = 0; d < in.head_dim_v; ++d)
          g[d] = in.dout->get(tensor_batch, s.row_q + i, h, d);
        std::vector<int> keys;
        for (int j = 0; j < s.seqlen_k; ++j) {
          const bool left = in.window.left < 0 || j >= i + shift - in.window.left;
          const bool right = in.window.right < 0 || j <= i + shift + in.window.right;
          if (left && right) keys.push_back(j);
        }
        std::vector<Real> score(keys.size()), bend(keys.size(), Real(1)),
            dropped(keys.size(), Real(1));
        Real largest = o.sinks ? Real(o.sinks[h]) : -Real(INFINITY);
        for (size_t n = 0; n < keys.size(); ++n) {
          const int j = keys[n];
          const Real* k_row = &k[int64_t(j) * in.head_dim];
          Real x = 0;
          for (int d = 0; d < in.head_dim; ++d) x += q[d] * k_row[d];
          x *= Real(o.scale);
          if (o.softcap > 0) {
            const Real t = std::tanh(x / Real(o.softcap));
            x = Real(o.softcap) * t;
            bend[n] = Real(1) - t * t;
          }
          if (in.bias)
            x += Real(in.bias->get(b, in.bias_one_row ? 0 : i, in.bias_one_head ? 0 : h, j));
          x -= Real(o.alibi_slope(b, h)) * std::fabs(Real(i + shift - j));
          score[n] = x;
          if (!(x <= largest)) largest = x;
          if (o.dropout_threshold)
            dropped[n] = dropout.keeps(uint32_t(b) * in.heads_q + h, i, j) ? keep_scale : Real(0);
        }
        const Real base = largest == -Real(INFINITY) ? Real(0) : largest;
        Real sum = o.sinks ? std::exp(Real(o.sinks[h]) - base) : Real(0);
        for (Real& x : score) sum += x = std::exp(x - base);
        const Real lse = sum == Real(0) ? -Real(INFINITY) : base + std::log(sum);
        r.lse[h * in.rows_q + qrow] = lse;
        std::vector<Real> out(in.head_dim_v, Real(0));
        for (size_t n = 0; n < keys.size(); ++n) {
          if (sum != Real(0)) score[n] /= sum;
          const Real* v_row = &v[int64_t(keys[n]) * in.head_dim_v];
          for (int d = 0; d < in.head_dim_v; ++d) {
            const Real p = dropped[n] == Real(0) ? Real(0) : score[n] * dropped[n];
            out[d] += p * v_row[d];
          }
        }
        Real delta = 0;
        for (int d = 0; d < in.head_dim_v; ++d) {
          r.out[(qrow * in.heads_q + h) * in.head_dim_v + d] = rounded(out[d]);
          if (in.backward) delta += rounded(out[d]) * g[d];
        }
        if (!in.backward) continue;
        if (!in.dlse.empty()) delta -= Real(in.dlse[h * in.rows_q + qrow]);
        if (o.sinks && lse != -Real(INFINITY))
          dsinks[h] -= std::exp(Real(o.sinks[h]) - lse) * delta;
        std::vector<Real> dq(in.head_dim, Real(0)), dq_terms(in.head_dim, Real(0));
        for (size_t n = 0; n < keys.size(); ++n) {
          const int j = keys[n];
          const int64_t krow = in.k_offset[b] + j;
          const Real *k_row = &k[int64_t(j) * in.head_dim], *v_row = &v[int64_t(j) * in.head_dim_v];
          Real dp = 0;
          for (int d = 0; d < in.head_dim_v; ++d) {
            dp += g[d] * v_row[d];
            if (dropped[n] != Real(0))
              dv[(krow * in.heads_k + hk) * in.head_dim_v + d] += score[n] * dropped[n] * g[d];
          }
          Real ds = score[n] * ((dropped[n] == Real(0) ? Real(0) : dp * dropped[n]) - delta);
          if (in.bias) r.dbias[((b * in.heads_q + h) * in.max_q + i) * in.max_k + j] = ds;
          ds *= bend[n] * Real(o.scale);
          const Real term =
              score[n] * (std::fabs(dp * dropped[n]) + std::fabs(delta)) * bend[n] * Real(o.scale);
          for (int d = 0; d < in.head_dim; ++d) {
            const Real key = k_row[d];
            const int64_t at = (krow * in.heads_k + hk) * in.head_dim + d;
            dq[d] += ds * key;
            dk[at] += ds * q[d];
            dq_terms[d] += term * std::fabs(key);
            dk_terms[at] += term * std::fabs(q[d]);
          }
        }
        for (Real x : dq_terms) r.dq_terms = std::fmax(r.dq_terms, x);
        for (int d = 0; d < in.head_dim; ++d)
          r.dq[(qrow * in.heads_q + h) * in.head_dim + d] = rounded(dq[d]);
      }
    }
  }
  for (Real x : dk_terms) r.dk_terms = std::fmax(r.dk_terms, x);
  for (Real x : dk) r.dk.push_back(rounded(x));
  for (Real x : dv) r.dv.push_back(rounded(x));
  for (Real x : dsinks) r.dsinks.push_back(x);
  return r;
}

}  // namespace fal::test
