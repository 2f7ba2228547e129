// Products of matrices with up to 32 vectors each, several in one launch, on compute capability 9.0: a block for 128 rows of
// a matrix, on a cluster of blocks, each with a part of these rows.
//
// One thread of a block asks the copy engine for boxes of 128 rows x 128 bytes, and for the same numbers of the vectors,
// into a ring of stages in shared memory; the tensor cores read both there. Boxes of the weight are asked for before the
// kernel that computes the vectors has ended, as many as the ring holds.
//
// No sum depends on other vectors, nor on how many there are.

#ifdef __CUDACC__  // the tests also compile the kernel for a CPU
#include "../../csrc/boxes.cuh"
#include "../../csrc/cluster.cuh"
#include "../../csrc/early.cuh"
#include "../../csrc/operator.h"
#endif
#include "../../csrc/products.cuh"
#include "sharing.cuh"

namespace {

constexpr int kGroups = 2;           // warpgroups of a block that multiply, each 64 rows
constexpr int kRows = 64 * kGroups;  // of a block
constexpr int kMultiply = 128 * kGroups, kThreads = kMultiply + 32;  // threads that multiply; a warp asks for boxes
constexpr int kColumns = 32;         // vectors of a block; those that are not there are zeros
constexpr int kBox = 64;             // numbers of a row in a stage: 128 bytes, the width of the swizzle
constexpr int kStages = 5;           // two blocks fit a multiprocessor, of this kernel and the next
constexpr int kStageBytes = (kRows + kColumns) * kBox * 2;
constexpr int kSharedBytes = 1024 + kStages * kStageBytes;  // from a multiple of 1024 on; the sums take the stages' place
constexpr int kPitch = kRows + 4;    // of the sums of a vector, so that a warp's are in different banks
constexpr int kProducts = 8;         // of a launch
constexpr int kMostParts = 8;        // blocks of a cluster
constexpr int kPart = 1024;          // numbers of a row for a block, where there are so many blocks
constexpr int kEnough = 64;          // blocks for one matrix
constexpr int kMany = 256;           // blocks for one matrix with which more of them only read more vectors

// y = add + factor activation(weight x), of n vectors
struct Product {
    const void *factor, *add;  // may be null
    void* y;
    int in, out, activation;
    int parts;  // blocks for the same rows
    int span;   // numbers of a row in a part
    int first_block;
};

struct Products {
    CUtensorMap weights[kProducts], xs[kProducts];
    Product of[kProducts];
    int count, n;
    int cluster;  // blocks of one; the parts of a product divide it
};

constexpr Sharing sharing(int part = kPart, int enough = kEnough) {
    return {kRows, kBox, part, kMostParts, enough, kMany};
}

#ifdef __CUDACC__
// As `bring`, of what is read once: it is the first to leave the L2 cache.
__device__ __forceinline__ void bring_once(void* to, const CUtensorMap& map, int k, int row, Barrier* barrier) {
    unsigned long long policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
        "l"(&map), "r"(k), "r"(row), "r"(shared_address(barrier)), "l"(policy)
        : "memory");
}
#define FOUR(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define WGMMA(type)                                                                                                   \
    asm volatile(                                                                                                     \
        "{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\n"                                                                \
        "wgmma.mma_async.sync.aligned.m64n32k16.f32." type "." type                                                   \
        " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, %16, %17, add, 1, 1, 0, 0;\n}"                     \
        : FOUR(0), FOUR(4), FOUR(8), FOUR(12)                                                                         \
        : "l"(rows), "l"(vectors))

// c += 64 rows x 16 numbers of the vectors; a warpgroup asks for it.
template <typename T>
__device__ __forceinline__ void multiply(float (&c)[kColumns / 2], unsigned long long rows, unsigned long long vectors) {
    if constexpr (std::is_same_v<T, Half>) {
        WGMMA("f16");
    } else {
        WGMMA("bf16");
    }
}

// A barrier of the threads that multiply.
__device__ __forceinline__ void sync_multiplying() { asm volatile("bar.sync 1, %0;" ::"n"(kMultiply) : "memory"); }

struct alignas(16) Quad {
    float values[4];
};

