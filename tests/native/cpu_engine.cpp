// Runs the CPU engine's cases against the double-precision reference: cpu_engine [isa|all [case]];
// --isas and
// --active say what there is to run.
// Needs no torch and no Python, so it runs wherever the engine compiles (also under qemu and
// sanitizers). Exit status 0 when everything holds.
#include <algorithm>
#include <memory>
#include <string>
#include <thread>

#include "../../csrc/cpu/engine.h"
#include "cpu_cases.h"
#include "cpu_reference.h"

namespace fal::test {
namespace {

int failures = 0;

void run_threads(void*, int workers, void (*body)(void* arg, int worker), void* arg) {
  std::vector<std::thread> threads;
  for (int w = 1; w < workers; ++w) threads.emplace_back(body, arg, w);
  body(arg, 0);
  for (std::thread& t : threads) t.join();
}

std::vector<int> cumulative(const std::vector<int>& lengths, int batch) {
  std::vector<int> sums(1, 0);
  for (int b = 0; b < batch; ++b) sums.push_back(sums.back() + lengths[b]);
  return sums;
}

// The memory and the problem of one case and dtype.
class Setup {
 public:
  Setup(const Case& c, DType dtype)
      : c_(c), dtype_(dtype), random_(c.name.size() * 977 + c.seqlen_k) {
    make_lengths();
    make_tensors();
    fill();
    make_options();
  }

  ForwardProblem forward() {
    ForwardProblem p{};
    p.shape = {
        c_.batch,      c_.heads_q,
        c_.heads_k,    c_.head_dim,
        c_.head_dim_v, dtype_,
        in_.rows_q,    c_.page_size ? int64_t(table_width_) * c_.page_size * c_.batch : in_.rows_k};
    p.lengths = lengths_;
    p.window = in_.window;
    p.score = score_;
    p.q = view(*q_, varlen_q_);
    p.kv.k = view(*k_, varlen_k_);
    p.kv.v = view(*v_, varlen_k_);
    p.kv.dtype = dtype_;
    if (c_.page_size)
      p.kv.pages = {static_cast<int32_t*>(table_->data()), table_width_, c_.page_size};
    p.out = view(*out_, varlen_q_);
    p.lse = stats(lse_.get());
    return p;
  }

  BackwardProblem backward() {
    BackwardProblem p{};
    p.forward = forward();
    p.dout = view(*dout_, varlen_q_);
    if (c_.dlse) p.dlse = stats(dlse_.get());
    p.dq = view(*dq_, varlen_q_);
    p.dk = view(*dk_, varlen_k_);
    p.dv = view(*dv_, varlen_k_);
    if (c_.sinks) p.dsinks = dsinks_.data();
    if (dbias_) {
      p.dbias = {dbias_->view().data, dbias_->batch, dbias_->head, dbias_->row, 1, bias_dtype_};
    }
    return p;
  }

  bool has_backward() const { return !c_.page_size; }
  const Inputs& inputs() const { return in_; }

  void poison_outputs() {
    for (Tensor* t : outputs()) t->poison();
    std::fill(dsinks_.begin(), dsinks_.end(), NAN);
  }
  std::vector<std::vector<char>> output_bytes() const {
    std::vector<std::vector<char>> all;
    for (Tensor* t : outputs()) all.push_back(t->bytes());
    const char* p = reinterpret_cast<const char*>(dsinks_.data());
    all.emplace_back(p, p + dsinks_.size() * sizeof(float));
    return all;
  }
  bool gaps_untouched() const {
    for (Tensor* t : outputs())
      if (!t->gaps_untouched()) return false;
    return true;
  }

