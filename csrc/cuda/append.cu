#include "append.cuh"
#include "append.h"
#include "launch.h"

namespace fal::cuda {
namespace {

dim3 blocks_for(int64_t batch, int64_t seqlen, int64_t heads) {
  return dim3(static_cast<unsigned>((batch * seqlen * heads + kAppendWarps - 1) / kAppendWarps));
}

}  // namespace

int rotate(const RotateProblem& problem, void* stream) {
  return launch(rotate_kernel, blocks_for(problem.batch, problem.seqlen, problem.heads),
                dim3(kAppendWarps * 32), 0, static_cast<cudaStream_t>(stream), problem);
}

int append(const AppendProblem& problem, void* stream) {
  return launch(append_kernel, blocks_for(problem.batch, problem.seqlen, problem.heads_k),
                dim3(kAppendWarps * 32), 0, static_cast<cudaStream_t>(stream), problem);
}

}  // namespace fal::cuda
