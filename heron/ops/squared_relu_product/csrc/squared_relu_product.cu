// Products of a channel mix with its squared ReLU, on compute capability 9.0: of tokens x (n, in) and a weight,
//
//     square = relu(key)^2             key = x weight^T         weight (hidden, in)
//     d_key = 2 relu(key) d_square     d_square = x weight      weight (in, hidden), backward; x is the gradient of out
//
// each in one kernel. Sums become bf16 in registers, as a product alone would write them, and the rest is computed from
// these, so the bits are those of products and operations one by one. relu(key) comes from its square, which README.md
// explains.
//
// A block takes tiles of 128 hidden channels x kTokens tokens, one after another. One thread asks the copy engine for
// boxes of 64 numbers of the sum, into a ring of stages. Two warpgroups take turns with tiles: one multiplies, and the
// other one computes and writes what its tile becomes. Two blocks are a cluster: they have the same tokens, of which
// each brings half for both.

#ifdef __CUDACC__  // the tests also compile the kernel for a CPU
#include <cuda_bf16.h>

#include "../../csrc/boxes.cuh"
#include "../../csrc/cluster.cuh"
#include "../../csrc/early.cuh"
#include "../../csrc/operator.h"
#endif

#include <tuple>
#include <type_traits>

namespace {

constexpr int kDepth = 64;         // numbers of a sum in a stage
constexpr int kLine = kDepth * 2;  // bytes: the width of the swizzle
constexpr int kHidden = 128;       // channels of a tile, in two halves
constexpr int kHalf = kHidden / 2;
constexpr int kGroups = 2;  // warpgroups that multiply
constexpr int kMultiply = 128 * kGroups, kThreads = kMultiply + 128;  // one thread of the others asks for boxes
constexpr int kCluster = 2;
constexpr int kBeside = 12;  // tiles of channels, of a cluster, that are computed one after another for the same tokens

// How large tiles are, and in how many parts of their tokens, `buffers` at a time, a half becomes what is written.
template <int tokens, int stages, int parts, int buffers>
struct Form {
    static constexpr int kTokens = tokens, kStages = stages, kParts = parts, kBuffers = buffers;
    static constexpr int kPart = tokens / parts, kPieces = 2 * parts;
    static constexpr int kStageBytes = (kHidden + tokens) * kLine, kBufferBytes = kPart * kLine;
    struct Barriers {
        Barrier full[stages], empty[stages];
        Barrier arrived[kGroups][buffers];  // pieces of the square
        Barrier turn[kGroups];              // that a warpgroup waits for
    };
    static constexpr int kBarriers = stages * kStageBytes + kGroups * buffers * kBufferBytes;  // where they are
    static constexpr int kSharedBytes = 1024 + kBarriers + static_cast<int>(sizeof(Barriers));
    static_assert(kPart % 8 == 0 && kPieces % buffers == 0 && tokens / kCluster % 8 == 0);
    static_assert(kSharedBytes <= 227 * 1024);
};

// Which is the fastest is measured. They give the same bits.
using Forms = std::tuple<Form<176, 4, 2, 2>, Form<192, 4, 4, 4>>;

// Run go(Form) for the form of this number; how many there are.
template <int number = 0, typename Go>
int with_form(int64_t wanted, const Go& go) {
    if constexpr (number == std::tuple_size_v<Forms>) {
        return number;
    } else {
        if (wanted == number) go(std::tuple_element_t<number, Forms>{});
        return with_form<number + 1>(wanted, go);
    }
}

struct Problem {
    CUtensorMap weight, x, square, out;
    int steps;             // stages of a sum
    int channels, tokens;  // tiles; of channels, of a cluster each
    int beside;            // of `channels`
};

#ifdef __CUDACC__
// As `bring`, to the same place in all blocks of the cluster, whose barriers at the place of `barrier` count the bytes.
__device__ __forceinline__ void bring_to_all(void* to, const CUtensorMap& map, int column, int row, Barrier* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
        "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier)),
        "h"(static_cast<unsigned short>((1 << kCluster) - 1))
        : "memory");
}
// Write what lies at `from`, but what is beyond the matrix.
__device__ __forceinline__ void write(const CUtensorMap& map, const void* from, int column, int row) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map), "r"(column),
                 "r"(row), "r"(shared_address(from))
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Until what this thread writes, but its latest `but`, has left shared memory.
template <int but>
__device__ __forceinline__ void written() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(but) : "memory");
}
__device__ __forceinline__ void show_to_engines() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Registers of this warpgroup's threads: a kernel begins with 168.
__device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 240;"); }
__device__ __forceinline__ void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 24;"); }
__device__ __forceinline__ void sync_group(int group) {
    asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
}
// At the barrier that lies where `barrier` does in the block of this `rank`. What threads have written is not shown to
// that block: it would take a fence, which waits for products under way.
__device__ __forceinline__ void arrive_at(Barrier* barrier, int rank) {
    asm volatile(
        "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(barrier)),
        "r"(rank)
        : "memory");
}

