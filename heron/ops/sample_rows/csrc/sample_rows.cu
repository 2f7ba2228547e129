// Draws one token for each row of logits. A block draws from a row and reads it several times, from the L2 cache. Few
// rows would leave most of a GPU idle, so from compute capability 9.0 on a cluster of blocks draws from each row; they
// read and write each other's shared memory.
//
// Each warp works on one stretch of consecutive ids, its lanes side by side, so that sums in the order of ids are sums
// over warps and then over lanes. A probability is an integer, 2^42 for the largest, made by exact operations (weight
// below): sums of them do not depend on their order, and a draw is the same bit for bit on any device and in PyTorch
// (reference.py). The cut of top_p and top_k is found by sums over bins of distances from the largest logit.

#ifdef __CUDACC__  // the tests also compile the kernel for a CPU
#include "../../csrc/operator.h"
#endif

namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
static_assert(kWarps == 32, "a warp sums what the warps bring, one a lane");
constexpr unsigned kAll = 0xffffffffu;
constexpr int kCluster = 8;   // blocks of a row, where rows are few
constexpr int kFewRows = 16;  // clusters that a large GPU runs at once
constexpr int kWidth = 8;     // ids of a lane that stand side by side
constexpr int kHeldByCluster = kCluster * kThreads * kWidth;  // ids
constexpr int kBits = 42;     // of a weight below its point
constexpr int kSettings = 5;  // numbers a row
constexpr int kIdBits = 20;   // of an id
constexpr int kBinBits = 10;
constexpr int kBins = 1 << kBinBits;
static_assert(kBins == kThreads, "a thread has one bin");
constexpr unsigned kNear = 0x3d800000u;  // the bits of 1/16: a nearer token is in the first bin
constexpr int kFirstShift = 16;  // that is 128 bins each time a distance doubles; one of 16 or more is in the last bin
constexpr int kFew = 256;        // tokens that each block takes once no more are left
constexpr float kLargestFloat = 3.4028234663852886e38f;
constexpr double kLog2E = 1.4426950408889634;
constexpr unsigned kInfinity = 0x7f800000u;

