// LayerNorm, token shift and mixing on a GPU, forward and backward: every activation crosses the memory bus once.
//
// A block marches over a strip of consecutive tokens; each thread has `width` channels. What a token takes from its
// neighbour is kept in registers, so a strip reads one token of another strip. Forward goes up the tokens, for each
// needs the normed one before; backward goes down, since a token's gradient needs that of the one behind. Sums over
// tokens (gradients of the mixes and of the norm) stay in registers until the strip ends; a second kernel adds up the
// strips, in one order.

#ifdef __CUDACC__  // the tests also compile the kernels for a CPU
#include <cuda_bf16.h>

#include <algorithm>

#include "../../csrc/operator.h"
#endif

#include "../../csrc/strips.cuh"

namespace {

constexpr int kMixes = 6;             // at most; kMostSums - 2
constexpr int kBackwardStrips = 512;  // of all kMixes; twice as many of fewer, which keep less in registers
constexpr int kLargestC = 2048;
constexpr int kWarps = 16;  // of a block, at most

// Sums of `n` numbers over the block, which every thread gets. Calls take turns with two buffers, so that one barrier
// is enough: who writes into a buffer again has passed the barrier of the other, and so has everybody who read it.
template <int n>
class BlockSum {
  public:
    __device__ __forceinline__ BlockSum(float (&room)[2][kWarps][n]) : of_warp_(room) {
        for (int i = threadIdx.x; i < 2 * kWarps * n; i += blockDim.x) (&room[0][0][0])[i] = 0;
        __syncthreads();
    }

    __device__ __forceinline__ void operator()(float (&values)[n]) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
        for (int mask = 16; mask; mask /= 2)
#pragma unroll
            for (int i = 0; i < n; ++i) values[i] += __shfl_xor_sync(0xffffffffu, values[i], mask);
        if (lane == 0)
#pragma unroll
            for (int i = 0; i < n; ++i) of_warp_[turn_][warp][i] = values[i];
        __syncthreads();
#pragma unroll
        for (int i = 0; i < n; ++i) values[i] = 0;
#pragma unroll 1
        for (int first = 0; first < warps; first += 4)  // what is beyond the last warp is 0
#pragma unroll
            for (int w = first; w < first + 4; ++w)
#pragma unroll
                for (int i = 0; i < n; ++i) values[i] += of_warp_[turn_][w][i];
        turn_ ^= 1;
    }

  private:
    float (&of_warp_)[2][kWarps][n];
    int turn_ = 0;
};

template <typename T>
struct Norm {
    const T *weight, *bias;
    const T* mixes[kMixes];
};

struct Shape {
    int rows, tokens, channels, strip;  // rows: tokens of all sequences
    float per_channel;                  // 1 / channels
    const int* begins;                  // (sequences + 1,): the first row of each; null: each has `tokens`
    int sequences;
};

// The sequence that a row is in, for a block that goes from row to row. Sequences may be empty.
struct Sequence {
    int number, begin, end;

    __device__ __forceinline__ Sequence(const Shape& shape, int row) : number(0) {
        if (!shape.begins) {
            number = row / shape.tokens;
        } else {
            for (int beyond = shape.sequences; beyond - number > 1;) {
                const int middle = (number + beyond) / 2;
                (shape.begins[middle] <= row ? number : beyond) = middle;
            }
        }
        begin = begin_of(shape, number), end = begin_of(shape, number + 1);
    }
    // Whether `row`, which comes behind the last one asked for, is the first of another sequence.
    __device__ __forceinline__ bool up_to(const Shape& shape, int row) {
        if (row < end) return false;
        while (row >= end) begin = end, end = begin_of(shape, ++number + 1);
        return true;
    }
    __device__ __forceinline__ void down_to(const Shape& shape, int row) {
        while (row < begin) end = begin, begin = begin_of(shape, --number);
    }

  private:
    static __device__ __forceinline__ int begin_of(const Shape& shape, int number) {
        return shape.begins ? shape.begins[number] : number * shape.tokens;
    }
};

template <typename T>
struct Forward {
    const T *x, *branch;  // (rows, C); branch may be null
    const T* last;        // (sequences, C): the normed token before each; null: zeros
    Norm<T> norm;
    T* sum;  // of x and branch; null without a branch
    T* mixed[kMixes];
    T* new_last;  // (sequences, C); those of empty sequences are left as they are
    float2* stats;  // (rows,): mean and 1 / deviation
    Shape shape;
    float eps;
};

