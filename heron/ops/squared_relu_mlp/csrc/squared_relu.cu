// The product before a squared ReLU and, backward, the one behind it, each with all that is elementwise, on compute
// capability 9.0:
//
//     forward    roots = relu(x key^T)                    squares = roots^2
//     backward   d = (d_y value) 2 roots                  squares = roots^2, once more
//
// Blocks stay and march over tiles of 64 tokens x 256 hidden channels, in pairs: the two of a cluster have the same
// channels, and each brings half of their boxes to both. One thread of a block asks for boxes. Two warpgroups take turns
// with the tiles: while one multiplies, the other does what is elementwise.

#ifdef __CUDACC__  // the tests also compile the kernel for a CPU
#include "../../csrc/box_maps.h"
#include "../../csrc/boxes.cuh"
#endif

namespace {

constexpr int kGroups = 2;                                         // warpgroups that multiply
constexpr int kTurns = 2;                                          // that they take; 1: both are at one tile
constexpr int kTokens = 64 * kGroups / kTurns, kColumns = 256;     // of a tile
constexpr int kBox = 64, kStages = kTurns == 2 ? 5 : 4;            // numbers of a sum in a stage
constexpr int kMultiply = 128 * kGroups, kThreads = kMultiply + 128;  // threads that multiply; a warpgroup asks for boxes
constexpr int kLeftBytes = kTokens * kBox * 2, kHalfBytes = kColumns / 2 * kBox * 2;
constexpr int kStageBytes = kLeftBytes + 2 * kHalfBytes;
constexpr int kSharedBytes = 1024 + kStages * kStageBytes;  // from a multiple of 1024 on
constexpr int kPieces = 16;                                 // of 8 numbers, of a tile for a thread

struct Problem {
    CUtensorMap left, right;  // x and key, or d_y and value
    const unsigned* kept;     // roots; of the backward
    unsigned *out, *squares;  // roots, or d
    int tokens, hidden, depth;
};

struct alignas(16) Piece {
    unsigned words[4];
};

#ifdef __CUDACC__
// A cluster's block of this `rank` learns that its barrier has been reached.
__device__ __forceinline__ void arrive_at(Barrier* barrier, int rank) {
    asm volatile(
        "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(barrier)),
        "r"(rank)
        : "memory");
}

// As bring, `half` of what both blocks of the cluster get; the other block brings the other half, `step` bytes and so many
// numbers and rows on.
__device__ __forceinline__ void bring_half(unsigned char* to, int half, int step, const CUtensorMap& map, int k, int row,
                                           int numbers_on, int rows_on, Barrier* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to + half * step)),
        "l"(&map), "r"(k + half * numbers_on), "r"(row + half * rows_on), "r"(shared_address(barrier)),
        "h"(static_cast<unsigned short>(3))
        : "memory");
}

// Boxes of 64 rows, one behind the other (8192 bytes, 512 times 16, from bit 16 on), of which the tensor cores read columns.
__device__ __forceinline__ unsigned long long descriptor_of_columns(const void* boxes) {
    return (shared_address(boxes) & 0x3ffff) >> 4 | 512ull << 16 | 64ull << 32 | 1ull << 62;
}

#define FOUR(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define SIXTEEN(i) FOUR(i), FOUR(i + 4), FOUR(i + 8), FOUR(i + 12)
#define WGMMA(by_columns)                                                                                             \
    asm volatile(                                                                                                     \
        "{\n.reg .pred add;\nsetp.ne.b32 add, %130, 0;\n"                                                             \
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"                                                     \
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,"  \
        "%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,"    \
        "%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,"    \
        "%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,"  \
        "%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,"   \
        "%127}, %128, %129, add, 1, 1, 0, " by_columns ";\n}"                                                         \
        : SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), SIXTEEN(48), SIXTEEN(64), SIXTEEN(80), SIXTEEN(96), SIXTEEN(112)      \
        : "l"(left), "l"(right), "r"(static_cast<int>(adds)))

// c += 64 tokens x 16 numbers x 256 channels, or without `adds` c is that; a warpgroup asks for it.
template <bool by_columns>
__device__ __forceinline__ void multiply(float (&c)[kColumns / 2], unsigned long long left, unsigned long long right,
                                         bool adds) {
    if constexpr (by_columns) {
        WGMMA("1");
    } else {
        WGMMA("0");
    }
}
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until this warpgroup's products are there, but for its last `but` groups of them.
template <int but>
__device__ __forceinline__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(but) : "memory");
}
// What is read of `c` is read behind this.
__device__ __forceinline__ void settle(float (&c)[kColumns / 2]) {
#pragma unroll
    for (float& sum : c) asm volatile("" : "+f"(sum)::"memory");
}

