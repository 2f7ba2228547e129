// One token of one sequence through a whole network on a GPU, in one kernel: a block for each multiprocessor, all of
// which go through the phases of each layer together.
//
// A phase is products with a vector that all blocks have. Their rows depend on nothing, so one warp of a block has the
// copy engine bring the tiles of 8 rows that the block is to multiply, whatever phase they are of, into a ring in
// shared memory: memory is busy while results go round. Eight other warps multiply each tile together, on the tensor
// cores.
//
// What blocks tell one another lies in global memory, each word beside a tag that says of which step and layer it is,
// written and read as one: a block that needs it looks again and again until the tag is the one it waits for. No word
// is overwritten before all have read it: every block has rows of the projections and of the key, and begins a phase
// when it has all results of the one before. All blocks must run at the same time (a cooperative launch).

#ifdef __CUDACC__  // the tests also compile the kernel for a CPU
#include <algorithm>

#include "../../csrc/barriers.cuh"
#include "../../csrc/operator.h"
#endif
#include "../../csrc/head.cuh"
#include "../../csrc/products.cuh"
#include "network.cuh"
#ifdef __CUDACC__
#include "instructions.cuh"
#endif
#include "tiles.cuh"

namespace {

// What a norm reads beside the residual, of eight channels.
struct NormPieces {
    Piece weight, bias, last, mixes[kMixes];
};

template <typename T, bool kIsInt8>
struct Step : Tiles {
    const unsigned first_tag;  // of this step
    int turn = 0;              // which of the two rooms for sums is next

    __device__ __forceinline__ explicit Step(const Problem& p)
        : Tiles(p), first_tag(p.counters[0] * (2 * p.n_layers + 1) + 1) {}

    // Of what a phase of a layer gives; the values change the residual a second time.
    __device__ __forceinline__ unsigned tag(int layer, bool is_of_values) const {
        return first_tag + 2 * layer + is_of_values;
    }

    // This block's tiles of a phase, each by all warps, a part of every row each.
    __device__ __forceinline__ void multiply(int phase, int layer) {
        int count = 0, product_here = 0, row_here = 0;  // of the tiles so far; what this thread finishes
        float gate = 1.0f;
        const auto finish = [&] {
            sync_multiplying();
            if (thread < kTiles * kRows) {
                const float* of_tile = there<const float>(p.at.sums) + (turn * kTiles + thread / kRows) * kSumPitch;
                float sum = 0.0f;
#pragma unroll
                for (int i = 0; i < kWarps; ++i) sum += of_tile[i * kRows + thread % kRows];
                end(phase, layer, product_here, row_here, thread / kRows < count, sum, gate);
            }
            count = 0, turn ^= 1;
        };
        for_tiles(phase, [&](int product, int tile) {
            if (thread / kRows == count) {
                product_here = product, row_here = kRows * tile + thread % kRows;
                gate = gate_of(phase, layer, row_here);
            }
            const bool in_codes = kIsInt8 && has_codes(product);
            const int bytes = row_bytes(product);
            const int which = product < kDown ? product : product < kOfOutput ? product - 1 : 0;  // of the vectors
            Sums sums = {};
#pragma unroll 1
            for (int begin = 0; begin < bytes; begin += kWide) {
                const int units = (bytes - begin < kWide ? bytes - begin : kWide) / kUnit;
                const int first = units * warp / kWarps, n = units * (warp + 1) / kWarps - first;
                const unsigned char* slot = slot_at(place.slot);
                await(filled(place.slot), place.round);
                if (in_codes) {
                    const int unit = (which * p.channels + begin) / kUnit + first;
                    multiply_codes(slot + first * kUnit, slot + kRows * kPitch + 2 * first, unit, n, sums);
                } else {
                    const auto* vector = shared + p.at.vectors + which * 2 * p.channels + begin + first * kUnit;
                    multiply_units<T>(slot + first * kUnit, kPitch, vector, n, sums);
                }
                leave_slot();
            }
            if (lane < 4) {
                float* to = there<float>(p.at.sums) + (turn * kTiles + count) * kSumPitch + warp * kRows + 2 * lane;
#pragma unroll
                for (int row = 0; row < 2; ++row) to[row] = sums[0][row] + sums[1][row];
            }
            if (++count == kTiles) finish();
        });
        if (count > 0) finish();
    }

