// Products of matrices with up to 256 vectors each, several in one launch, on compute capability 9.0: a block for 128 rows
// of a matrix and up to 128 vectors, on a cluster of blocks, each with a part of these rows.
//
// One thread of a block asks the copy engine for boxes of 128 rows x 128 bytes, and for the same numbers of the vectors,
// into a ring of stages in shared memory; the tensor cores read both there. Boxes of the weight are asked for before the
// kernel that computes the vectors has ended, as many as the ring holds. Blocks of a cluster that need the same box bring
// a slice of it each, to all of them.
//
// No sum depends on other vectors, nor on how many there are.

#include <algorithm>

#ifdef __CUDACC__  // the tests also compile the kernel for a CPU
#include <cuda.h>

#include "../../csrc/early.cuh"
#include "../../csrc/operator.h"
#endif
#include "../../csrc/products.cuh"

namespace {

constexpr int kGroups = 2;           // warpgroups of a block that multiply, each 64 rows
constexpr int kRows = 64 * kGroups;  // of a block
constexpr int kMultiply = 128 * kGroups, kThreads = kMultiply + 32;  // threads that multiply; a warp asks for boxes
constexpr int kBox = 64;    // numbers of a row in a stage: 128 bytes, the width of the swizzle
constexpr int kProducts = 8;  // of a launch
constexpr int kMostColumns = 128;  // vectors of a block
constexpr int kMostBlocks = 8;     // of a cluster
constexpr int kLeast = 128;        // numbers of a row that are worth a block
template <int columns>
constexpr int kRing = 1024 * (columns == kMostColumns ? 208 : 104);  // bytes of stages, at most

// y = add + factor activation(weight x), of n vectors
struct Product {
    const void *factor, *add;  // may be null
    void* y;
    int in, out, activation;
    int parts;  // blocks for the same rows
    int span;   // numbers of a row in a part
    int side_by_side;  // blocks of different rows that share their vectors' boxes
    int first_block;
};

struct Products {
    CUtensorMap weights[kProducts], xs[kProducts];
    Product of[kProducts];
    int count, n;
    int tiles;    // blocks for the same rows and numbers of them, each with other vectors: they share the weight's boxes
    int cluster;  // blocks of one, of which tiles x side_by_side x parts of a product are a divisor
};

// How many blocks share the rows of a matrix, up to `most`: each takes at most `part` numbers of a row, fewer while the
// matrix has less than `enough` blocks.
inline int parts_of(const Product& p, int part, int most, int enough) {
    const int tiles = (p.out + kRows - 1) / kRows;
    int parts = 1;
    const auto wants_more = [&] {
        const int blocks = tiles * parts;
        return blocks < 256 && (p.in > part * parts || (blocks < enough && p.in > kLeast * parts));
    };
    while (parts < most && wants_more()) parts *= 2;
    return parts;
}

inline int columns_of(int n) { return n <= 32 ? 32 : n <= 64 ? 64 : kMostColumns; }

inline int up(int x, int unit) { return (x + unit - 1) / unit; }

// Share out the products to blocks, at most `most` with parts of the same rows; how many blocks there are.
inline int plan(Products& products, int part = 1024, int most = 8, int enough = 128, int side_by_side = 1) {
    products.tiles = up(products.n, kMostColumns);
    products.cluster = 1;
    for (int i = 0; i < products.count; ++i) {
        Product& p = products.of[i];
        p.parts = parts_of(p, part, std::min(most, kMostBlocks / products.tiles), enough);
        p.span = up(p.in, kBox * p.parts) * kBox;
        p.side_by_side = std::min({side_by_side, kMostBlocks / (products.tiles * p.parts), columns_of(products.n) / 8});
        if (p.out <= kRows) p.side_by_side = 1;
        products.cluster = std::max(products.cluster, products.tiles * p.side_by_side * p.parts);
    }
    int blocks = 0;
    for (int i = 0; i < products.count; ++i) {
        Product& p = products.of[i];
        p.first_block = blocks;
        const int shared = products.tiles * p.side_by_side * p.parts;
        blocks += up(up(p.out, kRows * p.side_by_side) * shared, products.cluster) * products.cluster;
    }
    return blocks;
}

template <int columns>
constexpr int kStageBytes = (kRows + columns) * kBox * 2;
template <int columns>
constexpr int kStages = kRing<columns> / kStageBytes<columns>;
constexpr int kPitch = kRows + 4;  // of the sums of a vector, so that a warp's are in different banks
template <int columns>
constexpr int kSumBytes = columns * kPitch * static_cast<int>(sizeof(float));  // where the stages were
template <int columns>
constexpr int kSharedBytes = 1024 + std::max(kStages<columns> * kStageBytes<columns>, kSumBytes<columns>);  // from a multiple of 1024 on

#ifdef __CUDACC__
using Barrier = unsigned long long;

__device__ __forceinline__ unsigned char* stages_memory() {
    extern __shared__ unsigned char shared[];
    return shared + (1024 - static_cast<unsigned>(__cvta_generic_to_shared(shared)) % 1024) % 1024;
}

__device__ __forceinline__ unsigned shared_address(const void* x) {
    return static_cast<unsigned>(__cvta_generic_to_shared(x));
}

__device__ __forceinline__ void init_barrier(Barrier* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// The copy engine sees the barriers that this thread has made.
__device__ __forceinline__ void show_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void expect_bytes(Barrier* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
// At the barrier of the block of the cluster that has this `rank` there.
__device__ __forceinline__ void arrive(Barrier* barrier, int rank) {
    unsigned there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(barrier)), "r"(rank));
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(there) : "memory");
}
// Until the barrier has been passed `round` + 1 times, of which all but the last are known.
__device__ __forceinline__ void await(Barrier* barrier, int round) {
    unsigned done = 0;
    while (done == 0) {
        asm volatile(
            "{\n.reg .pred done;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
            "selp.u32 %0, 1, 0, done;\n}"
            : "=r"(done)
            : "r"(shared_address(barrier)), "r"(round % 2)
            : "memory");
    }
}

