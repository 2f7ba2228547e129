// One token for each row of logits, drawn on the GPU: a block for a row, which it reads several times, from the L2 cache.
// Few rows would leave most of a GPU idle: from compute capability 9.0 on a row then has a cluster of blocks, which read
// each other's shared memory.
//
// Each warp works on one stretch of consecutive ids, its lanes side by side, so that sums in the order of ids are sums
// over warps and then over lanes. A probability is an integer, 2^42 for the largest, made by exact operations (weight
// below): sums of them do not depend on their order, and a draw is the same bit for bit on any device and in PyTorch
// (reference.py). The cut of top_p and top_k is found by halving an interval of distances from the largest logit.

#ifdef __CUDACC__  // the tests also compile the kernel for a CPU
#include "../../csrc/operator.h"
#endif

namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
static_assert(kWarps == 32, "a warp sums what the warps bring, one a lane");
constexpr unsigned kAll = 0xffffffffu;
constexpr int kCluster = 8;    // blocks of a row, where rows are few
constexpr int kFewRows = 16;   // clusters that a large GPU runs at once
constexpr int kWidth = 8;      // ids of a lane that stand side by side
constexpr int kHeldByCluster = kCluster * kThreads * kWidth;  // ids
constexpr int kBits = 42;                                     // of a weight below its point
constexpr int kSettings = 5;   // numbers a row
constexpr int kHalvings = 24;  // of the interval of distances; from then on of the interval of their bits
constexpr int kNearby = 2;     // distances that a thread takes once few are left
constexpr float kFar = 64.0f;  // no weight is above 0 at half this distance
constexpr float kLargestFloat = 3.4028234663852886e38f;
constexpr double kLog2E = 1.4426950408889634;
constexpr unsigned kInfinity = 0x7f800000u;

// 2^(-distance scale), 2^42 for 1, rounded down. Operations that are rounded one by one, as PyTorch's are.
__device__ __forceinline__ unsigned long long weight(float distance, float scale) {
    const float exponent = __fmul_rn(distance, scale);
    if (!(exponent < kBits + 1)) return 0;  // inf x 0 too
    const float whole = floorf(exponent), part = exponent - whole;
    float power = 0x1.c946cap-14f;
    power = __fadd_rn(__fmul_rn(power, part), -0x1.4e2ae8p-10f);
    power = __fadd_rn(__fmul_rn(power, part), 0x1.39e3fcp-7f);
    power = __fadd_rn(__fmul_rn(power, part), -0x1.c6948ep-5f);
    power = __fadd_rn(__fmul_rn(power, part), 0x1.ebfac0p-3f);
    power = __fadd_rn(__fmul_rn(power, part), -0x1.62e42cp-1f);
    power = __fadd_rn(__fmul_rn(power, part), 1.0f);
    return static_cast<unsigned long long>(power * 4398046511104.0f) >> static_cast<int>(whole);
}

