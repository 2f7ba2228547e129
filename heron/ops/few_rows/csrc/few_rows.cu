// Products of matrices with 1 to 32 vectors each, several in one launch, by tensor cores: a block for 64 rows of a matrix,
// or from compute capability 9.0 on a cluster of blocks, each with a part of these rows, so that a small matrix is read by
// all multiprocessors, too.
//
// The weights go from memory straight into the registers that the tensor cores read. A matrix instruction sums over 16
// numbers in any order, as long as that is the same for weight and vector: the eight that a lane reads at once are two
// pairs of each of two instructions. A warp has asked for its next kLines pieces of 16 rows x 128 bytes, first of all before
// the kernel that computes the vectors has ended.
//
// No sum depends on other vectors, nor on how many there are.

#ifdef __CUDACC__  // the tests also compile the kernel for a CPU
#include "../../csrc/cluster.cuh"
#include "../../csrc/early.cuh"
#include "../../csrc/operator.h"
#endif
#include "../../csrc/products.cuh"
#include "sharing.cuh"

namespace {

constexpr int kGroups = 4, kSides = 2;  // warps of a block: for 16 rows each, and for every second line of them
constexpr int kThreads = 32 * kGroups * kSides;
constexpr int kTile = 16 * kGroups;  // rows of a block
constexpr int kLine = 64;            // numbers of a row that a warp reads at once: 128 bytes
constexpr int kStep = kSides * kLine;
constexpr int kLines = 4;            // that a warp waits for
constexpr int kStaged = 32768;       // numbers that a block holds at a time, of all vectors together
constexpr int kProducts = 8;         // of a launch
constexpr int kEnough = 128;         // blocks for one matrix
constexpr int kMany = 512;           // blocks for one matrix with which more of them only read more vectors

// y = add + factor activation(weight x), of n vectors
struct Product {
    const void *x, *weight, *factor, *add;  // the last two may be null
    void* y;
    int64_t stride;  // of the weight's rows, in elements
    int in, out, activation;
    int parts;  // blocks for the same rows
    int span;   // numbers of a row in a part
    int first_block;
};

struct Products {
    Product of[kProducts];
    int count, n;
    int cluster;  // blocks of one; the parts of a product divide it
    int staged;   // numbers of each vector that fit
};

constexpr Sharing sharing(int part, int most) { return {kTile, kStep, part, most, kEnough, kMany}; }

// Vectors for which there is a kernel, `n` or more.
inline int columns_of(int n) { return n <= 8 ? 8 : n <= 16 ? 16 : 32; }

// Share out the products to blocks, at most `most` to a cluster and `part` numbers of a row to a block, if there are not many
// blocks anyway; how many blocks there are.
inline int plan(Products& products, int part, int most) {
    const int blocks = share_out(products, sharing(part, most));
    products.staged = 0;
    for (int i = 0; i < products.count; ++i) {
        products.staged = std::max(products.staged, std::min(products.of[i].span, kStaged / columns_of(products.n)));
    }
    return blocks;
}

// In shared memory, in this order: sums of all parts and both sides, of as many rows as a block finishes, and vectors.
constexpr int kPitch = kTile + 4;  // of the sums of a vector, so that a warp's are in different banks
template <int columns>
constexpr int kSumBytes = kSides * columns * kPitch * static_cast<int>(sizeof(float));
template <int columns>
int shared_bytes(int staged) {
    return kSumBytes<columns> + columns * staged * 2;
}

#ifdef __CUDACC__
__device__ __forceinline__ unsigned char* shared_memory() {
    extern __shared__ __align__(16) unsigned char shared[];
    return shared;
}

// 16 bytes from global to shared memory in the background; zeros where not `valid`.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(valid ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending>
__device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// c += a b: 16 x 8 in fp32, from 16 x 16 and 16 x 8.
template <typename T>
__device__ __forceinline__ void multiply_tiles(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    if constexpr (std::is_same_v<T, Half>) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

// What the blocks of a cluster of this size have written to shared memory can be read by them all.
__device__ __forceinline__ void sync_cluster(int blocks) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (blocks > 1) return sync_cluster();
#endif
    __syncthreads();
}

// All of them have used what they have read, and shared memory may go.
__device__ __forceinline__ void leave_cluster(int blocks) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (blocks == 1) return;
    meet_cluster();
#endif
}

