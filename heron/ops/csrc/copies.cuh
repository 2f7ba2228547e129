// Copies to shared memory in the background.
#pragma once

namespace {

__device__ __forceinline__ unsigned char* shared_memory() {
    extern __shared__ __align__(16) unsigned char memory[];
    return memory;
}

template <int bytes>
__device__ __forceinline__ void begin_copy_of(void* to, const void* from, bool wanted) {
    const auto there = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(there), "l"(from), "n"(bytes),
                 "r"(wanted ? bytes : 0)
                 : "memory");
}

__device__ __forceinline__ void end_of_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait until this thread's copies have arrived, except those of its last `but` groups.
template <int but>
__device__ __forceinline__ void copies_arrived() {
    asm volatile("cp.async.wait_group %0;" ::"n"(but) : "memory");
}

}  // namespace
