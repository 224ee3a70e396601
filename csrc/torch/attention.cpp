// The operators flashattn_lite::forward and ::backward: check, allocate, fill the problem, pick the
// engine, run. Shapes and meaning: flashattn_lite/attention.py and docs/semantics.md.
#include <math.h>

#include "engines.h"

namespace fal::torch_binding {
namespace {

constexpr const char* kForward = "flashattn_lite::forward";

struct ForwardResults {
  Tensor out, lse;
};

ForwardResults forward_with(Arguments&& arguments, const std::string& backend, bool want_lse) {
  const Tensor& q = arguments.q();
  ForwardResults results;
  results.out = empty_laid_out_like(q, arguments.problem().shape.head_dim_v);
  if (want_lse || !q.is_cpu()) {  // a CUDA kernel always writes it
    results.lse = empty_on(q, arguments.lse_sizes(), aoti_torch_dtype_float32());
  }
  arguments.set_outputs(results.out, results.lse);
  const Engine engine = choose_forward(kForward, backend, q, arguments.problem());
  run_forward(engine, q, arguments.problem());
  return results;
}

void forward(uint64_t* stack, uint64_t inputs, uint64_t) {
  Tensor q, k, v;
  Options options;
  std::string backend;
  StackReader reader(stack, inputs);
  reader >> q >> k >> v;
  options.read(reader);
  reader >> backend >> options.num_splits;
  ForwardResults results =
      forward_with({kForward, std::move(q), std::move(k), std::move(v), std::move(options)},
                   backend, /*want_lse=*/true);
  put_results(stack, std::move(results.out), std::move(results.lse));
}

// The arguments of the plain operators after their tensors. torch's Python binding spends 0.2 us on
// an argument that is given and 0.04 on a default, so the likely ones come first, and these
// operators exist: the 23 options of `forward` cost a tiny call half its time.
struct PlainOptions {
  bool heads_first = false;
  int64_t window_right = -1, window_left = -1;
  std::optional<double> softmax_scale;

  static constexpr const char* kSchema =
      "bool heads_first=False, int window_right=-1, float? softmax_scale=None, int window_left=-1";

