// Python's way to the kernels of the emulator's own tests. Arrays travel as integer addresses that
// must have been registered; every function returns launch()'s error code.
#include "simt_binding.h"
#include "simt_test_kernels.h"

namespace py = pybind11;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

#define FAL_BUG_NAME(name) #name,
const char* const kAttentionBugs[] = {FAL_ATTENTION_BUGS(FAL_BUG_NAME)};
const char* const kGemmBugs[] = {FAL_GEMM_BUGS(FAL_BUG_NAME)};
const char* const kSmallBugs[] = {FAL_SMALL_BUGS(FAL_BUG_NAME)};

template <size_t kCount>
py::list names(const char* const (&list)[kCount]) {
  py::list result;
  for (const char* name : list) result.append(name);
  return result;
}

template <size_t kCount>
int number(const char* const (&list)[kCount], const std::string& bug) {
  for (size_t i = 0; i < kCount; i++)
    if (bug == list[i]) return int(i);
  throw py::value_error("no such bug: " + bug);
}

}  // namespace

PYBIND11_MODULE(simt_tests, m) {
  fal::simt::bind(m);
  m.attr("attention_bugs") = names(kAttentionBugs);
  m.attr("gemm_bugs") = names(kGemmBugs);
  m.attr("small_bugs") = names(kSmallBugs);
  m.def("attention", [](uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, uintptr_t lse,
                        int heads, int seqlen, bool causal, float scale, const std::string& bug) {
    return run_attention(at<void>(q), at<void>(k), at<void>(v), at<void>(out), at<float>(lse),
                         heads, seqlen, causal, scale, number(kAttentionBugs, bug));
  });
  m.def("gemm_sm80", [](uintptr_t a, uintptr_t b, uintptr_t c, int rows, int columns, int depth) {
    return run_gemm_sm80(at<void>(a), at<void>(b), at<float>(c), rows, columns, depth);
  });
  m.def("gemm_sm90", [](uintptr_t a, uintptr_t b, uintptr_t c, int rows, int columns, int depth,
                        bool b_transposed, const std::string& bug) {
    return run_gemm_sm90(at<void>(a), at<void>(b), at<void>(c), rows, columns, depth, b_transposed,
                         number(kGemmBugs, bug));
  });
  m.def("sum", [](uintptr_t in, uintptr_t out, int n, int blocks) {
    return run_sum(at<float>(in), at<float>(out), n, blocks);
  });
  m.def("sum_last_block", [](uintptr_t in, uintptr_t partial, uintptr_t counter, uintptr_t out,
                             int n, int blocks, const std::string& bug) {
    return run_sum_last_block(at<float>(in), at<float>(partial), at<unsigned>(counter),
                              at<float>(out), n, blocks, number(kSmallBugs, bug));
  });
  m.def("histogram", [](uintptr_t in, uintptr_t out, int n, int bins, const std::string& bug) {
    return run_histogram(at<int>(in), at<int>(out), n, bins, number(kSmallBugs, bug));
  });
  m.def("transpose", [](uintptr_t in, uintptr_t out, int n, int pad) {
    return run_transpose(at<float>(in), at<float>(out), n, pad);
  });
  m.def("strided", [](uintptr_t in, uintptr_t out, int stride) {
    return run_strided(at<float>(in), at<float>(out), stride);
  });
  m.def("ping_pong", [](uintptr_t out, int rounds, const std::string& bug) {
    return run_ping_pong(at<float>(out), rounds, number(kSmallBugs, bug));
  });
  m.def("warp_scan", [](uintptr_t in, uintptr_t out, const std::string& bug) {
    return run_warp_scan(at<float>(in), at<float>(out), number(kSmallBugs, bug));
  });
  m.def("votes", [](uintptr_t in, uintptr_t out) { return run_votes(at<int>(in), at<int>(out)); });
  m.def("mistake", [](uintptr_t in, uintptr_t out, const std::string& bug) {
    return run_mistake(at<float>(in), at<float>(out), number(kSmallBugs, bug));
  });
}
