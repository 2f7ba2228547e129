// The kernel of sample_rows as a library for a CPU: a block for a row, or a cluster of blocks that run together.
#include "numbers.h"
#include "together.h"
#include "warp.h"

#include <link.h>

#include <algorithm>
#include <utility>

// The thread-local variables of this library are the shared memory of the block that has its turn; it has no others.
#define __shared__ static thread_local
using std::max;
using std::min;

inline float __fadd_rd(float x, float y) { return float(std::floor(double(x) + y)); }  // if y is 2^23
inline uint32_t __float_as_uint(float x) { return as_bits(x); }
inline float __uint_as_float(uint32_t bits) { return as_float(bits); }

inline unsigned __reduce_add_sync(unsigned, unsigned x) { return reduce(x, [](auto a, auto b) { return a + b; }); }
inline unsigned __reduce_max_sync(unsigned, unsigned x) { return reduce(x, [](auto a, auto b) { return max(a, b); }); }
template <typename T> T atomicAdd(T* to, T x) { return std::exchange(*to, *to + x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(x); }

namespace emulator {
constexpr unsigned kMaxBlocks = 8;
struct Memory { char* begin; int bytes; };
inline Memory shared;
inline unsigned in_cluster, arrived, awaited[kMaxBlocks][kMaxThreads];

inline int find_shared(dl_phdr_info* library, size_t, void*) {
  bool is_this = false;
  Memory found{};
  for (int i = 0; i < library->dlpi_phnum; i++) {
    const auto& part = library->dlpi_phdr[i];
    const uintptr_t offset = reinterpret_cast<uintptr_t>(&find_shared) - library->dlpi_addr - part.p_vaddr;
    is_this = is_this || (part.p_type == PT_LOAD && offset < part.p_memsz);
    if (part.p_type == PT_TLS) found = {static_cast<char*>(library->dlpi_tls_data), int(part.p_memsz)};
  }
  if (is_this) shared = found;
  return is_this;
}
}  // namespace emulator

inline void __cluster_barrier_arrive() {
  using namespace emulator;
  awaited[block_index.x][current->index] = (arrived++ / in_cluster + 1) * in_cluster;
}
inline void __cluster_barrier_arrive_relaxed() { __cluster_barrier_arrive(); }
inline void __cluster_barrier_wait() {
  using namespace emulator;
  poll_until([] { return arrived >= awaited[block_index.x][current->index]; });
}
inline void* __cluster_map_shared_rank(void* x, unsigned rank) {
  using namespace emulator;
  if (rank == block_index.x) return x;
  return reinterpret_cast<char*>(all[rank].words.data()) + (static_cast<char*>(x) - shared.begin);
}

#include "../../../heron/ops/sample_rows/csrc/sample_rows.cu"

namespace {
struct Arguments {
  const void* logits;
  int64_t rows, stride;
  const float* counts;
  const bool* barred;
  const double *settings, *uniforms;
  int vocab, aligned;
  int64_t* ids;
  float* logprobs;
};

template <typename T, int blocks, bool holds> void draw(const Arguments& a) {
  dl_iterate_phdr(emulator::find_shared, nullptr);
  emulator::in_cluster = blocks * kThreads;
  for (int64_t i = 0; i < a.rows; i++) {
    emulator::arrived = 0;
    emulator::body = [=] {
      sample_rows<T, blocks, holds>(static_cast<const T*>(a.logits) + i * a.stride, a.stride,
                                    a.counts ? a.counts + i * a.vocab : nullptr, a.barred, a.settings + i * kSettings,
                                    a.uniforms + i, a.vocab, a.aligned, a.ids + i, a.logprobs + i);
    };
    emulator::run_together(blocks, kThreads, emulator::shared.bytes, i % 2, emulator::shared.begin);
  }
}

template <typename T> void draw(int blocks, bool holds, const Arguments& arguments) {
  const auto form = blocks == 1 ? draw<T, 1, false> : holds ? draw<T, kCluster, true> : draw<T, kCluster, false>;
  form(arguments);
}
}  // namespace

extern "C" void sample_rows_emulated(int dtype, int blocks, int holds, const void* logits, int64_t rows, int64_t stride,
                                     const float* counts, const bool* barred, const double* settings,
                                     const double* uniforms, int vocab, int aligned, int64_t* ids, float* logprobs) {
  const auto run = dtype == 0 ? draw<float> : draw<BFloat16>;
  run(blocks, holds, {logits, rows, stride, counts, barred, settings, uniforms, vocab, aligned, ids, logprobs});
}