// An integer that is larger for a larger float, which is no NaN.
__device__ __forceinline__ unsigned ordered(float x) {
    const unsigned bits = __float_as_uint(x + 0.0f);  // -0 is 0
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float float_of(unsigned ordered) {
    return __uint_as_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}

template <typename T, int width>
struct alignas(sizeof(T) * width) Pack {
    T values[width];
};

template <typename T>
__device__ __forceinline__ void load_whole(const T* from, T (&to)[kWidth]) {
    constexpr int width = sizeof(T) * kWidth > 16 ? 16 / sizeof(T) : kWidth;
#pragma unroll
    for (int j = 0; j < kWidth; j += width) {
        const auto pack = *reinterpret_cast<const Pack<T, width>*>(from + j);
#pragma unroll
        for (int k = 0; k < width; ++k) to[j + k] = pack.values[k];
    }
}

// Of the blocks of a row: which this one is, a barrier for all, and where `x` of this block lies in another's memory.
template <int blocks>
__device__ __forceinline__ int rank() { return static_cast<int>(blockIdx.x) % blocks; }

template <int blocks>
__device__ __forceinline__ void sync() {
    if constexpr (blocks == 1) {
        __syncthreads();
    } else {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        __cluster_barrier_arrive();
        __cluster_barrier_wait();
#endif
    }
}

template <int blocks, typename X>
__device__ __forceinline__ X* in_block(X* x, int rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if constexpr (blocks > 1) return static_cast<X*>(__cluster_map_shared_rank(x, static_cast<unsigned>(rank)));
#endif
    return x;
}

template <typename T, int blocks, bool holds>
struct Row {
    const T* logits;
    const float* counts;  // null where the row has no penalties
    const bool* barred;
    int vocab;
    bool aligned;  // all three on 16 bytes, so that whole packs can be read
    float presence, frequency;
    // Allowed logits as a first reading finds them, then their distances; all that there is for this thread, if it `holds`.
    float held[kWidth];

    // Of the ids from `at` on: the logits as they are, and less the penalties, -inf where barred or behind the last id.
    __device__ __forceinline__ void load(int at, float (&raw)[kWidth], float (&allowed)[kWidth]) const {
        T read[kWidth];
        bool bars[kWidth];
        if (aligned && at + kWidth <= vocab) {
            load_whole(logits + at, read);
            load_whole(barred + at, bars);
#pragma unroll
            for (int j = 0; j < kWidth; ++j) raw[j] = static_cast<float>(read[j]);
        } else {
#pragma unroll
            for (int j = 0; j < kWidth; ++j) {
                const bool there = at + j < vocab;
                raw[j] = there ? static_cast<float>(logits[at + j]) : -INFINITY;
                bars[j] = there ? barred[at + j] : true;
            }
        }
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
            allowed[j] = raw[j];
            if (counts != nullptr && at + j < vocab) {
                const float count = counts[at + j];
                allowed[j] = __fsub_rn(__fsub_rn(raw[j], count > 0.0f ? presence : 0.0f), __fmul_rn(frequency, count));
            }
            if (bars[j]) allowed[j] = -INFINITY;
        }
    }

    // Bits of the distances from the largest logit, which are ordered as the distances are; kInfinity where barred.
    __device__ __forceinline__ void load_distances(int at, float largest, unsigned (&distances)[kWidth]) const {
        if constexpr (holds) {
#pragma unroll
            for (int j = 0; j < kWidth; ++j) distances[j] = __float_as_uint(held[j]);
        } else {
            float raw[kWidth], allowed[kWidth];
            load(at, raw, allowed);
#pragma unroll
            for (int j = 0; j < kWidth; ++j) distances[j] = distance_of(allowed[j], largest);
        }
    }
    __device__ __forceinline__ static unsigned distance_of(float allowed, float largest) {
        return allowed > -INFINITY ? __float_as_uint(largest - allowed) : kInfinity;
    }
    __device__ __forceinline__ void hold_distances(float largest) {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) held[j] = __uint_as_float(distance_of(held[j], largest));
    }

    // Ids of this warp, and the first of a lane.
    __device__ __forceinline__ int stretch(int parts = blocks) const {
        const int step = 32 * kWidth * kWarps * parts;
        return (vocab + step - 1) / step * 32 * kWidth;
    }
    __device__ __forceinline__ int begin() const {
        return (rank<blocks>() * kWarps + static_cast<int>(threadIdx.x / 32)) * stretch();
    }
    __device__ __forceinline__ int end() const { return min(begin() + stretch(), vocab); }
    __device__ __forceinline__ static int of_lane() { return static_cast<int>(threadIdx.x % 32) * kWidth; }
};

__device__ __forceinline__ unsigned long long warp_sum(unsigned long long x) {
#pragma unroll
    for (int mask = 16; mask; mask /= 2) x += __shfl_xor_sync(kAll, x, mask);
    return x;
}

// What a first reading finds.
struct Summary {
    float largest, sum;       // of the logits, and of 2^(log2(e) (x - largest))
    unsigned long long best;  // allowed: the largest, and the lowest id of those; 0: none
    unsigned nan;
};

__device__ __forceinline__ Summary merge(const Summary& a, const Summary& b) {
    const float larger = fmaxf(a.largest, b.largest);
    const float of_a = exp2f((a.largest - larger) * static_cast<float>(kLog2E));
    const float of_b = exp2f((b.largest - larger) * static_cast<float>(kLog2E));
    const float sum = __fadd_rn(__fmul_rn(a.sum, of_a), __fmul_rn(b.sum, of_b));
    return {larger, sum, a.best > b.best ? a.best : b.best, a.nan | b.nan};
}

// Over `lanes` neighbours.
__device__ __forceinline__ Summary merge(Summary all, int lanes) {
#pragma unroll
    for (int mask = lanes / 2; mask; mask /= 2) {
        all = merge(all, Summary{__shfl_xor_sync(kAll, all.largest, mask), __shfl_xor_sync(kAll, all.sum, mask),
                                 __shfl_xor_sync(kAll, all.best, mask), __shfl_xor_sync(kAll, all.nan, mask)});
    }
    return all;
}

