// The operators heron::wkv7s_* on CUDA. Their schemas are in cuda.py, which also checks and allocates.

#include "../../csrc/operator.h"
#include "wkv7s.h"

namespace {

Wkv7sInput input(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

template <typename T>
T* pointer(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}
template <typename T>
T* pointer(const Optional& x) {
  return x.has_value() ? pointer<T>(*x) : nullptr;
}

Wkv7sProblem problem(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& a, const Tensor& b,
                     const Optional& cu_seqlens, bool tensor_cores, int64_t segments, int64_t segment_tokens) {
  Wkv7sProblem p{};
  p.inputs[kR] = input(r), p.inputs[kW] = input(w), p.inputs[kK] = input(k);
  p.inputs[kV] = input(v), p.inputs[kA] = input(a), p.inputs[kB] = input(b);
  p.batch = int32_t(r.size(0)), p.tokens = r.size(1), p.heads = int32_t(r.size(2)), p.size = int32_t(r.size(3));
  const ScalarType dtype = r.scalar_type();
  p.dtype = dtype == ScalarType::Float ? kWkv7sFloat32 : dtype == ScalarType::Half ? kWkv7sFloat16 : kWkv7sBFloat16;
  p.cu_seqlens = pointer<const void>(cu_seqlens);
  p.cu_seqlens_is_int64 = cu_seqlens.has_value() && cu_seqlens->scalar_type() == ScalarType::Long;
  p.tensor_cores = tensor_cores;
  p.segments = int32_t(segments), p.segment_tokens = int32_t(segment_tokens);
  p.sequences = cu_seqlens.has_value() ? int32_t(cu_seqlens->numel()) - 1 : p.batch * p.segments;
  return p;
}

void run(const char* (*launch)(const Wkv7sProblem*, void*), const Wkv7sProblem& p) {
  const char* error = launch(&p, current_stream());
  STD_TORCH_CHECK(error == nullptr, "wkv7s: ", error);
}

void forward(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& a, const Tensor& b,
             const Tensor& state, const Optional& cu_seqlens, bool tensor_cores, int64_t segments, int64_t segment_tokens,
             bool mapped, const Tensor& y, const Tensor& final_state, const Optional& saved, const Optional& transfer,
             const Optional& local, const Optional& edges) {
  const DeviceGuard guard(r.get_device_index());
  Wkv7sProblem p = problem(r, w, k, v, a, b, cu_seqlens, tensor_cores, segments, segment_tokens);
  p.state = pointer<float>(state), p.y = pointer<void>(y), p.final_state = pointer<float>(final_state);
  p.saved = pointer<void>(saved), p.mapped = mapped;
  p.transfer = pointer<float>(transfer), p.local = pointer<float>(local), p.edges = pointer<float>(edges);
  run(wkv7s_forward, p);
}

void backward(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& a, const Tensor& b,
              const Optional& dy, const Optional& d_final, const Tensor& saved, const Optional& transfer,
              const Optional& cu_seqlens, bool tensor_cores, int64_t segments, int64_t segment_tokens, bool mapped,
              const Tensor& dr, const Tensor& dw, const Tensor& dk, const Tensor& dv, const Tensor& da, const Tensor& db,
              const Tensor& d_state, const Optional& local, const Optional& edges) {
  const DeviceGuard guard(r.get_device_index());
  Wkv7sProblem p = problem(r, w, k, v, a, b, cu_seqlens, tensor_cores, segments, segment_tokens);
  if (dy.has_value()) p.inputs[kDy] = input(*dy);
  p.d_final = pointer<float>(d_final), p.saved = pointer<void>(saved), p.transfer = pointer<float>(transfer);
  p.dr = pointer<void>(dr), p.dw = pointer<void>(dw), p.dk = pointer<void>(dk);
  p.dv = pointer<void>(dv), p.da = pointer<void>(da), p.db = pointer<void>(db);
  p.d_state = pointer<float>(d_state), p.local = pointer<float>(local), p.edges = pointer<float>(edges);
  p.mapped = mapped;
  run(wkv7s_backward, p);
}

void span(const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& a, const Tensor& b, int64_t segments,
          int64_t segment_tokens, const Tensor& transfer, const Tensor& local) {
  const DeviceGuard guard(w.get_device_index());
  Wkv7sProblem p = problem(k, w, k, v, a, b, std::nullopt, true, segments, segment_tokens);
  p.transfer = pointer<float>(transfer), p.local = pointer<float>(local);
  run(wkv7s_forward, p);
}

void span_backward(const Tensor& r, const Tensor& w, const Tensor& a, const Tensor& b, const Tensor& dy, int64_t segments,
                   int64_t segment_tokens, const Tensor& local) {
  const DeviceGuard guard(r.get_device_index());
  Wkv7sProblem p = problem(r, w, b, b, a, b, std::nullopt, true, segments, segment_tokens);
  p.inputs[kDy] = input(dy);
  p.local = pointer<float>(local);
  run(wkv7s_backward, p);
}

void step(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& a, const Tensor& b,
          const Tensor& state, const Optional& cu_seqlens, const Tensor& y, const Tensor& final_state) {
  const DeviceGuard guard(r.get_device_index());
  Wkv7sProblem p = problem(r, w, k, v, a, b, cu_seqlens, false, 1, r.size(1));
  p.state = pointer<float>(state), p.y = pointer<void>(y), p.final_state = pointer<float>(final_state);
  run(wkv7s_step, p);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(heron, CUDA, library) {
  library.impl("wkv7s_forward", TORCH_BOX(&forward));
  library.impl("wkv7s_backward", TORCH_BOX(&backward));
  library.impl("wkv7s_span", TORCH_BOX(&span));
  library.impl("wkv7s_span_backward", TORCH_BOX(&span_backward));
  library.impl("wkv7s_step", TORCH_BOX(&step));
}
