// AdamW by rows on the CPU: one pass over weights, moments and gradients, threads over rows.

#include "rows.h"

#include <algorithm>
#include <system_error>
#include <thread>
#include <vector>

using namespace heron_rows;

namespace {

template <typename Moment>
void some_rows(float* weights, Moment* exp_avg, Moment* exp_avg_sq, int32_t* row_step, const float* gradients,
               const int64_t* ids, int64_t begin, int64_t end, int width, double lr, double beta1, double beta2, double eps) {
    for (int64_t i = begin; i < end; ++i) {
        const int64_t at = ids[i] * width;
        const Step step = step_at(++row_step[ids[i]], lr, beta1, beta2, eps);
        adamw_row<1, 1>(weights + at, exp_avg + at, exp_avg_sq + at, gradients + i * width, width, step, 0, 1);
    }
}

}  // namespace

// ids: n different rows. The moments are fp32, or bf16 where `in_half`.
extern "C" void heron_row_adamw(float* weights, void* exp_avg, void* exp_avg_sq, int32_t* row_step, const float* gradients,
                                const int64_t* ids, int64_t n, int32_t width, double lr, double beta1, double beta2,
                                double eps, int32_t in_half, int32_t threads) {
    const auto run = [=](int64_t begin, int64_t end) {
        if (in_half)
            some_rows(weights, static_cast<uint16_t*>(exp_avg), static_cast<uint16_t*>(exp_avg_sq), row_step, gradients,
                      ids, begin, end, width, lr, beta1, beta2, eps);
        else
            some_rows(weights, static_cast<float*>(exp_avg), static_cast<float*>(exp_avg_sq), row_step, gradients, ids,
                      begin, end, width, lr, beta1, beta2, eps);
    };
    const int64_t share = (n + threads - 1) / std::max<int64_t>(threads, 1);
    std::vector<std::thread> others;
    int64_t begin = share;  // the first share is this thread's own
    try {
        for (; begin < n; begin += share) others.emplace_back(run, begin, std::min(begin + share, n));
    } catch (const std::system_error&) {  // no more threads: the rest is this thread's, too
        run(begin, n);
    }
    run(0, std::min(share, n));
    for (auto& other : others) other.join();
}