// 2^(-distance scale), 2^42 for 1, rounded down. Operations that are rounded one by one, as PyTorch's are.
__device__ __forceinline__ unsigned long long weight(float distance, float scale) {
    const float exponent = fminf(__fmul_rn(distance, scale), kBits + 1);  // of inf x 0, too
    const float rounded_down = __fadd_rd(exponent, 0x1p23f);  // as an integer in the last bits
    const float part = __fsub_rn(exponent, __fsub_rn(rounded_down, 0x1p23f));
    float power = 0x1.c946cap-14f;
    power = __fadd_rn(__fmul_rn(power, part), -0x1.4e2ae8p-10f);
    power = __fadd_rn(__fmul_rn(power, part), 0x1.39e3fcp-7f);
    power = __fadd_rn(__fmul_rn(power, part), -0x1.c6948ep-5f);
    power = __fadd_rn(__fmul_rn(power, part), 0x1.ebfac0p-3f);
    power = __fadd_rn(__fmul_rn(power, part), -0x1.62e42cp-1f);
    power = __fadd_rn(__fmul_rn(power, part), 1.0f);
    return static_cast<unsigned long long>(power * 4398046511104.0f) >> (__float_as_uint(rounded_down) & 63);
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

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900  // also where nvcc or a test compiles for the host
#define HERON_CLUSTERS
#endif

// `publishes`: whether another block will read what this warp has written, or what another warp of its block had
// written before a __syncthreads. A warp that publishes waits until all that has arrived, so few do.
template <int blocks>
__device__ __forceinline__ void arrive(bool publishes) {
#ifdef HERON_CLUSTERS
    if constexpr (blocks > 1) publishes ? __cluster_barrier_arrive() : __cluster_barrier_arrive_relaxed();
#endif
}

template <int blocks>
__device__ __forceinline__ void wait() {
#ifdef HERON_CLUSTERS
    if constexpr (blocks > 1) __cluster_barrier_wait();
#endif
    if constexpr (blocks == 1) __syncthreads();
}

template <int blocks>
__device__ __forceinline__ void sync(bool publishes) {
    arrive<blocks>(publishes);
    wait<blocks>();
}

template <int blocks, typename X>
__device__ __forceinline__ X* in_block(X* x, int rank) {
#ifdef HERON_CLUSTERS
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
    // Allowed logits as a first reading finds them, then their distances; all that this thread has, if it `holds`.
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
    // visit(distances, the first one's id) for all that this thread has.
    template <typename Visit>
    __device__ __forceinline__ void each(float largest, Visit visit) const {
        for (int start = begin(); holds || start < end(); start += 32 * kWidth) {
            unsigned distances[kWidth];
            load_distances(start + of_lane(), largest, distances);
            visit(distances, start + of_lane());
            if (holds) break;
        }
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

// At most 2^63 in all.
__device__ __forceinline__ unsigned long long warp_sum(unsigned long long x) {
    constexpr int kPart = 26;  // bits, of which a warp's sums fit 32
    unsigned long long sum = 0;
#pragma unroll
    for (int shift = 0; shift < 64; shift += kPart) {
        const auto part = static_cast<unsigned>(x >> shift) & ((1u << kPart) - 1);
        sum += static_cast<unsigned long long>(__reduce_add_sync(kAll, part)) << shift;
    }
    return sum;
}

// What a first reading finds.
struct Summary {
    float largest, sum;       // of the logits, and of 2^(log2(e) (x - largest))
    unsigned long long best;  // allowed: the largest, and the lowest id of those; 0: none
    unsigned nan;
};

// Over the lanes of a warp, where each `lanes` neighbours bring what the first ones do.
__device__ __forceinline__ Summary merge(const Summary& mine, int lanes) {
    const float largest = float_of(__reduce_max_sync(kAll, ordered(mine.largest)));
    float sum = __fmul_rn(mine.sum, exp2f((mine.largest - largest) * static_cast<float>(kLog2E)));
#pragma unroll
    for (int mask = lanes / 2; mask; mask /= 2) sum = __fadd_rn(sum, __shfl_xor_sync(kAll, sum, mask));
    const auto best = static_cast<unsigned>(mine.best >> 32);
    const unsigned upper = __reduce_max_sync(kAll, best);
    const unsigned lower = __reduce_max_sync(kAll, best == upper ? static_cast<unsigned>(mine.best) : 0);
    const unsigned long long both = static_cast<unsigned long long>(upper) << 32 | lower;
    return {largest, sum, both, __ballot_sync(kAll, mine.nan != 0)};
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
    __shared__ Summary of_warp[kCluster / blocks][kWarps], of_part[kCluster];
    const int stretch = row.stretch(kCluster), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 1
    for (int part = rank<blocks>(); part < kCluster; part += blocks) {
        const int begin = (part * kWarps + warp) * stretch;
        const Summary mine = summary_of(row, begin, min(begin + stretch, row.vocab));
        if (lane == 0) of_warp[part / blocks][warp] = mine;
    }
    __syncthreads();
    if (blocks > 1) wait<blocks>();  // until all blocks run: their memory is there from then on
    if (warp < kCluster / blocks) {
        const Summary all = merge(of_warp[warp][lane], 32);
        if (lane < blocks) *in_block<blocks>(&of_part[warp * blocks + rank<blocks>()], lane) = all;
    }
    sync<blocks>(warp == 0);
    return merge(of_part[lane % kCluster], kCluster);
}

// The place of a token in the order in which top_p and top_k keep them: by distance, then by id.
using Place = unsigned long long;
__device__ __forceinline__ Place place_of(unsigned distance, int id) {
    return static_cast<Place>(distance) << kIdBits | static_cast<unsigned>(id);
}
__device__ __forceinline__ unsigned long long mass_at(unsigned distance) {
    return weight(__uint_as_float(distance), static_cast<float>(kLog2E));
}

struct alignas(16) Sums {
    unsigned long long mass;
    unsigned count;
    __device__ __forceinline__ void add(const Sums& x) { mass += x.mass, count += x.count; }
    __device__ __forceinline__ bool reach(const Sums& wanted) const {
        return mass >= wanted.mass || count >= wanted.count;
    }
};

__device__ __forceinline__ Sums warp_sum(const Sums& x) { return {warp_sum(x.mass), __reduce_add_sync(kAll, x.count)}; }

// Sums of masses and numbers of tokens by bins, in shared memory, where an atomic sum has 32 bits.
struct Bins {
    unsigned lower[kBins], upper[kBins], count[kBins];  // the two halves of masses
    __device__ __forceinline__ void clear(int bin) { lower[bin] = upper[bin] = count[bin] = 0; }
    __device__ __forceinline__ Sums at(int bin) const {
        return {static_cast<unsigned long long>(upper[bin]) << 32 | lower[bin], count[bin]};
    }
    // One token for each bin that is not negative.
    template <int n>
    __device__ __forceinline__ void add(const int (&bins)[n], const unsigned long long (&masses)[n]) {
        unsigned low[n];
#pragma unroll
        for (int j = 0; j < n; ++j) {
            low[j] = bins[j] < 0 ? 0 : atomicAdd(&lower[bins[j]], static_cast<unsigned>(masses[j]));
        }
#pragma unroll
        for (int j = 0; j < n; ++j) {
            if (bins[j] < 0) continue;
            const unsigned overflows = low[j] + static_cast<unsigned>(masses[j]) < low[j];
            const unsigned high = static_cast<unsigned>(masses[j] >> 32) + overflows;
            if (high != 0) atomicAdd(&upper[bins[j]], high);
            atomicAdd(&count[bins[j]], 1u);
        }
    }
    // What all lanes of a warp bring.
    __device__ __forceinline__ void add_of_warp(int bin, const Sums& mine) {
        const Sums sums = warp_sum(mine);
        const auto low = static_cast<unsigned>(sums.mass);
        if (threadIdx.x % 32 != 0 || sums.count == 0) return;
        const unsigned overflows = atomicAdd(&lower[bin], low) + low < low;
        atomicAdd(&upper[bin], static_cast<unsigned>(sums.mass >> 32) + overflows);
        atomicAdd(&count[bin], sums.count);
    }
};

// A search for the last token that is kept: it is one of those from `first` to `last`, which `inside` counts.
struct Search {
    Place first, last;
    Place base;   // where the bins begin; what is below is in the first one
    int shift;    // 2^shift places a bin
    int inside;   // 0 after a reading: all tokens of the row are kept
    Sums before, wanted;  // of the tokens before `first`, and up to the one that is searched for
    double share;         // of the row's mass that is wanted; 1 or more as soon as wanted.mass says it
};

// Finds the first lane of a warp at which `before`, plus the sums `mine` of that lane and all lower ones, reaches
// `wanted`. Returns 32 if there is none; else `before` now includes the lanes below that one. All lanes must call this.
__device__ __forceinline__ int lane_reaching(const Sums& wanted, const Sums& mine, Sums& before) {
    const int lane = threadIdx.x % 32;
    Sums sums = mine;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const Sums lower{__shfl_up_sync(kAll, sums.mass, step), __shfl_up_sync(kAll, sums.count, step)};
        if (lane >= step) sums.add(lower);
    }
    sums.add(before);
    const unsigned votes = __ballot_sync(kAll, sums.reach(wanted));
    if (votes == 0) return 32;
    const int found = __ffs(static_cast<int>(votes)) - 1;
    before = {__shfl_sync(kAll, sums.mass - mine.mass, found), __shfl_sync(kAll, sums.count - mine.count, found)};
    return found;
}

// The last place that top_p and top_k keep.
template <typename T, int blocks, bool holds>
__device__ __forceinline__ Place cut_of(const Row<T, blocks, holds>& row, float largest, double top_p, unsigned most) {
    __shared__ Bins bins[2];
    __shared__ Sums of_warp[kWarps], of_group[2][blocks][kWarps];  // each of a group of 32 bins
    __shared__ Sums of_bin[blocks][32];                            // of one group
    __shared__ Search search;
    __shared__ Place few_of_block[kFew], few[kFew], cut;
    __shared__ unsigned long long masses[kFew];
    __shared__ int n_of_block, n;
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    bins[0].clear(thread);
    if (thread == 0) {
        n_of_block = n = 0;
        const Place last = place_of(kInfinity, 0) - 1, base = place_of(kNear, 0);
        search = {0, last, base, kIdBits + kFirstShift, 0, {0, 0}, {~0ull, most}, top_p};
    }
    __syncthreads();
    for (int turn = 0; turn == 0 || search.inside > kFew; ++turn) {
        Bins& here = bins[turn % 2];
        const Place first = search.first, last = search.last, base = search.base;
        const int shift = search.shift;
        const auto bin_of = [&](unsigned distance, int id) {
            if (turn == 0) {
                const int bin = (static_cast<int>(distance) - static_cast<int>(kNear)) >> kFirstShift;
                return distance == kInfinity ? -1 : max(0, min(bin, kBins - 1));
            }
            const Place place = place_of(distance, id);
            if (place < first || place > last) return -1;
            return static_cast<int>(min((place - base) >> shift, static_cast<Place>(kBins - 1)));
        };
        Sums nearer{0, 0}, farther{0, 0};  // in the first and the last bin, where many tokens may be
        row.each(largest, [&](const unsigned (&distances)[kWidth], int at) {
            int bin[kWidth];
            unsigned long long masses[kWidth];
#pragma unroll
            for (int j = 0; j < kWidth; ++j) {
                bin[j] = bin_of(distances[j], at + j);
                masses[j] = mass_at(distances[j]);
                if (bin[j] == 0) nearer.add({masses[j], 1});
                if (bin[j] == kBins - 1) farther.add({masses[j], 1});
                if (bin[j] == 0 || bin[j] == kBins - 1) bin[j] = -1;
            }
            here.add(bin, masses);
        });
        here.add_of_warp(0, nearer);
        here.add_of_warp(kBins - 1, farther);
        __syncthreads();
        const Sums mine = warp_sum(here.at(thread));
        if (lane == 0) of_warp[warp] = mine;
        __syncthreads();
        if (warp < blocks) in_block<blocks>(of_group[turn % 2][rank<blocks>()], warp)[lane] = of_warp[lane];
        sync<blocks>(warp < blocks);
        bins[(turn + 1) % 2].clear(thread);  // which all have read
        Search next = search;
        int group = 32;
        if (warp < blocks) {
            Sums sums{0, 0};
#pragma unroll 2
            for (int k = 0; k < blocks; ++k) sums.add(of_group[turn % 2][k][lane]);
            if (next.share < 1.0) {
                const double mass = static_cast<double>(warp_sum(sums.mass));
                next.wanted.mass = static_cast<unsigned long long>(ceil(next.share * mass));
                next.share = 1.0;
            }
            group = lane_reaching(next.wanted, sums, next.before);
            if (group < 32) of_bin[warp][lane] = in_block<blocks>(&here, warp)->at(32 * group + lane);
        }
        __syncthreads();
        if (warp == 0) {
            next.inside = 0;
            if (group < 32) {
                Sums sums{0, 0};
#pragma unroll 2
                for (int k = 0; k < blocks; ++k) sums.add(of_bin[k][lane]);
                const int found = lane_reaching(next.wanted, sums, next.before), bin = 32 * group + found;
                next.inside = static_cast<int>(__shfl_sync(kAll, sums.count, found));
                const Place from = next.base + (static_cast<Place>(bin) << next.shift);
                if (bin > 0) next.first = from;
                if (bin < kBins - 1) next.last = min(next.last, from + (static_cast<Place>(1) << next.shift) - 1);
                next.base = next.first;
                const int bits = 64 - __clzll(static_cast<long long>(next.last - next.first));
                next.shift = min(next.shift, max(0, bits - kBinBits));  // the last bin may be wider than the others
            }
            if (lane == 0) search = next;
        }
        __syncthreads();
    }
    if (search.inside == 0) return ~0ull;  // all are kept

    // At most kFew tokens are left. Each block copies all of them and, for each one, sums those that come before it.
    row.each(largest, [&, first = search.first, last = search.last](const unsigned (&distances)[kWidth], int at) {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
            const Place place = place_of(distances[j], at + j);
            if (first <= place && place <= last) few_of_block[atomicAdd(&n_of_block, 1)] = place;
        }
    });
    if (blocks > 1) __syncthreads();
    sync<blocks>(warp == 0);
#pragma unroll
    for (int k = 0; k < blocks * kFew; k += kThreads) {
        const int of = (thread + k) / kFew, i = thread % kFew;
        if (of >= blocks) break;
        const int count = *in_block<blocks>(&n_of_block, of);
        const Place place = in_block<blocks>(few_of_block, of)[i];
        if (i < count) {
            const int at = atomicAdd(&n, 1);
            few[at] = place;
            masses[at] = mass_at(static_cast<unsigned>(place >> kIdBits));
        }
    }
    __syncthreads();
    for (int i = warp; i < n; i += kWarps) {
        const Place place = few[i];
        Sums before{0, 0};
#pragma unroll 2
        for (int j = lane; j < n; j += 32) {
            if (few[j] < place) before.add({masses[j], 1});
        }
        before = warp_sum(before);
        before.add(search.before);
        const Sums reached{before.mass + masses[i], before.count + 1};
        if (lane == 0 && !before.reach(search.wanted) && reached.reach(search.wanted)) cut = place;
    }
    __syncthreads();
    return cut;
}

// Finds the id at which the sum of value(distance, id), in the order of ids, first exceeds point(sum of all). One
// thread of the row calls found(id).
template <typename T, int blocks, bool holds, typename Value, typename Point, typename Found>
__device__ __forceinline__ void locate(const Row<T, blocks, holds>& row, float largest, Value value, Point point,
                                       Found found) {
    __shared__ unsigned long long of_warp[kWarps], of_block[blocks];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    unsigned long long values[kWidth], own = 0;
    const auto sum_of = [&](const unsigned (&distances)[kWidth], int at) {
        unsigned long long sum = 0;
#pragma unroll
        for (int j = 0; j < kWidth; ++j) sum += values[j] = value(distances[j], at + j);
        return sum;
    };
    row.each(largest, [&](const unsigned (&distances)[kWidth], int at) { own += sum_of(distances, at); });
    const unsigned long long mine = warp_sum(own);
    if (lane == 0) of_warp[warp] = mine;
    __syncthreads();
    const unsigned long long beside = of_warp[lane];
    unsigned long long before = warp_sum(lane < warp ? beside : 0);
    if (warp == 0) {
        const unsigned long long sum = warp_sum(beside);
        if (lane < blocks) *in_block<blocks>(&of_block[rank<blocks>()], lane) = sum;
    }
    sync<blocks>(warp == 0);
    unsigned long long all = 0;
#pragma unroll
    for (int k = 0; k < blocks; ++k) {
        if (k == rank<blocks>()) before += all;
        all += of_block[k];
    }
    const unsigned long long wanted = point(all);
    if (before > wanted || wanted >= before + mine) return;  // for all warps but one
    row.each(largest, [&](const unsigned (&distances)[kWidth], int at) {
        const unsigned long long sum = holds ? own : sum_of(distances, at);
        unsigned long long reached = sum;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const unsigned long long lower = __shfl_up_sync(kAll, reached, step);
            reached += lane >= step ? lower : 0;
        }
        unsigned long long here = before + reached - sum;
        if (here <= wanted && wanted < here + sum) {
            int not_yet = 0;
#pragma unroll
            for (int j = 0; j < kWidth; ++j) {
                here += values[j];
                not_yet += here <= wanted;
            }
            found(at + not_yet);
        }
        before += __shfl_sync(kAll, reached, 31);
    });
}