  void read(StackReader& stack) {
    stack >> heads_first >> window_right >> softmax_scale >> window_left;
  }
  Options options() const {
    Options o;
    o.softmax_scale = softmax_scale;
    o.window_left = window_left;
    o.window_right = window_right;
    return o;
  }
};

// `caches`: what a step over a KV cache has beside a dense call follows.
Arguments plain_arguments(const uint64_t* stack, uint64_t inputs, bool caches) {
  Tensor q, k, v;
  PlainOptions plain;
  StackReader reader(stack, inputs);
  reader >> q >> k >> v;
  plain.read(reader);
  for (Tensor* t : {&q, &k, &v}) t->set_heads_first(plain.heads_first);
  Options options = plain.options();
  if (caches) {
    reader >> options.seqused_k >> options.block_table >> options.k_scale >> options.v_scale;
  }
  return Arguments(kForward, std::move(q), std::move(k), std::move(v), std::move(options));
}

// What a call without gradients needs.
void forward_plain(uint64_t* stack, uint64_t inputs, uint64_t) {
  Arguments arguments = plain_arguments(stack, inputs, /*caches=*/true);
  put_results(stack, forward_with(std::move(arguments), "auto", /*want_lse=*/false).out);
}

// What backward_plain needs; refuses what it will refuse.
void forward_plain_training(uint64_t* stack, uint64_t inputs, uint64_t) {
  Arguments arguments = plain_arguments(stack, inputs, /*caches=*/false);
  BackwardProblem later{};
  later.forward = arguments.problem();
  choose_backward(kForward, "auto", arguments.q(), later);
  ForwardResults results = forward_with(std::move(arguments), "auto", /*want_lse=*/true);
  put_results(stack, std::move(results.out), std::move(results.lse));
}

// What backward differentiates, and with respect to which options.
struct BackwardInputs {
  Tensor dout, q, k, v, out, lse;
  std::optional<Tensor> dlse;
  bool deterministic = false, need_dsinks = false, need_dbias = false;
};

struct Gradients {
  Tensor dq, dk, dv, dsinks, dbias;  // the last two are not made unless needed
};

Gradients backward_with(BackwardInputs&& in, Options&& options, const std::string& backend) {
  constexpr const char* kName = "flashattn_lite::backward";
  Arguments arguments(kName, std::move(in.q), std::move(in.k), std::move(in.v), std::move(options));
  const Options& o = arguments.options();
  const Shape& shape = arguments.problem().shape;
  for (const auto& [name, t] : {std::pair{"dout", &in.dout}, std::pair{"out", &in.out}}) {
    arguments.checker().has_shape(name, *t, arguments.out_sizes());
    FAL_CHECK(t->dtype() == arguments.q().dtype(), kName, ": ", name, " is ",
              dtype_text(t->dtype()), " but q is ", dtype_text(arguments.q().dtype()));
  }
  for (const auto& [name, t] :
       {std::pair{"lse", &in.lse}, std::pair{"dlse", in.dlse ? &*in.dlse : &in.lse}}) {
    arguments.checker().has_shape(name, *t, arguments.lse_sizes());
    FAL_CHECK(t->dtype() == aoti_torch_dtype_float32(), kName, ": ", name, " is ",
              dtype_text(t->dtype()), "; it must be float32");
  }
  FAL_CHECK(!o.block_table && !o.k_scale, kName,
            ": there is no backward through paged or quantised k and v");
  FAL_CHECK(!in.need_dsinks || o.sinks, kName, ": need_dsinks is true but sinks is not given");
  FAL_CHECK(!in.need_dbias || o.bias, kName, ": need_dbias is true but bias is not given");

  arguments.set_outputs(in.out, in.lse);
  std::vector<Tensor> keep;
  BackwardProblem problem{};
  problem.forward = arguments.problem();
  problem.deterministic = in.deterministic;
  problem.dout = Arguments::view(in.dout, &keep);
  if (in.dlse) problem.dlse = Arguments::stats(*in.dlse);

  Gradients g{
      empty_like(arguments.q()), empty_like(arguments.k()), empty_like(arguments.v()), {}, {}};
  problem.dq = Arguments::view(g.dq, &keep);
  problem.dk = Arguments::view(g.dk, &keep);
  problem.dv = Arguments::view(g.dv, &keep);
  if (in.need_dsinks) {
    g.dsinks = empty_on(arguments.q(), {shape.heads_q}, aoti_torch_dtype_float32());
    problem.dsinks = static_cast<float*>(g.dsinks.data());
  }
  if (in.need_dbias) {
    const Lengths& lengths = problem.forward.lengths;
    g.dbias =
        empty_on(arguments.q(), {shape.batch, shape.heads_q, lengths.seqlen_q, lengths.seqlen_k},
                 o.bias->dtype());
    problem.dbias = {g.dbias.data(),    g.dbias.stride(0), g.dbias.stride(1),
                     g.dbias.stride(2), g.dbias.stride(3), problem.forward.score.bias.dtype};
  }
  const Engine engine = choose_backward(kName, backend, arguments.q(), problem);
  run_backward(engine, arguments.q(), problem);
  return g;
}

void backward(uint64_t* stack, uint64_t inputs, uint64_t) {
  BackwardInputs in;
  Options options;
  std::string backend;
  StackReader reader(stack, inputs);
  reader >> in.dout >> in.dlse >> in.q >> in.k >> in.v >> in.out >> in.lse;
  options.read(reader);
  reader >> in.deterministic >> in.need_dsinks >> in.need_dbias >> backend;
  Gradients g = backward_with(std::move(in), std::move(options), backend);
  // An operator returns tensors: an empty one stands for what was not asked for.
  for (Tensor* t : {&g.dsinks, &g.dbias}) {
    if (!t->handle()) *t = empty_on(g.dq, {0}, aoti_torch_dtype_float32());
  }
  put_results(stack, std::move(g.dq), std::move(g.dk), std::move(g.dv), std::move(g.dsinks),
              std::move(g.dbias));
}

// Of forward_plain_training.
void backward_plain(uint64_t* stack, uint64_t inputs, uint64_t) {
  BackwardInputs in;
  PlainOptions plain;
  StackReader reader(stack, inputs);
  reader >> in.dout >> in.q >> in.k >> in.v >> in.out >> in.lse;
  plain.read(reader);
  for (Tensor* t : {&in.dout, &in.q, &in.k, &in.v, &in.out}) t->set_heads_first(plain.heads_first);
  Gradients g = backward_with(std::move(in), plain.options(), "auto");
  put_results(stack, std::move(g.dq), std::move(g.dk), std::move(g.dv));
}

// Static initialisers register the operators when the library is loaded; it exports nothing.
const bool registered = [] {
  static Library definitions = Library::define("flashattn_lite");
  const std::string options = Options::kSchema, plain = PlainOptions::kSchema;
  definitions
      .schema("forward(Tensor q, Tensor k, Tensor v, " + options +
              ", str backend, int num_splits=0) -> (Tensor out, Tensor lse)")
      .schema("forward_plain(Tensor q, Tensor k, Tensor v, " + plain +
              ", Tensor? seqused_k=None, Tensor? block_table=None, Tensor? k_scale=None, "
              "Tensor? v_scale=None) -> Tensor out")
      .schema("forward_plain_training(Tensor q, Tensor k, Tensor v, " + plain +
              ") -> (Tensor out, Tensor lse)")
      .schema(
          "backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor "
          "lse, " +
          options +
          ", bool deterministic, bool need_dsinks, bool need_dbias, str backend) -> "
          "(Tensor dq, Tensor dk, Tensor dv, Tensor dsinks, Tensor dbias)")
      .schema("backward_plain(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, " +
              plain + ") -> (Tensor dq, Tensor dk, Tensor dv)");
  static Library on_cpu = Library::implement("flashattn_lite", "CPU");
  on_cpu.function("forward", forward)
      .function("forward_plain", forward_plain)
      .function("forward_plain_training", forward_plain_training)
      .function("backward", backward)
      .function("backward_plain", backward_plain);
  static Library on_cuda = Library::implement("flashattn_lite", "CUDA");
  on_cuda.function("forward", forward)
      .function("forward_plain", forward_plain)
      .function("forward_plain_training", forward_plain_training)
      .function("backward", backward)
      .function("backward_plain", backward_plain);
  return true;
}();

}  // namespace
}  // namespace fal::torch_binding
