#include "arguments.h"

#include <math.h>

#include "../core/head_dims.h"
#include "../core/philox.h"
#include "block_mask.h"

namespace fal::torch_binding {

void Options::read(StackReader& stack) {
  stack >> cu_seqlens_q >> cu_seqlens_k >> seqused_q >> seqused_k >> leftpad_k >> block_table >>
      k_scale >> v_scale >> max_seqlen_q >> max_seqlen_k >> alibi_slopes >> sinks >> bias >>
      dropout_seed >> block_mask >> block_mask_layout >> softmax_scale >> softcap >> window_left >>
      window_right >> dropout_p;
}

Arguments::Arguments(const char* op, Tensor q, Tensor k, Tensor v, Options&& options)
    : q_(std::move(q)),
      k_(std::move(k)),
      v_(std::move(v)),
      checker_(op, q_),
      options_(std::move(options)) {
  check_dtypes();
  check_shapes();
  set_lengths();
  set_score();
  set_block_mask();
  problem_.q = view(q_, &keep_);
  problem_.kv.k = view(k_, &keep_);
  problem_.kv.v = view(v_, &keep_);
  if (q_.is_cpu() || contents_checked_on_cuda()) check_contents();
}

void Arguments::check_dtypes() {
  DType& dtype = problem_.shape.dtype;
  DType& kv_dtype = problem_.kv.dtype;
  if (!known_dtype(q_.dtype(), &dtype) || !is_float(dtype)) {
    checker_.bad("q is ", dtype_text(q_.dtype()), "; it must be float32, float16 or bfloat16");
  }
  if (!known_dtype(k_.dtype(), &kv_dtype))
    checker_.bad("k is ", dtype_text(k_.dtype()), "; it must be ", dtype_text(q_.dtype()),
                 " as q is, int8 or float8_e4m3fn");
  if (k_.dtype() != v_.dtype()) {
    checker_.bad("k is ", dtype_text(k_.dtype()), " but v is ", dtype_text(v_.dtype()),
                 "; they must agree");
  }
  const bool quantised = !is_float(kv_dtype);
  if (!quantised && k_.dtype() != q_.dtype()) {
    checker_.bad("k and v are ", dtype_text(k_.dtype()), " but q is ", dtype_text(q_.dtype()),
                 "; they must agree");
  }
  if (quantised && !(options_.k_scale && options_.v_scale)) {
    checker_.bad("k and v are ", dtype_text(k_.dtype()), ", which needs k_scale and v_scale");
  }
  if (!quantised && (options_.k_scale || options_.v_scale)) {
    checker_.bad("k_scale and v_scale belong to int8 or float8_e4m3fn k and v, which are ",
                 dtype_text(k_.dtype()));
  }
  if (!q_.is_cpu() && !q_.is_cuda()) checker_.bad("q is on an unsupported device; use cpu or cuda");
  checker_.on_device("k", k_);
  checker_.on_device("v", v_);
}

void Arguments::check_shapes() {
  const Options& o = options_;
  const bool paged = o.block_table.has_value();
  if (o.cu_seqlens_q ? q_.dim() != 3 : q_.dim() != 4) {
    checker_.bad("q has shape ", shape_text(q_), "; it must be ",
                 o.cu_seqlens_q ? "(total_q, heads_q, head_dim) because cu_seqlens_q is given"
                                : "(batch, seqlen_q, heads_q, head_dim)");
  }
  const char* kv_form =
      paged            ? "(num_pages, page_size, heads_k, head_dim) because block_table is given"
      : o.cu_seqlens_k ? "(total_k, heads_k, head_dim) because cu_seqlens_k is given"
                       : "(batch, seqlen_k, heads_k, head_dim)";
  if (paged && o.cu_seqlens_k)
    checker_.bad("cu_seqlens_k does not go with block_table; give seqused_k");
  if (paged && !o.seqused_k)
    checker_.bad("block_table needs seqused_k, the keys used of each sequence");
  const int64_t kv_dim = o.cu_seqlens_k ? 3 : 4;
  if (k_.dim() != kv_dim) checker_.bad("k has shape ", shape_text(k_), "; it must be ", kv_form);
  if (v_.dim() != kv_dim) checker_.bad("v has shape ", shape_text(v_), "; it must be ", kv_form);
  for (int64_t d = 0; d + 1 < kv_dim; ++d) {
    if (k_.size(d) != v_.size(d)) {
      checker_.bad("k has shape ", shape_text(k_), " but v has ", shape_text(v_),
                   "; only head_dim may differ");
    }
  }

  Shape& s = problem_.shape;
  const int64_t qd = q_.dim();
  const int64_t batch = o.cu_seqlens_q ? o.cu_seqlens_q->numel() - 1 : q_.size(0);
  const int64_t heads_q = q_.size(qd - 2), heads_k = k_.size(kv_dim - 2);
  const int64_t head_dim = q_.size(qd - 1), head_dim_v = v_.size(kv_dim - 1);
  if (batch < 0)
    checker_.bad("cu_seqlens_q is empty; it must hold batch + 1 offsets, the first of them 0");
  if (k_.size(kv_dim - 1) != head_dim) {
    checker_.bad("k has head_dim ", k_.size(kv_dim - 1), " but q has ", head_dim);
  }
  const int64_t tokens = o.cu_seqlens_q ? o.max_seqlen_q : q_.size(1);
  const int32_t most = tokens <= kDecodeTokens ? kMaxDecodeHeadDim : kMaxHeadDim;
  if (head_dim < 1 || head_dim > most)
    checker_.bad("q has head_dim ", head_dim, "; it must be 1 to ", most);
  if (head_dim_v < 1 || head_dim_v > most)
    checker_.bad("v has head_dim ", head_dim_v, "; it must be 1 to ", most);
  if (heads_k < 1 ? heads_q > 0 : heads_q % heads_k != 0) {
    checker_.bad("q has ", heads_q, " heads but k has ", heads_k,
                 "; heads_q must be a multiple of heads_k");
  }
  if (!paged && !o.cu_seqlens_k && k_.size(0) != batch) {
    checker_.bad("k has batch ", k_.size(0), " but q has batch ", batch);
  }
  if (o.cu_seqlens_k && o.cu_seqlens_k->numel() - 1 != batch) {
    checker_.bad("cu_seqlens_k has ", o.cu_seqlens_k->numel(), " entries; with batch ", batch,
                 " it must have ", batch + 1);
  }
  s.batch = static_cast<int32_t>(batch);
  s.heads_q = static_cast<int32_t>(heads_q);
  s.heads_k = static_cast<int32_t>(heads_k);
  s.head_dim = static_cast<int32_t>(head_dim);
  s.head_dim_v = static_cast<int32_t>(head_dim_v);
  s.rows_q = qd == 3 ? q_.size(0) : q_.size(0) * q_.size(1);
  s.rows_k = kv_dim == 3 ? k_.size(0) : k_.size(0) * k_.size(1);
}

void Arguments::set_lengths() {
  const Options& o = options_;
  const int64_t batch = problem_.shape.batch;
  Lengths& l = problem_.lengths;
  int64_t seqlen_q = o.cu_seqlens_q ? o.max_seqlen_q : q_.size(1);
  int64_t seqlen_k = o.cu_seqlens_k ? o.max_seqlen_k : k_.size(1);
  if (o.block_table) {
    problem_.kv.pages = checker_.pages(*o.block_table, batch, k_.size(1));
    seqlen_k = o.block_table->size(1) * k_.size(1);
    problem_.shape.rows_k = batch * seqlen_k;
  }
  if (seqlen_q < 0 || seqlen_q > Band::kMaxLength) {
    checker_.bad(o.cu_seqlens_q ? "max_seqlen_q" : "seqlen_q", " is ", seqlen_q,
                 "; it must be 0 to 2^30");
  }
  if (seqlen_k < 0 || seqlen_k > Band::kMaxLength) {
    checker_.bad(o.cu_seqlens_k ? "max_seqlen_k" : "seqlen_k", " is ", seqlen_k,
                 "; it must be 0 to 2^30");
  }
  l.seqlen_q = static_cast<int32_t>(seqlen_q);
  l.seqlen_k = static_cast<int32_t>(seqlen_k);
  l.cu_seqlens_q = checker_.index_vector("cu_seqlens_q", o.cu_seqlens_q, batch + 1);
  l.cu_seqlens_k = checker_.index_vector("cu_seqlens_k", o.cu_seqlens_k, batch + 1);
  l.seqused_q = checker_.index_vector("seqused_q", o.seqused_q, batch);
  l.seqused_k = checker_.index_vector("seqused_k", o.seqused_k, batch);
  l.leftpad_k = checker_.index_vector("leftpad_k", o.leftpad_k, batch);

  const auto side = [&](const char* name, int64_t value) -> int32_t {
    if (value < -1) checker_.bad(name, " is ", value, "; it must be >= 0, or -1 for unbounded");
    return static_cast<int32_t>(value < Band::kMaxLength ? value : Band::kMaxLength);
  };
  problem_.window = {side("window_left", o.window_left), side("window_right", o.window_right)};
  if (o.num_splits < 0)
    checker_.bad("num_splits is ", o.num_splits, "; it must be >= 0 (0 chooses)");
  problem_.num_splits =
      static_cast<int32_t>(o.num_splits < Band::kMaxLength ? o.num_splits : Band::kMaxLength);
}

void Arguments::set_score() {
  const Options& o = options_;
  const Shape& s = problem_.shape;
  ScoreOptions& score = problem_.score;
  const double scale =
      o.softmax_scale ? *o.softmax_scale : 1 / sqrt(static_cast<double>(s.head_dim));
  score.scale = static_cast<float>(scale);
  score.softcap = static_cast<float>(o.softcap);
  if (!isfinite(scale)) checker_.bad("softmax_scale is ", scale, "; it must be finite");
  if (!(o.softcap >= 0) || !isfinite(o.softcap)) {
    checker_.bad("softcap is ", o.softcap, "; it must be >= 0 (0 = off)");
  }
  if (!isfinite(score.scale))
    checker_.bad("softmax_scale is ", scale, "; it must be finite in float32");
  // Beyond these, score / softcap leaves float32's normal numbers.
  if (o.softcap > 0 && !(o.softcap >= 1e-30 && o.softcap <= 1e30))
    checker_.bad("softcap is ", o.softcap, "; it must be 0 (off) or 1e-30 to 1e30");
  if (!(o.dropout_p >= 0 && o.dropout_p < 1)) {
    checker_.bad("dropout_p is ", o.dropout_p, "; it must be in [0, 1)");
  }
  score.alibi_slopes = checker_.float_vector("alibi_slopes", o.alibi_slopes);
  if (o.alibi_slopes) {
    const Tensor& t = *o.alibi_slopes;
    const bool per_head = t.dim() == 1 && t.size(0) == s.heads_q;
    const bool per_batch = t.dim() == 2 && t.size(0) == s.batch && t.size(1) == s.heads_q;
    if (!per_head && !per_batch) {
      checker_.bad("alibi_slopes has shape ", shape_text(t), "; it must be (", s.heads_q, ",) or (",
                   s.batch, ", ", s.heads_q, ")");
    }
    score.alibi_batch_stride = per_batch ? t.stride(0) : 0;
  }
  score.sinks = checker_.float_vector("sinks", o.sinks);
  if (o.sinks && (o.sinks->dim() != 1 || o.sinks->size(0) != s.heads_q)) {
    checker_.bad("sinks has shape ", shape_text(*o.sinks), "; it must be (", s.heads_q, ",)");
  }
  if (o.bias) {
    const Tensor& t = *o.bias;
    const DType dtype = checker_.float_dtype("bias", t);
    checker_.on_device("bias", t);
    const std::vector<int64_t> full{s.batch, s.heads_q, problem_.lengths.seqlen_q,
                                    problem_.lengths.seqlen_k};
    int64_t stride[4];
    for (int64_t d = 0; d < 4; ++d) {
      if (t.dim() != 4 || (t.size(d) != full[d] && t.size(d) != 1)) {
        checker_.bad("bias has shape ", shape_text(t), "; it must broadcast to ", sizes_text(full));
      }
      stride[d] = t.size(d) == 1 ? 0 : t.stride(d);
    }
    score.bias = {t.data(), stride[0], stride[1], stride[2], stride[3], dtype};
  }
  if (o.dropout_p > 0) {
    if (!o.dropout_seed) checker_.bad("dropout_p is ", o.dropout_p, ", which needs dropout_seed");
    const Tensor& t = *o.dropout_seed;
    if (!t.is_cpu() || t.dtype() != aoti_torch_dtype_int64() || t.numel() != 1) {
      checker_.bad("dropout_seed must be one int64 on the CPU");
    }
    score.dropout_seed = *static_cast<const uint64_t*>(t.data());
    score.dropout_threshold = Dropout::threshold_of(o.dropout_p);
  }
  const auto kv_scale = [&](const char* name, const std::optional<Tensor>& t) -> RowStats {
    if (!t) return {};
    std::vector<int64_t> sizes = sizes_of(k_);
    sizes.pop_back();
    checker_.float_vector(name, t);
    checker_.has_shape(name, *t, sizes);
    const int64_t d = t->dim();  // (batch, row, head) or (row, head)
    return {static_cast<float*>(t->data()), d == 3 ? t->stride(0) : 0, t->stride(d - 1),
            t->stride(d - 2)};
  };
  problem_.kv.k_scale = kv_scale("k_scale", o.k_scale);
  problem_.kv.v_scale = kv_scale("v_scale", o.v_scale);
}

void Arguments::set_block_mask() {
  const Options& o = options_;
  if (o.block_mask.has_value() != o.block_mask_layout.has_value()) {
    checker_.bad("block_mask and block_mask_layout go together");
  }
  if (!o.block_mask) return;
  const Lengths& l = problem_.lengths;
  BlockMask& mask = problem_.block_mask;
  mask = block_mask_of(checker_, *o.block_mask, *o.block_mask_layout, problem_.shape);
  const bool dense_k = !l.cu_seqlens_k && !l.seqused_k && !l.leftpad_k;
  const bool dense_q = !l.cu_seqlens_q && !l.seqused_q;
  if (dense_k && l.seqlen_k > mask.seqlen_k) {
    checker_.bad("block_mask has seqlen_k ", mask.seqlen_k, " but k has seqlen ", l.seqlen_k,
                 "; a mask must cover every key");
  }
  const int64_t first_row = static_cast<int64_t>(l.seqlen_k) - l.seqlen_q -
                            (static_cast<int64_t>(mask.seqlen_k) - mask.seqlen_q);
  if (dense_k && dense_q && first_row < 0 && l.seqlen_q > 0) {
    checker_.bad("block_mask covers ", mask.seqlen_q, " x ", mask.seqlen_k,
                 " but q and k have seqlens ", l.seqlen_q, " and ", l.seqlen_k,
                 ": the first query row lies ", -first_row, " rows before the mask's first");
  }
}

std::vector<int64_t> Arguments::out_sizes() const {
  std::vector<int64_t> sizes = sizes_of(q_);
  sizes.back() = problem_.shape.head_dim_v;
  return sizes;
}

std::vector<int64_t> Arguments::lse_sizes() const {
  if (varlen_q()) return {problem_.shape.heads_q, q_.size(0)};
  return {problem_.shape.batch, problem_.shape.heads_q, q_.size(1)};
}

AnyView Arguments::view(const Tensor& t, std::vector<Tensor>* keep) {
  const int64_t d = t.dim();
  if (t.size(d - 1) > 1 && t.stride(d - 1) != 1) {
    keep->push_back(copy(t));
    return view(keep->back(), keep);
  }
  return {t.data(), d == 4 ? t.stride(0) : 0, t.stride(d - 3), t.stride(d - 2)};
}

RowStats Arguments::stats(const Tensor& t) {
  const int64_t d = t.dim();
  return {static_cast<float*>(t.data()), d == 3 ? t.stride(0) : 0, t.stride(d - 2),
          t.stride(d - 1)};
}

void Arguments::set_outputs(const Tensor& out, const Tensor& lse) {
  problem_.out = view(out, &keep_);
  if (lse.handle()) problem_.lse = stats(lse);
}

void Arguments::check_contents() {
  HostReader host;
  const Options& o = options_;
  const int32_t *cu_q = host.read(o.cu_seqlens_q), *cu_k = host.read(o.cu_seqlens_k);
  const int32_t *used_q = host.read(o.seqused_q), *used_k = host.read(o.seqused_k);
  const int32_t* leftpad = host.read(o.leftpad_k);
  const Lengths& l = problem_.lengths;
  const int64_t batch = problem_.shape.batch;
  const Checker& c = checker_;
  if (cu_q) c.cumulative("cu_seqlens_q", cu_q, batch, q_.size(0), "q", "max_seqlen_q", l.seqlen_q);
  if (cu_k) c.cumulative("cu_seqlens_k", cu_k, batch, k_.size(0), "k", "max_seqlen_k", l.seqlen_k);
  if (used_q) c.within_lengths("seqused_q", used_q, cu_q, batch, l.seqlen_q);
  if (used_k && !o.block_table) c.within_lengths("seqused_k", used_k, cu_k, batch, l.seqlen_k);
  if (leftpad) c.within_lengths("leftpad_k", leftpad, cu_k, batch, l.seqlen_k);
  if (o.block_mask) {
    const BlockMask& mask = problem_.block_mask;
    check_block_mask(c, host.read(o.block_mask), *o.block_mask_layout);
    for (int64_t b = 0; b < batch; ++b) {
      int64_t seqlen_k = used_k ? used_k[b] : cu_k ? cu_k[b + 1] - cu_k[b] : l.seqlen_k;
      if (leftpad) seqlen_k -= leftpad[b];
      if (seqlen_k > mask.seqlen_k) {
        c.bad("block_mask has seqlen_k ", mask.seqlen_k, " but sequence ", b, " has ", seqlen_k,
              " keys; a mask must cover every key");
      }
    }
  }
  if (o.block_table) {
    const Tensor& table = *o.block_table;
    c.table_entries("seqused_k", used_k, host.read(o.block_table), HostReader::row_stride(table),
                    batch, table.size(1), k_.size(1), k_.size(0));
  }
}

}  // namespace fal::torch_binding