template <typename T, int width, int n_mixes>
__global__ void __launch_bounds__(kLargestC / width, width / 4) forward(const Forward<T> p) {
    constexpr int kAtOnce = 2;
    const int c = threadIdx.x * width;
    const bool mine = c < p.shape.channels;
    const auto weights = load<T, width>(p.norm.weight + c, mine), biases = load<T, width>(p.norm.bias + c, mine);
    Pack<T, width> mixes[n_mixes];
#pragma unroll
    for (int m = 0; m < n_mixes; ++m) mixes[m] = load<T, width>(p.norm.mixes[m] + c, mine);
    __shared__ __align__(16) float of_warp[2][kWarps][kAtOnce];
    BlockSum<kAtOnce> block_sum(of_warp);

    const auto offset = [&](int row) { return static_cast<int64_t>(row) * p.shape.channels + c; };
    // x of `kAtOnce` rows, with the branch, as it is put away: with the rounding.
    const auto read = [&](int row, int end, float(&x)[kAtOnce][width]) {
        Pack<T, width> packs[kAtOnce], branches[kAtOnce] = {};
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            packs[i] = load<T, width>(p.x + offset(row + i), mine && row + i < end);
            if (p.branch) branches[i] = load<T, width>(p.branch + offset(row + i), mine && row + i < end);
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            packs[i].get(x[i]);
            if (!p.branch) continue;
            float branch[width];
            branches[i].get(branch);
#pragma unroll
            for (int v = 0; v < width; ++v) x[i][v] += branch[v];
            packs[i].set(x[i]);
            packs[i].get(x[i]);
        }
    };
    // x becomes its norm, without weight and bias.
    const auto normalise = [&](float(&x)[kAtOnce][width], float2(&stats)[kAtOnce]) {
        float total[kAtOnce] = {}, square[kAtOnce] = {};
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
            for (int v = 0; v < width; ++v) total[i] += x[i][v];
        block_sum(total);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            stats[i].x = total[i] * p.shape.per_channel;
#pragma unroll
            for (int v = 0; v < width; ++v) {
                x[i][v] -= stats[i].x;
                square[i] += x[i][v] * x[i][v];
            }
            if (!mine) square[i] = 0;
        }
        block_sum(square);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            stats[i].y = rsqrtf(square[i] * p.shape.per_channel + p.eps);
#pragma unroll
            for (int v = 0; v < width; ++v) x[i][v] *= stats[i].y;
        }
    };

    const int first = blockIdx.x * p.shape.strip, end = min(first + p.shape.strip, p.shape.rows);
    Sequence sequence(p.shape, first);
    float before[width];  // the token before, normed
    float x[kAtOnce][width], weight[width], bias[width];
    float2 stats[kAtOnce];
    const auto read_last = [&] { load<T, width>(p.last + offset(sequence.number), mine && p.last).get(before); };
    if (first == sequence.begin) {
        read_last();
    } else {
        read(first - 1, first, x);
        normalise(x, stats);
        weights.get(weight), biases.get(bias);
#pragma unroll
        for (int v = 0; v < width; ++v) before[v] = x[0][v] * weight[v] + bias[v];
    }
    for (int row = first; row < end; row += kAtOnce) {
        read(row, end, x);
        if (p.branch && mine)
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i)
                if (row + i < end) store(p.sum + offset(row + i), x[i]);
        normalise(x, stats);
        float delta[kAtOnce][width];
        weights.get(weight), biases.get(bias);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const bool there = row + i < end;
            if (threadIdx.x == 0 && there) p.stats[row + i] = stats[i];
            if (there && sequence.up_to(p.shape, row + i)) read_last();
#pragma unroll
            for (int v = 0; v < width; ++v) {
                x[i][v] = x[i][v] * weight[v] + bias[v];
                delta[i][v] = before[v] - x[i][v];
                before[v] = x[i][v];
            }
            if (row + i + 1 == sequence.end && there && mine) store(p.new_last + offset(sequence.number), x[i]);
        }
        if (!mine) continue;