// Of the ids from `begin` to `end`, for all lanes of a warp.
template <typename T, int blocks, bool holds>
__device__ __forceinline__ Summary summary_of(Row<T, blocks, holds>& row, int begin, int end) {
    Summary mine{-kLargestFloat, 0.0f, 0, 0};  // finite, so that -inf - largest is -inf
#pragma unroll
    for (int j = 0; j < kWidth; ++j) row.held[j] = -INFINITY;
    for (int at = begin + row.of_lane(); at < end; at += 32 * kWidth) {
        float raw[kWidth], larger = mine.largest;
        row.load(at, raw, row.held);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
            mine.nan |= raw[j] != raw[j];
            larger = fmaxf(larger, raw[j]);
            if (row.held[j] > -INFINITY) {
                const unsigned long long here = static_cast<unsigned long long>(ordered(row.held[j])) << 32 |
                                                (kAll - static_cast<unsigned>(at + j));
                mine.best = here > mine.best ? here : mine.best;
            }
        }
        mine.sum = __fmul_rn(mine.sum, exp2f((mine.largest - larger) * static_cast<float>(kLog2E)));
        mine.largest = larger;
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
            mine.sum = __fadd_rn(mine.sum, exp2f((raw[j] - larger) * static_cast<float>(kLog2E)));
        }
    }
    return merge(mine, 32);
}

// A block alone makes the sums of a cluster's blocks one after another, so that they are the same bit for bit.
template <typename T, int blocks, bool holds>
__device__ __forceinline__ Summary summary_of(Row<T, blocks, holds>& row) {
    __shared__ Summary of_warp[kCluster / blocks][kWarps], of_part[kCluster / blocks];
    const int stretch = row.stretch(kCluster), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 1
    for (int part = rank<blocks>(); part < kCluster; part += blocks) {
        const int begin = (part * kWarps + warp) * stretch;
        const Summary mine = summary_of(row, begin, min(begin + stretch, row.vocab));
        if (lane == 0) of_warp[part / blocks][warp] = mine;
    }
    __syncthreads();
    if (warp < kCluster / blocks) {
        const Summary all = merge(of_warp[warp][lane], 32);
        if (lane == 0) of_part[warp] = all;
    }
    sync<blocks>();
    const int part = lane % kCluster;
    return merge(*in_block<blocks>(&of_part[part / blocks], part % blocks), kCluster);
}

// Of an interval of distances, a part that ends somewhere inside it.
struct Tally {
    unsigned long long mass;      // of the part
    unsigned count, last, after;  // tokens in the part, the largest distance there, and the smallest after it
};

// Of a warp's first `lanes`.
__device__ __forceinline__ Tally merge(Tally all, int lanes) {
    if (static_cast<int>(threadIdx.x % 32) >= lanes) all = {0, 0, 0, kAll};
    constexpr int kPart = 26;  // bits, of which a warp's sums fit 32
    unsigned long long mass = 0;
#pragma unroll
    for (int shift = 0; shift < 64; shift += kPart) {
        const auto part = static_cast<unsigned>(all.mass >> shift) & ((1u << kPart) - 1);
        mass += static_cast<unsigned long long>(__reduce_add_sync(kAll, part)) << shift;
    }
    return {mass, __reduce_add_sync(kAll, all.count), __reduce_max_sync(kAll, all.last), __reduce_min_sync(kAll, all.after)};
}

// The part up to `middle` of the distances from `low` to `high`; each(visit) shows `visit` this thread's share of them.
// `turn` is another one, odd or even, than that of the call before: its results may still be being read.
template <int blocks, typename Each>
__device__ __forceinline__ Tally tally_of(Each each, unsigned low, unsigned middle, unsigned high, int turn) {
    __shared__ Tally of_warp[kWarps], of_block[2];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Tally mine{0, 0, low, high};
    each([&](unsigned distance, auto mass) {
        if (distance < low || distance > high) return;
        if (distance > middle) {
            mine.after = min(mine.after, distance);
        } else {
            mine.last = max(mine.last, distance);
            mine.mass += mass();
            mine.count += 1;
        }
    });
    mine = merge(mine, 32);
    if (lane == 0) of_warp[warp] = mine;
    __syncthreads();
    if (warp == 0) {
        mine = merge(of_warp[lane], 32);
        if (lane == 0) of_block[turn % 2] = mine;
    }
    sync<blocks>();
    return merge(*in_block<blocks>(&of_block[turn % 2], lane % blocks), blocks);
}

