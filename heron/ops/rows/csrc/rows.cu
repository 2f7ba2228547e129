// Rows of many tables on a GPU: one launch for all tables, one warp for one row. A table may lie on the device or in
// pinned host memory, whose address is one of the device's too; the same instructions read and write both.

#include "rows.h"

#include <algorithm>

#include "../../csrc/operator.h"

namespace {

using namespace heron_rows;

constexpr int kTables = 64;  // of one launch: what it is told about them must fit in 4 KiB
constexpr int kCopyThreads = 512, kStepThreads = 256, kWarp = 32;
constexpr int kBlocksPerProcessor = 8;

struct Copied {
    const char* source;
    char* target;
    int row_bytes;
};
struct Copies {
    Copied table[kTables];
};

struct Stepped {
    float* weights;
    void *exp_avg, *exp_avg_sq;
    int* row_step;
    const float* gradients;
    int width;
};
struct Steps {
    Stepped table[kTables];
};

__device__ __forceinline__ int64_t place(const int64_t* index, int64_t row) { return index ? index[row] : row; }

// Row from_rows[i] of each source becomes row to_rows[i] of its target; without an index it is row i.
template <typename Piece>
__global__ void __launch_bounds__(kCopyThreads)
    copy(Copies copies, int n_tables, int64_t n, const int64_t* from_rows, const int64_t* to_rows) {
    const int64_t n_warps = static_cast<int64_t>(gridDim.x) * (kCopyThreads / kWarp);
    for (int64_t k = (static_cast<int64_t>(blockIdx.x) * kCopyThreads + threadIdx.x) / kWarp; k < n * n_tables; k += n_warps) {
        const Copied& table = copies.table[k / n];
        const int pieces = table.row_bytes / static_cast<int>(sizeof(Piece));
        const auto* from = reinterpret_cast<const Piece*>(table.source) + place(from_rows, k % n) * pieces;
        auto* to = reinterpret_cast<Piece*>(table.target) + place(to_rows, k % n) * pieces;
        copy_row<8>(from, to, pieces, threadIdx.x % kWarp, kWarp);
    }
}

template <int width, typename Moment>
__global__ void __launch_bounds__(kStepThreads)
    adamw(Steps steps, int n_tables, int64_t n, const int64_t* ids, const int64_t* weight_rows, const int64_t* moment_rows,
          double lr, double beta1, double beta2, double eps, const float* found_inf) {
    if (found_inf && *found_inf != 0) return;
    const int64_t n_warps = static_cast<int64_t>(gridDim.x) * (kStepThreads / kWarp);
    for (int64_t k = (static_cast<int64_t>(blockIdx.x) * kStepThreads + threadIdx.x) / kWarp; k < n * n_tables; k += n_warps) {
        const Stepped& table = steps.table[k / n];
        const int64_t i = k % n, w = place(weight_rows, i) * table.width, m = place(moment_rows, i) * table.width;
        const Step step = step_at(table.row_step[ids[i]] + 1, lr, beta1, beta2, eps);
        adamw_row<width, 2>(table.weights + w, static_cast<Moment*>(table.exp_avg) + m,
                            static_cast<Moment*>(table.exp_avg_sq) + m, table.gradients + i * table.width,
                            table.width / width, step, threadIdx.x % kWarp, kWarp);
    }
}

// After the step of every row: its lanes have all read the count by then.
__global__ void count(Steps steps, int n_tables, int64_t n, const int64_t* ids, const float* found_inf) {
    if (found_inf && *found_inf != 0) return;
    const int64_t k = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (k < n * n_tables) ++steps.table[k / n].row_step[ids[k % n]];
}

unsigned blocks_for(int64_t rows, int threads, int64_t most) {
    const int64_t wanted = (rows + threads / kWarp - 1) / (threads / kWarp);
    int processors = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, current_device()));
    return static_cast<unsigned>(std::min(wanted, most > 0 ? most : int64_t{processors} * kBlocksPerProcessor));
}

const int64_t* index_of(const Optional& rows) { return rows ? rows->const_data_ptr<int64_t>() : nullptr; }

void check(const Tensor& table, const char* name) {
    STD_TORCH_CHECK(table.dim() >= 1 && table.is_contiguous(), name, " must be contiguous");
    cudaPointerAttributes where{};
    STD_CUDA_CHECK(cudaPointerGetAttributes(&where, table.const_data_ptr()));
    STD_TORCH_CHECK(where.type != cudaMemoryTypeUnregistered, name, " must be on a CUDA device or in pinned memory");
}

bool aligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