#pragma unroll
        for (int m = 0; m < n_mixes; ++m) {
            float mix[width];
            mixes[m].get(mix);
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                float out[width];
#pragma unroll
                for (int v = 0; v < width; ++v) out[v] = x[i][v] + delta[i][v] * mix[v];
                if (row + i < end) store(p.mixed[m] + offset(row + i), out);
            }
        }
    }
}

template <typename T>
struct Backward {
    const T* d_mixed[kMixes];  // (rows, C)
    const T *d_sum, *sum;      // (rows, C); d_sum may be null
    const float2* stats;
    Norm<T> norm;
    const T *last, *d_new_last;  // (sequences, C), each may be null
    T* d;             // (rows, C)
    T* d_last;        // (sequences, C); null without `last`; those of empty sequences are left as they are
    float* of_strip;  // (strips, n_mixes + 2, C): gradients of the mixes, of weight and bias; null: they are not wanted
    Shape shape;
};

// What a row needs is copied to shared memory some rows ahead, by the thread that will use it.
template <typename T>
constexpr int kAhead = 8 / sizeof(T);

// Numbers a thread: of many mixes few, for it keeps their sums in registers.
template <typename T, int n_mixes>
constexpr int kBackwardWidth = sizeof(T) == 4 || n_mixes > 2 ? 4 : 8;

template <typename T, int n_mixes>
constexpr size_t backward_memory(int threads) {
    return sizeof(T) * kBackwardWidth<T, n_mixes> * kAhead<T> * (n_mixes + 2) * threads;
}