  Results results() const {
    Results r;
    r.out = rows(*out_), r.dq = rows(*dq_), r.dk = rows(*dk_), r.dv = rows(*dv_);
    for (int h = 0; h < c_.heads_q; ++h)
      for (int64_t i = 0; i < in_.rows_q; ++i) r.lse.push_back(stat(*lse_, h, i));
    if (dbias_)
      for (int b = 0; b < c_.batch; ++b)
        for (int h = 0; h < c_.heads_q; ++h)
          for (int64_t i = 0; i < in_.max_q; ++i)
            for (int64_t j = 0; j < in_.max_k; ++j) r.dbias.push_back(dbias_->get(b, i, h, j));
    r.dsinks.assign(dsinks_.begin(), dsinks_.end());
    return r;
  }

 private:
  void make_lengths() {
    varlen_q_ = !c_.cu_q.empty(), varlen_k_ = !c_.cu_k.empty();
    lengths_ = {c_.seqlen_q, c_.seqlen_k, nullptr, nullptr, nullptr, nullptr, nullptr};
    in_.rows_q = int64_t(c_.batch) * c_.seqlen_q, in_.rows_k = int64_t(c_.batch) * c_.seqlen_k;
    const auto varlen = [&](const std::vector<int>& lens, std::vector<int>& cu, int32_t& longest,
                            int64_t& total) {
      cu = cumulative(lens, c_.batch);
      longest = 0, total = 0;
      for (size_t i = 0; i < lens.size(); ++i) {
        total += lens[i];
        if (int(i) < c_.batch) longest = std::max(longest, lens[i]);
      }
    };
    if (varlen_q_)
      varlen(c_.cu_q, cu_q_, lengths_.seqlen_q, in_.rows_q), lengths_.cu_seqlens_q = cu_q_.data();
    if (varlen_k_)
      varlen(c_.cu_k, cu_k_, lengths_.seqlen_k, in_.rows_k), lengths_.cu_seqlens_k = cu_k_.data();
    if (!c_.used_q.empty()) lengths_.seqused_q = c_.used_q.data();
    if (!c_.used_k.empty()) lengths_.seqused_k = c_.used_k.data();
    if (!c_.leftpad.empty()) lengths_.leftpad_k = c_.leftpad.data();
  }

  void make_tensors() {
    const auto q_like = [&](int dim) {
      return std::make_unique<Tensor>(dtype_, varlen_q_ ? 1 : c_.batch,
                                      varlen_q_ ? in_.rows_q : c_.seqlen_q, c_.heads_q, dim,
                                      c_.layout);
    };
    table_width_ = c_.page_size ? (c_.seqlen_k + c_.page_size - 1) / c_.page_size + 2 : 0;
    const int64_t pages = int64_t(table_width_) * c_.batch + 3;
    const auto k_like = [&](int dim) {
      if (c_.page_size)
        return std::make_unique<Tensor>(dtype_, pages, c_.page_size, c_.heads_k, dim, c_.layout);
      return std::make_unique<Tensor>(dtype_, varlen_k_ ? 1 : c_.batch,
                                      varlen_k_ ? in_.rows_k : c_.seqlen_k, c_.heads_k, dim,
                                      c_.layout);
    };
    q_ = q_like(c_.head_dim), k_ = k_like(c_.head_dim), v_ = k_like(c_.head_dim_v);
    out_ = q_like(c_.head_dim_v), dout_ = q_like(c_.head_dim_v);
    dq_ = q_like(c_.head_dim), dk_ = k_like(c_.head_dim), dv_ = k_like(c_.head_dim_v);
    // LSE as (1 or batch, heads, rows): a Tensor whose "dim" is the row.
    const auto stat_like = [&] {
      return std::make_unique<Tensor>(DType::kFloat32, varlen_q_ ? 1 : c_.batch, c_.heads_q, 1,
                                      varlen_q_ ? in_.rows_q : c_.seqlen_q, 0);
    };
    lse_ = stat_like(), dlse_ = stat_like();
    if (c_.bias != BiasKind::kNone) {
      bias_dtype_ = dtype_;
      const int heads = c_.bias == BiasKind::kOneHead ? 1 : c_.heads_q;
      const int rows = c_.bias == BiasKind::kOneRow ? 1 : lengths_.seqlen_q;
      bias_ = std::make_unique<Tensor>(dtype_, c_.batch, rows, heads, lengths_.seqlen_k, 1);
      // Strided: every other element of a row is a gap.
      if (c_.bias == BiasKind::kStrided)
        strided_bias_ =
            std::make_unique<Tensor>(dtype_, c_.batch, rows, heads, lengths_.seqlen_k * 2, 1);
      dbias_ = std::make_unique<Tensor>(bias_dtype_, c_.batch, lengths_.seqlen_q, c_.heads_q,
                                        lengths_.seqlen_k, c_.layout);
    }
  }