#define TEN(t) "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9,"
#define TO_87 \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9," TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) TEN(6) TEN(7) "%80,%81,%82,%83,%84,%85,%86,%87"
#define TO_95 TO_87 ",%88,%89,%90,%91,%92,%93,%94,%95"
#define EIGHT(i)                                                                                                 \
    "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), \
        "+f"(c[i + 7])
#define SUMS_88                                                                                                    \
    EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24), EIGHT(32), EIGHT(40), EIGHT(48), EIGHT(56), EIGHT(64), EIGHT(72), \
        EIGHT(80)
// The high half of both descriptors says what `descriptor` says there.
#define WGMMA(n, list, a_, b_, adds_, turned_, ...)                                                             \
    asm volatile("{\n.reg .pred adds;\n.reg .b64 a, b;\nsetp.ne.b32 adds, " adds_ ", 0;\n"                      \
                 "mov.b64 a, {" a_ ", 0x40000040};\nmov.b64 b, {" b_ ", 0x40000040};\n"                         \
                 "wgmma.mma_async.sync.aligned.m64n" n "k16.f32.bf16.bf16 {" list "}, a, b, adds, 1, 1, "       \
                 turned_ ", 0;\n}"                                                                              \
                 : __VA_ARGS__                                                                                  \
                 : "r"(a), "r"(b), "r"(static_cast<int>(adds)), "n"(static_cast<int>(turned)))

// c = a b, or c += a b: 64 channels x `tokens`, 16 numbers of a sum; a warpgroup asks for it. `a` and `b` are the low
// halves of descriptors. The weight's rows are channels, or, if `turned`, numbers of the sum.
template <int tokens, bool turned>
__device__ __forceinline__ void multiply(float (&c)[tokens / 2], unsigned a, unsigned b, bool adds) {
    if constexpr (tokens == 176) {
        WGMMA("176", TO_87, "%88", "%89", "%90", "%91", SUMS_88);
    } else {
        static_assert(tokens == 192);
        WGMMA("192", TO_95, "%96", "%97", "%98", "%99", SUMS_88, EIGHT(88));
    }
}

// Two 8 x 8 matrices of 16-bit numbers that lie side by side, and if `four` two more, eight rows on, turned: a lane has
// two numbers of a column. Lanes give the places of rows: the first eight those of the first matrix, and so on.
template <bool four>
__device__ __forceinline__ void load_turned(unsigned (&m)[4], const void* row) {
    if constexpr (four) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                     : "r"(shared_address(row))
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                     : "=r"(m[0]), "=r"(m[1])
                     : "r"(shared_address(row))
                     : "memory");
    }
}
template <bool four>
__device__ __forceinline__ void store_turned(void* row, const unsigned (&m)[4]) {
    if constexpr (four) {
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                         shared_address(row)),
                     "r"(m[0]), "r"(m[1]), "r"(m[2]), "r"(m[3])
                     : "memory");
    } else {
        asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(shared_address(row)),
                     "r"(m[0]), "r"(m[1])
                     : "memory");
    }
}