    __device__ __forceinline__ float gate_of(int phase, int layer, int row) const {
        if (p.gates == nullptr || phase != (p.gates_hidden ? kKey : kValue)) return 1.0f;
        const int64_t first = static_cast<int64_t>(layer) * (p.gates_hidden ? p.hidden_channels : p.channels);
        return static_cast<float>(static_cast<const T*>(p.gates)[first + row]);
    }

    __device__ __forceinline__ static unsigned bits_of(float even, float odd) {
        const T two[2] = {static_cast<T>(even), static_cast<T>(odd)};
        unsigned bits;
        memcpy(&bits, two, sizeof bits);
        return bits;
    }

    __device__ __forceinline__ static Piece packed(const float (&x)[8]) {
        Piece piece;
#pragma unroll
        for (int i = 0; i < 4; ++i) piece.words[i] = bits_of(x[2 * i], x[2 * i + 1]);
        return piece;
    }

    // What becomes of a row's sum; by whole warps, whose neighbours have neighbouring rows.
    __device__ __forceinline__ void end(int phase, int layer, int product, int row, bool is_there, float sum,
                                        float gate) const {
        const int C = p.channels;
        is_there = is_there && row < p.rows[product];
        if (phase == kLogits) {
            if (is_there) static_cast<T*>(p.logits)[row] = static_cast<T>(sum);
            return;
        }
        if (phase == kOutput || phase == kValue) {
            if (!is_there) return;
            const float mine = there<const float>(p.at.residual)[row] + gate * sum;
            put(p.residual + row, __float_as_uint(mine), tag(layer, phase == kValue));
            return;
        }
        Tagged* to = p.hidden;
        int activation = kSquaredRelu;
        if (phase == kProject) {
            const int m = product - kDown;
            to = product < 2 ? p.projected + product * C / 2 : layer == 0 ? p.v_first : p.projected + C;
            if (m >= 0) {
                to = p.squeezed;
                for (int i = 0; i < m; ++i) to += p.ranks[i] / 2;
            }
            activation = m == 1 ? kTanh : m == 3 ? kSigmoid : kNone;
        }
        const float mine = is_there ? gate * activated(sum, activation) : 0.0f;
        const float other = __shfl_xor_sync(kAll, mine, 1);
        if (is_there && row % 2 == 0) put(to + row / 2, bits_of(mine, other), tag(layer, false));
    }

    // use(i, bits of both) of the two words of(i), for all i < n, by whichever thread.
    template <int kAtOnce, typename Of, typename Use>
    __device__ __forceinline__ void get(int n, const Of& of, const Use& use) const {
#pragma unroll 1
        for (int begin = thread; begin < n; begin += kMultiply * kAtOnce) {
            Tagged found[kAtOnce][2];
            const auto look = [&](int i) {
                const Wanted wanted = of(begin + kMultiply * i);
                look_at_two(wanted.words, found[i][0], found[i][1]);
                return found[i][0].tag == wanted.tag && found[i][1].tag == wanted.tag;
            };
            bool has_all;
            do {
                has_all = true;
#pragma unroll
                for (int i = 0; i < kAtOnce; ++i) {
                    if (begin + kMultiply * i < n) has_all = look(i) && has_all;
                }
            } while (!has_all);
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                if (begin + kMultiply * i < n) use(begin + kMultiply * i, found[i][0].bits, found[i][1].bits);
            }
        }
    }