  void fill() {
    in_.batch = c_.batch, in_.heads_q = c_.heads_q, in_.heads_k = c_.heads_k;
    in_.head_dim = c_.head_dim, in_.head_dim_v = c_.head_dim_v;
    in_.window = {c_.left, c_.right};
    in_.max_q = lengths_.seqlen_q, in_.max_k = lengths_.seqlen_k;
    in_.k_batch.assign(in_.rows_k, 0), in_.k_row.assign(in_.rows_k, 0);
    if (c_.dlse) in_.dlse.assign(c_.heads_q * in_.rows_q, 0.0);
    if (c_.page_size) {
      table_ = std::make_unique<GuardedMemory>(sizeof(int32_t) * table_width_ * c_.batch);
      int32_t* table = static_cast<int32_t*>(table_->data());
      for (int i = 0; i < table_width_ * c_.batch; ++i) table[i] = 0x40000000;
    }
    for (int b = 0; b < c_.batch; ++b) {
      const Sequence s = lengths_.sequence(b);
      in_.sequences.push_back(s);
      in_.q_offset.push_back(varlen_q_ ? s.row_q : int64_t(b) * c_.seqlen_q);
      in_.k_offset.push_back(varlen_k_ ? s.row_k : int64_t(b) * c_.seqlen_k + s.row_k);
      for (int i = 0; i < s.seqlen_q; ++i) {
        for (int h = 0; h < c_.heads_q; ++h) {
          const int64_t tb = varlen_q_ ? 0 : b, row = s.row_q + i;
          for (int d = 0; d < c_.head_dim; ++d)
            q_->set(tb, row, h, d, i == c_.nan_query ? NAN : random_.normal());
          for (int d = 0; d < c_.head_dim_v; ++d) dout_->set(tb, row, h, d, random_.normal());
          if (c_.dlse) {
            dlse_->set(tb, h, 0, row, random_.normal());
            in_.dlse[h * in_.rows_q + in_.q_offset[b] + i] = dlse_->get(tb, h, 0, row);
          }
        }
      }
      for (int j = 0; j < s.seqlen_k; ++j) {
        int64_t tb = varlen_k_ ? 0 : b, row = s.row_k + j;
        if (c_.page_size) {
          const int page = int(row) / c_.page_size;
          int32_t* entry = static_cast<int32_t*>(table_->data()) + b * table_width_ + page;
          *entry = (page * c_.batch + (c_.batch - 1 - b)) + 2;
          tb = *entry, row %= c_.page_size;
        }
        in_.k_batch[in_.k_offset[b] + j] = tb, in_.k_row[in_.k_offset[b] + j] = row;
        for (int h = 0; h < c_.heads_k; ++h) {
          for (int d = 0; d < c_.head_dim; ++d)
            k_->set(tb, row, h, d, j == c_.nan_key ? NAN : random_.normal());
          for (int d = 0; d < c_.head_dim_v; ++d)
            v_->set(tb, row, h, d, j == c_.nan_value ? NAN : random_.normal());
        }
      }
    }
    in_.q = q_.get(), in_.k = k_.get(), in_.v = v_.get(), in_.dout = dout_.get();
    in_.bias = bias_.get();
    in_.bias_one_head = c_.bias == BiasKind::kOneHead,
    in_.bias_one_row = c_.bias == BiasKind::kOneRow;
    in_.backward = has_backward();
    if (!bias_) return;
    for (int64_t b = 0; b < bias_->extent(0); ++b)
      for (int64_t i = 0; i < bias_->extent(1); ++i)
        for (int64_t h = 0; h < bias_->extent(2); ++h)
          for (int64_t j = 0; j < bias_->extent(3); ++j) {
            const double x = random_.uniform() < 0.1 ? -INFINITY : random_.normal();
            bias_->set(b, i, h, j, x);
            if (strided_bias_) strided_bias_->set(b, i, h, 2 * j, x);
          }
  }