// Two numbers in bf16.
__device__ __forceinline__ unsigned rounded(float low, float high) {
    unsigned two;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
    return two;
}
__device__ __forceinline__ __nv_bfloat162 numbers_of(unsigned two) { return reinterpret_cast<__nv_bfloat162&>(two); }
__device__ __forceinline__ unsigned bits_of(__nv_bfloat162 two) { return reinterpret_cast<unsigned&>(two); }
__device__ __forceinline__ float root(float x) {
    float y;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// relu(key)^2; NaN stays NaN.
__device__ __forceinline__ unsigned squared(unsigned key) {
    const __nv_bfloat162 relu = __hmax2_nan(numbers_of(key), numbers_of(0));
    return bits_of(__hmul2_rn(relu, relu));
}
// 2 relu(key) d_square; 0 where the square is.
__device__ __forceinline__ unsigned gradient(unsigned d_square, unsigned square) {
    const unsigned relu = rounded(root(__uint_as_float(square << 16)), root(__uint_as_float(square & 0xffff0000u)));
    const __nv_bfloat162 twice = __hadd2_rn(numbers_of(relu), numbers_of(relu));
    return bits_of(__hmul2_rn(numbers_of(d_square), twice)) & __hgtu2_mask(numbers_of(square), numbers_of(0));
}

#endif

struct Tile {
    int channel, token;  // the first ones, of the cluster
};
__device__ __forceinline__ Tile tile_of(const Problem& p, int number, int tokens) {
    const int before = number / (p.beside * p.tokens) * p.beside, rest = number % (p.beside * p.tokens);
    const int beside = min(p.beside, p.channels - before);
    return {(before + rest % beside) * kHidden * kCluster, rest / beside * tokens};
}

template <typename Form, bool backward>
__global__ void __launch_bounds__(kThreads, 1) products_with_squares(const __grid_constant__ Problem p) {
    constexpr int stages = Form::kStages, tokens = Form::kTokens, buffers = Form::kBuffers;
    unsigned char* const memory = memory_of_boxes();
    auto& barriers = *reinterpret_cast<typename Form::Barriers*>(memory + Form::kBarriers);
    auto &full = barriers.full, &empty = barriers.empty;
    const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
    const int rank = static_cast<int>(blockIdx.x) % kCluster;
    const int cluster = static_cast<int>(blockIdx.x) / kCluster, clusters = static_cast<int>(gridDim.x) / kCluster;
    const int tiles = p.channels * p.tokens;
    const auto weight_in = [&](int stage) { return memory + stage * Form::kStageBytes; };
    const auto x_in = [&](int stage) { return weight_in(stage) + kHidden * kLine; };

    if (threadIdx.x == kMultiply) {
        prefetch_map(p.weight), prefetch_map(p.x), prefetch_map(p.out);
        for (int i = 0; i < stages; ++i) {
            init_barrier(&full[i], 1);
            init_barrier(&empty[i], 4 * kCluster);  // warps
        }
        for (int group = 0; group < kGroups; ++group) {
            for (int i = 0; i < buffers; ++i) init_barrier(&barriers.arrived[group][i], 1);
            init_barrier(&barriers.turn[group], 4);
        }
        show_barriers();
    }
    __syncwarp();
    sync_cluster();  // the barriers are there
    wait_for_inputs();

    if (warp >= kMultiply / 32) {
        give_registers();
        if (threadIdx.x == kMultiply) {
            int step = 0;
            for (int number = cluster; number < tiles; number += clusters) {
                const Tile tile = tile_of(p, number, tokens);
                const int channel = tile.channel + rank * kHidden, mine = rank * (tokens / kCluster);
                for (int i = 0; i < p.steps; ++i, ++step) {
                    const int stage = step % stages, k = i * kDepth;
                    if (step >= stages) await(&empty[stage], step / stages - 1);
                    expect_bytes(&full[stage], Form::kStageBytes);
                    if (backward) {
                        bring(weight_in(stage), p.weight, channel, k, &full[stage]);
                        bring(weight_in(stage) + kHalf * kLine, p.weight, channel + kHalf, k, &full[stage]);
                    } else {
                        bring(weight_in(stage), p.weight, k, channel, &full[stage]);
                    }
                    bring_to_all(x_in(stage) + mine * kLine, p.x, k, tile.token + mine, &full[stage]);
                }
            }
        }
    } else {
        take_registers();
        const int group = warp / 4;
        const bool leads = threadIdx.x % 128 == 0;
        const auto buffer_of = [&](int piece) {
            return memory + stages * Form::kStageBytes + (group * buffers + piece % buffers) * Form::kBufferBytes;
        };
        // Of this lane's row of four matrices: tokens lane / 16 * 8 + lane % 8, and 8 channels, permuted like a box.
        const int place = (lane / 16 * 8 + lane % 8) * kLine + ((warp % 4 * 2 + lane / 8 % 2) ^ lane % 8) * 16;
        int step = group * p.steps, turn = group - 1, pieces = 0;
        for (int number = cluster + group * clusters; number < tiles; number += kGroups * clusters) {
            const Tile tile = tile_of(p, number, tokens);
            const int channel = tile.channel + rank * kHidden;
            const auto bring_square = [&](int piece) {
                Barrier* const barrier = &barriers.arrived[group][piece % buffers];
                expect_bytes(barrier, Form::kBufferBytes);
                bring(buffer_of(piece), p.square, channel + piece / Form::kParts * kHalf,
                      tile.token + piece % Form::kParts * Form::kPart, barrier);
            };
            if (backward && leads) {
                written<0>();
                for (int piece = 0; piece < buffers; ++piece) bring_square(piece);
            }

            // Not before the other one has seen all of its stages full: a barrier tells apart no more than two rounds.
            if (turn >= 0) await(&barriers.turn[group], turn);
            ++turn;
            float c[2][tokens / 2];
            for (int i = 0; i < p.steps; ++i, ++step) {
                const int stage = step % stages;
                await(&full[stage], step / stages);
                const auto a = static_cast<unsigned>(descriptor(weight_in(stage)));
                const auto b = static_cast<unsigned>(descriptor(x_in(stage)));
                begin_multiplying();
#pragma unroll
                for (int k = 0; k < kDepth / 16; ++k) {
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        // In units of 16 bytes; 16 numbers of a sum are 32 bytes, or 16 rows.
                        const unsigned from = a + half * (kHalf * kLine / 16) + k * (backward ? kLine : 2);
                        multiply<tokens, backward>(c[half], from, b + k * 2, i + k > 0);
                    }
                }
                end_multiplying();
                if (i > 0) {
                    multiplied<1>();
                    if (lane < kCluster) arrive_at(&empty[(step - 1) % stages], lane);
                }
            }
            if (lane == 0) arrive(&barriers.turn[1 - group]);
            multiplied<0>();
            if (lane < kCluster) arrive_at(&empty[(step - 1) % stages], lane);
            step += p.steps;  // of the other one

#pragma unroll
            for (int piece = 0; piece < Form::kPieces; ++piece) {
                const int half = piece / Form::kParts, part = piece % Form::kParts;
                unsigned char* const buffer = buffer_of(piece);
                if (backward) {
                    await(&barriers.arrived[group][piece % buffers], (pieces + piece) / buffers);
                } else {
                    if (leads) written<buffers - 1>();
                    sync_group(group);
                }
                constexpr int eights = Form::kPart / 8;
#pragma unroll
                for (int i = 0; i < eights; i += 2) {
                    const auto finish = [&](auto is_four) {
                        constexpr bool four = decltype(is_four)::value;
                        unsigned char* const row = buffer + place + i * 8 * kLine;
                        unsigned m[4];
                        if (backward) load_turned<four>(m, row);
#pragma unroll
                        for (int j = 0; j < (four ? 4 : 2); ++j) {
                            const float* two = c[half] + (part * eights + i) * 4 + 2 * j;
                            const unsigned sum = rounded(two[0], two[1]);
                            m[j] = backward ? gradient(sum, m[j]) : squared(sum);
                        }
                        store_turned<four>(row, m);
                    };
                    if (i + 1 < eights) {
                        finish(std::true_type{});
                    } else {
                        finish(std::false_type{});
                    }
                }
                show_to_engines();
                sync_group(group);
                if (leads) {
                    write(p.out, buffer, channel + half * kHalf, tile.token + part * Form::kPart);
                    // Bring the next piece into a buffer. Of two buffers it is this one; of more it is that of the
                    // piece before, which has been written in the meantime.
                    constexpr int since = buffers > 2;
                    if (backward && piece >= since && piece - since + buffers < Form::kPieces) {
                        written<since>();
                        bring_square(piece - since + buffers);
                    }
                }
            }
            pieces += Form::kPieces;
        }
        if (leads) written<0>();
    }
    __syncwarp();
    sync_cluster();  // the other block may still bring something here
}

}  // namespace