// Four sums from where `mine` is in the shared memory of the block of the cluster that has this `rank` there.
__device__ __forceinline__ Quad sums_of(const float* mine, int rank) {
    unsigned there;
    Quad quad;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(mine)), "r"(rank));
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(quad.values[0]), "=f"(quad.values[1]), "=f"(quad.values[2]), "=f"(quad.values[3])
                 : "r"(there)
                 : "memory");
    return quad;
}
#endif

template <typename T>
struct alignas(4 * sizeof(T)) Four {
    T values[4];
};

// Four numbers at `from`, of which `there` exist.
template <typename T>
__device__ __forceinline__ Quad four_of(const void* from, int64_t at, int there, float otherwise) {
    Quad quad{{otherwise, otherwise, otherwise, otherwise}};
    if (from == nullptr) return quad;
    const T* x = static_cast<const T*>(from) + at;
    if (there == 4 && at % 4 == 0) {
        const auto four = *reinterpret_cast<const Four<T>*>(x);
#pragma unroll
        for (int i = 0; i < 4; ++i) quad.values[i] = static_cast<float>(four.values[i]);
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i < there) quad.values[i] = static_cast<float>(x[i]);
        }
    }
    return quad;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) few_rows_by_boxes(const __grid_constant__ Products products) {
    __shared__ Barrier full[kStages], empty[kStages];
    int which = 0;
    while (which + 1 < products.count && static_cast<int>(blockIdx.x) >= products.of[which + 1].first_block) ++which;
    const Product& p = products.of[which];
    const CUtensorMap &weight = products.weights[which], &x = products.xs[which];
    const int block = static_cast<int>(blockIdx.x) - p.first_block, part = block % p.parts;
    const int first_rank = static_cast<int>(blockIdx.x) % products.cluster - part;
    const int first_row = block / p.parts * kRows, begin = part * p.span;
    const int steps = max(0, (min(p.span, p.in - begin) + kBox - 1) / kBox);
    const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);

    unsigned char* const memory = memory_of_boxes();
    const auto rows_in = [&](int step) { return memory + step % kStages * kStageBytes; };
    const auto vectors_in = [&](int step) { return rows_in(step) + kRows * kBox * 2; };
    const bool brings = threadIdx.x == kMultiply;
    const auto bring_weight = [&](int step) {
        expect_bytes(&full[step % kStages], kStageBytes);
        bring_once(rows_in(step), weight, begin + step * kBox, first_row, &full[step % kStages]);
    };
    const auto bring_vectors = [&](int step) {
        bring(vectors_in(step), x, begin + step * kBox, 0, &full[step % kStages]);
    };
    if (brings) {
        prefetch_map(weight), prefetch_map(x);
        for (int i = 0; i < kStages; ++i) {
            init_barrier(&full[i], 1);
            init_barrier(&empty[i], kMultiply / 32);
        }
        show_barriers();
        for (int step = 0; step < min(kStages, steps); ++step) bring_weight(step);
    }
    __syncthreads();  // the barriers are there
    wait_for_inputs();

    auto* const sums = reinterpret_cast<float*>(memory);
    if (warp == kMultiply / 32) {
        if (brings) {
            for (int step = 0; step < min(kStages, steps); ++step) bring_vectors(step);
            for (int step = kStages; step < steps; ++step) {
                await(&empty[step % kStages], step / kStages - 1);
                bring_weight(step);
                bring_vectors(step);
            }
        }
    } else {
        float c[kColumns / 2] = {};
        const int group = warp / 4;
#pragma unroll 1
        for (int step = 0; step < steps; ++step) {
            await(&full[step % kStages], step / kStages);
            const auto rows = descriptor(rows_in(step) + group * 64 * kBox * 2), vectors = descriptor(vectors_in(step));
            begin_multiplying();
#pragma unroll
            for (int k = 0; k < kBox / 16; ++k) multiply<T>(c, rows + 2 * k, vectors + 2 * k);  // 32 bytes on
            end_multiplying();
            multiplied<0>();
            if (lane == 0) arrive(&empty[step % kStages]);
        }
        sync_multiplying();  // the stages have been read
        const int row = warp * 16 + lane / 4, column = lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < kColumns / 2; ++i) {
            sums[(column + i / 4 * 8 + i % 2) * kPitch + row + i / 2 % 2 * 8] = c[i];
        }
    }
    const bool is_alone = products.cluster == 1;
    if (is_alone) {
        __syncthreads();
    } else {
        __syncwarp();
        sync_cluster();
    }

    const int rows = kRows / p.parts;
    for (int i = static_cast<int>(threadIdx.x); i < products.n * rows / 4; i += kThreads) {
        const int v = i / (rows / 4), r = part * rows + i % (rows / 4) * 4, there = min(4, p.out - first_row - r);
        if (there <= 0) continue;
        const int64_t at = static_cast<int64_t>(v) * p.out + first_row + r;
        const Quad factor = four_of<T>(p.factor, at, there, 1.0f), add = four_of<T>(p.add, at, there, 0.0f);
        Quad sum{};
#pragma unroll 4
        for (int other = 0; other < p.parts; ++other) {
            const Quad theirs = sums_of(sums + v * kPitch + r, first_rank + other);
#pragma unroll
            for (int j = 0; j < 4; ++j) sum.values[j] += theirs.values[j];
        }
        Four<T> y;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            y.values[j] = static_cast<T>(add.values[j] + factor.values[j] * activated(sum.values[j], p.activation));
        }
        T* const to = static_cast<T*>(p.y) + at;
        if (there == 4 && at % 4 == 0) {
            *reinterpret_cast<Four<T>*>(to) = y;
        } else {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if (j < there) to[j] = y.values[j];
            }
        }
    }
    if (is_alone) return;
    __syncwarp();
    meet_cluster();  // others may still read what is here
}

}  // namespace

