// Gradients of the soft suffix carrier on a GPU: a block for a stream, tiles of 32 rows t and 32 distances c = t - 1 - u.
//
// Down a distance the soft length follows from the one before it, so a lane walks a column of a tile. Sums over the
// distances of a row, and over the rows of an end u, which stands askew in a tile, are made by a lane each from the tile
// in shared memory. Of the lengths only those at the borders of tiles are kept; all others are found again. No sum
// depends on which warp comes first: two runs give the same bits. README.md has the equations.

#ifdef __CUDACC__  // the tests also compile the kernel for a CPU
#include "../../csrc/operator.h"
#endif

namespace {

constexpr int kSide = 32;          // of a tile: the lanes of a warp
constexpr int kWarps = 8;          // of a block, at most
constexpr int kMostBits = 8;       // of a symbol
constexpr int64_t kBlocks = 1024;  // more than a GPU runs at once
constexpr int64_t kScratchBytes = int64_t{1} << 28;
constexpr float kSharpness = 2.41421356f;   // sqrt 2 + 1
constexpr float kSharpness2 = 3.48297393f;  // over ln 2
constexpr float kNoMatchLogit = 0.5f;
constexpr float kNoMatch = -1.0f;  // in the place of a length

struct Problem {
    const uint8_t *q, *k, *v;        // (streams, tokens)
    const float* slope;              // (streams, tokens, bits): what half a step of each bit of the value is worth
    const float *middle, *no_match;  // (streams, tokens): what a value without its bits is worth, and no match
    float *dq, *dk, *dv;             // (streams, tokens, bits): by the signs 1 and -1
    float* scratch;                  // floats_of() for each block
    int64_t streams;
    int tokens, bits;
};

inline __host__ __device__ int64_t tiles_of(int tokens) { return (tokens + kSide - 1) / kSide; }

// Of a block: a column for each tile on or below the diagonal, and for each bit two sums of keys and two of values.
inline __host__ __device__ int64_t floats_of(int tokens, int bits) {
    const int64_t n = tiles_of(tokens);
    return kSide * (n * (n + 1) / 2 + n * 4 + n * 4 * bits);
}

// The softmax's, but for a factor of the row, whose largest weight has the root `top`.
inline __device__ float weight(float length, float top) {
    return length < 0.0f ? 0.0f : exp2f(kSharpness2 * (sqrtf(1.0f + length) - top));
}

// Sums over matches of a row, in fp64: an error of the mean is one of all its matches, in the same direction.
struct Softmax {
    float top;               // the root of the longest
    double weights, worths;  // over its weight; of weights times what each is worth
};

inline __device__ Softmax operator+(const Softmax& a, const Softmax& b) {
    const float top = fmaxf(a.top, b.top);
    const double by_a = exp2f(kSharpness2 * (a.top - top)), by_b = exp2f(kSharpness2 * (b.top - top));
    return {top, by_a * a.weights + by_b * b.weights, by_a * a.worths + by_b * b.worths};
}

// What is kept of a row: the probability of a match is its weight times `share`, and `mean + rest` what the row is worth.
struct Row {
    float top, share, mean, rest;
};

// What all warps of a block see.
struct Shared {
    float tile[kWarps][kSide][kSide + 1];
    union {
        Softmax sums[kWarps][kSide];
        float d_query[kWarps][kMostBits][kSide];
    };
    float gain[kMostBits + 1];  // by the number of bits that differ
    float slope[kMostBits][kSide], middle[kSide];
    Row row[kSide];
    uint8_t query[kSide];
};

// kBits: room for the bits of a symbol.
template <int kBits>
class Stream {
  public:
    __device__ Stream(const Problem& p, int64_t stream, float* scratch, Shared& shared)
        : p_(p),
          at_(stream * p.tokens),
          n_(static_cast<int>(tiles_of(p.tokens))),
          warps_(blockDim.x / kSide),
          warp_(threadIdx.x / kSide),
          lane_(threadIdx.x % kSide),
          borders_(scratch),
          rows_(reinterpret_cast<Row*>(borders_ + kSide * (int64_t{n_} * (n_ + 1) / 2))),
          sums_(borders_ + kSide * (int64_t{n_} * (n_ + 1) / 2 + 4 * n_)),
          shared_(shared),
          tile_(shared.tile[threadIdx.x / kSide]) {}

