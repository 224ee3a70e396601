// The operators flashattn_lite::rotate and ::append_kv: rotary embedding, and new rows into a
// (paged, perhaps quantised) cache, in place. Meaning: flashattn_lite/kv_cache.py and
// docs/semantics.md.
#include "../core/head_dims.h"
#include "../cpu/append.h"
#include "boxing.h"
#include "checks.h"
#include "engines.h"

namespace fal::torch_binding {
namespace {

Rotary rotary_of(const Checker& check, const Tensor& cos, const Tensor& sin, int64_t head_dim,
                 bool interleaved) {
  check.on_device("rotary_cos", cos);
  if (cos.dim() != 2 || cos.size(1) < 1 || 2 * cos.size(1) > head_dim) {
    check.bad("rotary_cos has shape ", shape_text(cos),
              "; it must be (positions, rotary_dim / 2) with rotary_dim <= head_dim ", head_dim);
  }
  check.has_shape("rotary_sin", sin, sizes_of(cos));
  const DType dtype = check.float_dtype("rotary_cos", cos);
  check.has_dtype("rotary_sin", sin, cos.dtype());
  check.unit_last_stride("rotary_cos", cos);
  check.unit_last_stride("rotary_sin", sin);
  if (cos.stride(0) != sin.stride(0)) {
    check.bad("rotary_cos and rotary_sin have different strides; call .contiguous() on both");
  }
  return {cos.data(),
          sin.data(),
          cos.stride(0),
          static_cast<int32_t>(cos.size(1)),
          static_cast<int32_t>(cos.size(0)),
          interleaved,
          dtype};
}

// Positions offsets[b] .. offsets[b] + lengths of entry b - 1 must have a row of angles.
void check_positions(const Checker& check, const char* name, const int32_t* offsets,
                     const int32_t* cu, int64_t batch, int64_t rows, int64_t positions) {
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t first = offsets ? offsets[b] : 0, count = cu ? cu[b + 1] - cu[b] : rows;
    if (first < 0) check.bad(name, "[", b, "] is ", first, "; it must be >= 0");
    if (count > 0 && first + count > positions) {
      check.bad("rotary_cos has ", positions, " positions but sequence ", b, " needs ",
                first + count);
    }
  }
}

struct Rows {  // a (batch, seqlen, heads, dim) or (total, heads, dim) argument
  int64_t batch, seqlen;
  const int32_t* cu_seqlens;
};

Rows rows_of(const Checker& check, const char* name, const Tensor& t,
             const std::optional<Tensor>& cu_seqlens, int64_t max_seqlen) {
  if (t.dim() != (cu_seqlens ? 3 : 4)) {
    check.bad(name, " has shape ", shape_text(t), "; it must be ",
              cu_seqlens ? "(total, heads, head_dim)" : "(batch, seqlen, heads, head_dim)");
  }
  const int32_t most = t.is_cpu() ? kMaxDecodeHeadDim : kMaxHeadDim;
  if (t.size(t.dim() - 1) > most)
    check.bad(name, " has head_dim ", t.size(t.dim() - 1), "; it must be 1 to ", most);
  check.unit_last_stride(name, t);
  for (const auto& [what, size] : {std::pair{"seqlen", cu_seqlens ? 0 : t.size(1)},
                                   std::pair{"max_seqlen", cu_seqlens ? max_seqlen : 0}}) {
    if (size < 0 || size > Band::kMaxLength)
      check.bad(what, " is ", size, "; it must be 0 to 2^30");
  }
  if (!cu_seqlens) return {t.size(0), t.size(1), nullptr};
  if (cu_seqlens->numel() < 1) check.bad("cu_seqlens is empty; it must hold batch + 1 offsets");
  const int64_t batch = cu_seqlens->numel() - 1;
  return {batch, max_seqlen, check.index_vector("cu_seqlens", cu_seqlens, batch + 1)};
}

AnyView any_view(const Tensor& t) {
  const int64_t d = t.dim();
  return {t.data(), d == 4 ? t.stride(0) : 0, t.stride(d - 3), t.stride(d - 2)};
}

void rotate(uint64_t* stack, uint64_t inputs, uint64_t) {
  constexpr const char* kName = "flashattn_lite::rotate";
  Tensor x, cos, sin;
  std::optional<Tensor> cu_seqlens, offsets;
  int64_t max_seqlen;
  bool interleaved, advance;
  StackReader(stack, inputs) >> x >> cos >> sin >> cu_seqlens >> offsets >> max_seqlen >>
      interleaved >> advance;

  const Checker check(kName, x);
  const Rows rows = rows_of(check, "x", x, cu_seqlens, max_seqlen);
  RotateProblem p{};
  p.batch = static_cast<int32_t>(rows.batch);
  p.seqlen = static_cast<int32_t>(rows.seqlen);
  p.heads = static_cast<int32_t>(x.size(x.dim() - 2));
  p.head_dim = static_cast<int32_t>(x.size(x.dim() - 1));
  p.dtype = check.float_dtype("x", x);
  p.cu_seqlens = rows.cu_seqlens;
  p.offsets = check.index_vector("offsets", offsets, rows.batch);
  p.advance = advance;
  p.rotary = rotary_of(check, cos, sin, p.head_dim, interleaved);
  if (x.is_cpu() || contents_checked_on_cuda()) {
    HostReader host;
    const int32_t* cu = host.read(cu_seqlens);
    if (cu)
      check.cumulative("cu_seqlens", cu, rows.batch, x.size(0), "x", "max_seqlen", max_seqlen);
    check_positions(check, "offsets", host.read(offsets), advance ? cu : nullptr, rows.batch,
                    advance ? rows.seqlen : (rows.seqlen > 0), p.rotary.positions);
  }
  Tensor out = empty_like(x);
  if (cu_seqlens) FAL_TORCH(aoti_torch_copy_(out.handle(), x.handle(), 0));  // rows of no sequence
  p.x = any_view(x);
  p.out = any_view(out);
  run_rotate(kName, x, p);
  put_results(stack, std::move(out));
}

void append_kv(uint64_t* stack, uint64_t inputs, uint64_t) {
  constexpr const char* kName = "flashattn_lite::append_kv";
  Tensor k, v, k_cache, v_cache, cache_seqlens_tensor;
  std::optional<Tensor> block_table, cu_seqlens, k_scale, v_scale, cos, sin;
  int64_t max_seqlen;
  bool interleaved;
  StackReader(stack, inputs) >> k >> v >> k_cache >> v_cache >> cache_seqlens_tensor >>
      block_table >> cu_seqlens >> max_seqlen >> k_scale >> v_scale >> cos >> sin >> interleaved;
  const std::optional<Tensor> cache_seqlens(std::move(cache_seqlens_tensor));

  const Checker check(kName, k);
  const Rows rows = rows_of(check, "k", k, cu_seqlens, max_seqlen);
  AppendProblem p{};
  p.dtype = check.float_dtype("k", k);
  std::vector<int64_t> v_sizes = sizes_of(k);
  v_sizes.back() = v.dim() ? v.size(v.dim() - 1) : 0;
  check.has_shape("v", v, v_sizes);
  check.has_dtype("v", v, k.dtype());
  rows_of(check, "v", v, cu_seqlens, max_seqlen);

  p.batch = static_cast<int32_t>(rows.batch);
  p.seqlen = static_cast<int32_t>(rows.seqlen);
  p.heads_k = static_cast<int32_t>(k.size(k.dim() - 2));
  p.head_dim = static_cast<int32_t>(k.size(k.dim() - 1));
  p.head_dim_v = static_cast<int32_t>(v_sizes.back());
  p.k = any_view(k);
  p.v = any_view(v);
  p.cu_seqlens = rows.cu_seqlens;
  p.cache_seqlens = check.index_vector("cache_seqlens", cache_seqlens, rows.batch);

  const char* form = block_table ? "(num_pages, page_size, heads_k, head_dim)"
                                 : "(batch, capacity, heads_k, head_dim)";
  for (const auto& [name, t, dim] : {std::tuple{"k_cache", &k_cache, p.head_dim},
                                     std::tuple{"v_cache", &v_cache, p.head_dim_v}}) {
    check.on_device(name, *t);
    if (t->dim() != 4 || t->size(2) != p.heads_k || t->size(3) != dim ||
        (!block_table && t->size(0) != rows.batch)) {
      check.bad(name, " has shape ", shape_text(*t), "; it must be ", form, " with ", p.heads_k,
                " heads of ", dim, block_table ? "" : " and the batch of k");
    }
    check.unit_last_stride(name, *t);
    for (int64_t d = 0; d < 3; ++d) {
      if (t->size(d) > 1 && t->stride(d) == 0)
        check.bad(name, " is expanded (stride 0); it must own its rows");
    }
  }
  if (k_cache.size(0) != v_cache.size(0) || k_cache.size(1) != v_cache.size(1)) {
    check.bad("k_cache has shape ", shape_text(k_cache), " but v_cache has ", shape_text(v_cache));
  }
  KeyValue& cache = p.cache;
  if (!known_dtype(k_cache.dtype(), &cache.dtype) ||
      (is_float(cache.dtype) && cache.dtype != p.dtype)) {
    check.bad("k_cache is ", dtype_text(k_cache.dtype()), " but k is ", dtype_text(k.dtype()),
              "; a cache is of the same dtype, int8 or float8_e4m3fn");
  }
  check.has_dtype("v_cache", v_cache, k_cache.dtype());
  cache.k = any_view(k_cache);
  cache.v = any_view(v_cache);
  if (!is_float(cache.dtype) != (k_scale && v_scale)) {
    check.bad("k_scale and v_scale go with an int8 or float8_e4m3fn cache, which is ",
              dtype_text(k_cache.dtype()));
  }
  for (const auto& [name, t, stats] : {std::tuple{"k_scale", &k_scale, &cache.k_scale},
                                       std::tuple{"v_scale", &v_scale, &cache.v_scale}}) {
    if (!*t) continue;
    check.has_shape(name, **t, {k_cache.size(0), k_cache.size(1), p.heads_k});
    check.has_dtype(name, **t, aoti_torch_dtype_float32());
    *stats = {static_cast<float*>((*t)->data()), (*t)->stride(0), (*t)->stride(2), (*t)->stride(1)};
  }
  int64_t capacity = k_cache.size(1);
  if (block_table) {
    cache.pages = check.pages(*block_table, rows.batch, k_cache.size(1));
    capacity *= block_table->size(1);
  }
  if (cos.has_value() != sin.has_value()) check.bad("rotary_cos and rotary_sin go together");
  if (cos) p.rotary = rotary_of(check, *cos, *sin, p.head_dim, interleaved);

  if (k.is_cpu() || contents_checked_on_cuda()) {
    HostReader host;
    const int32_t *cu = host.read(cu_seqlens), *used = host.read(cache_seqlens);
    if (cu)
      check.cumulative("cu_seqlens", cu, rows.batch, k.size(0), "k", "max_seqlen", max_seqlen);
    std::vector<int32_t> needed(rows.batch);
    for (int64_t b = 0; b < rows.batch; ++b) {
      const int64_t fresh = cu ? cu[b + 1] - cu[b] : rows.seqlen;
      if (used[b] < 0 || used[b] + fresh > capacity) {
        check.bad("cache_seqlens[", b, "] is ", used[b], " and ", fresh, " rows are new, but ",
                  block_table ? "block_table addresses " : "the cache holds ", capacity,
                  " rows of a sequence");
      }
      needed[b] = static_cast<int32_t>(used[b] + fresh);
    }
    if (block_table) {
      check.table_entries("cache_seqlens + new", needed.data(), host.read(block_table),
                          HostReader::row_stride(*block_table), rows.batch, block_table->size(1),
                          k_cache.size(1), k_cache.size(0));
    }
    if (cos)
      check_positions(check, "cache_seqlens", used, cu, rows.batch, rows.seqlen,
                      p.rotary.positions);
  }
  run_append(kName, k, p);
}

const bool registered = [] {
  static Library definitions = Library::fragment("flashattn_lite");
  definitions
      .schema(
          "rotate(Tensor x, Tensor rotary_cos, Tensor rotary_sin, Tensor? cu_seqlens, "
          "Tensor? offsets, SymInt max_seqlen, bool interleaved, bool advance) -> Tensor")
      .schema(
          "append_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
          "Tensor cache_seqlens, Tensor? block_table, Tensor? cu_seqlens, SymInt max_seqlen, "
          "Tensor(c!)? k_scale, Tensor(d!)? v_scale, Tensor? rotary_cos, Tensor? rotary_sin, "
          "bool interleaved) -> ()");
  static Library on_cpu = Library::implement("flashattn_lite", "CPU");
  on_cpu.function("rotate", rotate).function("append_kv", append_kv);
  static Library on_cuda = Library::implement("flashattn_lite", "CUDA");
  on_cuda.function("rotate", rotate).function("append_kv", append_kv);
  return true;
}();

}  // namespace
}  // namespace fal::torch_binding