  void make_options() {
    score_ = {};
    score_.scale = static_cast<float>(c_.scale / std::sqrt(double(c_.head_dim)));
    score_.softcap = static_cast<float>(c_.softcap);
    for (int i = 0; i < c_.batch * c_.heads_q; ++i)
      slopes_.push_back(0.02f + 0.13f * static_cast<float>(i));
    if (c_.alibi) score_.alibi_slopes = slopes_.data();
    score_.alibi_batch_stride = c_.alibi == 2 ? c_.heads_q : 0;
    for (int h = 0; h < c_.heads_q; ++h) sinks_.push_back(0.7f * static_cast<float>(h) - 0.5f);
    if (c_.sinks) score_.sinks = sinks_.data();
    dsinks_.assign(c_.sinks ? c_.heads_q : 0, NAN);
    score_.dropout_seed = 0x1234567890abcdefull;
    score_.dropout_threshold = c_.dropout > 0 ? Dropout::threshold_of(c_.dropout) : 0;
    if (bias_) {
      const Tensor& t = strided_bias_ ? *strided_bias_ : *bias_;
      score_.bias = {t.view().data,
                     t.batch,
                     in_.bias_one_head ? 0 : t.head,
                     in_.bias_one_row ? 0 : t.row,
                     strided_bias_ ? 2 : 1,
                     bias_dtype_};
    }
    in_.score = score_;
  }

  std::vector<Tensor*> outputs() const {
    std::vector<Tensor*> all{out_.get(), lse_.get(), dq_.get()};
    if (has_backward()) all.push_back(dk_.get()), all.push_back(dv_.get());
    if (dbias_) all.push_back(dbias_.get());
    return all;
  }
  AnyView view(const Tensor& t, bool varlen) const {
    AnyView v = t.view();
    if (varlen) v.batch = 0;
    return v;
  }
  RowStats stats(const Tensor* t) const {
    return {static_cast<float*>(t->view().data), varlen_q_ ? 0 : t->batch, t->row, 1};
  }
  double stat(const Tensor& t, int h, int64_t i) const {
    return varlen_q_ ? t.get(0, h, 0, i) : t.get(i / c_.seqlen_q, h, 0, i % c_.seqlen_q);
  }
  std::vector<double> rows(const Tensor& t) const {
    std::vector<double> all;
    for (int64_t b = 0; b < t.extent(0); ++b)
      for (int64_t r = 0; r < t.extent(1); ++r)
        for (int64_t h = 0; h < t.extent(2); ++h)
          for (int64_t d = 0; d < t.extent(3); ++d) all.push_back(t.get(b, r, h, d));
    return all;
  }