template <typename T, int n_mixes>
__global__ void __launch_bounds__(kLargestC / kBackwardWidth<T, n_mixes>) backward(const Backward<T> p) {
    constexpr int width = kBackwardWidth<T, n_mixes>, ahead = kAhead<T>, parts = n_mixes + 2;
    using Part = Pack<T, width>;
    const int c = threadIdx.x * width, threads = blockDim.x;
    const bool mine = c < p.shape.channels;
    const auto weights = load<T, width>(p.norm.weight + c, mine), biases = load<T, width>(p.norm.bias + c, mine);
    Part mixes[n_mixes];
#pragma unroll
    for (int m = 0; m < n_mixes; ++m) mixes[m] = load<T, width>(p.norm.mixes[m] + c, mine);
    __shared__ __align__(16) float of_warp[2][kWarps][2];
    BlockSum<2> block_sum(of_warp);

    const int first = blockIdx.x * p.shape.strip, end = min(first + p.shape.strip, p.shape.rows);
    const auto offset = [&](int row) { return static_cast<int64_t>(row) * p.shape.channels + (mine ? c : 0); };
    Part* const room = reinterpret_cast<Part*>(shared_memory()) + threadIdx.x;  // [row % ahead][part][thread]
    const auto place = [&](int row) { return room + (row & (ahead - 1)) * parts * threads; };
    const auto begin_row = [&](int row) {
        if (row >= first) {
            const int64_t at = offset(row);
            Part* to = place(row);
#pragma unroll
            for (int m = 0; m < n_mixes; ++m) begin_copy(to + m * threads, p.d_mixed[m] + at, mine);
            if (p.d_sum) begin_copy(to + n_mixes * threads, p.d_sum + at, mine);
            if (row > 0) begin_copy(to + (n_mixes + 1) * threads, p.sum + at - p.shape.channels, mine);
        }
        end_of_copies();
    };
    const auto stats_before = [&](int row) { return row >= first && row > 0 ? p.stats[row - 1] : float2{0, 0}; };
    for (int i = 1; i <= ahead; ++i) begin_row(end - i);

    float of_mix[n_mixes][width] = {}, of_weight[width] = {}, of_bias[width] = {};
    float from_behind[width] = {};  // gradient of this token's normed values by way of the next token
    Sequence sequence(p.shape, end - 1);
    if (end < sequence.end) {
#pragma unroll
        for (int m = 0; m < n_mixes; ++m) {
            float d[width], mix[width];
            load<T, width>(p.d_mixed[m] + offset(end), mine).get(d);
            mixes[m].get(mix);
#pragma unroll
            for (int v = 0; v < width; ++v) from_behind[v] += d[v] * mix[v];
        }
    }
    float normed[width];  // without weight and bias
    float scale = p.stats[end - 1].y;
    load<T, width>(p.sum + offset(end - 1), mine).get(normed);
#pragma unroll
    for (int v = 0; v < width; ++v) normed[v] = (normed[v] - p.stats[end - 1].x) * scale;
    float2 next_before = stats_before(end - 1);
    for (int row = end - 1; row >= first; --row) {
        const float2 before = next_before;
        next_before = stats_before(row - 1);
        copies_arrived<ahead - 1>();
        const Part* here = place(row);
        sequence.down_to(p.shape, row);
        const bool has_before = row > sequence.begin;
        const int64_t of_sequence = static_cast<int64_t>(sequence.number) * p.shape.channels + c;
        if (row + 1 == sequence.end) load<T, width>(p.d_new_last + of_sequence, mine && p.d_new_last).get(from_behind);
        float weight[width], bias[width], d_sum[width] = {}, normed_before[width] = {};
        float all[width] = {}, to_before[width] = {}, delta[width], sums[2] = {};
        if (p.d_sum) here[n_mixes * threads].get(d_sum);
        if (row > 0) here[(n_mixes + 1) * threads].get(normed_before);
        weights.get(weight), biases.get(bias);
#pragma unroll
        for (int v = 0; v < width; ++v) {
            normed_before[v] = (normed_before[v] - before.x) * before.y;
            delta[v] = has_before ? (normed_before[v] - normed[v]) * weight[v] : -(normed[v] * weight[v] + bias[v]);
        }
        if (!has_before && p.last) {
            float last[width];
            load<T, width>(p.last + of_sequence, mine).get(last);
#pragma unroll
            for (int v = 0; v < width; ++v) delta[v] += last[v];
        }
#pragma unroll
        for (int m = 0; m < n_mixes; ++m) {
            float d[width], mix[width];
            here[m * threads].get(d);
            mixes[m].get(mix);
#pragma unroll
            for (int v = 0; v < width; ++v) {
                all[v] += d[v];
                to_before[v] += d[v] * mix[v];
                of_mix[m][v] += d[v] * delta[v];
            }
        }
        begin_row(row - ahead);  // into the place that has just been read
#pragma unroll
        for (int v = 0; v < width; ++v) {
            const float d = all[v] - to_before[v] + from_behind[v];
            from_behind[v] = to_before[v];
            of_weight[v] += d * normed[v];
            of_bias[v] += d;
            all[v] = d * weight[v];
            sums[0] += all[v];
            sums[1] += all[v] * normed[v];
        }
        if (!has_before && p.d_last && mine) store(p.d_last + of_sequence, to_before);
        block_sum(sums);
        const float mean = sums[0] * p.shape.per_channel, slope = sums[1] * p.shape.per_channel;
        if (mine) {
#pragma unroll
            for (int v = 0; v < width; ++v) d_sum[v] += (all[v] - mean - normed[v] * slope) * scale;
            store(p.d + offset(row), d_sum);
        }
        scale = before.y;
#pragma unroll
        for (int v = 0; v < width; ++v) normed[v] = normed_before[v];
    }
    if (!mine || !p.of_strip) return;
    float* out = p.of_strip + static_cast<int64_t>(blockIdx.x) * (n_mixes + 2) * p.shape.channels + c;
    const auto put = [&](const float(&values)[width]) {
        store(out, values);
        out += p.shape.channels;
    };
#pragma unroll
    for (int m = 0; m < n_mixes; ++m) put(of_mix[m]);
    put(of_weight);
    put(of_bias);
}

int strips_of(const Shape& shape) { return (shape.rows + shape.strip - 1) / shape.strip; }

int threads_for(int channels, int width) { return (channels / width + 31) / 32 * 32; }

#ifdef __CUDACC__
// But for `strip`.
Shape shape_of(const Tensor& x, const Optional& begins) {
    const int64_t rows = x.size(0) * x.size(1);
    STD_TORCH_CHECK(rows < int64_t{1} << 30, "shift_mix: too many tokens");
    const auto tokens = static_cast<int>(x.size(1)), channels = static_cast<int>(x.size(2));
    Shape shape{static_cast<int>(rows), tokens, channels, 0, 1.0f / static_cast<float>(channels), nullptr, 0};
    shape.sequences = static_cast<int>(x.size(0));
    if (begins) {
        STD_TORCH_CHECK(begins->scalar_type() == ScalarType::Int && begins->is_contiguous() && on_one_device(*begins, x) &&
                        begins->dim() == 1 && begins->numel() > 1 && x.size(0) == 1,
                        "shift_mix: begins must be (sequences + 1,) int32 on the device of x, and x (1, T, C)");
        shape.begins = begins->const_data_ptr<int>();
        shape.sequences = static_cast<int>(begins->numel()) - 1;
    }
    return shape;
}

