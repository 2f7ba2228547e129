// Kernels that begin while the one before them ends (programmatic dependent launch, from compute capability 9.0 on).
#pragma once

#include <cuda_runtime.h>

// Until what the kernels before this one have written can be read. The next kernel may begin from here on: before it
// waits itself, it reads nothing but weights and what else none of them writes, whatever it may prefetch, and it writes
// nothing.
__device__ __forceinline__ void wait_for_inputs() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Bring what is at `x` near, for a read behind wait_for_inputs: what others write there until then, that read sees.
__device__ __forceinline__ void prefetch(const void* x) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(x)));
}

// Launch a kernel whose every thread calls wait_for_inputs; of more than one block a cluster only from 9.0 on.
template <typename Problem>
cudaError_t launch_early(void (*kernel)(Problem), unsigned blocks, unsigned threads, size_t shared_bytes,
                         cudaStream_t stream, int device, const Problem& problem, unsigned cluster = 1) {
    int major = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = cluster;
    attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = major < 9 ? 0 : cluster > 1 ? 2 : 1;
    return cudaLaunchKernelEx(&config, kernel, problem);
}