#ifdef __CUDACC__
namespace {

// `matrix`, to be read in boxes of kBox numbers of `box_rows` rows.
CUtensorMap map_of(const Tensor& matrix, int64_t stride, int box_rows) {
    CUtensorMap map;
    const int result = describe(map, matrix.const_data_ptr(), matrix.scalar_type() == ScalarType::Half, matrix.size(0),
                                matrix.size(1), stride, box_rows);
    STD_TORCH_CHECK(result == 0, "few_rows: cuTensorMapEncodeTiled failed: ", result);
    return map;
}

template <typename T>
void start(const Products& products, int blocks, int device) {
    const auto kernel = few_rows_by_boxes<T>;
    const auto* function = reinterpret_cast<const void*>(kernel);
    STD_CUDA_CHECK(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
    STD_CUDA_CHECK(cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout,
                                        cudaSharedmemCarveoutMaxShared));
    STD_CUDA_CHECK(launch_early(kernel, static_cast<unsigned>(blocks), kThreads, kSharedBytes, current_stream(), device,
                                products, static_cast<unsigned>(products.cluster)));
}

// Shapes, dtypes and alignment as heron.ops.few_rows says, and checks.
Tensors run(const Tensors& xs, const Tensors& weights, const std::vector<int64_t>& activations,
            const Optionals& factors, const Optionals& adds) {
    const Tensor& first = weights[0];
    const int device = first.get_device_index();
    const DeviceGuard guard(device);
    Tensors ys;
    Products products{};
    products.n = static_cast<int>(xs[0].size(0));
    for (size_t i = 0; i < weights.size(); ++i) {
        ys.push_back(empty({products.n, weights[i].size(0)}, weights[i]));
        products.weights[i] = map_of(weights[i], weights[i].stride(0), kRows);
        products.xs[i] = map_of(xs[i], weights[i].size(1), kColumns);
        Product& p = products.of[products.count++];
        p.factor = data_of(factors[i]), p.add = data_of(adds[i]);
        p.y = ys.back().mutable_data_ptr();
        p.in = static_cast<int>(weights[i].size(1)), p.out = static_cast<int>(weights[i].size(0));
        p.activation = static_cast<int>(activations[i]);
    }
    const int blocks = share_out(products, sharing());
    (first.scalar_type() == ScalarType::BFloat16 ? start<BFloat16> : start<Half>)(products, blocks, device);
    return ys;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(heron, library) {
    library.def(
        "few_rows_by_boxes(Tensor[] xs, Tensor[] weights, int[] activations, Tensor?[] factors, Tensor?[] adds) "
        "-> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(heron, CUDA, library) { library.impl("few_rows_by_boxes", TORCH_BOX(&run)); }
#endif