// Those from `low` to `high` of a row's distances, at most kNearby for each thread of a block: every block gets them all.
// What a thread has less than that is kInfinity.
template <typename T, int blocks, bool holds>
__device__ __forceinline__ void gather(const Row<T, blocks, holds>& row, float largest, unsigned low, unsigned high,
                                       unsigned (&nearby)[kNearby]) {
    __shared__ unsigned of_block[kNearby * kThreads];
    __shared__ int n_of_block;
    if (threadIdx.x == 0) n_of_block = 0;
    __syncthreads();
    const int lane = threadIdx.x % 32;
    for (int start = row.begin(); start < row.end(); start += 32 * kWidth) {
        unsigned distances[kWidth];
        row.load_distances(start + row.of_lane(), largest, distances);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
            const bool inside = low <= distances[j] && distances[j] <= high;
            const unsigned votes = __ballot_sync(kAll, inside);
            if (votes == 0) continue;
            const int first = __shfl_sync(kAll, lane == 0 ? atomicAdd(&n_of_block, __popc(votes)) : 0, 0);
            if (inside) of_block[first + __popc(votes & ((1u << lane) - 1))] = distances[j];
        }
    }
    sync<blocks>();
#pragma unroll
    for (int i = 0; i < kNearby; ++i) {
        int at = static_cast<int>(threadIdx.x) + i * kThreads;
        nearby[i] = kInfinity;
#pragma unroll 1
        for (int k = 0; k < blocks; ++k) {
            const int count = *in_block<blocks>(&n_of_block, k);
            if (0 <= at && at < count) nearby[i] = in_block<blocks>(of_block, k)[at];
            at -= count;
        }
    }
}

// The id at which the sum of value(distance, id), in the order of ids, exceeds point(sum of all).
template <typename T, int blocks, bool holds, typename Value, typename Point>
__device__ __forceinline__ int locate(const Row<T, blocks, holds>& row, float largest, Value value, Point point) {
    __shared__ unsigned long long of_warp[kWarps], of_block;
    __shared__ int found;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    unsigned long long mine = 0;
    for (int at = row.begin() + row.of_lane(); at < row.end(); at += 32 * kWidth) {
        unsigned distances[kWidth];
        row.load_distances(at, largest, distances);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) mine += value(distances[j], at + j);
    }
    mine = warp_sum(mine);
    sync<blocks>();  // what a call before this one left has been read
    if (lane == 0) of_warp[warp] = mine;
    __syncthreads();
    const unsigned long long beside = of_warp[lane];
    unsigned long long before = warp_sum(lane < warp ? beside : 0);
    if (warp == 0) {
        const unsigned long long sum = warp_sum(beside);
        if (lane == 0) of_block = sum;
    }
    sync<blocks>();
    const unsigned long long there = lane < blocks ? *in_block<blocks>(&of_block, lane) : 0;
    before += warp_sum(lane < rank<blocks>() ? there : 0);
    const unsigned long long wanted = point(warp_sum(there));
    if (before <= wanted && wanted < before + mine) {  // the same in all lanes, and in one warp
        for (int start = row.begin(); start < row.end(); start += 32 * kWidth) {
            const int at = start + row.of_lane();
            unsigned distances[kWidth];
            row.load_distances(at, largest, distances);
            unsigned long long sum = 0;
#pragma unroll
            for (int j = 0; j < kWidth; ++j) sum += value(distances[j], at + j);
            unsigned long long reached = sum;
#pragma unroll
            for (int step = 1; step < 32; step *= 2) {
                const unsigned long long lower = __shfl_up_sync(kAll, reached, step);
                reached += lane >= step ? lower : 0;
            }
            unsigned long long here = before + reached - sum;
            if (here <= wanted && wanted < here + sum) {
#pragma unroll
                for (int j = 0; j < kWidth; ++j) {
                    const unsigned long long next = here + value(distances[j], at + j);
                    if (here <= wanted && wanted < next) {
#pragma unroll 1
                        for (int k = 0; k < blocks; ++k) *in_block<blocks>(&found, k) = at + j;
                    }
                    here = next;
                }
            }
            before += __shfl_sync(kAll, reached, 31);
        }
    }
    sync<blocks>();
    return found;
}

// Tokens that top_p and top_k leave: those nearer than `distance`, and those at it up to the id `last`.
struct Cut {
    unsigned distance;
    int last;
};