// A box of `map`, from number `k` of `row` on, to `to`; zeros beyond the matrix. `barrier` counts its bytes. With several
// bits in `blocks`, to the same place in all these blocks of the cluster, whose barriers count them.
__device__ __forceinline__ void bring(void* to, const CUtensorMap& map, int k, int row, Barrier* barrier, unsigned blocks) {
    if ((blocks & (blocks - 1)) == 0) {
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
                shared_address(to)),
            "l"(&map), "r"(k), "r"(row), "r"(shared_address(barrier))
            : "memory");
    } else {
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
            "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
            "l"(&map), "r"(k), "r"(row), "r"(shared_address(barrier)), "h"(static_cast<unsigned short>(blocks))
            : "memory");
    }
}
__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
// Rows of 128 bytes in shared memory, as the copy engine leaves them: eight of them are 1024 bytes.
__device__ __forceinline__ unsigned long long descriptor(const void* rows) {
    return (shared_address(rows) & 0x3ffff) >> 4 | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

#define FOUR(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define SIXTEEN(i) FOUR(i), FOUR(i + 4), FOUR(i + 8), FOUR(i + 12)
#define WGMMA(n, type, registers, a, b, ...)                                                                  \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\n"                                                \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" registers "}, " a ", " b \
                 ", add, 1, 1, 0, 0;\n}"                                                                       \
                 : __VA_ARGS__                                                                                 \
                 : "l"(rows), "l"(vectors))
#define R16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define R32 R16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define R64                                                                                                     \
    R32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56," \
        "%57,%58,%59,%60,%61,%62,%63"

// c += 64 rows x 16 numbers of `columns` vectors; a warpgroup asks for it.
template <typename T, int columns>
__device__ __forceinline__ void multiply(float (&c)[columns / 2], unsigned long long rows, unsigned long long vectors) {
    constexpr bool half = std::is_same_v<T, Half>;
    if constexpr (columns == 32) {
        if constexpr (half) WGMMA(32, "f16", R16, "%16", "%17", SIXTEEN(0));
        else WGMMA(32, "bf16", R16, "%16", "%17", SIXTEEN(0));
    } else if constexpr (columns == 64) {
        if constexpr (half) WGMMA(64, "f16", R32, "%32", "%33", SIXTEEN(0), SIXTEEN(16));
        else WGMMA(64, "bf16", R32, "%32", "%33", SIXTEEN(0), SIXTEEN(16));
    } else {
        if constexpr (half) WGMMA(128, "f16", R64, "%64", "%65", SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), SIXTEEN(48));
        else WGMMA(128, "bf16", R64, "%64", "%65", SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), SIXTEEN(48));
    }
}
__device__ __forceinline__ void begin_multiplying() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void end_multiplying() {
    asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
}

// A barrier of the threads that multiply.
__device__ __forceinline__ void sync_multiplying() { asm volatile("bar.sync 1, %0;" ::"n"(kMultiply) : "memory"); }

