// Addresses in shared memory, as instructions take them.
#pragma once

namespace {

__device__ __forceinline__ unsigned shared_address(const void* x) {
    return static_cast<unsigned>(__cvta_generic_to_shared(x));
}

}  // namespace
