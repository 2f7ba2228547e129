// One token of a head's time mix, by a few warps: what head_step and token_step share. The tests also compile it for a
// CPU.
//
// Eight lanes share four rows of the state, four value channels; each has every eighth run of keys, 16 bytes of a row,
// in registers. What is to be computed of a channel is shared out to four lanes. Sums over a head's channels are sums
// over warps, then over what the warps bring, in one order.
#pragma once

namespace {

#ifdef __CUDACC__
__device__ __forceinline__ float divide_fast(float x, float y) { return __fdividef(x, y); }

// What is read once is the first to leave the caches.
template <typename Part>
__device__ __forceinline__ Part read_once(const Part* from) {
    using Bits = std::conditional_t<sizeof(Part) == 16, uint4, std::conditional_t<sizeof(Part) == 8, uint2, unsigned>>;
    static_assert(sizeof(Part) == sizeof(Bits));
    const Bits bits = __ldcs(reinterpret_cast<const Bits*>(from));
    return *reinterpret_cast<const Part*>(&bits);
}
#endif

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kDecayScale = 0.60653065971263342f;  // e^-0.5
constexpr float kLeastSquare = 1e-24f;               // of the removal key

template <typename T, int width>
struct alignas(sizeof(T) * width) Run {
    T values[width];
};

__device__ __forceinline__ float sigmoid(float x) { return divide_fast(1.0f, 1.0f + expf(-x)); }

// The sum over lanes whose numbers differ in these bits.
template <int... masks>
__device__ __forceinline__ float sum_over(float x) {
    ((x += __shfl_xor_sync(kAllLanes, x, masks)), ...);
    return x;
}

constexpr int kLanes = 8, kStateRows = 4;         // that share rows of the state; rows that they share
constexpr int kOfWarp = 32 / kLanes * kStateRows;  // channels of a warp

// What all lanes read of every channel; the first four by the kind of the thread that writes them.
enum Vector { kReceptance, kDecay, kKeyVector, kRemovalKey, kRemovalIclr, kMixedValue, kVectors };
// Sums over a head to which every warp adds its part: squares of the removal key, the bonus, the mean of y, and squares of
// distances from that mean.
enum Share { kSquare, kBonus, kMean, kSquares, kShares };

// The sums over the lanes that share rows: of the row lane / 2. A lane hands on what others sum up.
__device__ __forceinline__ float row_sum(const float (&of_rows)[kStateRows], int lane) {
    const bool lower = lane < 4, even = lane / 2 % 2 == 0;
    float halves[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        halves[i] = lower ? of_rows[i] : of_rows[2 + i];
        halves[i] += __shfl_xor_sync(kAllLanes, lower ? of_rows[2 + i] : of_rows[i], 4);
    }
    float x = even ? halves[0] : halves[1];
    x += __shfl_xor_sync(kAllLanes, even ? halves[1] : halves[0], 2);
    return x + __shfl_xor_sync(kAllLanes, x, 1);
}

struct alignas(8) Two {  // of a thread's two channels
    float values[2];
};

template <typename Compute>
__device__ __forceinline__ Two of_both(const Compute& compute) {
    return {{compute(0), compute(1)}};
}

// Those of the thread of this kind for the same channels.
__device__ __forceinline__ Two of_kind(const Two& x, int kind) {
    return of_both([&](int i) { return __shfl_sync(kAllLanes, x.values[i], kind, 4); });
}

// Two channels of a tensor (C,), or zeros.
template <typename T>
__device__ __forceinline__ Two two_at(const void* from, int64_t i) {
    if (from == nullptr) return Two{};
    const auto two = *reinterpret_cast<const Run<T, 2>*>(static_cast<const T*>(from) + i);
    return of_both([&](int j) { return static_cast<float>(two.values[j]); });
}

// What the threads of a head share; in shared memory.
template <int size>
struct HeadRoom {
    alignas(16) float vectors[kVectors][size];
    float of_warps[kShares][size / kOfWarp];
};

// A thread of the 2 * size of a head, for one token.
template <int size>
struct Head {
    static constexpr int kKeys = size / kLanes, kWarps = size / kOfWarp;
    HeadRoom<size>& room;
    const int thread = static_cast<int>(threadIdx.x);
    // Of rows, of keys, of what a channel needs.
    const int group = thread / kLanes, lane = thread % kLanes, kind = thread % 4, pair = thread / 4;
    const bool is_second = lane / 2 % 2 == 1;  // of the pair is the channel that this thread ends
    Two v{}, gate{};
    float bonus = 0.0f;

    __device__ __forceinline__ explicit Head(HeadRoom<size>& room) : room(room) {}

    __device__ __forceinline__ float own(const Two& x) const { return is_second ? x.values[1] : x.values[0]; }
    template <typename X>
    __device__ __forceinline__ X by_kind(X a, X b, X c, X d) const {
        return kind == 0 ? a : kind == 1 ? b : kind == 2 ? c : d;
    }