// As `x` of the block of the cluster that has this `rank` there.
__device__ __forceinline__ const float* in_block(const float* x, int rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    return static_cast<const float*>(__cluster_map_shared_rank(x, static_cast<unsigned>(rank)));
#else
    return x;
#endif
}
#endif

// Where eight numbers of a vector, from `i` on, are in shared memory: its lines are between those of the others, and the
// halves of every second one change places, so that a warp reads two vectors from different banks.
template <int columns>
__device__ __forceinline__ int place(int vector, int i) {
    return (i / kLine * columns + vector) * kLine + (i % kLine ^ vector % 2 * (kLine / 2));
}

// Up to `columns` vectors, a multiple of 8. Numbers of vectors that are not there are whatever shared memory holds: they
// count in no other's sums.
template <typename T, int columns>
__global__ void __launch_bounds__(kThreads, 2) few_rows(const __grid_constant__ Products products) {
    int which = 0;
    while (which + 1 < products.count && static_cast<int>(blockIdx.x) >= products.of[which + 1].first_block) ++which;
    const Product& p = products.of[which];
    const int block = static_cast<int>(blockIdx.x) - p.first_block, part = block % p.parts;
    const int first_row = block / p.parts * kTile, begin = part * p.span, length = min(p.span, p.in - begin);
    const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
    const int row = 16 * (warp % kGroups) + lane / 4, inner = warp / kGroups * kLine + lane % 4 * 8;
    const int upper_length = first_row + row < p.out ? length - inner : 0;
    const int lower_length = first_row + row + 8 < p.out ? length - inner : 0;
    const T* const weight = static_cast<const T*>(p.weight) + first_row * p.stride + begin;
    const unsigned stride = static_cast<unsigned>(p.stride), upper = row * stride + inner, lower = upper + 8 * stride;
    const auto fetch = [&](Piece (&line)[4], int from) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int at = from + i / 2 * (kLine / 2);
            line[i] = at < (i % 2 ? lower_length : upper_length)
                          ? streamed(reinterpret_cast<const Piece*>(weight + ((i % 2 ? lower : upper) + at)))
                          : Piece{};
        }
    };
    Piece held[kLines][4];
#pragma unroll
    for (int i = 0; i < kLines; ++i) fetch(held[i], i * kStep);
    wait_for_inputs();

    auto* const of_side = reinterpret_cast<float*>(shared_memory());
    auto* const vectors = reinterpret_cast<T*>(shared_memory() + kSumBytes<columns>);
    const T *const first = vectors + place<columns>(lane / 4, inner);
    const T *const second = vectors + place<columns>(lane / 4, inner + kLine / 2);
    float sums[columns / 8][4] = {};
#pragma unroll 1
    for (int from = 0; from < length; from += products.staged) {
        const int here = min(products.staged, length - from);
        if (from > 0) __syncthreads();
#pragma unroll 1
        for (int v = warp; v < products.n; v += kGroups * kSides) {
            const T* x = static_cast<const T*>(p.x) + static_cast<int64_t>(v) * p.in + begin + from;
#pragma unroll 1
            for (int i = 8 * lane; i < (here + kStep - 1) / kStep * kStep; i += 8 * 32) {
                copy_async(vectors + place<columns>(v, i), x + i, i < here);
            }
        }
        copy_commit();
        copy_wait<0>();
        __syncthreads();
#pragma unroll 1
        for (int base = 0; base < here; base += kLines * kStep) {
#pragma unroll
            for (int i = 0; i < kLines; ++i) {
                const int at = base + i * kStep;
                if (at < here) {
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const T* x = half ? second : first;
                        const Piece &a = held[i][2 * half], &b = held[i][2 * half + 1];
#pragma unroll
                        for (int c = 0; c < columns / 8; ++c) {
                            const Piece u = *reinterpret_cast<const Piece*>(x + (at * columns + 8 * c * kLine));
#pragma unroll
                            for (int j = 0; j < 4; j += 2) {
                                const unsigned tile[] = {a.words[j], b.words[j], a.words[j + 1], b.words[j + 1]};
                                multiply_tiles<T>(sums[c], tile, u.words[j], u.words[j + 1]);
                            }
                        }
                    }
                }
                fetch(held[i], from + at + kLines * kStep);
            }
        }
    }