  const Case& c_;
  DType dtype_, bias_dtype_ = DType::kFloat32;
  Random random_;
  bool varlen_q_, varlen_k_;
  Lengths lengths_;
  std::vector<int> cu_q_, cu_k_;
  std::unique_ptr<Tensor> q_, k_, v_, out_, lse_, dout_, dlse_, dq_, dk_, dv_, bias_, strided_bias_,
      dbias_;
  std::unique_ptr<GuardedMemory> table_;
  int table_width_;
  std::vector<float> slopes_, sinks_, dsinks_;
  ScoreOptions score_;
  Inputs in_{};
};

// error <= factor * (error of the same formula in low precision) + 4 ulps of the largest value + 4
// float32 ulps of the largest sum of absolute terms.
void compare(const std::string& where, const std::vector<double>& ours,
             const std::vector<double>& truth, const std::vector<double>& naive, double factor,
             DType dtype, double terms = 0) {
  double naive_error = 0, largest = 0, error = 0;
  size_t worst = 0;
  bool same_kind = ours.size() == truth.size();
  for (size_t i = 0; i < truth.size() && same_kind; ++i) {
    if (std::isfinite(truth[i])) {
      largest = std::max(largest, std::fabs(truth[i]));
      if (std::isfinite(naive[i]))
        naive_error = std::max(naive_error, std::fabs(naive[i] - truth[i]));
      const double e = std::fabs(ours[i] - truth[i]);
      if (!(e <= error)) error = e, worst = i;
      if (std::isnan(e)) break;
    } else if (!(std::isnan(truth[i]) ? std::isnan(ours[i]) : ours[i] == truth[i])) {
      same_kind = false, worst = i;
    }
  }
  const double budget = factor * naive_error + 8 * epsilon_of(dtype) * largest + 0x1p-21 * terms;
  if (same_kind && error <= budget) return;
  ++failures;
  printf("FAIL %s: element %zu is %.9g, should be %.9g (error %.3g, budget %.3g)\n", where.c_str(),
         worst, worst < ours.size() ? ours[worst] : NAN, worst < truth.size() ? truth[worst] : NAN,
         error, budget);
}

void run_case(const Case& c, DType dtype, const std::vector<std::string>& isas) {
  Setup setup(c, dtype);
  const Results truth = reference<double>(setup.inputs(), dtype, false);
  const Results naive = reference<float>(setup.inputs(), dtype, true);
  for (const std::string& isa : isas) {
    const std::string where = c.name +
                              (dtype == DType::kFloat32   ? " float32 "
                               : dtype == DType::kFloat16 ? " float16 "
                                                          : " bfloat16 ") +
                              isa;
    if (!cpu::select_isa(isa.c_str())) abort();
    std::vector<std::vector<char>> first;
    for (int threads = 1; threads <= 3; ++threads) {
      setup.poison_outputs();
      const cpu::ThreadPool pool{threads, nullptr, &run_threads};
      const ForwardProblem f = setup.forward();
      if (const char* reason = cpu::supports_forward(f)) printf("%s\n", reason), abort();
      cpu::forward(f, pool);
      if (setup.has_backward()) {
        const BackwardProblem b = setup.backward();
        if (const char* reason = cpu::supports_backward(b)) printf("%s\n", reason), abort();
        cpu::backward(b, pool);
      }
      if (threads == 1) {
        first = setup.output_bytes();
      } else if (first != setup.output_bytes()) {
        ++failures;
        printf("FAIL %s: %d threads give other bits\n", where.c_str(), threads);
      }
    }
    volatile float denormal = 1e-40f;
    if (denormal * 1.f == 0.f) {
      ++failures;
      printf("FAIL %s: denormals are still flushed after the call\n", where.c_str());
    }
    if (!setup.gaps_untouched())
      ++failures, printf("FAIL %s: wrote between the elements\n", where.c_str());
    const Results ours = setup.results();
    compare(where + " out", ours.out, truth.out, naive.out, 2, dtype);
    compare(where + " lse", ours.lse, truth.lse, naive.lse, 2, DType::kFloat32);
    if (!setup.has_backward()) continue;
    compare(where + " dq", ours.dq, truth.dq, naive.dq, 3, dtype, truth.dq_terms);
    compare(where + " dk", ours.dk, truth.dk, naive.dk, 3, dtype, truth.dk_terms);
    compare(where + " dv", ours.dv, truth.dv, naive.dv, 3, dtype);
    if (c.bias != BiasKind::kNone)
      compare(where + " dbias", ours.dbias, truth.dbias, naive.dbias, 3, dtype);
    if (c.sinks)
      // Through delta from the stored output, so as precise as that.
      compare(where + " dsinks", ours.dsinks, truth.dsinks, naive.dsinks, 3, dtype);
  }
}

// Rows so far apart that row * stride passes 2^31 elements: same bits as compact rows.
void run_big_strides(const std::string& isa) {
  constexpr int kLength = 7, kDim = 24;
  constexpr int64_t kStride = (int64_t{1} << 29) + 8;
  if (!cpu::select_isa(isa.c_str())) abort();
  std::vector<std::vector<float>> results[2];
  for (const int64_t stride : {int64_t{kDim}, kStride}) {
    const size_t bytes = sizeof(float) * (stride * (kLength - 1) + kDim);
    std::vector<float*> tensors;  // q k v out dout dq dk dv
    for (int i = 0; i < 8; ++i) {
      void* map = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (map == MAP_FAILED) printf("no address space for the big strides\n"), abort();
      tensors.push_back(static_cast<float*>(map));
      Random random(i + 1);
      for (int r = 0; r < kLength; ++r)
        for (int d = 0; d < kDim; ++d)
          tensors[i][r * stride + d] = static_cast<float>(random.normal());
    }
    std::vector<float> lse(kLength);
    const auto view = [&](int i) { return AnyView{tensors[i], 0, stride, 0}; };
    BackwardProblem b{};
    ForwardProblem& f = b.forward;
    f.shape = {1, 1, 1, kDim, kDim, DType::kFloat32, kLength, kLength};
    f.lengths = {kLength, kLength, nullptr, nullptr, nullptr, nullptr, nullptr};
    f.window = {Window::kUnbounded, 0};
    f.score.scale = 0.2f;
    f.q = view(0), f.kv.k = view(1), f.kv.v = view(2), f.out = view(3);
    f.lse = {lse.data(), 0, 0, 1};
    b.dout = view(4), b.dq = view(5), b.dk = view(6), b.dv = view(7);
    const cpu::ThreadPool pool{1, nullptr, &run_threads};
    cpu::forward(f, pool);
    cpu::backward(b, pool);
    for (float* t : tensors) {
      std::vector<float> rows;
      for (int r = 0; r < kLength; ++r)
        rows.insert(rows.end(), t + r * stride, t + r * stride + kDim);
      results[stride != kDim].push_back(rows);
      munmap(t, bytes);
    }
  }
  if (results[0] == results[1]) return;
  ++failures;
  printf("FAIL %s: strides past 2^31 give other bits\n", isa.c_str());
}

}  // namespace
}  // namespace fal::test