    // Eight numbers of vector `which`, from place 8 `at` on, and for codes their limbs: integers of two bytes, 127 x
    // 256 for the largest of each 64. All lanes come here.
    __device__ __forceinline__ void keep(int which, int at, bool is_there, const float (&x)[8]) const {
        if (is_there) there<Piece>(p.at.vectors + which * 2 * p.channels)[at] = packed(x);
        if constexpr (kIsInt8) {
            if (which > 2) return;
            float largest = 0.0f;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const float size = fabsf(x[i]);
                largest = size <= largest ? largest : size;  // NaN stays
            }
#pragma unroll
            for (int mask = 1; mask < 8; mask *= 2) {
                const float other = __shfl_xor_sync(kAll, largest, mask);
                largest = other <= largest ? largest : other;
            }
            constexpr float kLargest = 127.0f * 256.0f;
            const float by = largest > 0.0f ? kLargest / largest : 0.0f;
            unsigned limbs[2][2] = {};
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int whole = __float2int_rn(x[i] * by), low = static_cast<signed char>(whole & 0xff);
                limbs[0][i / 4] |= static_cast<unsigned>((whole - low) / 256 & 0xff) << 8 * (i % 4);
                limbs[1][i / 4] |= static_cast<unsigned>(low & 0xff) << 8 * (i % 4);
            }
            const int first = which * p.channels + 8 * at;
            if (!is_there) return;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                auto* to = there<unsigned>(p.at.limbs + i * p.at.n_limbs + first);
                to[0] = limbs[i][0], to[1] = limbs[i][1];
            }
            if (at % 8 == 0) there<float>(p.at.scales)[first / kGroup] = largest / kLargest;
        }
    }

    // y, or the hidden channels, in pairs.
    __device__ __forceinline__ void read_vector(const Tagged* from, int n, unsigned wanted) {
        auto* to = there<unsigned>(p.at.vectors);
        const auto of = [=](int i) { return Wanted{from + 2 * i, wanted}; };
        get<4>(n / 4, of, [=](int i, unsigned a, unsigned b) { to[2 * i] = a, to[2 * i + 1] = b; });
        sync_multiplying();
        if constexpr (kIsInt8) {
#pragma unroll 1
            for (int begin = 0; begin < n / 8; begin += kMultiply) {
                const int at = begin + thread;
                float x[8] = {};
                if (at < n / 8) unpack(there<const Piece>(p.at.vectors)[at], x);
                keep(0, at, at < n / 8, x);
            }
            sync_multiplying();
        }
    }
    __device__ __forceinline__ static void unpack(const Piece& piece, float (&x)[8]) {
        T numbers[8];
        memcpy(numbers, &piece, sizeof piece);
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] = static_cast<float>(numbers[i]);
    }

    __device__ __forceinline__ static int mixes_of(int phase) {
        return phase == kProject ? kMixes : phase == kKey ? 1 : 0;
    }
    // Ask for what the norm before a phase reads, before it waits for the residual.
    __device__ __forceinline__ NormPieces ask(int phase, int layer, int at) const {
        NormPieces pieces{};
        if (at >= p.channels / 8) return pieces;
        const auto piece = [=](const void* from, int i) { return static_cast<const Piece*>(from)[i]; };
        if (phase == kLogits) {
            pieces.weight = piece(p.norm_weight, at), pieces.bias = piece(p.norm_bias, at);
            return pieces;
        }
        const Layer& w = weights_of(layer);
        const bool is_first = phase == kProject;
        pieces.weight = piece(is_first ? w.norm1_weight : w.norm2_weight, at);
        pieces.bias = piece(is_first ? w.norm1_bias : w.norm2_bias, at);
        pieces.last = piece(is_first ? w.att_before : w.ffn_before, at);
#pragma unroll
        for (int m = 0; m < kMixes; ++m) {
            if (m < mixes_of(phase))
                pieces.mixes[m] = piece(is_first ? w.mixes : w.channel_mix, m * p.channels / 8 + at);
        }
        return pieces;
    }

    __device__ __forceinline__ float block_sum(float x, float* room) const {
        x = sum_over<1, 2, 4, 8, 16>(x);
        if (lane == 0) room[warp] = x;
        sync_multiplying();
        x = 0.0f;
#pragma unroll
        for (int i = 0; i < kWarps; ++i) x += room[i];
        return x;
    }

    // The residual, normed, becomes the token; mixed with the last one the vectors. `pieces` are this thread's first.
    __device__ __forceinline__ void norm_and_mix(int phase, int layer, NormPieces pieces) {
        auto* residual = there<float>(p.at.residual);
        const int n = p.channels / 8;
        if (phase == kProject && layer == 0) {
            for (int at = thread; at < n; at += kMultiply) {
                float x[8];
                unpack(static_cast<const Piece*>(p.x)[at], x);
#pragma unroll
                for (int i = 0; i < 8; ++i) residual[8 * at + i] = x[i];
            }
        } else {
            const unsigned wanted = phase == kKey ? tag(layer, false) : tag(layer - 1, true);
            const auto of = [&](int i) { return Wanted{p.residual + 2 * i, wanted}; };
            get<4>(p.channels / 2, of, [=](int i, unsigned a, unsigned b) {
                residual[2 * i] = __uint_as_float(a), residual[2 * i + 1] = __uint_as_float(b);
            });
        }
        sync_multiplying();
        const auto sum_of = [&](float* room, const auto& share) {
            float sum = 0.0f;
            for (int i = 4 * thread; i < p.channels; i += 4 * kMultiply) {
                const auto four = *reinterpret_cast<const Run<float, 4>*>(residual + i);
#pragma unroll
                for (int j = 0; j < 4; ++j) sum += share(four.values[j]);
            }
            return block_sum(sum, room) / static_cast<float>(p.channels);
        };
        float* rooms = there<float>(p.at.norm);
        const float mean = sum_of(rooms, [](float x) { return x; });
        const float variance = sum_of(rooms + kWarps, [=](float x) { return (x - mean) * (x - mean); });
        const float scale = rsqrtf(variance + p.eps);
#pragma unroll 1
        for (int begin = 0; begin < n; begin += kMultiply) {
            const int at = begin + thread;
            const bool is_there = at < n;
            if (begin > 0) pieces = ask(phase, layer, at);
            float weight[8], bias[8], here[8] = {}, past[8], mix[8];
            if (is_there) {
                unpack(pieces.weight, weight), unpack(pieces.bias, bias);
#pragma unroll
                for (int i = 0; i < 8; ++i) here[i] = (residual[8 * at + i] - mean) * scale * weight[i] + bias[i];
            }
            if (phase == kLogits) {
                keep(0, at, is_there, here);
                continue;
            }
            if (is_there) {
                const Piece now = packed(here);
                there<Piece>(p.at.now)[at] = now;
                unpack(now, here);
            }
            unpack(pieces.last, past);
#pragma unroll
            for (int m = 0; m < kMixes; ++m) {
                if (m >= mixes_of(phase)) break;
                float mixed[8];
                unpack(pieces.mixes[m], mix);
#pragma unroll
                for (int i = 0; i < 8; ++i) mixed[i] = here[i] + (past[i] - here[i]) * mix[i];
                keep(m, at, is_there, mixed);
            }
        }
        sync_multiplying();
    }

    // The last token, which all blocks have read by now, becomes this one.
    __device__ __forceinline__ void keep_shift(void* to) const {
        if (block != 0) return;
        for (int at = thread; at < p.channels / 8; at += kMultiply)
            static_cast<Piece*>(to)[at] = there<Piece>(p.at.now)[at];
    }

    // The time mix of one head, between its products.
    __device__ __forceinline__ void mix_head(int layer, int which) {
        const Layer& w = weights_of(layer);
        auto& in = *there<HeadInputs>(p.at.head);
        Head<kHead> head(in.room);
        constexpr int kKeys = Head<kHead>::kKeys;
        const auto key = [&](int i) { return 4 * (i / 4 * kLanes + head.lane) + i % 4; };
        // Calls use(row, i, at) for each of this thread's rows and each four of its keys; they begin at byte 16 at.
        const auto for_keys = [&](const auto& use) {
#pragma unroll
            for (int row = 0; row < kStateRows; ++row) {
#pragma unroll
                for (int i = 0; i < kKeys; i += 4) use(row, i, ((kStateRows * head.group + row) * kHead + key(i)) / 4);
            }
        };
        const int here = which * kHead + 2 * head.pair;
        Two added{}, kk{}, ka{}, rk{};
        float weight = 0.0f, bias = 0.0f;
        const bool is_of_head = thread < 2 * kHead;
        if (is_of_head) {
            added = two_at<T>(head.by_kind(w.w0, w.a0, w.v0, static_cast<const void*>(nullptr)), here);
            kk = two_at<T>(w.k_k, here), ka = two_at<T>(w.k_a, here), rk = two_at<T>(w.r_k, here);
            weight = head.own(two_at<T>(w.norm_weight, here)), bias = head.own(two_at<T>(w.norm_bias, here));
        }
        const int C = p.channels, squeezed = p.ranks[0] + p.ranks[1] + p.ranks[2] + p.ranks[3];
        const Tagged *const v_first = p.v_first, *const v = layer == 0 ? v_first : p.projected + C;
        constexpr int kOfVector = kHead / 4;  // pairs of words
        const unsigned mine = tag(layer, false), first = tag(0, false);
        const auto of = [&](int i) -> Wanted {
            if (i >= 4 * kOfVector) return {p.squeezed + 2 * (i - 4 * kOfVector), mine};
            const int vector = i / kOfVector;
            const Tagged* from = vector == 3 ? v_first : vector == 2 ? v : p.projected + vector * C / 2;
            return {from + which * kHead / 2 + i % kOfVector * 2, vector == 3 ? first : mine};
        };
        get<2>(4 * kOfVector + squeezed / 4, of, [&](int i, unsigned a, unsigned b) {
            const unsigned bits[2] = {a, b};
            if (i >= 4 * kOfVector) {
                memcpy(there<unsigned>(p.at.squeezed) + 2 * (i - 4 * kOfVector), bits, sizeof bits);
                return;
            }
            T numbers[4];
            memcpy(numbers, bits, sizeof numbers);
#pragma unroll
            for (int j = 0; j < 4; ++j)
                in.vectors[i / kOfVector][i % kOfVector * 4 + j] = static_cast<float>(numbers[j]);
        });
        sync_multiplying();
        multiply_ups(in);
        sync_multiplying();
        if (is_of_head) {
            const Two of_sigmoid = *reinterpret_cast<const Two*>(&in.ups[head.by_kind(1, 2, 0, 3)][2 * head.pair]);
            const Two vector = *reinterpret_cast<const Two*>(&in.vectors[head.kind][2 * head.pair]);
            head.mix(added, of_sigmoid, vector, w.v0 != nullptr, kk, ka, rk);
        }
        float state[kStateRows][kKeys];
        await(filled(place.slot), place.round);
        if (is_of_head) for_keys([&](int row, int i, int at) {
            const auto four = reinterpret_cast<const Run<float, 4>*>(slot_at(place.slot))[at];
#pragma unroll
            for (int j = 0; j < 4; ++j) state[row][i + j] = four.values[j];
        });
        leave_slot();
        if (!is_of_head) return;
        sync_head();
        const float y = head.move_on(state, key);
        head.share_norm(y);
        sync_head();
        const float out = head.ended(y, weight, bias, p.eps_head);
        const float other = __shfl_xor_sync(kAll, out, 2);
        if (head.kind == 0) put(p.y + here / 2, bits_of(out, other), mine);
        auto* new_state = reinterpret_cast<Run<float, 4>*>(w.wkv_after + static_cast<int64_t>(which) * kHead * kHead);
        for_keys([&](int row, int i, int at) {
            new_state[at] = {{state[row][i], state[row][i + 1], state[row][i + 2], state[row][i + 3]}};
        });
    }
    // The upper low-rank products of a head, 8 channels a warp.
    __device__ __forceinline__ void multiply_ups(HeadInputs& in) {
        int before = 0;  // bytes of the vectors of the matrices before
        int of = 0;
        for_ups([&](int m, int row, int rows, int bytes) {
            if (m != of) before += 2 * p.ranks[of], of = m;
            await(filled(place.slot), place.round);
            const int mine = kRows * warp - row;
            if (mine >= 0 && mine < rows) {
                Sums sums = {};
                const unsigned char *from = slot_at(place.slot) + mine * bytes, *x = shared + p.at.squeezed + before;
#pragma unroll 1
                for (int i = 0; i < bytes; i += kUnits * kUnit) {
                    multiply_units<T>(from + i, bytes, x + i, (bytes - i) / kUnit, sums);
                }
                if (lane < 4) {
#pragma unroll
                    for (int j = 0; j < 2; ++j) in.ups[m][kRows * warp + 2 * lane + j] = sums[0][j] + sums[1][j];
                }
            }
            leave_slot();
        });
    }

    // Of the warps that multiply.
    __device__ __forceinline__ void compute_all() {
        NormPieces pieces = ask(kProject, 0, thread);
#pragma unroll 1
        for (int layer = 0; layer < p.n_layers; ++layer) {
            norm_and_mix(kProject, layer, pieces);
            multiply(kProject, layer);
#pragma unroll 1
            for (int head = first_head; head < heads; head += blocks) {
                mix_head(layer, head);
                if (head + blocks < heads) sync_multiplying();
            }
            read_vector(p.y, p.channels, tag(layer, false));
            pieces = ask(kKey, layer, thread);
            keep_shift(weights_of(layer).att_after);
            multiply(kOutput, layer);
            norm_and_mix(kKey, layer, pieces);
            multiply(kKey, layer);
            read_vector(p.hidden, p.hidden_channels, tag(layer, false));
            pieces = ask(layer + 1 < p.n_layers ? kProject : kLogits, layer + 1, thread);
            keep_shift(weights_of(layer).ffn_after);
            multiply(kValue, layer);
        }
        norm_and_mix(kLogits, p.n_layers, pieces);
        multiply(kLogits, p.n_layers);
    }
};

