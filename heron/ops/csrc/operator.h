// What our operators use of PyTorch: its stable interface alone. Its headers compile in seconds instead of half a minute,
// and a library that is built once runs under every PyTorch from 2.11 on.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;
using Optional = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;
using Optionals = std::vector<Optional>;

inline int current_device() { return torch::stable::accelerator::getCurrentDeviceIndex(); }

// Of the current device.
inline cudaStream_t current_stream() {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(current_device(), &stream));
    return static_cast<cudaStream_t>(stream);
}

// How many blocks of a kernel the current device runs at a time; at least 1.
template <typename Kernel>
int blocks_at_a_time(Kernel* kernel, int threads, size_t shared_bytes) {
    int blocks = 0, multiprocessors = 0;
    STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, current_device()));
    return blocks * multiprocessors > 0 ? blocks * multiprocessors : 1;
}

// Null where there is no tensor.
inline const void* data_of(const Optional& x) { return x.has_value() ? x->const_data_ptr() : nullptr; }

inline bool begins_at_multiple_of(int64_t bytes, const Tensor& x) {
    return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % bytes == 0;
}

inline bool on_one_device(const Tensor& a, const Tensor& b) { return a.get_device_index() == b.get_device_index(); }

// On the device of `like`; of its dtype, or another one.
inline Tensor empty(IntHeaderOnlyArrayRef sizes, const Tensor& like, std::optional<ScalarType> dtype = std::nullopt) {
    return torch::stable::new_empty(like, sizes, dtype);
}

inline Tensor zeros(IntHeaderOnlyArrayRef sizes, const Tensor& like) { return torch::stable::new_zeros(like, sizes); }

inline Tensor zeros_like(const Tensor& x) { return zeros(x.sizes(), x); }

// run(T{}) for the one of `Types` that `x` is of.
template <typename... Types, typename Run>
void with_dtype(const Tensor& x, const char* op, const Run& run) {
    const ScalarType dtype = x.scalar_type();
    const bool ran = ((dtype == torch::headeronly::CppTypeToScalarType<Types>::value && (run(Types{}), true)) || ...);
    STD_TORCH_CHECK(ran, op, ": no kernel for ", torch::headeronly::toString(dtype));
}

}  // namespace