// logits: (rows, vocab), `stride` apart. ids: -1 where the logits are not finite.
template <typename T, int blocks, bool holds>
__global__ void __launch_bounds__(kThreads)
sample_rows(const T* __restrict__ logits, int64_t stride, const float* __restrict__ counts,
            const bool* __restrict__ barred, const double* __restrict__ settings, const double* __restrict__ uniforms,
            int vocab, bool aligned, int64_t* __restrict__ ids, float* __restrict__ logprobs) {
    arrive<blocks>(false);
    const unsigned number = blockIdx.x / blocks;
    const double* mine = settings + static_cast<int64_t>(number) * kSettings;
    Row<T, blocks, holds> row{logits + number * stride,     nullptr, barred, vocab, aligned,
                              static_cast<float>(mine[3]), static_cast<float>(mine[4]), {}};
    if (counts != nullptr && (mine[3] != 0.0 || mine[4] != 0.0)) {
        row.counts = counts + static_cast<int64_t>(number) * vocab;
    }
    const double temperature = mine[0], top_p = mine[1], top_k = mine[2];
    const bool greedy = temperature == 0.0 || top_p == 0.0 || top_k == 1.0;
    const float scale =
        greedy ? 0.0f : static_cast<float>(fmin(kLog2E / temperature, static_cast<double>(kLargestFloat)));
    const unsigned most = top_k > 0.0 ? static_cast<unsigned>(fmin(top_k, 4294967295.0)) : kAll;
    const Summary summary = summary_of(row);
    const auto write = [&](int id) {
        ids[number] = id;
        logprobs[number] =
            id < 0 ? 0.0f : static_cast<float>(row.logits[id]) - summary.largest - logf(summary.sum);
    };
    const float best = float_of(static_cast<unsigned>(summary.best >> 32));
    const bool bad = summary.nan || summary.largest == INFINITY || summary.best == 0 || best == INFINITY;
    if (bad || greedy) {
        const int likeliest = static_cast<int>(kAll - static_cast<unsigned>(summary.best));
        if (threadIdx.x == 0 && rank<blocks>() == 0) write(bad ? -1 : likeliest);
        return;
    }
    row.hold_distances(best);
    const Place cut = top_p < 1.0 || most < kAll ? cut_of(row, best, top_p, most) : ~0ull;
    const double uniform = uniforms[number];
    const auto value = [=](unsigned distance, int id) -> unsigned long long {
        const bool kept = place_of(distance, id) <= cut && distance != kInfinity;
        return kept ? weight(__uint_as_float(distance), scale) : 0;
    };
    const auto point = [=](unsigned long long sum) {
        const auto at = static_cast<unsigned long long>(uniform * static_cast<double>(sum));
        return at < sum ? at : sum - 1;
    };
    locate(row, best, value, point, write);
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
    const auto kernel = !few    ? sample_rows<T, 1, false>
                        : holds ? sample_rows<T, kCluster, true>
                                : sample_rows<T, kCluster, false>;
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
