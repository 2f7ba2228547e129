// For kernels in which a block marches over a strip of tokens, each thread with some channels: numbers in packs, copies
// ahead of their use, sums over all tokens.
#pragma once

#ifdef __CUDACC__  // the tests also compile kernels for a CPU, and bring these themselves
#include "copies.cuh"
#endif

namespace {

// `width` numbers that lie side by side. Of bf16, two are in a word.
template <typename T, int width>
struct alignas(sizeof(T) * width) Pack {
    unsigned words[sizeof(T) * width / 4];

    __device__ __forceinline__ void get(float (&values)[width]) const {
#pragma unroll
        for (int i = 0; i < width; ++i) {
            if constexpr (sizeof(T) == 4)
                values[i] = __uint_as_float(words[i]);
            else
                values[i] = __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
        }
    }
    __device__ __forceinline__ void set(const float (&values)[width]) {
        if constexpr (sizeof(T) == 4) {
#pragma unroll
            for (int i = 0; i < width; ++i) words[i] = __float_as_uint(values[i]);
        } else {
#pragma unroll
            for (int i = 0; i < width; i += 2) {
                const __nv_bfloat162 two = __floats2bfloat162_rn(values[i], values[i + 1]);
                words[i / 2] = *reinterpret_cast<const unsigned*>(&two);
            }
        }
    }
};

template <typename T, int width>
__device__ __forceinline__ Pack<T, width> load(const T* from, bool wanted) {
    Pack<T, width> pack{};
    if (wanted) pack = *reinterpret_cast<const Pack<T, width>*>(from);
    return pack;
}

template <typename T, int width>
__device__ __forceinline__ void store(T* to, const float (&values)[width]) {
    Pack<T, width> pack;
    pack.set(values);
    *reinterpret_cast<Pack<T, width>*>(to) = pack;
}

// As load, into shared memory, and at some later time: copies_arrived. Zeros, where it is not wanted.
template <typename T, int width>
__device__ __forceinline__ void begin_copy(Pack<T, width>* to, const T* from, bool wanted) {
    begin_copy_of<sizeof(T) * width>(to, from, wanted);
}

constexpr int kMostSums = 8, kColumns = 32, kPerColumn = 16;

// Sums over tokens, one for each channel, of which every strip has a part.
template <typename T>
struct Columns {
    const float* of_strip;  // (strips, n, C)
    T* out[kMostSums];      // n of (C,)
    int strips, channels, columns;
};

template <typename T>
__global__ void add_up_strips(const Columns<T> p) {
    __shared__ float parts[kPerColumn][kColumns];
    const int mine = threadIdx.x % kColumns, part = threadIdx.x / kColumns;
    const int column = blockIdx.x * kColumns + mine;
    float sum = 0;
    if (column < p.columns)
        for (int strip = part; strip < p.strips; strip += kPerColumn)
            sum += p.of_strip[static_cast<int64_t>(strip) * p.columns + column];
    parts[part][mine] = sum;
    __syncthreads();
    if (part != 0 || column >= p.columns) return;
    for (int i = 1; i < kPerColumn; ++i) sum += parts[i][mine];
    p.out[column / p.channels][column % p.channels] = static_cast<T>(sum);
}

}  // namespace