// Until all threads of the cluster are here; what they have written then can be read.
__device__ __forceinline__ void sync_cluster() {
    __syncwarp();
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Until they are here; ordinary memory that they have written is not there yet.
__device__ __forceinline__ void meet_cluster() {
    __syncwarp();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

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

// Up to `columns` vectors; those that are not there are zeros.
template <typename T, int columns>
__global__ void __launch_bounds__(kThreads, 2) few_rows_by_boxes(const __grid_constant__ Products products) {
    constexpr int stages = kStages<columns>;
    __shared__ Barrier full[stages], empty[stages];
    int which = 0;
    while (which + 1 < products.count && static_cast<int>(blockIdx.x) >= products.of[which + 1].first_block) ++which;
    const Product& p = products.of[which];
    const CUtensorMap &weight = products.weights[which], &x = products.xs[which];
    // The blocks that work on the same rows or with the same vectors: these tiles first, then rows, then parts.
    const int tiles = products.tiles, beside = p.side_by_side, shared = tiles * beside * p.parts;
    const int block = static_cast<int>(blockIdx.x) - p.first_block, mine = block % shared;
    const int first_rank = static_cast<int>(blockIdx.x) % products.cluster - mine;
    const int tile = mine % tiles, side = mine / tiles % beside, part = mine / (tiles * beside);
    const int first_row = (block / shared * beside + side) * kRows, begin = part * p.span;
    const int first_vector = tile * kMostColumns;
    const int steps = max(0, (min(p.span, p.in - begin) + kBox - 1) / kBox);
    const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
    // Blocks begin at different numbers of a row: else all would ask for the same few numbers of the vectors at a time.
    const int turn = steps > 0 ? block / shared % steps : 0;
    const auto number_at = [&](int step) { return begin + (step + turn) % steps * kBox; };
    const bool shares = tiles * beside > 1, is_alone = products.cluster == 1;

    unsigned char* const memory = stages_memory();
    const auto rows_in = [&](int step) { return memory + step % stages * kStageBytes<columns>; };
    const auto vectors_in = [&](int step) { return rows_in(step) + kRows * kBox * 2; };
    const bool brings = threadIdx.x == kMultiply;
    const auto bring_weight = [&](int step) {
        const int slice = kRows / tiles, row = tile * slice;
        expect_bytes(&full[step % stages], kStageBytes<columns>);
        bring(rows_in(step) + row * kBox * 2, weight, number_at(step), first_row + row, &full[step % stages],
                    ((1u << tiles) - 1) << (first_rank + mine - tile));
    };
    const auto bring_vectors = [&](int step) {
        const int slice = columns / beside, vector = side * slice;
        unsigned blocks = 0;
        for (int i = 0; i < beside; ++i) blocks |= 1u << (first_rank + mine + (i - side) * tiles);
        bring(vectors_in(step) + vector * kBox * 2, x, number_at(step), first_vector + vector,
                     &full[step % stages], blocks);
    };
    if (brings) {
        prefetch_map(weight), prefetch_map(x);
        for (int i = 0; i < stages; ++i) {
            init_barrier(&full[i], 1);
            init_barrier(&empty[i], kMultiply / 32 * (tiles + beside - 1));
        }
        show_barriers();
    }
    shares ? meet_cluster() : __syncthreads();  // the barriers are there
    if (brings) {
        for (int step = 0; step < min(stages, steps); ++step) bring_weight(step);
    }
    wait_for_inputs();

    auto* const sums = reinterpret_cast<float*>(memory);
    if (warp == kMultiply / 32) {
        if (brings) {
            for (int step = 0; step < min(stages, steps); ++step) bring_vectors(step);
            for (int step = stages; step < steps; ++step) {
                await(&empty[step % stages], step / stages - 1);
                bring_weight(step);
                bring_vectors(step);
            }
        }
    } else {
        float c[columns / 2] = {};
        const int group = warp / 4;
#pragma unroll 1
        for (int step = 0; step < steps; ++step) {
            await(&full[step % stages], step / stages);
            const auto rows = descriptor(rows_in(step) + group * 64 * kBox * 2), vectors = descriptor(vectors_in(step));
            begin_multiplying();
#pragma unroll
            for (int k = 0; k < kBox / 16; ++k) multiply<T, columns>(c, rows + 2 * k, vectors + 2 * k);  // 32 bytes on
            end_multiplying();
            if (lane < tiles + beside - 1) {  // those that bring something here: of the same rows, of the same vectors
                const int other = lane < tiles ? lane - tile : ((lane - tiles < side ? 0 : 1) + lane - tiles - side) * tiles;
                arrive(&empty[step % stages], first_rank + mine + other);
            }
        }
        sync_multiplying();  // the stages have been read
        const int row = warp * 16 + lane / 4, column = lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < columns / 2; ++i) {
            sums[(column + i / 4 * 8 + i % 2) * kPitch + row + i / 2 % 2 * 8] = c[i];
        }
    }
    is_alone ? __syncthreads() : sync_cluster();

    const int rows = kRows / p.parts, vectors = min(columns, products.n - first_vector);
    for (int i = static_cast<int>(threadIdx.x); i < vectors * rows / 4; i += kThreads) {
        const int v = i / (rows / 4), r = part * rows + i % (rows / 4) * 4, there = min(4, p.out - first_row - r);
        if (there <= 0) continue;
        const int64_t at = static_cast<int64_t>(first_vector + v) * p.out + first_row + r;
        const Quad factor = four_of<T>(p.factor, at, there, 1.0f), add = four_of<T>(p.add, at, there, 0.0f);
        Quad sum{};
#pragma unroll 4
        for (int other = 0; other < p.parts; ++other) {
            const Quad theirs = sums_of(sums + v * kPitch + r, first_rank + mine + (other - part) * tiles * beside);
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
    if (!is_alone) meet_cluster();  // others may still read what is here
}

}  // namespace

#ifdef __CUDACC__
namespace {

using Several = std::vector<Optional>;

const void* data_of(const Optional& x) { return x.has_value() ? x->const_data_ptr() : nullptr; }

// `matrix`, to be read in boxes of kBox numbers of `box_rows` rows.
CUtensorMap map_of(const Tensor& matrix, int64_t stride, int box_rows) {
    static const auto encode = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found{};
        STD_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                                        &found));
        STD_TORCH_CHECK(found == cudaDriverEntryPointSuccess, "few_rows: the driver has no cuTensorMapEncodeTiled");
        return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
    }();
    CUtensorMap map;
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(matrix.size(1)), static_cast<cuuint64_t>(matrix.size(0))};
    const cuuint64_t strides[] = {static_cast<cuuint64_t>(stride) * 2};
    const cuuint32_t box[] = {kBox, static_cast<cuuint32_t>(box_rows)}, steps[] = {1, 1};
    const bool in_half = matrix.scalar_type() == ScalarType::Half;
    const auto type = in_half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    const CUresult result =
        encode(&map, type, 2, const_cast<void*>(matrix.const_data_ptr()), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    STD_TORCH_CHECK(result == CUDA_SUCCESS, "few_rows: cuTensorMapEncodeTiled failed: ", static_cast<int>(result));
    return map;
}