    __device__ void run() {
        for (int i = 0; i < n_; ++i) forward(i);
        for (int i = n_; i-- > 0;) backward(i);
        const float rate = 1.5f / p_.bits;
        for (int cell = threadIdx.x; cell < p_.tokens * p_.bits; cell += blockDim.x) {
            const int place = cell / p_.bits, bit = cell % p_.bits;
            p_.dk[at_ * p_.bits + cell] = rate * total(0, bit, place + 1);
            p_.dv[at_ * p_.bits + cell] = total(1, bit, place);
        }
    }

  private:
    // The lengths of the distances of tile j above its tile i; later what comes to them from below.
    __device__ float& border(int i, int j) { return borders_[kSide * (int64_t{i} * (i + 1) / 2 + j) + lane_]; }

    // Of two sums of each place, of keys (0) or values (1): the one of ends that are in the tile, or beside it.
    __device__ float& sum(int beside, int what, int bit, int64_t place) {
        return sums_[((beside * 2 + what) * p_.bits + bit) * kSide * int64_t{n_} + place];
    }

    __device__ float total(int what, int bit, int64_t place) {
        const int64_t end = kSide * int64_t{n_};
        return (place < end ? sum(0, what, bit, place) : 0.0f) + (place + kSide < end ? sum(1, what, bit, place + kSide) : 0.0f);
    }

    __device__ unsigned symbol(const uint8_t* of, int place) const { return of[at_ + min(max(place, 0), p_.tokens - 1)]; }

    // What one symbol gives in row r of tile i at this lane's distance of tile j.
    __device__ float gain(int i, int j, int r) const {
        return shared_.gain[__popc(shared_.query[r] ^ symbol(p_.k, kSide * (i - j) + r - 1 - lane_))];
    }

    // The worth of the value that follows the match in row r at distance `lane`.
    __device__ float worth(int i, int j, int r, int lane) const {
        const unsigned value = symbol(p_.v, kSide * (i - j) + r - lane);
        float sum = shared_.middle[r];
#pragma unroll
        for (int b = 0; b < kBits; ++b) sum += value >> b & 1 ? shared_.slope[b][r] : -shared_.slope[b][r];
        return sum;
    }

    __device__ float probability(int r, float length) const {
        return weight(length, shared_.row[r].top) * shared_.row[r].share;
    }

    // By the first warp alone, before a barrier. Behind their last one the others read nothing that it writes here.
    __device__ void load(int i) {
        if (warp_ != 0) return;
        const int64_t t = at_ + min(kSide * i + lane_, p_.tokens - 1);
        shared_.query[lane_] = p_.q[t];
        shared_.middle[lane_] = p_.middle[t];
        for (int b = 0; b < kBits; ++b) shared_.slope[b][lane_] = b < p_.bits ? p_.slope[t * p_.bits + b] : 0.0f;
    }

    // Puts the lengths of tile (i, j) into shared memory, and returns the last one of this lane's distance.
    __device__ float walk(int i, int j) {
        float length = j < i ? border(i, j) : 0.0f;
#pragma unroll 8
        for (int r = 0; r < kSide; ++r) {
            const bool is_match = (j < i || lane_ < r) && kSide * i + r < p_.tokens;
            if (is_match) length = gain(i, j, r) * (1.0f + length);
            tile_[r][lane_] = is_match ? length : kNoMatch;
        }
        __syncwarp();
        return length;
    }

