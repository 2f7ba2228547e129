// WKV7 with state on CUDA: which kernel runs a problem.

#ifdef __CUDACC__  // elsewhere the includer brings the same names for a CPU: tests/ops/emulator
#include "hardware.cuh"
#endif

#include "general.cuh"
#include "tensor_core.cuh"

extern "C" const char* wkv7s_forward(const Wkv7sProblem* problem, void* stream) {
  return problem->tensor_cores ? tensor_core::run_forward(*problem, stream) : general::run(*problem, 0, stream);
}

extern "C" const char* wkv7s_backward(const Wkv7sProblem* problem, void* stream) {
  return problem->tensor_cores ? tensor_core::run_backward(*problem, stream) : general::run(*problem, 1, stream);
}

extern "C" const char* wkv7s_step(const Wkv7sProblem* problem, void* stream) { return general::run(*problem, 2, stream); }