void copy_rows(const Tensors& sources, const Optional& from_rows, const Tensors& targets,
               const Optional& to_rows, int64_t most_blocks) {
    STD_TORCH_CHECK(!sources.empty() && sources.size() == targets.size(), "as many targets as sources");
    const auto& there = sources[0].is_cuda() ? sources[0] : targets[0];
    const int64_t n = from_rows ? from_rows->numel() : to_rows ? to_rows->numel() : sources[0].size(0);
    STD_TORCH_CHECK(!to_rows || to_rows->numel() == n, "as many rows of the targets as of the sources");
    if (n == 0) return;
    const DeviceGuard guard(there.get_device_index());
    const auto stream = current_stream();
    for (size_t first = 0; first < sources.size(); first += kTables) {
        const int n_tables = static_cast<int>(std::min<size_t>(kTables, sources.size() - first));
        Copies copies;
        size_t piece = 16;
        for (int t = 0; t < n_tables; ++t) {
            const auto &source = sources[first + t], &target = targets[first + t];
            check(source, "sources"), check(target, "targets");
            STD_TORCH_CHECK(source.scalar_type() == target.scalar_type() && source.size(1) == target.size(1),
                            "rows of one width and dtype");
            const auto row_bytes = static_cast<size_t>(source.size(1)) * source.element_size();
            copies.table[t] = {static_cast<const char*>(source.const_data_ptr()),
                               static_cast<char*>(target.mutable_data_ptr()), static_cast<int>(row_bytes)};
            while (row_bytes % piece || !aligned(source.const_data_ptr(), piece) || !aligned(target.const_data_ptr(), piece))
                piece /= 2;
        }
        const unsigned blocks = blocks_for(n * n_tables, kCopyThreads, most_blocks);
        const auto launch = [&](auto kernel) {
            kernel<<<blocks, kCopyThreads, 0, stream>>>(copies, n_tables, n, index_of(from_rows), index_of(to_rows));
            STD_CUDA_KERNEL_LAUNCH_CHECK();
        };
        if (piece == 16)
            launch(copy<uint4>);
        else if (piece >= 4)
            launch(copy<uint32_t>);
        else
            launch(copy<uint16_t>);
    }
}

void row_adamw_(const Tensors& weights, const Tensors& exp_avgs, const Tensors& exp_avg_sqs, const Tensors& row_steps,
                const Tensors& gradients, const Tensor& ids, const Optional& weight_rows,
                const Optional& moment_rows, double lr, double beta1, double beta2, double eps,
                const Optional& found_inf) {
    const int64_t n = ids.numel();
    if (n == 0 || weights.empty()) return;
    const DeviceGuard guard(ids.get_device_index());
    const auto stream = current_stream();
    const float* bad = found_inf ? found_inf->const_data_ptr<float>() : nullptr;
    const bool in_half = exp_avgs[0].scalar_type() == ScalarType::BFloat16;
    STD_TORCH_CHECK(in_half || exp_avgs[0].scalar_type() == ScalarType::Float, "moments must be fp32 or bf16");
    for (size_t first = 0; first < weights.size(); first += kTables) {
        const int n_tables = static_cast<int>(std::min<size_t>(kTables, weights.size() - first));
        Steps steps;
        bool whole = true;
        for (int t = 0; t < n_tables; ++t) {
            const auto &p = weights[first + t], &m = exp_avgs[first + t], &v = exp_avg_sqs[first + t];
            const auto &row_step = row_steps[first + t], &g = gradients[first + t];
            check(p, "weights"), check(m, "exp_avgs"), check(v, "exp_avg_sqs"), check(g, "gradients");
            check(row_step, "row_steps");
            STD_TORCH_CHECK(m.scalar_type() == exp_avgs[0].scalar_type() && v.scalar_type() == m.scalar_type(),
                            "moments of one dtype");
            STD_TORCH_CHECK(g.size(0) == n, "a gradient for each row");
            const int64_t width = p.size(1);
            STD_TORCH_CHECK(m.size(1) == width && v.size(1) == width && g.size(1) == width, "rows of one width");
            steps.table[t] = {p.mutable_data_ptr<float>(),          m.mutable_data_ptr(),      v.mutable_data_ptr(),
                              row_step.mutable_data_ptr<int32_t>(), g.const_data_ptr<float>(), static_cast<int>(width)};
            whole = whole && width % 4 == 0 && aligned(p.const_data_ptr(), 16) && aligned(m.const_data_ptr(), 16) &&
                    aligned(v.const_data_ptr(), 16) && aligned(g.const_data_ptr(), 16);
        }
        const auto launch = [&](auto kernel) {
            kernel<<<blocks_for(n * n_tables, kStepThreads, 0), kStepThreads, 0, stream>>>(
                steps, n_tables, n, ids.const_data_ptr<int64_t>(), index_of(weight_rows), index_of(moment_rows), lr, beta1,
                beta2, eps, bad);
            STD_CUDA_KERNEL_LAUNCH_CHECK();
        };
        if (in_half)
            whole ? launch(adamw<4, uint16_t>) : launch(adamw<1, uint16_t>);
        else
            whole ? launch(adamw<4, float>) : launch(adamw<1, float>);
        const auto count_blocks = static_cast<unsigned>((n * n_tables + kStepThreads - 1) / kStepThreads);
        count<<<count_blocks, kStepThreads, 0, stream>>>(steps, n_tables, n, ids.const_data_ptr<int64_t>(), bad);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(heron, library) {
    library.def(
        "copy_rows(Tensor[] sources, Tensor? from_rows, Tensor(a!)[] targets, Tensor? to_rows, int most_blocks) -> ()");
    library.def(
        "row_adamw_(Tensor(a!)[] weights, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] row_steps, "
        "Tensor[] gradients, Tensor ids, Tensor? weight_rows, Tensor? moment_rows, float lr, float beta1, float beta2, "
        "float eps, Tensor? found_inf) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(heron, CUDA, library) {
    library.impl("copy_rows", TORCH_BOX(&copy_rows));
    library.impl("row_adamw_", TORCH_BOX(&row_adamw_));
}