    // Finds top, share and mean of the rows of tile i: a match of root x has the weight exp(sharpness (x - top)) share.
    __device__ void forward(int i) {
        load(i);
        __syncthreads();
        Softmax sum{1.0f, 0.0, 0.0};
        for (int j = warp_; j <= i; j += warps_) {
            const float last = walk(i, j);
            if (i + 1 < n_) border(i + 1, j) = last;
            float longest = 0.0f;
            for (int l = 0; l < kSide; ++l) longest = fmaxf(longest, tile_[lane_][l]);
            Softmax more{sqrtf(1.0f + longest), 0.0, 0.0};
#pragma unroll 8
            for (int l = 0; l < kSide; ++l) {
                const double w = weight(tile_[lane_][l], more.top);
                more.weights += w;
                more.worths += w * worth(i, j, lane_, l);
            }
            sum = sum + more;
            __syncwarp();
        }
        shared_.sums[warp_][lane_] = sum;
        __syncthreads();
        if (warp_ == 0) {
            const int t = min(kSide * i + lane_, p_.tokens - 1);
            const float none = 1.0f + (kNoMatchLogit + logf(static_cast<float>(max(t, 1)))) / kSharpness;
            Softmax all{none, 1.0, p_.no_match[at_ + t]};
            for (int w = 0; w < warps_; ++w) all = all + shared_.sums[w][lane_];
            const double mean = all.worths / all.weights;
            rows_[kSide * i + lane_] = {all.top, static_cast<float>(1.0 / all.weights), static_cast<float>(mean),
                                        static_cast<float>(mean - static_cast<float>(mean))};
        }
    }

    // Finds dq of the rows of tile i, and adds what they give to the sums of keys and values.
    __device__ void backward(int i) {
        load(i);
        if (warp_ == 0) shared_.row[lane_] = rows_[kSide * i + lane_];
        __syncthreads();
        float d_query[kBits] = {};
        for (int j = warp_; j <= i; j += warps_) {
            walk(i, j);
            add_askew(
                i, j, 1, [&](int r, float length) { return probability(r, length); },
                [&](int r, int b, float p) { return shared_.slope[b][r] * p; });
            __syncwarp();
            float carry = i + 1 < n_ ? border(i + 1, j) : 0.0f;
#pragma unroll 8
            for (int r = kSide; r-- > 0;) {
                const Row& row = shared_.row[r];
                const float length = tile_[r][lane_], p = probability(r, length);
                const float d_root = p * (worth(i, j, r, lane_) - row.mean - row.rest) * (0.5f * kSharpness);
                const float d_length = length < 0.0f ? 0.0f : carry + d_root * rsqrtf(1.0f + length);
                carry = d_length * gain(i, j, r);
                tile_[r][lane_] = d_length * length;
            }
            border(i, j) = carry;
            __syncwarp();
#pragma unroll 8
            for (int l = 0; l < kSide; ++l) {
                const unsigned key = symbol(p_.k, kSide * (i - j) + lane_ - 1 - l);
                const float d_log = tile_[lane_][l];
#pragma unroll
                for (int b = 0; b < kBits; ++b) d_query[b] += key >> b & 1 ? d_log : -d_log;
            }
            add_askew(
                i, j, 0, [](int, float d_log) { return d_log; },
                [&](int r, int b, float d_log) { return shared_.query[r] >> b & 1 ? d_log : -d_log; });
            __syncwarp();
        }
#pragma unroll
        for (int b = 0; b < kBits; ++b) shared_.d_query[warp_][b][lane_] = d_query[b];
        __syncthreads();
        for (int cell = threadIdx.x; cell < kSide * p_.bits; cell += blockDim.x) {
            const int r = cell / p_.bits, b = cell % p_.bits;
            float sum = 0.0f;
            for (int w = 0; w < warps_; ++w) sum += shared_.d_query[w][b][r];
            if (kSide * i + r < p_.tokens) p_.dq[(at_ + kSide * i) * p_.bits + cell] = 1.5f / p_.bits * sum;
        }
    }