// Registers of this warpgroup's threads, which all warpgroups of a block share.
template <int count>
__device__ __forceinline__ void keep_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

// This warpgroup waits for its turn to multiply, which the other one gives it.
__device__ __forceinline__ void await_turn(int group) {
    asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "n"(kMultiply) : "memory");
}
__device__ __forceinline__ void give_turn(int group) {
    asm volatile("bar.arrive %0, %1;" ::"r"(1 + group), "n"(kMultiply) : "memory");
}

// Two numbers of bf16 in a word.
__device__ __forceinline__ unsigned pack(float low, float high) {
    unsigned word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}
__device__ __forceinline__ unsigned pack_positive(float low, float high) {  // NaN stays NaN
    unsigned word;
    asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}
__device__ __forceinline__ unsigned times(unsigned a, unsigned b) {
    unsigned word;
    asm("mul.bf16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
    return word;
}
__device__ __forceinline__ unsigned twice(unsigned a) {
    unsigned word;
    asm("add.bf16x2 %0, %1, %1;" : "=r"(word) : "r"(a));
    return word;
}
#endif

// Of four threads side by side, word i of the j-th becomes word j of the i-th.
__device__ __forceinline__ void turn(unsigned (&words)[4], int thread) {
#pragma unroll
    for (int bit = 1; bit < 4; bit *= 2) {
        const bool is_second = thread & bit;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i & bit) continue;
            unsigned &first = words[i], &second = words[i + bit];
            const unsigned theirs = __shfl_xor_sync(0xffffffffu, is_second ? first : second, bit);
            (is_second ? first : second) = theirs;
        }
    }
}

template <bool backward>
__global__ void __launch_bounds__(kThreads, 1) squared_relu(const __grid_constant__ Problem p) {
    __shared__ Barrier full[kStages], empty[kStages];
    const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
    const int rank = static_cast<int>(blockIdx.x % 2);
    const int steps = (p.depth + kBox - 1) / kBox, across = p.hidden / kColumns;
    const int pairs = (p.tokens + 2 * kTokens - 1) / (2 * kTokens) * across;
    const int first_pair = static_cast<int>(blockIdx.x / 2), clusters = static_cast<int>(gridDim.x / 2);
    unsigned char* const memory = stages_memory();
    const auto left_in = [&](int step) { return memory + step % kStages * kStageBytes; };
    const auto right_in = [&](int step) { return left_in(step) + kLeftBytes; };
    const auto first_token = [&](int pair) { return (pair / across * 2 + rank) * kTokens; };
    const auto first_column = [&](int pair) { return pair % across * kColumns; };

    if (threadIdx.x == kMultiply) {
        prefetch_map(p.left), prefetch_map(p.right);
        for (int i = 0; i < kStages; ++i) {
            init_barrier(&full[i], 1);
            init_barrier(&empty[i], 2 * kTokens / 16);  // both blocks read what is brought to both
        }
        show_barriers();
    }
    sync_cluster();  // the barriers are there

    int step = 0;
    if (warp >= kMultiply / 32) {
        keep_registers<40>();
        if (threadIdx.x == kMultiply) {
            for (int pair = first_pair; pair < pairs; pair += clusters) {
                const int column = first_column(pair);
                for (int i = 0; i < steps; ++i, ++step) {
                    Barrier* const here = &full[step % kStages];
                    if (step >= kStages) await(&empty[step % kStages], step / kStages - 1);
                    expect_bytes(here, kStageBytes);
                    bring(left_in(step), p.left, i * kBox, first_token(pair), here);
                    unsigned char* const right = right_in(step);
                    if constexpr (backward) {
                        for (int box = 0; box < 2; ++box) {
                            bring_half(right + box * kHalfBytes / 2, rank, kHalfBytes, p.right, column + box * kBox,
                                       i * kBox, kColumns / 2, 0, here);
                        }
                    } else {
                        bring_half(right, rank, kHalfBytes, p.right, i * kBox, column, 0, kColumns / 2, here);
                    }
                }
            }
        }
    } else {
        take_registers<232>();
        float c[kColumns / 2];
        const int group = warp / 4, turn_of = kTurns == 2 ? group : 0;
        step = turn_of * steps;
        for (int pair = first_pair + turn_of * clusters; pair < pairs; pair += kTurns * clusters) {
            // A thread has two tokens, 8 apart. Of every 32 channels it sums four pairs and stores eight in a row.
            const int token = first_token(pair) + warp * 16 % kTokens + lane / 4, column = first_column(pair) + lane % 4 * 8;
            const auto token_of = [&](int piece) { return token + piece % 2 * 8; };
            const auto place_of = [&](int piece) {
                return (static_cast<int64_t>(token_of(piece)) * p.hidden + column + piece / 2 * 32) / 2;
            };
            [[maybe_unused]] Piece kept[kPieces];
            if constexpr (backward) {
#pragma unroll
                for (int i = 0; i < kPieces; ++i) {
                    if (token_of(i) < p.tokens) kept[i] = *reinterpret_cast<const Piece*>(p.kept + place_of(i));
                }
            }
            const auto tell_of_room = [&](int step) {
                if (lane < 2) arrive_at(&empty[step % kStages], lane);
            };
            // Behind the other's turn all rounds of the barriers are known but those of this one.
            if (kTurns == 2 && pair != first_pair) await_turn(group);
#pragma unroll 1
            for (int i = 0; i < steps; ++i, ++step) {
                await(&full[step % kStages], step / kStages);
                const auto left = descriptor(left_in(step) + (kTurns == 2 ? 0 : group * 64 * kBox * 2));
                const auto right = backward ? descriptor_of_columns(right_in(step)) : descriptor(right_in(step));
                begin_multiplying();
#pragma unroll
                for (int k = 0; k < kBox / 16; ++k) {  // 32 bytes on, or 16 rows of 128
                    multiply<backward>(c, left + 2 * k, right + (backward ? 128 : 2) * k, i + k > 0);
                }
                commit_products();
                if (i > 0) {
                    wait_for_products<1>();
                    tell_of_room(step - 1);
                }
            }
            if (kTurns == 2 && pair + clusters < pairs) give_turn(1 - group);
            wait_for_products<0>();
            settle(c);
            tell_of_room(step - 1);
            step += (kTurns - 1) * steps;

#pragma unroll
            for (int i = 0; i < kPieces; ++i) {
                const float* sums = c + i / 2 * 16 + i % 2 * 2;
                unsigned words[4];
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    words[j] = (backward ? pack : pack_positive)(sums[4 * j], sums[4 * j + 1]);
                }
                turn(words, lane % 4);
                Piece out, squares;
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const unsigned root = backward ? kept[i].words[j] : words[j];
                    out.words[j] = backward ? times(words[j], twice(root)) : root;
                    squares.words[j] = times(root, root);
                }
                if (token_of(i) < p.tokens) {
                    *reinterpret_cast<Piece*>(p.out + place_of(i)) = out;
                    *reinterpret_cast<Piece*>(p.squares + place_of(i)) = squares;
                }
            }
        }
    }
    sync_cluster();  // nobody brings or tells anything any more
}

}  // namespace

