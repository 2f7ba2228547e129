// The kernel of token streams as a library for a CPU.
#include "warp.h"

#define __shared__ static
inline int __ffs(unsigned x) { return __builtin_ffs(int(x)); }

#include "../../../heron/ops/rosa/csrc/memory.cu"

extern "C" const char* rosa_read_one_emulated(uint32_t* ids, void* nodes, uint32_t* roots, uint32_t mask, uint32_t n_roots,
                                              int64_t window, int32_t max_match, int64_t end, uint32_t t,
                                              const int64_t* id, int most, int64_t* read, int64_t* found) {
  const Trees trees{ids, static_cast<Node*>(nodes), roots, mask, n_roots, window, {max_match, end}};
  return launch<Trees, uint32_t, const int64_t*, int, int64_t*, int64_t*>(read_one, dim3(1), 32, 0, nullptr, trees, t, id,
                                                                        most, read, found);
}