template <typename T, int blocks, bool holds>
__device__ __forceinline__ Cut cut_of(const Row<T, blocks, holds>& row, float largest, double top_p, double top_k) {
    const auto mass_at = [](unsigned distance) { return weight(__uint_as_float(distance), static_cast<float>(kLog2E)); };
    unsigned long long masses[kWidth];  // of what is held
#pragma unroll
    for (int j = 0; j < kWidth; ++j) masses[j] = holds ? mass_at(__float_as_uint(row.held[j])) : 0;
    const auto each_of_row = [&](auto visit) {
        if constexpr (holds) {
#pragma unroll
            for (int j = 0; j < kWidth; ++j) visit(__float_as_uint(row.held[j]), [&] { return masses[j]; });
            return;
        }
        for (int at = row.begin() + row.of_lane(); at < row.end(); at += 32 * kWidth) {
            unsigned distances[kWidth];
            row.load_distances(at, largest, distances);
#pragma unroll
            for (int j = 0; j < kWidth; ++j) visit(distances[j], [&] { return mass_at(distances[j]); });
        }
    };
    unsigned nearby[kNearby];
    bool is_gathered = false;
    const auto each_nearby = [&](auto visit) {
#pragma unroll
        for (int i = 0; i < kNearby; ++i) visit(nearby[i], [&] { return mass_at(nearby[i]); });
    };
    const Tally all = tally_of<blocks>(each_of_row, 0, kInfinity - 1, kInfinity - 1, 1);
    unsigned low = 0, high = all.last, inside = all.count;
    const unsigned long long no_mass = ~0ull;
    const auto wanted =
        top_p < 1.0 ? static_cast<unsigned long long>(ceil(top_p * static_cast<double>(all.mass))) : no_mass;
    const unsigned most = top_k > 0.0 ? static_cast<unsigned>(fmin(top_k, 4294967295.0)) : 4294967295u;
    unsigned long long mass = 0;  // nearer than low
    unsigned count = 0;
    for (int round = 0; low < high; ++round) {
        if (!is_gathered && inside <= kNearby * kThreads) {
            gather(row, largest, low, high, nearby);
            is_gathered = true;
        }
        const float nearest = __uint_as_float(low), farthest = __uint_as_float(high);
        unsigned middle = low + (high - low) / 2;
        if (farthest <= kFar && round < kHalvings) middle = __float_as_uint(0.5f * (nearest + farthest));
        if (farthest > kFar && nearest < 0.5f * kFar) middle = __float_as_uint(0.5f * kFar);
        middle = max(low, min(middle, high - 1));
        const Tally part = is_gathered ? tally_of<1>(each_nearby, low, middle, high, round)
                                       : tally_of<blocks>(each_of_row, low, middle, high, round);
        if (mass + part.mass >= wanted || count + part.count >= most) {
            high = part.last;
            inside = part.count;
        } else {
            mass += part.mass;
            count += part.count;
            inside -= part.count;
            low = part.after;
        }
    }
    unsigned left = most - count;  // of those at the cut
    const unsigned long long each = weight(__uint_as_float(low), static_cast<float>(kLog2E));
    if (wanted != no_mass && each > 0 && mass < wanted) {
        const unsigned long long enough = (wanted - mass + each - 1) / each;
        left = enough < left ? static_cast<unsigned>(enough) : left;
    }
    if (left >= static_cast<unsigned>(row.vocab)) return {low, row.vocab};
    if (inside <= left) return {low, row.vocab};
    const auto is_equal = [=](unsigned distance, int) { return static_cast<unsigned long long>(distance == low); };
    return {low, locate(row, largest, is_equal, [=](unsigned long long) { return static_cast<unsigned long long>(left - 1); })};
}

