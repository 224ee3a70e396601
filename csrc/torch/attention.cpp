// The operators flashattn_lite::forward and ::backward: check, allocate, fill the problem, pick the
// engine, run. Shapes and meaning: flashattn_lite/attention.py and docs/semantics.md.
#include <math.h>

#include "engines.h"

namespace fal::torch_binding {
namespace {

void forward_with(uint64_t* stack, Tensor q, Tensor k, Tensor v, Options options,
                  const std::string& backend) {
  constexpr const char* kName = "flashattn_lite::forward";
  Arguments arguments(kName, std::move(q), std::move(k), std::move(v), std::move(options));
  Tensor out = empty_on(arguments.q(), arguments.out_sizes(), arguments.q().dtype());
  Tensor lse = empty_on(arguments.q(), arguments.lse_sizes(), aoti_torch_dtype_float32());
  arguments.set_outputs(out, lse);
  const Engine engine = choose_forward(kName, backend, arguments.q(), arguments.problem());
  run_forward(engine, arguments.q(), arguments.problem());
  put_results(stack, std::move(out), std::move(lse));
}

void forward(uint64_t* stack, uint64_t inputs, uint64_t) {
  Tensor q, k, v;
  Options options;
  std::string backend;
  StackReader reader(stack, inputs);
  reader >> q >> k >> v;
  options.read(reader);
  reader >> backend >> options.num_splits;
  forward_with(stack, std::move(q), std::move(k), std::move(v), std::move(options), backend);
}

// The same without options: torch's Python binding spends 0.1 us on every argument, so that the 23
// of `forward` cost a tiny call half its time.
void forward_plain(uint64_t* stack, uint64_t inputs, uint64_t) {
  Tensor q, k, v;
  Options options;
  StackReader reader(stack, inputs);
  reader >> q >> k >> v >> options.softmax_scale >> options.window_left >> options.window_right;
  forward_with(stack, std::move(q), std::move(k), std::move(v), std::move(options), "auto");
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

Gradients backward_with(BackwardInputs in, Options options, const std::string& backend) {
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

  const auto gradient_of = [](const Tensor& t) { return empty_on(t, sizes_of(t), t.dtype()); };
  Gradients g{
      gradient_of(arguments.q()), gradient_of(arguments.k()), gradient_of(arguments.v()), {}, {}};
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

// Of forward_plain.
void backward_plain(uint64_t* stack, uint64_t inputs, uint64_t) {
  BackwardInputs in;
  Options options;
  StackReader reader(stack, inputs);
  reader >> in.dout >> in.q >> in.k >> in.v >> in.out >> in.lse;
  reader >> options.softmax_scale >> options.window_left >> options.window_right;
  reader >> in.deterministic;
  Gradients g = backward_with(std::move(in), std::move(options), "auto");
  put_results(stack, std::move(g.dq), std::move(g.dk), std::move(g.dv));
}

// Static initialisers register the operators when the library is loaded; it exports nothing.
const bool registered = [] {
  static Library definitions = Library::define("flashattn_lite");
  const std::string options = Options::kSchema;
  definitions
      .schema("forward(Tensor q, Tensor k, Tensor v, " + options +
              ", str backend, int num_splits=0) -> (Tensor out, Tensor lse)")
      .schema(
          "forward_plain(Tensor q, Tensor k, Tensor v, float softmax_scale, int window_left, int "
          "window_right) -> (Tensor out, Tensor lse)")
      .schema(
          "backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor "
          "lse, " +
          options +
          ", bool deterministic, bool need_dsinks, bool need_dbias, str backend) -> "
          "(Tensor dq, Tensor dk, Tensor dv, Tensor dsinks, Tensor dbias)")
      .schema(
          "backward_plain(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float "
          "softmax_scale, int window_left, int window_right, bool deterministic) -> (Tensor dq, "
          "Tensor dk, Tensor dv)");
  static Library on_cpu = Library::implement("flashattn_lite", "CPU");
  on_cpu.function("forward", forward)
      .function("forward_plain", forward_plain)
      .function("backward", backward)
      .function("backward_plain", backward_plain);
  static Library on_cuda = Library::implement("flashattn_lite", "CUDA");
  on_cuda.function("forward", forward)
      .function("forward_plain", forward_plain)
      .function("backward", backward)
      .function("backward_plain", backward_plain);
  return true;
}();

}  // namespace
}  // namespace fal::torch_binding
