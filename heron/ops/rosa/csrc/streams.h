// Streams shared out among threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

// Functions on rows get a second form for processors with AVX2, chosen when the library is loaded.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_CPU __attribute__((target_clones("avx2,fma", "default")))
#else
#define FOR_EACH_CPU
#endif

// Makes a Worker of `problem` in each thread and runs it on one stream after another, until none is left. Returns whether
// there was enough memory.
template <class Worker, class Problem>
bool run_streams(const Problem& problem, int64_t n_threads) {
    std::atomic<int64_t> next_stream{0};
    std::atomic<bool> enough_memory{true};
    const auto work = [&] {
        try {
            Worker worker(problem);
            for (int64_t stream; (stream = next_stream++) < problem.n_streams;) worker.run(stream);
        } catch (const std::bad_alloc&) {
            enough_memory = false;
        }
    };
    std::vector<std::thread> helpers;
    try {
        for (int64_t n = 1; n < std::min(n_threads, problem.n_streams); ++n) helpers.emplace_back(work);
    } catch (const std::system_error&) {  // there are no more threads to be had; those that are do the work
    }
    work();
    for (std::thread& helper : helpers) helper.join();
    return enough_memory;
}