#ifdef __CUDACC__
namespace {

template <bool backward>
void start(Problem problem, const Tensor& left, const Tensor& right, const Tensor& out, const Tensor& squares) {
    problem.left = map_of(left, left.size(1), kTokens);
    problem.right = map_of(right, right.size(1), backward ? kBox : kColumns / 2);
    problem.out = static_cast<unsigned*>(out.mutable_data_ptr());
    problem.squares = static_cast<unsigned*>(squares.mutable_data_ptr());
    problem.tokens = static_cast<int>(left.size(0)), problem.depth = static_cast<int>(left.size(1));
    problem.hidden = static_cast<int>(out.size(1));
    int processors = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, left.get_device_index()));
    const auto kernel = squared_relu<backward>;
    STD_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        kSharedBytes));
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = 2, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(processors / 2 * 2));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = kSharedBytes;
    config.stream = current_stream();
    config.attrs = &cluster;
    config.numAttrs = 1;
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, problem));
}

// Shapes, dtypes and alignment as heron.ops.squared_relu_mlp says, and checks. x: (tokens, depth). key: (hidden, depth).
std::tuple<Tensor, Tensor> run(const Tensor& x, const Tensor& key) {
    const DeviceGuard guard(x.get_device_index());
    auto roots = empty({x.size(0), key.size(0)}, x), squares = empty({x.size(0), key.size(0)}, x);
    start<false>({}, x, key, roots, squares);
    return {squares, roots};
}

// d_y: (tokens, depth). value: (depth, hidden). roots: (tokens, hidden).
std::tuple<Tensor, Tensor> run_backward(const Tensor& d_y, const Tensor& value, const Tensor& roots) {
    const DeviceGuard guard(d_y.get_device_index());
    auto d = empty(roots.sizes(), roots), squares = empty(roots.sizes(), roots);
    Problem problem{};
    problem.kept = static_cast<const unsigned*>(roots.const_data_ptr());
    start<true>(problem, d_y, value, d, squares);
    return {d, squares};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(heron, CUDA, library) {
    library.impl("squared_relu", TORCH_BOX(&run));
    library.impl("squared_relu_backward", TORCH_BOX(&run_backward));
}
#endif