void check(const Tensor& x, const Tensor& like, const char* name) {
    STD_TORCH_CHECK(x.scalar_type() == like.scalar_type() && x.is_contiguous() && on_one_device(x, like) &&
                    begins_at_multiple_of(16, x),
                    "shift_mix: ", name, " must be contiguous, 16-byte aligned and of the dtype and device of x");
}

// Tokens of a strip, where there are to be so many of them.
int strip_of(const Shape& shape, int strips) { return std::max(4, (shape.rows + strips - 1) / strips); }

// (sequences, C), which the kernels fill but for empty sequences; there they are as `otherwise`, or zeros.
Tensor of_sequences(const Tensor& x, const Shape& shape, const Optional& otherwise) {
    if (!shape.begins) return empty({shape.sequences, shape.channels}, x);
    return otherwise ? torch::stable::clone(*otherwise) : zeros({shape.sequences, shape.channels}, x);
}

template <typename T>
const T* checked_of_sequences(const Optional& given, const Tensor& x, const Shape& shape,
                              const char* name) {
    if (!given) return nullptr;
    check(*given, x, name);
    STD_TORCH_CHECK(given->numel() == int64_t{shape.sequences} * shape.channels, "shift_mix: ", name,
                    " must be (sequences, C)");
    return given->const_data_ptr<T>();
}

template <typename T>
Norm<T> norm_of(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensors& mixes) {
    STD_TORCH_CHECK(mixes.size() == 1 || mixes.size() == 2 || mixes.size() == kMixes, "shift_mix: 1, 2 or 6 mixes");
    STD_TORCH_CHECK(x.dim() == 3 && x.size(2) % 8 == 0 && x.size(2) <= kLargestC, "shift_mix: C must be 8, 16, ... 2048");
    check(weight, x, "weight"), check(bias, x, "bias");
    Norm<T> norm{weight.const_data_ptr<T>(), bias.const_data_ptr<T>(), {}};
    for (size_t i = 0; i < mixes.size(); ++i) {
        check(mixes[i], x, "mixes");
        STD_TORCH_CHECK(mixes[i].numel() == x.size(2), "shift_mix: a mix has C values");
        norm.mixes[i] = mixes[i].const_data_ptr<T>();
    }
    return norm;
}

template <typename Launch>
void with_mixes(size_t n, const Launch& launch) {
    if (n == 1) launch(std::integral_constant<int, 1>());
    if (n == 2) launch(std::integral_constant<int, 2>());
    if (n == kMixes) launch(std::integral_constant<int, kMixes>());
}