// logits: (rows, vocab), `stride` apart. ids: -1 where the logits are not finite.
template <typename T, int blocks, bool holds>
__global__ void __launch_bounds__(kThreads)
sample_rows(const T* __restrict__ logits, int64_t stride, const float* __restrict__ counts,
            const bool* __restrict__ barred, const double* __restrict__ settings, const double* __restrict__ uniforms,
            int vocab, bool aligned, int64_t* __restrict__ ids, float* __restrict__ logprobs) {
    const unsigned number = blockIdx.x / blocks;
    const double* mine = settings + static_cast<int64_t>(number) * kSettings;
    Row<T, blocks, holds> row{logits + number * stride,    nullptr, barred, vocab, aligned, static_cast<float>(mine[3]),
                       static_cast<float>(mine[4]), {}};
    if (counts != nullptr && (mine[3] != 0.0 || mine[4] != 0.0)) {
        row.counts = counts + static_cast<int64_t>(number) * vocab;
    }
    const Summary summary = summary_of(row);
    const double temperature = mine[0], top_p = mine[1], top_k = mine[2];
    const float best = float_of(static_cast<unsigned>(summary.best >> 32));
    int id = static_cast<int>(kAll - static_cast<unsigned>(summary.best));
    if (summary.nan || summary.largest == INFINITY || summary.best == 0 || best == INFINITY) {
        id = -1;
    } else if (temperature != 0.0 && top_p != 0.0 && top_k != 1.0) {
        row.hold_distances(best);
        const float scale = static_cast<float>(fmin(kLog2E / temperature, static_cast<double>(kLargestFloat)));
        Cut cut{kInfinity, vocab};
        if (top_p < 1.0 || top_k > 0.0) cut = cut_of(row, best, top_p, top_k);
        const double uniform = uniforms[number];
        const auto value = [=](unsigned distance, int i) -> unsigned long long {
            const bool kept = distance < cut.distance || (distance == cut.distance && i <= cut.last);
            return kept && distance != kInfinity ? weight(__uint_as_float(distance), scale) : 0;
        };
        id = locate(row, best, value, [=](unsigned long long sum) {
            const auto point = static_cast<unsigned long long>(uniform * static_cast<double>(sum));
            return point < sum ? point : sum - 1;
        });
    }
    if (blocks > 1) sync<blocks>();  // no block ends while another one reads its memory
    if (threadIdx.x == 0 && rank<blocks>() == 0) {
        ids[number] = id;
        logprobs[number] =
            id < 0 ? 0.0f : static_cast<float>(row.logits[id]) - summary.largest - logf(summary.sum);
    }
}

}  // namespace

#ifdef __CUDACC__
namespace {

template <typename T>
void start(const Tensor& logits, const float* counts, const Tensor& barred, const Tensor& settings,
           const Tensor& uniforms, Tensor& ids, Tensor& logprobs) {
    const T* data = logits.const_data_ptr<T>();
    const bool* bars = barred.const_data_ptr<bool>();
    const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && logits.stride(0) * sizeof(T) % 16 == 0 &&
                         reinterpret_cast<uintptr_t>(bars) % 16 == 0;
    int major = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, logits.get_device_index()));
    const bool few = logits.size(0) <= kFewRows && major >= 9;
    const bool holds = logits.size(1) <= kHeldByCluster;
    const auto kernel = !few ? sample_rows<T, 1, false> : holds ? sample_rows<T, kCluster, true> : sample_rows<T, kCluster, false>;
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = kCluster;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(logits.size(0) * (few ? kCluster : 1)));
    config.blockDim = dim3(kThreads);
    config.stream = current_stream();
    config.attrs = &cluster;
    config.numAttrs = few ? 1 : 0;
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, data,
                                      logits.stride(0), counts, bars, settings.const_data_ptr<double>(),
                                      uniforms.const_data_ptr<double>(), static_cast<int>(logits.size(1)), aligned,
                                      ids.mutable_data_ptr<int64_t>(), logprobs.mutable_data_ptr<float>()));
}

// Shapes and dtypes as heron.ops.sample_rows says, and checks.
std::tuple<Tensor, Tensor> run(const Tensor& logits, const Optional& counts,
                               const Tensor& barred, const Tensor& settings,
                               const Tensor& uniforms) {
    const DeviceGuard guard(logits.get_device_index());
    auto ids = empty({logits.size(0)}, logits, ScalarType::Long);
    auto logprobs = empty({logits.size(0)}, logits, ScalarType::Float);
    if (logits.size(0) == 0) return {ids, logprobs};
    const float* counted = counts.has_value() ? counts->const_data_ptr<float>() : nullptr;
    const auto of_dtype = logits.scalar_type() == ScalarType::Float      ? start<float>
                          : logits.scalar_type() == ScalarType::BFloat16 ? start<BFloat16>
                                                                         : start<Half>;
    of_dtype(logits, counted, barred, settings, uniforms, ids, logprobs);
    return {ids, logprobs};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(heron, library) {
    library.def(
        "sample_rows(Tensor logits, Tensor? counts, Tensor barred, Tensor settings, Tensor uniforms) -> "
        "(Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(heron, CUDA, library) { library.impl("sample_rows", TORCH_BOX(&run)); }
#endif