template <typename T, bool kIsInt8>
__global__ void __launch_bounds__(kThreads, 1) token_step(const __grid_constant__ Problem p) {
    Step<T, kIsInt8> step(p);
    if (step.thread == 0) {
        for (int i = 0; i < p.at.slots; ++i) init_barrier(step.filled(i), 1), init_barrier(step.freed(i), kWarps);
        show_barriers();
    }
    for (int i = step.thread; i < p.n_layers * static_cast<int>(sizeof(Layer) / 16); i += kThreads)
        step.template there<Piece>(p.at.layers)[i] = reinterpret_cast<const Piece*>(p.layers)[i];
    __syncthreads();
    if (step.warp < kWarps) {
        take_registers();
        step.compute_all();
    } else {
        give_registers();
        if (step.warp == kWarps) step.bring_all();
    }
    __syncthreads();
    end_step(p.counters);
}

}  // namespace

#ifdef __CUDACC__
namespace {

template <typename T, bool kIsInt8>
void start(Problem& problem, int device) {
    const auto kernel = token_step<T, kIsInt8>;
    int blocks = 0, available = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&available, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, device));
    problem.at = shared_of(problem, kIsInt8, available);
    blocks = std::min({blocks, 3 * problem.channels / kRows, problem.hidden_channels / kRows});  // rows for each
    STD_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize, problem.at.bytes));
    cudaLaunchAttribute together{};
    together.id = cudaLaunchAttributeCooperative;
    together.val.cooperative = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = static_cast<size_t>(problem.at.bytes);
    config.stream = current_stream();
    config.attrs = &together;
    config.numAttrs = 1;
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<const Problem&>(problem)));
}