Tensors run_forward(const Tensor& x, const Optional& branch,
                    const Tensor& weight, const Tensor& bias, const Tensors& mixes,
                    const Optional& last, const Optional& begins,
                    double eps) {
    const DeviceGuard guard(x.get_device_index());
    const auto stream = current_stream();
    const Shape shape = shape_of(x, begins);
    check(x, x, "x");
    Tensors out;
    for (size_t i = 0; i < mixes.size(); ++i) out.push_back(empty_like(x));
    out.push_back(empty({shape.rows, 2}, x, ScalarType::Float));
    out.push_back(of_sequences(x, shape, last));
    if (branch) {
        check(*branch, x, "branch");
        STD_TORCH_CHECK(branch->sizes().equals(x.sizes()), "shift_mix: branch must have the shape of x");
        out.push_back(empty_like(x));
    }
    if (shape.rows == 0) return out;
    with_dtype<float, BFloat16>(x, "shift_mix", [&](auto zero) {
        using T = decltype(zero);
        constexpr int width = 16 / sizeof(T);
        Forward<T> p{};
        p.x = x.const_data_ptr<T>(), p.norm = norm_of<T>(x, weight, bias, mixes);
        p.last = checked_of_sequences<T>(last, x, shape, "last");
        p.new_last = out[mixes.size() + 1].mutable_data_ptr<T>();
        for (size_t i = 0; i < mixes.size(); ++i) p.mixed[i] = out[i].mutable_data_ptr<T>();
        p.stats = reinterpret_cast<float2*>(out[mixes.size()].mutable_data_ptr<float>());
        if (branch) p.branch = branch->const_data_ptr<T>(), p.sum = out.back().mutable_data_ptr<T>();
        p.shape = shape, p.eps = static_cast<float>(eps);
        with_mixes(mixes.size(), [&](auto n) {
            const auto kernel = &forward<T, width, n.value>;
            const int threads = threads_for(shape.channels, width);
            p.shape.strip = strip_of(shape, blocks_at_a_time(kernel, threads, 0));
            kernel<<<strips_of(p.shape), threads, 0, stream>>>(p);
        });
        STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
    return out;
}

Tensors run_backward(const Tensors& d_mixed, const Optional& d_sum,
                     const Optional& d_new_last, const Tensor& sum,
                     const Tensor& stats, const Tensor& weight, const Tensor& bias,
                     const Tensors& mixes, const Optional& last,
                     const Optional& begins, bool of_weights) {
    const DeviceGuard guard(sum.get_device_index());
    const auto stream = current_stream();
    const int n_mixes = static_cast<int>(mixes.size());
    const Shape shape = shape_of(sum, begins);
    check(sum, sum, "x");
    STD_TORCH_CHECK(d_mixed.size() == mixes.size(), "shift_mix: a gradient for each mix");
    const int sums = of_weights ? n_mixes + 2 : 0;
    Tensors out{empty_like(sum)};
    for (int i = 0; i < sums; ++i) out.push_back(shape.rows ? empty_like(weight) : zeros_like(weight));
    if (last) out.push_back(of_sequences(sum, shape, d_new_last));
    if (shape.rows == 0) return out;
    Tensor of_strip;
    with_dtype<float, BFloat16>(sum, "shift_mix", [&](auto zero) {
        using T = decltype(zero);
        Backward<T> p{};
        for (int i = 0; i < n_mixes; ++i) {
            check(d_mixed[i], sum, "gradients");
            p.d_mixed[i] = d_mixed[i].const_data_ptr<T>();
        }
        if (d_sum) {
            check(*d_sum, sum, "gradient of the sum");
            p.d_sum = d_sum->const_data_ptr<T>();
        }
        p.sum = sum.const_data_ptr<T>(), p.stats = reinterpret_cast<const float2*>(stats.const_data_ptr<float>());
        p.norm = norm_of<T>(sum, weight, bias, mixes);
        p.last = checked_of_sequences<T>(last, sum, shape, "last");
        p.d_new_last = checked_of_sequences<T>(d_new_last, sum, shape, "gradient of the new last");
        if (last) p.d_last = out.back().mutable_data_ptr<T>();
        p.d = out[0].mutable_data_ptr<T>();
        p.shape = shape;
        with_mixes(n_mixes, [&](auto n) {
            const int threads = threads_for(shape.channels, kBackwardWidth<T, n.value>);
            const auto bytes = static_cast<int>(backward_memory<T, n.value>(threads));
            const auto kernel = &backward<T, n.value>;
            STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
            p.shape.strip = strip_of(shape, n_mixes == kMixes ? kBackwardStrips : 2 * kBackwardStrips);
            if (sums) {
                of_strip = empty({strips_of(p.shape), sums, shape.channels}, sum, ScalarType::Float);
                p.of_strip = of_strip.mutable_data_ptr<float>();
            }
            kernel<<<strips_of(p.shape), threads, bytes, stream>>>(p);
        });
        STD_CUDA_KERNEL_LAUNCH_CHECK();
        if (!sums) return;
        const int columns = sums * shape.channels;
        Columns<T> q{p.of_strip, {}, strips_of(p.shape), shape.channels, columns};
        // as the strips have them: the mixes, weight, bias; as they are returned: weight, bias, the mixes
        for (int i = 0; i < sums; ++i) q.out[i] = out[i < n_mixes ? i + 3 : i - n_mixes + 1].mutable_data_ptr<T>();
        add_up_strips<T><<<(columns + kColumns - 1) / kColumns, kColumns * kPerColumn, 0, stream>>>(q);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(heron, CUDA, library) {
    library.impl("shift_mix", TORCH_BOX(&run_forward));
    library.impl("shift_mix_backward", TORCH_BOX(&run_backward));
}
#else
}  // namespace
#endif