#ifdef __CUDACC__
namespace {

CUtensorMap map_of(const Tensor& matrix, int box_rows) {
    CUtensorMap map;
    const int result = describe(map, matrix.const_data_ptr(), false, matrix.size(0), matrix.size(1), matrix.stride(0),
                                box_rows);
    STD_TORCH_CHECK(result == 0, "squared_relu_product: cuTensorMapEncodeTiled failed: ", result);
    return map;
}

template <typename Form, bool backward>
void start(const Tensor& x, const Tensor& weight, const Tensor& square, Tensor& out) {
    const int device = x.get_device_index();
    const auto kernel = products_with_squares<Form, backward>;
    const auto divided_up = [](int64_t size, int unit) { return static_cast<int>((size + unit - 1) / unit); };
    Problem p;
    p.weight = map_of(weight, backward ? kDepth : kHidden);
    p.x = map_of(x, Form::kTokens / kCluster);
    p.square = map_of(square, Form::kPart);
    p.out = map_of(out, Form::kPart);
    p.steps = divided_up(x.size(1), kDepth);
    p.channels = divided_up(out.size(1), kHidden * kCluster);
    p.tokens = divided_up(x.size(0), Form::kTokens);
    p.beside = min(kBeside, p.channels);
    const auto* function = reinterpret_cast<const void*>(kernel);
    STD_CUDA_CHECK(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, Form::kSharedBytes));
    int multiprocessors = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
    const int blocks = kCluster * min(multiprocessors / kCluster, p.channels * p.tokens);
    STD_CUDA_CHECK(launch_early(kernel, static_cast<unsigned>(blocks), kThreads, Form::kSharedBytes, current_stream(),
                                device, p, kCluster));
}

// Rows from a multiple of 16 bytes on.
Tensor aligned(const Tensor& x) { return begins_at_multiple_of(16, x) ? x : torch::stable::clone(x); }

// Shapes, dtypes and strides as heron.ops.squared_relu_product says; with `square` the gradient of the key.
Tensor run(const Tensor& x, const Tensor& weight, const Optional& square, int64_t form) {
    const DeviceGuard guard(x.get_device_index());
    auto out = empty({x.size(0), weight.size(square ? 1 : 0)}, x);
    const int forms = with_form(form, [&](auto chosen) {
        using F = decltype(chosen);
        if (square) {
            start<F, true>(aligned(x), aligned(weight), aligned(*square), out);
        } else {
            start<F, false>(aligned(x), aligned(weight), out, out);
        }
    });
    STD_TORCH_CHECK(form >= 0 && form < forms, "squared_relu_product: form must be below ", forms, ", got ", form);
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(heron, library) {
    library.def("squared_relu_product_by_boxes(Tensor x, Tensor weight, Tensor? square, int form) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(heron, CUDA, library) {
    library.impl("squared_relu_product_by_boxes", TORCH_BOX(&run));
}
#endif