// Shapes and dtypes as heron.ops.token_step says: `layers` are the addresses of each as in Layer, `scratch` has a place
// for each word that blocks tell one another, `counters` are 0 at first.
Tensor run(const Tensor& x, const Tensor& layers, const Tensor& head, const Optional& head_scales,
           const Tensor& norm_weight, const Tensor& norm_bias, const Optional& gates, bool gates_hidden,
           const Tensor& scratch, const Tensor& counters, const std::vector<int64_t>& ranks, int64_t hidden_channels,
           double eps, double eps_head) {
    const DeviceGuard guard(x.get_device_index());
    auto logits = empty({1, head.size(0)}, x);
    Problem p{};
    p.layers = static_cast<const Layer*>(layers.const_data_ptr());
    p.head = {head.const_data_ptr(), data_of(head_scales)};
    p.norm_weight = norm_weight.const_data_ptr();
    p.norm_bias = norm_bias.const_data_ptr();
    p.x = x.const_data_ptr();
    p.gates = data_of(gates);
    p.gates_hidden = gates_hidden;
    p.logits = logits.mutable_data_ptr();
    p.counters = static_cast<unsigned*>(counters.mutable_data_ptr());
    p.n_layers = static_cast<int>(layers.size(0));
    p.eps = static_cast<float>(eps);
    p.eps_head = static_cast<float>(eps_head);
    for (int i = 0; i < kLowRank; ++i) p.ranks[i] = static_cast<int>(ranks[i]);
    size_up(p, static_cast<int>(x.size(1)), static_cast<int>(hidden_channels), static_cast<int>(head.size(0)),
            static_cast<Tagged*>(scratch.mutable_data_ptr()));
    const int device = x.get_device_index();
    with_dtype<BFloat16, Half>(x, "token_step", [&](auto number) {
        using T = decltype(number);
        head_scales.has_value() ? start<T, true>(p, device) : start<T, false>(p, device);
    });
    return logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(heron, library) {
    library.def(
        "token_step(Tensor x, Tensor layers, Tensor head, Tensor? head_scales, Tensor norm_weight, Tensor norm_bias, "
        "Tensor? gates, bool gates_hidden, Tensor(a!) scratch, Tensor(b!) counters, int[] ranks, int hidden_channels, "
        "float eps, float eps_head) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(heron, CUDA, library) { library.impl("token_step", TORCH_BOX(&run)); }
#endif