    // Adds part(r, bit, value(r, cell)) over the cells of each end: cell (r, l) has the end r - l behind that of (0, 0). A
    // lane sums two ends, kSide apart, which have one cell of each column together. No other tile of rows i adds there.
    template <typename Value, typename Part>
    __device__ void add_askew(int i, int j, int what, const Value& value, const Part& part) {
        float inside[kBits] = {}, beside[kBits] = {};
#pragma unroll 8
        for (int l = 0; l < kSide; ++l) {
            const int r = (lane_ + l) % kSide;
            const float cell = value(r, tile_[r][l]);
#pragma unroll
            for (int b = 0; b < kBits; ++b) {
                const float more = part(r, b, cell);
                inside[b] += r >= lane_ ? more : 0.0f;
                beside[b] += r >= lane_ ? 0.0f : more;
            }
        }
        const bool is_first = i == n_ - 1;
        const int place = kSide * (i - j) + lane_;
#pragma unroll
        for (int b = 0; b < kBits; ++b) {
            if (b < p_.bits) {
                float &in = sum(0, what, b, place), &out = sum(1, what, b, place);
                in = inside[b] + (is_first ? 0.0f : in);
                out = beside[b] + (is_first ? 0.0f : out);
            }
        }
    }

    const Problem& p_;
    const int64_t at_;
    const int n_, warps_, warp_, lane_;
    float* const borders_;
    Row* const rows_;
    float* const sums_;
    Shared& shared_;
    float (*const tile_)[kSide + 1];
};

template <int kBits>
__global__ void __launch_bounds__(kSide* kWarps, kBits > 4 ? 2 : 3) soft(const Problem p) {
    __shared__ Shared shared;
    if (threadIdx.x <= static_cast<unsigned>(p.bits)) shared.gain[threadIdx.x] = expf(-3.0f * threadIdx.x / p.bits);
    float* scratch = p.scratch + blockIdx.x * floats_of(p.tokens, p.bits);
    for (int64_t stream = blockIdx.x; stream < p.streams; stream += gridDim.x)
        Stream<kBits>(p, stream, scratch, shared).run();
}

inline int64_t blocks_of(int64_t streams, int tokens, int bits) {
    const int64_t fit = kScratchBytes / int64_t{sizeof(float)} / floats_of(tokens, bits);
    return std::max<int64_t>(1, std::min({streams, kBlocks, fit}));
}

inline int threads_of(int tokens) { return kSide * static_cast<int>(std::min<int64_t>(kWarps, tiles_of(tokens))); }

}  // namespace

#ifdef __CUDACC__
namespace {

// q, k, v: (S, T) uint8 below 2^D; slope: (S, T, D), middle, no_match: (S, T) fp32. All contiguous; S, T >= 1; D <= 8.
std::tuple<Tensor, Tensor, Tensor> gradients(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& slope,
                                             const Tensor& middle, const Tensor& no_match) {
    const DeviceGuard guard(q.get_device_index());
    const int64_t streams = slope.size(0);
    const int tokens = static_cast<int>(slope.size(1)), bits = static_cast<int>(slope.size(2));
    STD_TORCH_CHECK(1 <= bits && bits <= kMostBits, "rosa: symbols of 1 to ", kMostBits, " bits, got ", bits);
    const int64_t blocks = blocks_of(streams, tokens, bits);
    auto dq = empty_like(slope), dk = empty_like(slope), dv = empty_like(slope);
    auto scratch = empty({blocks * floats_of(tokens, bits)}, slope);
    const Problem problem{q.mutable_data_ptr<uint8_t>(), k.mutable_data_ptr<uint8_t>(), v.mutable_data_ptr<uint8_t>(),
                          slope.mutable_data_ptr<float>(), middle.mutable_data_ptr<float>(),
                          no_match.mutable_data_ptr<float>(), dq.mutable_data_ptr<float>(), dk.mutable_data_ptr<float>(),
                          dv.mutable_data_ptr<float>(), scratch.mutable_data_ptr<float>(), streams, tokens, bits};
    const auto kernel = bits == 1 ? soft<1> : bits <= 4 ? soft<4> : soft<8>;
    kernel<<<static_cast<unsigned>(blocks), threads_of(tokens), 0, current_stream()>>>(problem);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(heron, library) {
    library.def(
        "rosa_soft_gradients(Tensor q, Tensor k, Tensor v, Tensor slope, Tensor middle, Tensor no_match) "
        "-> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(heron, CUDA, library) { library.impl("rosa_soft_gradients", TORCH_BOX(&gradients)); }
#endif