template <typename T, int columns>
void start(const Products& products, int blocks, int device) {
    const auto kernel = few_rows_by_boxes<T, columns>;
    STD_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes<columns>));
    STD_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                        cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
    STD_CUDA_CHECK(launch_early(kernel, static_cast<unsigned>(blocks), kThreads, kSharedBytes<columns>, current_stream(),
                                device, products, static_cast<unsigned>(products.cluster)));
}

template <typename T>
void start_for(const Products& products, int blocks, int device) {
    const int columns = columns_of(products.n);
    if (columns == 32) start<T, 32>(products, blocks, device);
    if (columns == 64) start<T, 64>(products, blocks, device);
    if (columns == 128) start<T, 128>(products, blocks, device);
}

// Shapes, dtypes and alignment as heron.ops.few_rows says, and checks.
Tensors run(const Tensors& xs, const Tensors& weights, const std::vector<int64_t>& activations,
            const Several& factors, const Several& adds) {
    const Tensor& first = weights[0];
    const int device = first.get_device_index();
    const DeviceGuard guard(device);
    Tensors ys;
    Products products{};
    products.n = static_cast<int>(xs[0].size(0));
    for (size_t i = 0; i < weights.size(); ++i) {
        ys.push_back(empty({products.n, weights[i].size(0)}, weights[i]));
        Product& p = products.of[products.count++];
        p.factor = data_of(factors[i]), p.add = data_of(adds[i]);
        p.y = ys.back().mutable_data_ptr();
        p.in = static_cast<int>(weights[i].size(1)), p.out = static_cast<int>(weights[i].size(0));
        p.activation = static_cast<int>(activations[i]);
    }
    const int blocks = plan(products);
    for (size_t i = 0; i < weights.size(); ++i) {
        const Product& p = products.of[i];
        const int columns = columns_of(products.n) / p.side_by_side;
        products.weights[i] = map_of(weights[i], weights[i].stride(0), kRows / products.tiles);
        products.xs[i] = map_of(xs[i], p.in, columns);
    }
    const auto start = first.scalar_type() == ScalarType::BFloat16 ? start_for<BFloat16> : start_for<Half>;
    start(products, blocks, device);
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
