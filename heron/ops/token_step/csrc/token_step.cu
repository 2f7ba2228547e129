// One token of one sequence through a whole network on a GPU, in one kernel: a block for each multiprocessor, all of
// which go through the phases of each layer together.
//
// A phase is products with a vector that all blocks have. Their rows depend on nothing, so four warps of a block have
// the copy engine bring the tiles of 8 rows that the block is to multiply, whatever phase they are of, into a ring in
// shared memory: memory is busy while results go round. Two teams of four other warps take turns to multiply what is
// there, on the tensor cores.
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

constexpr float kSmallest = 0x1p-110f;  // whose scale is still a normal number
constexpr int kAhead = 2;  // mixes that a norm has asked for before it begins

// What a norm reads beside the residual, of eight channels.
struct NormPieces {
    Piece weight, bias, last, mixes[kAhead];
};

template <typename T, bool kIsInt8>
struct Step : Tiles {
    const unsigned first_tag;  // of this step
    int turn = 0;              // which of the two rooms for sums is next
    const Span projected, of_squeeze;  // vectors that r, k and v multiply; and the lower low-rank matrices
    const float one_of_channels;

    __device__ __forceinline__ explicit Step(const Problem& p)
        : Tiles(p), first_tag(p.counters[0] * (2 * p.n_layers + 1) + 1), projected(span_of(p, kProject, blocks, block)),
          of_squeeze(span_of(p, kSqueeze, blocks, block)), one_of_channels(1.0f / static_cast<float>(p.channels)) {}

    // Of what a phase of a layer gives; the values change the residual a second time.
    __device__ __forceinline__ unsigned tag(int layer, bool is_of_values) const {
        return first_tag + 2 * layer + is_of_values;
    }

    // The low-rank matrices stay in floating point.
    __device__ __forceinline__ static bool multiplies_codes(int phase) { return kIsInt8 && phase != kSqueeze; }

    // Multiplies this block's tiles of a phase. The teams take its slots in turn; each warp of a team multiplies a part
    // of every row.
    __device__ __forceinline__ void multiply(int phase, int layer) {
        const Part part = part_of_phase(phase);
        if (part.count == 0) return;
        const bool in_codes = multiplies_codes(phase);
        const int bytes = row_bytes(first_product(phase)), slots = (bytes + kWide - 1) / kWide;  // of a row; of a tile
        const int team_of_first = next;
        next ^= part.count * slots & 1;
        int tile = 0, slot = team ^ team_of_first;  // which tile and which of its slots is next for this team
        const auto skip = [&](int n) {
            for (slot += n; slot >= slots; ++tile) slot -= slots;
        };
        skip(0);
        int product = first_product(phase), product_ends = tiles_of(p, product) - part.first;  // of `tile`; at which
#pragma unroll 1
        for (int begin = 0; begin < part.count; begin += kTiles, turn ^= 1) {
            const int end = part.count - begin < kTiles ? part.count : begin + kTiles;
            const int finished = begin + thread / kRows;  // the tile of which this thread finishes a row
            const auto [of_product, row] = row_of_tile(phase, part.first + (finished < end ? finished : begin));
            const float gate = finished < end ? gate_of(phase, layer, row) : 1.0f;
            float* all_sums = there<float>(p.at.sums) + turn * kTiles * kSumPitch;
#pragma unroll 1
            while (tile < end) {
                for (; has_many(phase) && tile >= product_ends; product_ends += tiles_of(p, product)) ++product;
                const int which = place_of_vector(phase, vector_of(product));
                float* of_warp = all_sums + (tile - begin) * kSumPitch + (team * kWarps + warp) * kRows;
                Sums sums = {};
                float sum = 0.0f;
#pragma unroll 1
                for (const int here = tile; tile == here; skip(kTeams)) {
                    const int from = slot * kWide;
                    const unsigned wide = bytes - from < kWide ? bytes - from : kWide, units = wide / kUnit;
                    const unsigned first = units * warp / kWarps, n = units * (warp + 1) / kWarps - first;
                    const unsigned char* rows = slot_at(place.slot);
                    await(filled(place.slot), place.round);
                    if (in_codes) {
                        const int unit = (which * p.channels + from) / kUnit + first;
                        multiply_codes(rows + first * kUnit, wide, rows + kRows * kWide + 2 * first,
                                       (units + 7) / 8 * 16, unit, n, sum);
                    } else {
                        const auto* vector = shared + p.at.vectors + which * 2 * p.channels + from + first * kUnit;
                        multiply_units<T, kUnits>(rows + first * kUnit, wide, vector, n, sums);
                    }
                    leave_slot();
                }
                if (in_codes) sum *= lane % 2 == 0 ? 256.0f : 1.0f;
                sum = sum_over<1, 2>(in_codes ? sum : sum_of_row(sums));
                if (lane % 4 == 0) of_warp[lane / 4] = sum;
            }
            sync_multiplying();
            if (thread >= kTiles * kRows) continue;
            const bool by_both = slots > 1;  // else the team that had its slot
            const int first_team = by_both ? 0 : finished % kTeams ^ team_of_first;
            const float* of_tile = all_sums + thread / kRows * kSumPitch + first_team * kWarps * kRows + thread % kRows;
            float total = 0.0f;
#pragma unroll
            for (int i = 0; i < kWarps; ++i) total += of_tile[i * kRows];
            if (by_both) {
#pragma unroll
                for (int i = kWarps; i < kTeams * kWarps; ++i) total += of_tile[i * kRows];
            }
            this->end(phase, layer, of_product, row, finished < end, total, gate);
        }
    }