int main(int argc, char** argv) {
  using namespace fal::test;
  std::vector<std::string> isas;
  const std::string wanted = argc > 1 ? argv[1] : "all", only = argc > 2 ? argv[2] : "";
  for (const char* const* isa = fal::cpu::available_isas(); *isa; ++isa)
    if (wanted == "all" || wanted == *isa) isas.push_back(*isa);
  if (wanted == "--active") return printf("%s\n", fal::cpu::active_isa()) < 0;
  if (wanted == "--isas") {
    for (const char* const* isa = fal::cpu::available_isas(); *isa; ++isa) printf("%s\n", *isa);
    return 0;
  }
  if (wanted == "--big-strides") {
    for (const char* const* isa = fal::cpu::available_isas(); *isa; ++isa) run_big_strides(*isa);
    printf("big strides: %d failures\n", failures);
    return failures != 0;
  }
  int ran = 0;
  for (const Case& c : all_cases()) {
    if (!only.empty() && c.name != only) continue;
    for (fal::DType dtype : {fal::DType::kFloat32, fal::DType::kFloat16, fal::DType::kBFloat16}) {
      run_case(c, dtype, isas);
      ++ran;
    }
  }
  for (const std::string& isa : isas) printf("%s ", isa.c_str());
  printf("| %d cases, %d failures\n", ran, failures);
  return ran == 0 || isas.empty() || failures != 0;
}
