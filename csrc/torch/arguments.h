// From tensors to a problem: the arguments that every attention operator shares, their checks, and
// the plain structs that the engines take.
#pragma once

#include <memory>

#include "boxing.h"
#include "checks.h"

namespace fal::torch_binding {

// The options shared by forward and backward, in the schema's order.
struct Options {
  std::optional<Tensor> cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad_k;
  std::optional<Tensor> block_table, k_scale, v_scale;
  int64_t max_seqlen_q = 0, max_seqlen_k = 0;
  std::optional<Tensor> alibi_slopes, sinks, bias, dropout_seed;
  std::optional<Tensor> block_mask, block_mask_layout;
  std::optional<double> softmax_scale;  // default: 1 / sqrt(head_dim)
  double softcap = 0;
  int64_t window_left = -1, window_right = -1;
  double dropout_p = 0;
  int64_t num_splits = 0;  // forward's own: not in kSchema

  static constexpr const char* kSchema =
      "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_q, Tensor? seqused_k, "
      "Tensor? leftpad_k, Tensor? block_table, Tensor? k_scale, Tensor? v_scale, "
      "SymInt max_seqlen_q, SymInt max_seqlen_k, "
      "Tensor? alibi_slopes, Tensor? sinks, Tensor? bias, Tensor? dropout_seed, "
      "Tensor? block_mask, Tensor? block_mask_layout, "
      "float? softmax_scale, float softcap, int window_left, int window_right, float dropout_p";

  void read(StackReader& stack);
};

// A forward problem over tensors, and the tensors that must outlive it.
class Arguments {
 public:
  // Checks everything; raises with the operator's name, the argument, its value and what would be
  // right. On the CPU the contents of index tensors are checked too. On CUDA that would wait for
  // the device: FAL_CHECK=1 asks for it.
  Arguments(const char* op, Tensor q, Tensor k, Tensor v, Options&& options);

  Arguments(const Arguments&) = delete;  // the checker points at q_
  Arguments& operator=(const Arguments&) = delete;

  // Points the problem's outputs at these tensors, (…, heads_q, head_dim_v) and (…) float32; an LSE
  // that is not wanted is null.
  void set_outputs(const Tensor& out, const Tensor& lse);

  const ForwardProblem& problem() const { return problem_; }
  const Tensor& q() const { return q_; }
  const Tensor& k() const { return k_; }
  const Tensor& v() const { return v_; }
  const Options& options() const { return options_; }
  bool varlen_q() const { return q_.dim() == 3; }
  std::vector<int64_t> out_sizes() const;
  std::vector<int64_t> lse_sizes() const;

  // A view of a tensor shaped like q, k, v or out; copies it into `keep` when its last stride is
  // not 1.
  static AnyView view(const Tensor& t, std::vector<Tensor>* keep);
  // A view of a tensor shaped like the LSE.
  static RowStats stats(const Tensor& t);

  const Checker& checker() const { return checker_; }

 private:
  void check_dtypes();
  void check_shapes();
  void set_lengths();
  void set_score();
  void set_block_mask();
  void check_contents();

  Tensor q_, k_, v_;
  Checker checker_;
  Options options_;
  ForwardProblem problem_{};
  std::vector<Tensor> keep_;
};

}  // namespace fal::torch_binding