#pragma unroll
    for (int c = 0; c < columns / 8; ++c) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            of_side[(inner / kLine * columns + 8 * c + lane % 4 * 2 + i % 2) * kPitch + row + i / 2 * 8] = sums[c][i];
        }
    }
    sync_cluster(products.cluster);
    const int first_rank = static_cast<int>(blockIdx.x) % products.cluster - part;
    for (int i = static_cast<int>(threadIdx.x) + kThreads * part; i < products.n * kTile; i += kThreads * p.parts) {
        const int v = i / kTile, r = i % kTile;
        if (first_row + r >= p.out) continue;
        const int64_t at = static_cast<int64_t>(v) * p.out + first_row + r;
        const float factor = p.factor ? static_cast<float>(static_cast<const T*>(p.factor)[at]) : 1.0f;
        const float add = p.add ? static_cast<float>(static_cast<const T*>(p.add)[at]) : 0.0f;
        float sum = 0.0f;
#pragma unroll 4
        for (int other = 0; other < p.parts; ++other) {
            const float* theirs = in_block(of_side, first_rank + other) + v * kPitch + r;
#pragma unroll
            for (int side = 0; side < kSides; ++side) sum += theirs[side * columns * kPitch];
        }
        static_cast<T*>(p.y)[at] = static_cast<T>(add + factor * activated(sum, p.activation));
    }
    leave_cluster(products.cluster);
}

}  // namespace

#ifdef __CUDACC__
namespace {

template <typename T, int columns>
void start(const Products& products, int blocks, int device) {
    const auto kernel = few_rows<T, columns>;
    const int bytes = shared_bytes<columns>(products.staged);
    STD_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    STD_CUDA_CHECK(launch_early(kernel, static_cast<unsigned>(blocks), kThreads, bytes, current_stream(), device,
                                products, static_cast<unsigned>(products.cluster)));
}

template <typename T>
void start_for(const Products& products, int blocks, int device) {
    const int columns = columns_of(products.n);
    if (columns == 8) start<T, 8>(products, blocks, device);
    if (columns == 16) start<T, 16>(products, blocks, device);
    if (columns == 32) start<T, 32>(products, blocks, device);
}

// Shapes, dtypes and alignment as heron.ops.few_rows says, and checks. `part` of a row for a block; `most` blocks of a cluster.
Tensors run(const Tensors& xs, const Tensors& weights, const std::vector<int64_t>& activations,
            const Optionals& factors, const Optionals& adds, int64_t part, int64_t most) {
    const Tensor& first = weights[0];
    const int device = first.get_device_index();
    const DeviceGuard guard(device);
    int major = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    Tensors ys;
    Products products{};
    products.n = static_cast<int>(xs[0].size(0));
    for (size_t i = 0; i < weights.size(); ++i) {
        ys.push_back(empty({products.n, weights[i].size(0)}, weights[i]));
        Product& p = products.of[products.count++];
        p.x = xs[i].const_data_ptr(), p.weight = weights[i].const_data_ptr();
        p.factor = data_of(factors[i]), p.add = data_of(adds[i]);
        p.y = ys.back().mutable_data_ptr();
        p.stride = weights[i].stride(0);
        p.in = static_cast<int>(weights[i].size(1)), p.out = static_cast<int>(weights[i].size(0));
        p.activation = static_cast<int>(activations[i]);
    }
    const int blocks = plan(products, static_cast<int>(part), major < 9 ? 1 : static_cast<int>(most));
    const auto start = first.scalar_type() == ScalarType::BFloat16 ? start_for<BFloat16> : start_for<Half>;
    start(products, blocks, device);
    return ys;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(heron, library) {
    library.def(
        "few_rows(Tensor[] xs, Tensor[] weights, int[] activations, Tensor?[] factors, Tensor?[] adds, int part, "
        "int most) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(heron, CUDA, library) { library.impl("few_rows", TORCH_BOX(&run)); }
#endif