    // Of its channels, by kind: what is added before the sigmoid (decay, iclr, value; 0), what the sigmoid is of (the
    // gate as it is), r, k, v and layer 0's v. A barrier of the head's threads follows.
    __device__ __forceinline__ void mix(Two added, Two of_sigmoid, Two vector, bool mixes_v, Two kk, Two ka, Two rk) {
        const auto write = [&](int name, Two x) { *reinterpret_cast<Two*>(&room.vectors[name][2 * pair]) = x; };
        // One of three sigmoids; the fourth kind has the gate as it is.
        const Two mine = of_both([&](int i) { return sigmoid(added.values[i] + of_sigmoid.values[i]); });
        const Two decay_share = of_kind(mine, 0), iclr = of_kind(mine, 1), share = of_kind(mine, 2);
        const Two r = of_kind(vector, 0), raw_key = of_kind(vector, 1);
        gate = of_kind(of_sigmoid, 3);
        v = of_kind(vector, 2);
        if (mixes_v) {
            const Two v_first = of_kind(vector, 3);
            v = of_both([&](int i) { return v.values[i] + (v_first.values[i] - v.values[i]) * share.values[i]; });
        }
        const Two removal_key = of_both([&](int i) { return raw_key.values[i] * kk.values[i]; });
        const Two k = of_both([&](int i) {
            return raw_key.values[i] * (1.0f + (iclr.values[i] - 1.0f) * ka.values[i]);
        });
        const Two decay = of_both([&](int i) { return expf(-kDecayScale * decay_share.values[i]); });
        write(kind, by_kind(r, decay, k, removal_key));
        if (kind == 0) write(kRemovalIclr, of_both([&](int i) { return removal_key.values[i] * iclr.values[i]; }));
        if (kind == 1) write(kMixedValue, v);
        float square_here = 0.0f, bonus_here = 0.0f;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            square_here += removal_key.values[i] * removal_key.values[i];
            bonus_here += r.values[i] * k.values[i] * rk.values[i];
        }
        square_here = sum_over<4, 8, 16>(square_here), bonus_here = sum_over<4, 8, 16>(bonus_here);
        if (thread % 32 == 0) {
            room.of_warps[kSquare][thread / 32] = square_here, room.of_warps[kBonus][thread / 32] = bonus_here;
        }
    }

    // The state goes on; y of the row lane / 2. key(i) is a thread's i-th key.
    template <typename Key>
    __device__ __forceinline__ float move_on(float (&state)[kStateRows][kKeys], const Key& key) {
        float square = 0.0f;
        bonus = 0.0f;
#pragma unroll
        for (int i = 0; i < kWarps; ++i) square += room.of_warps[kSquare][i], bonus += room.of_warps[kBonus][i];
        float sums[kStateRows] = {};
#pragma unroll
        for (int i = 0; i < kKeys; ++i) {
            const float removal = room.vectors[kRemovalKey][key(i)];
#pragma unroll
            for (int row = 0; row < kStateRows; ++row) sums[row] += state[row][i] * removal;
        }
        const float removed_here = divide_fast(row_sum(sums, lane), fmaxf(square, kLeastSquare));
        float removed[kStateRows], values[kStateRows];
#pragma unroll
        for (int row = 0; row < kStateRows; ++row) {
            removed[row] = __shfl_sync(kAllLanes, removed_here, 2 * row, kLanes);
            values[row] = room.vectors[kMixedValue][kStateRows * group + row];
            sums[row] = 0.0f;
        }
#pragma unroll
        for (int i = 0; i < kKeys; ++i) {
            const float r_here = room.vectors[kReceptance][key(i)], decay_here = room.vectors[kDecay][key(i)];
            const float k_here = room.vectors[kKeyVector][key(i)], removal = room.vectors[kRemovalIclr][key(i)];
#pragma unroll
            for (int row = 0; row < kStateRows; ++row) {
                float& s = state[row][i];
                s = s * decay_here - removed[row] * removal + values[row] * k_here;
                sums[row] += s * r_here;
            }
        }
        return row_sum(sums, lane);
    }

    // What the warps bring to y's norm; a barrier follows.
    __device__ __forceinline__ void share_norm(float y) const {
        const float mean_here = sum_over<2, 4, 8, 16>(y) / kOfWarp;
        const float squares_here = sum_over<2, 4, 8, 16>((y - mean_here) * (y - mean_here));
        if (thread % 32 == 0) {
            room.of_warps[kMean][thread / 32] = mean_here, room.of_warps[kSquares][thread / 32] = squares_here;
        }
    }

    // What becomes of the y of this thread's channel, which even lanes end.
    __device__ __forceinline__ float ended(float y, float weight, float bias, float eps) const {
        float mean = 0.0f, variance = 0.0f;
#pragma unroll
        for (int i = 0; i < kWarps; ++i) mean += room.of_warps[kMean][i] / kWarps;
#pragma unroll
        for (int i = 0; i < kWarps; ++i) {
            const float distance = room.of_warps[kMean][i] - mean;
            variance += (room.of_warps[kSquares][i] + kOfWarp * distance * distance) / size;
        }
        const float normed = (y - mean) * rsqrtf(variance + eps) * weight + bias;
        return (normed + bonus * own(v)) * own(gate);
    }
};

}  // namespace