    // A thread's row of a tile, and the product that it is of.
    struct RowOf {
        int product, row;
    };
    __device__ __forceinline__ RowOf row_of_tile(int phase, int tile) const {
        int product = first_product(phase);
        for (; has_many(phase) && tile >= tiles_of(p, product); ++product) tile -= tiles_of(p, product);
        return {product, kRows * tile + thread % kRows};
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
            const float before = there<const float>(p.at.own)[row - kRows * part_of_phase(phase).first];
            const float mine = before + gate * sum;
            put(p.residual + row, __float_as_uint(mine), tag(layer, phase == kValue));
            return;
        }
        Tagged* to = p.hidden;
        int activation = kSquaredRelu;
        if (phase == kProject) {
            to = product < 2 ? p.projected + product * C / 2 : layer == 0 ? p.v_first : p.projected + C;
            activation = kNone;
        }
        if (phase == kSqueeze) {
            const int m = product - kDown;
            to = p.squeezed;
            for (int i = 0; i < m; ++i) to += p.ranks[i] / 2;
            activation = m == 1 ? kTanh : m == 3 ? kSigmoid : kNone;
        }
        const float mine = is_there ? gate * activated(sum, activation) : 0.0f;
        const float other = __shfl_xor_sync(kAll, mine, 1);
        if (is_there && row % 2 == 0) put(to + row / 2, bits_of(mine, other), tag(layer, false));
    }

    // use(i, words) of the two words of(i), of(i + kMultiply), ... for all i < n; what is not there is 0.
    template <int kLooks, typename Of, typename Use>
    __device__ __forceinline__ void get(int n, const Of& of, const Use& use) const {
#pragma unroll 1
        for (int begin = thread; begin - lane < n; begin += kMultiply * kLooks) {
            Tagged found[kLooks][2];
            bool has[kLooks], has_all;
#pragma unroll
            for (int i = 0; i < kLooks; ++i) {
                found[i][0] = found[i][1] = {};
                has[i] = begin + kMultiply * i >= n;
            }
            do {
#pragma unroll
                for (int i = 0; i < kLooks; ++i)
                    if (!has[i]) look_at_two(of(begin + kMultiply * i).words, found[i][0], found[i][1]);
                has_all = true;
#pragma unroll
                for (int i = 0; i < kLooks; ++i) {
                    if (!has[i]) {
                        const unsigned wanted = of(begin + kMultiply * i).tag;
                        has[i] = found[i][0].tag == wanted && found[i][1].tag == wanted;
                    }
                    has_all = has[i] && has_all;
                }
            } while (!has_all);
            use(begin, found);
        }
    }

    // Stores numbers as integers of two bytes. Each group of 64 has one scale, by which its largest number becomes
    // 127 x 256; a group whose largest number is below kSmallest becomes 0. The upper bytes of a group lie before its
    // lower ones. `x` are k runs of n numbers, and a run begins `apart` numbers behind the one before (a multiple of
    // 64); runs that begin at `end` or later are not stored. All lanes of a warp must call this.
    template <int k, int n>
    __device__ __forceinline__ void keep_limbs(int first, int apart, int end, const float (&x)[k][n]) const {
        const unsigned group = static_cast<unsigned>(first) / kGroup, within = static_cast<unsigned>(first) % kGroup;
        auto* to = there<unsigned>(p.at.limbs) + group * 2 * kGroup / 4;
        float largest[k] = {};
#pragma unroll
        for (int i = 0; i < k; ++i) {
#pragma unroll
            for (int j = 0; j < n; ++j) largest[i] = larger(largest[i], fabsf(x[i][j]));
        }
#pragma unroll
        for (int mask = 1; mask < kGroup / n; mask *= 2) {
#pragma unroll
            for (int i = 0; i < k; ++i) largest[i] = larger(largest[i], __shfl_xor_sync(kAll, largest[i], mask));
        }
        constexpr float kLargest = 127.0f * 256.0f;
        constexpr float kWhole = 0x1.8p23f;  // what is added to it is rounded to an integer, in its last bits
#pragma unroll
        for (int i = 0; i < k; ++i) {
            const float scale = largest[i] * (1.0f / kLargest);
            const float by = largest[i] >= kSmallest ? reciprocal(scale) : 0.0f;
            unsigned limbs[2][n / 4];
#pragma unroll
            for (int j = 0; j < n / 4; ++j) {
                // The second limb is a whole's last byte, signed: half of 256 more is in the first one's.
                unsigned whole[4], more[4];
#pragma unroll
                for (int l = 0; l < 4; ++l) {
                    whole[l] = __float_as_uint(fmaf(x[i][4 * j + l], by, kWhole));
                    more[l] = __float_as_uint(fmaf(x[i][4 * j + l], by, kWhole + 128.0f));
                }
                const auto joined = [](const unsigned (&from)[4], unsigned bytes) {
                    const unsigned low = __byte_perm(from[0], from[1], bytes);
                    return __byte_perm(low, __byte_perm(from[2], from[3], bytes), 0x5410);
                };
                limbs[0][j] = joined(more, 0x0051), limbs[1][j] = joined(whole, 0x0040);
            }
            if (first + apart * i >= end) continue;
#pragma unroll
            for (int j = 0; j < n / 4; ++j) {
                const int place = place_of_word(within / 4 + j);
                to[2 * apart / 4 * i + place] = limbs[0][j], to[2 * apart / 4 * i + kGroup / 4 + place] = limbs[1][j];
            }
            if (within == 0) there<float>(p.at.scales)[group + apart / kGroup * i] = scale;
        }
    }

    __device__ __forceinline__ static Piece in_order(const Piece& x) {
        return {{x.words[0], x.words[2], x.words[1], x.words[3]}};
    }
    // Where among the vectors that are there, of codes or of floats, one of a phase lies.
    __device__ __forceinline__ int place_of_vector(int phase, int which) const {
        if (phase == kProject) return which - projected.first;
        if (phase == kSqueeze) return which - of_squeeze.first + (kIsInt8 ? 0 : projected.count());
        return 0;
    }
    // Eight numbers of a vector, from place 8 `at` on, as its products read them. All lanes come here.
    __device__ __forceinline__ void keep(int phase, int which, int at, bool is_there, const float (&x)[8]) const {
        const int place = place_of_vector(phase, which);
        if (multiplies_codes(phase)) {
            const int first = place * p.channels + 8 * at;
            const float run[1][8] = {{x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]}};
            keep_limbs(first, 0, is_there ? first + 8 : 0, run);
        } else if (is_there) {
            there<Piece>(p.at.vectors + place * 2 * p.channels)[at] = in_order(packed(x));
        }
    }

    // y, or the hidden channels, in pairs.
    template <int kLooks>
    __device__ __forceinline__ void read_vector(const Tagged* from, int n, unsigned wanted) {
        auto* to = there<unsigned>(p.at.vectors);
        const auto of = [=](int i) { return Wanted{from + 2 * i, wanted}; };
        get<kLooks>(n / 4, of, [&](int begin, const Tagged (&found)[kLooks][2]) {
            if constexpr (kIsInt8) {
                float x[kLooks][4];
#pragma unroll
                for (int i = 0; i < kLooks; ++i) unpack(found[i], x[i]);
                keep_limbs(4 * begin, 4 * kMultiply, n, x);
            } else {
#pragma unroll
                for (int i = 0; i < kLooks; ++i) {
                    const int here = begin + kMultiply * i;
                    if (here < n / 4) keep_words(to, here, found[i]);
                }
            }
        });
        sync_multiplying();
    }
    __device__ __forceinline__ static void keep_words(unsigned* to, int pair, const Tagged (&words)[2]) {
#pragma unroll
        for (int i = 0; i < 2; ++i) to[place_of_word(2 * pair + i)] = words[i].bits;
    }
    __device__ __forceinline__ static void unpack(const Tagged (&words)[2], float (&x)[4]) {
        const unsigned bits[2] = {words[0].bits, words[1].bits};
        T numbers[4];
        memcpy(numbers, bits, sizeof numbers);
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = static_cast<float>(numbers[i]);
    }
    __device__ __forceinline__ static void unpack(const Piece& piece, float (&x)[8]) {
        T numbers[8];
        memcpy(numbers, &piece, sizeof piece);
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] = static_cast<float>(numbers[i]);
    }

    // Returns how many vectors the norm before a phase mixes; mix_of(phase, i) says which of the layer's six is the i-th.
    __device__ __forceinline__ int mixes_of(int phase) const {
        return phase == kProject ? projected.count() + of_squeeze.count() : phase == kKey;
    }
    __device__ __forceinline__ int mix_of(int phase, int i) const {
        if (phase == kKey) return 0;
        return i < projected.count() ? projected.first + i : of_squeeze.first + i - projected.count();
    }
    __device__ __forceinline__ static Piece piece_at(const void* from, int i) {
        return static_cast<const Piece*>(from)[i];
    }
    __device__ __forceinline__ Piece mix_at(int phase, int layer, int m, int at) const {
        const Layer& w = weights_of(layer);
        return piece_at(phase == kProject ? w.mixes : w.channel_mix, m * (p.channels / 8) + at);
    }
    // Ask for what the norm before a phase reads, before it waits for the residual.
    __device__ __forceinline__ NormPieces ask(int phase, int layer, int at) const {
        NormPieces pieces{};
        if (at >= p.channels / 8) return pieces;
        if (phase == kLogits) {
            pieces.weight = piece_at(p.norm_weight, at), pieces.bias = piece_at(p.norm_bias, at);
            return pieces;
        }
        const Layer& w = weights_of(layer);
        const bool is_first = phase == kProject;
        pieces.weight = piece_at(is_first ? w.norm1_weight : w.norm2_weight, at);
        pieces.bias = piece_at(is_first ? w.norm1_bias : w.norm2_bias, at);
        pieces.last = piece_at(is_first ? w.att_before : w.ffn_before, at);
        const int mixes = mixes_of(phase);
#pragma unroll
        for (int i = 0; i < kAhead; ++i)
            if (i < mixes) pieces.mixes[i] = mix_at(phase, layer, mix_of(phase, i), at);
        return pieces;
    }

    // The residual, normed, becomes the token; mixed with the last one the vectors. `pieces` are this thread's first.
    __device__ __forceinline__ void norm_and_mix(int phase, int layer, NormPieces pieces) {
        auto* residual = there<float>(p.at.residual);
        // Of distances from the pivot, this warp's first number; and how many all its lanes have.
        float pivot = 0.0f, sum = 0.0f, squares = 0.0f, count = 0.0f;
        const auto take = [&](int i, float a, float b) {
            residual[2 * i] = a, residual[2 * i + 1] = b;
            if (i < kMultiply) pivot = __shfl_sync(kAll, a, 0, 32);
            a -= pivot, b -= pivot;
            sum += a + b, squares += a * a + b * b, count += 2.0f * 32.0f;
        };
        if (phase == kProject && layer == 0) {
#pragma unroll 1
            for (int i = thread; i < p.channels / 2; i += kMultiply) {
                const T* two = static_cast<const T*>(p.x) + 2 * i;
                take(i, static_cast<float>(two[0]), static_cast<float>(two[1]));
            }
        } else {
            const unsigned wanted = phase == kKey ? tag(layer, false) : tag(layer - 1, true);
            const auto of = [&](int i) { return Wanted{p.residual + 2 * i, wanted}; };
            constexpr int kLooks = 4;
            get<kLooks>(p.channels / 2, of, [&](int begin, const Tagged (&found)[kLooks][2]) {
#pragma unroll
                for (int i = 0; i < kLooks; ++i) {
                    const int here = begin + kMultiply * i;
                    if (here < p.channels / 2)
                        take(here, __uint_as_float(found[i][0].bits), __uint_as_float(found[i][1].bits));
                }
            });
        }
        // Each warp's mean and its sum of squared distances from it, then those of all.
        using OfWarp = Run<float, 4>;
        __syncwarp();
        auto* of_warps = there<OfWarp>(p.at.norm);
        sum = sum_over<1, 2, 4, 8, 16>(sum), squares = sum_over<1, 2, 4, 8, 16>(squares);
        if (lane == 0) {
            const float distance = count > 0.0f ? sum / count : 0.0f;
            of_warps[thread / 32] = OfWarp{{pivot + distance, squares - sum * distance, count, 0.0f}};
        }
        sync_multiplying();
        OfWarp of[kTeams * kWarps];
        float mean = 0.0f, variance = 0.0f;
#pragma unroll
        for (int i = 0; i < kTeams * kWarps; ++i) {
            of[i] = of_warps[i];
            mean += of[i].values[0] * of[i].values[2];
        }
        mean *= one_of_channels;
#pragma unroll
        for (int i = 0; i < kTeams * kWarps; ++i) {
            const float distance = of[i].values[0] - mean;
            variance += of[i].values[1] + of[i].values[2] * (distance * distance);
        }
        const float scale = rsqrtf(variance * one_of_channels + p.eps);
        const Part own = part_of_phase(kValue);  // and of the output
        for (int i = thread; i < kRows * own.count; i += kMultiply) {
            const int row = kRows * own.first + i;
            if (row < p.channels) there<float>(p.at.own)[i] = residual[row];
        }
        const int n = p.channels / 8;
        const int mixes = mixes_of(phase);
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
                keep(phase, 0, at, is_there, here);
                continue;
            }
            if (is_there) {
                const Piece now = packed(here);
                if (block == 0) now_at(phase, layer)[at] = now;
                unpack(now, here);
            }
            unpack(pieces.last, past);
