// Barriers of all threads of a cluster of blocks, from compute capability 9.0 on.
#pragma once

#include "shared_address.cuh"

namespace {

// Until all threads of the cluster are here; what they have written then can be read.
__device__ __forceinline__ void sync_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Until they are here; ordinary memory that they have written is not there yet.
__device__ __forceinline__ void meet_cluster() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
}

}  // namespace
