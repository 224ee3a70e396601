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
  reader >> backend;
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

void backward(uint64_t* stack, uint64_t inputs, uint64_t) {
  constexpr const char* kName = "flashattn_lite::backward";
  Tensor dout, q, k, v, out, lse;
  std::optional<Tensor> dlse;
  Options options;
  bool deterministic, need_dsinks, need_dbias;
  std::string backend;
  StackReader reader(stack, inputs);
  reader >> dout >> dlse >> q >> k >> v >> out >> lse;
  options.read(reader);
  reader >> deterministic >> need_dsinks >> need_dbias >> backend;

  Arguments arguments(kName, std::move(q), std::move(k), std::move(v), std::move(options));
  const Options& o = arguments.options();
  const Shape& shape = arguments.problem().shape;
  for (const auto& [name, t] : {std::pair{"dout", &dout}, std::pair{"out", &out}}) {
    arguments.checker().has_shape(name, *t, arguments.out_sizes());
    FAL_CHECK(t->dtype() == arguments.q().dtype(), kName, ": ", name, " is ",
              dtype_text(t->dtype()), " but q is ", dtype_text(arguments.q().dtype()));
  }
  for (const auto& [name, t] : {std::pair{"lse", &lse}, std::pair{"dlse", dlse ? &*dlse : &lse}}) {
    arguments.checker().has_shape(name, *t, arguments.lse_sizes());
    FAL_CHECK(t->dtype() == aoti_torch_dtype_float32(), kName, ": ", name, " is ",
              dtype_text(t->dtype()), "; it must be float32");
  }
  FAL_CHECK(!o.block_table && !o.k_scale, kName,
            ": there is no backward through paged or quantised k and v");
  FAL_CHECK(!need_dsinks || o.sinks, kName, ": need_dsinks is true but sinks is not given");
  FAL_CHECK(!need_dbias || o.bias, kName, ": need_dbias is true but bias is not given");

  arguments.set_outputs(out, lse);
  std::vector<Tensor> keep;
  BackwardProblem problem{};
  problem.forward = arguments.problem();
  problem.deterministic = deterministic;
  problem.dout = Arguments::view(dout, &keep);
  if (dlse) problem.dlse = Arguments::stats(*dlse);

  const auto gradient_of = [](const Tensor& t) { return empty_on(t, sizes_of(t), t.dtype()); };
  Tensor dq = gradient_of(arguments.q()), dk = gradient_of(arguments.k()),
         dv = gradient_of(arguments.v());
  Tensor dsinks =
      empty_on(arguments.q(), {need_dsinks ? shape.heads_q : 0}, aoti_torch_dtype_float32());
  std::vector<int64_t> dbias_sizes{0};
  if (need_dbias) {
    dbias_sizes = {shape.batch, shape.heads_q, problem.forward.lengths.seqlen_q,
                   problem.forward.lengths.seqlen_k};
  }
  Tensor dbias = empty_on(arguments.q(), dbias_sizes,
                          need_dbias ? o.bias->dtype() : aoti_torch_dtype_float32());
  problem.dq = Arguments::view(dq, &keep);
  problem.dk = Arguments::view(dk, &keep);
  problem.dv = Arguments::view(dv, &keep);
  if (need_dsinks) problem.dsinks = static_cast<float*>(dsinks.data());
  if (need_dbias) {
    problem.dbias = {dbias.data(),    dbias.stride(0), dbias.stride(1),
                     dbias.stride(2), dbias.stride(3), problem.forward.score.bias.dtype};
  }
  const Engine engine = choose_backward(kName, backend, arguments.q(), problem);
  run_backward(engine, arguments.q(), problem);
  put_results(stack, std::move(dq), std::move(dk), std::move(dv), std::move(dsinks),
              std::move(dbias));
}

// Static initialisers register the operators when the library is loaded; it exports nothing.
const bool registered = [] {
  static Library definitions = Library::define("flashattn_lite");
  const std::string options = Options::kSchema;
  definitions
      .schema("forward(Tensor q, Tensor k, Tensor v, " + options +
              ", str backend) -> (Tensor out, Tensor lse)")
      .schema(
          "forward_plain(Tensor q, Tensor k, Tensor v, float softmax_scale, int window_left, int "
          "window_right) -> (Tensor out, Tensor lse)")
      .schema(
          "backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor "
          "lse, " +
          options +
          ", bool deterministic, bool need_dsinks, bool need_dbias, str backend) -> "
          "(Tensor dq, Tensor dk, Tensor dv, Tensor dsinks, Tensor dbias)");
  static Library on_cpu = Library::implement("flashattn_lite", "CPU");
  on_cpu.function("forward", forward)
      .function("forward_plain", forward_plain)
      .function("backward", backward);
  static Library on_cuda = Library::implement("flashattn_lite", "CUDA");
  on_cuda.function("forward", forward)
      .function("forward_plain", forward_plain)
      .function("backward", backward);
  return true;
}();

}  // namespace
}  // namespace fal::torch_binding