#pragma unroll 1
            for (int i = 0; i < mixes; ++i) {
                const int m = mix_of(phase, i);
                Piece of = i == 0 ? pieces.mixes[0] : pieces.mixes[1];
                if (i >= kAhead && is_there) of = mix_at(phase, layer, m, at);
                float mixed[8];
                unpack(of, mix);
#pragma unroll
                for (int j = 0; j < 8; ++j) mixed[j] = here[j] + (past[j] - here[j]) * mix[j];
                keep(phase == kProject && i >= projected.count() ? kSqueeze : phase, m, at, is_there, mixed);
            }
        }
        sync_multiplying();
    }

    // Where the token, normed, is kept: not where the last one lies as long as other blocks may read that.
    __device__ __forceinline__ Piece* now_at(int phase, int layer) const {
        const Layer& w = weights_of(layer);
        void* to = phase == kProject ? w.att_after : w.ffn_after;
        return static_cast<Piece*>(to == (phase == kProject ? w.att_before : w.ffn_before) ? p.now : to);
    }
    // All blocks have read the last token by now.
    __device__ __forceinline__ void keep_shift(int phase, int layer) const {
        const Layer& w = weights_of(layer);
        auto* to = static_cast<Piece*>(phase == kProject ? w.att_after : w.ffn_after);
        const Piece* now = now_at(phase, layer);
        if (block != 0 || now == to) return;
        for (int at = thread; at < p.channels / 8; at += kMultiply) to[at] = now[at];
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
        const int C = p.channels;
        const Tagged *const v_first = p.v_first, *const v = layer == 0 ? v_first : p.projected + C;
        constexpr int kOfVector = kHead / 4;  // pairs of words
        const unsigned mine = tag(layer, false), first = tag(0, false);
        const auto of = [&](int i) -> Wanted {
            const int vector = i / kOfVector;
            if (vector >= 4) {
                const int up = i - 4 * kOfVector, m = up / (kHead / 2);
                return {p.ups + m * C + which * kHead + up % (kHead / 2) * 2, mine};
            }
            const Tagged* from = vector == 3 ? v_first : vector == 2 ? v : p.projected + vector * C / 2;
            return {from + which * kHead / 2 + i % kOfVector * 2, vector == 3 ? first : mine};
        };
        constexpr int kPairs = 4 * kOfVector + kLowRank * kHead / 2, kLooks = 1;
        static_assert(kPairs <= kMultiply * kLooks, "a thread looks for one pair");
        get<kLooks>(kPairs, of, [&](int here, const Tagged (&found)[kLooks][2]) {
            if (here >= kPairs) return;
            if (const int up = here - 4 * kOfVector; up >= 0) {
                float* to = &in.ups[0][0] + 2 * up;
                to[0] = __uint_as_float(found[0][0].bits), to[1] = __uint_as_float(found[0][1].bits);
                return;
            }
            float x[4];
            unpack(found[0], x);
#pragma unroll
            for (int j = 0; j < 4; ++j) in.vectors[here / kOfVector][here % kOfVector * 4 + j] = x[j];
        });
        sync_multiplying();
        if (is_of_head) {
            const Two of_sigmoid = *reinterpret_cast<const Two*>(&in.ups[head.by_kind(1, 2, 0, 3)][2 * head.pair]);
            const Two vector = *reinterpret_cast<const Two*>(&in.vectors[head.kind][2 * head.pair]);
            head.mix(added, of_sigmoid, vector, w.v0 != nullptr, kk, ka, rk);
        }
        float state[kStateRows][kKeys];
        next = 0;
        if (team == 0) await(filled(place.slot), place.round);
        if (is_of_head) for_keys([&](int row, int i, int at) {
            const auto four = reinterpret_cast<const Run<float, 4>*>(slot_at(place.slot))[at];
#pragma unroll
            for (int j = 0; j < 4; ++j) state[row][i + j] = four.values[j];
        });
        leave_slot(team == 0);
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
    // This block's rows of the upper low-rank products, a matrix by each warp of a team.
    __device__ __forceinline__ void multiply_ups(int layer) {
        if (part_of_phase(kUps).count == 0) return;
        const unsigned wanted = tag(layer, false);
        int squeezed = 0, before = 0, bytes = 0;  // in all; of the vectors before the warp's, and of that
#pragma unroll
        for (int m = 0; m < kLowRank; ++m) {
            if (m < warp) before += 2 * p.ranks[m];
            if (m == warp) bytes = 2 * p.ranks[m];
            squeezed += p.ranks[m];
        }
        constexpr int kLooks = 1;
        const auto of = [=](int i) { return Wanted{p.squeezed + 2 * i, wanted}; };
        get<kLooks>(squeezed / 4, of, [&](int begin, const Tagged (&found)[kLooks][2]) {
            if (begin < squeezed / 4) keep_words(there<unsigned>(p.at.squeezed), begin, found[0]);
        });
        sync_multiplying();
        for_ups([&](int row, int rows, int first) {
            if (team == next) {
                await(filled(place.slot), place.round);
                const bool is_mine = p.at.matrices == kLowRank || first == warp;
                const unsigned char *from = slot_at(place.slot) + (p.at.matrices == kLowRank ? rows * before : 0);
                const unsigned char* x = shared + p.at.squeezed + before;
                Sums sums[kMostEights] = {};
#pragma unroll 1
                for (int begin = 0; begin < bytes; begin += kAtOnce * kUnit) {
#pragma unroll
                    for (int i = 0; i < kMostEights; ++i) {
                        const int units = is_mine && kRows * i < rows ? (bytes - begin) / kUnit : 0;
                        multiply_units<T, kAtOnce>(from + i * kRows * bytes + begin, bytes, x + begin, units, sums[i]);
                    }
                }
                Tagged* to = p.ups + warp * p.channels + row + lane / 4;
#pragma unroll
                for (int i = 0; i < kMostEights; ++i) {
                    const float sum = sum_over<1, 2>(sum_of_row(sums[i]));
                    if (is_mine && kRows * i < rows && lane % 4 == 0) put(to + kRows * i, __float_as_uint(sum), wanted);
                }
            }
            leave_slot(team == next);
        });
    }

    // Of the warps that multiply. The compiler writes the code out for each phase.
    __device__ __forceinline__ void compute_all() {
        NormPieces pieces = ask(kProject, 0, thread);
#pragma unroll 1
        for (int layer = 0; layer < p.n_layers; ++layer) {
            const unsigned wanted = tag(layer, false);
            norm_and_mix(kProject, layer, pieces);
            multiply(kSqueeze, layer);
            multiply(kProject, layer);
            multiply_ups(layer);
            mix_heads(layer);
            read_vector<2>(p.y, p.channels, wanted);
            pieces = ask(kKey, layer, thread);
            keep_shift(kProject, layer);
            multiply(kOutput, layer);
            norm_and_mix(kKey, layer, pieces);
            multiply(kKey, layer);
            read_vector<4>(p.hidden, p.hidden_channels, wanted);
            pieces = layer + 1 < p.n_layers ? ask(kProject, layer + 1, thread) : ask(kLogits, layer + 1, thread);
            keep_shift(kKey, layer);
            multiply(kValue, layer);
        }
        norm_and_mix(kLogits, p.n_layers, pieces);
        multiply(kLogits, p.n_layers);
    }
    __device__ __forceinline__ void mix_heads(int layer) {
#pragma unroll 1
        for (int head = first_head; head < heads; head += blocks) {
            mix_head(layer, head);
            if (head + blocks < heads) sync_multiplying();
        }
    }
};

template <typename T, bool kIsInt8>
__global__ void __launch_bounds__(kThreads, 1) token_step(const __grid_constant__ Problem p) {
    Step<T, kIsInt8> step(p);
    if (step.thread == 0) {
        for (int i = 0; i < p.at.slots; ++i) init_barrier(step.filled(i), kAskers), init_barrier(step.freed(i), kWarps);
        show_barriers();
    }
    step.find_parts();
    for (int i = step.thread; i < p.n_layers * static_cast<int>(sizeof(Layer) / 16); i += kThreads)
        step.template there<Piece>(p.at.layers)[i] = reinterpret_cast<const Piece*>(p.layers)[i];
    __syncthreads();
    if (step.thread < kMultiply) {
        take_registers();
        step.compute_all();
    } else {
        give_registers();
        step.bring_all();
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
    blocks = std::min({blocks, 3 * problem.channels / kRows, problem.hidden_channels / kRows});  // rows for each
    problem.at = shared_of(problem, kIsInt8, available, blocks);
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
