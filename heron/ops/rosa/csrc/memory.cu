// One token of a stream on a GPU: the walk of trees.h by one warp, whose lanes compare 32 tokens of two keys at once.
#include "trees.h"

#ifdef __CUDACC__
#include "../../csrc/operator.h"
#endif

namespace {

using namespace heron_trees;

constexpr unsigned kAll = 0xffffffffu;
constexpr int kMost = 255;  // matches

// Reads *id, below 0 as 0, as position t. `read` takes the id, `found` (most, 2) what followed each match, and its length.
// All lanes walk; the first one writes, and keeps the matches. What it writes no lane reads again before the end.
__global__ void __launch_bounds__(32)
read_one(Trees trees, uint32_t t, const int64_t* id, int most, int64_t* read, int64_t* found) {
    __shared__ int64_t src[kMost], next[kMost];
    __shared__ int32_t length[kMost];
    const int lane = threadIdx.x;
    const bool writes = lane == 0;
    const Results results{src, length, next, most};
    const int64_t drawn = *id;
    const uint32_t token = drawn < 0 ? 0 : static_cast<uint32_t>(drawn);
    const uint32_t root = trees.root_of(token);
    if (writes) {
        trees.tokens[t & trees.mask] = token;
        *read = token;
        results.clear();
    }
    __syncwarp();

    const auto at = [&](int64_t place) { return trees.token(place); };
    const auto compare = [&](uint32_t j, int32_t shared) -> Comparison {
        for (;; shared += 32) {
            const Verdict mine = verdict(at, j, at, t, shared + lane, trees.rules);
            if (const unsigned decided = __ballot_sync(kAll, mine != GO_ON)) {
                const int first = __ffs(decided) - 1;
                return {shared + first, static_cast<Verdict>(__shfl_sync(kAll, static_cast<int>(mine), first))};
            }
        }
    };
    const auto meet = [&](uint32_t j, int32_t shared) {
        if (writes) results.add(j, shared, at(static_cast<int64_t>(j) + 1));
    };
    const auto set = [&](uint32_t* place, uint32_t value) {
        if (writes) *place = value;
    };
    trees.insert(t, root, compare, meet, set);
    __syncwarp();
    set(&trees.root_of(token), t);
    for (int k = lane; k < most; k += 32) {
        found[2 * k] = next[k];
        found[2 * k + 1] = length[k];
    }
}

}  // namespace

#ifdef __CUDACC__
namespace {

// id, read: (1,) int64. ids (P,), nodes (P, 2), roots (R,) int32; `ring`: P is a power of two, and old places are used
// again. found: (most, 2) int64. All contiguous and on one device.
void run(const Tensor& id, const Tensor& ids, const Tensor& nodes, const Tensor& roots, int64_t t,
         bool ring, int64_t window, int64_t max_match, int64_t end, const Tensor& read, const Tensor& found) {
    const int64_t places = ids.size(0), most = found.size(0);
    STD_TORCH_CHECK(most <= kMost, "rosa: at most ", kMost, " matches of a token on a GPU, got ", most);
    STD_TORCH_CHECK(nodes.size(0) == places && (ring || t < places), "rosa: a stream of ", places, " places is full");
    const DeviceGuard guard(ids.get_device_index());
    const Trees trees{reinterpret_cast<uint32_t*>(ids.mutable_data_ptr<int32_t>()),
                      reinterpret_cast<Node*>(nodes.mutable_data_ptr<int32_t>()),
                      reinterpret_cast<uint32_t*>(roots.mutable_data_ptr<int32_t>()),
                      ring ? static_cast<uint32_t>(places - 1) : UINT32_MAX,
                      static_cast<uint32_t>(roots.size(0)),
                      window,
                      {static_cast<int32_t>(max_match), end}};
    read_one<<<1, 32, 0, current_stream()>>>(trees, static_cast<uint32_t>(t), id.mutable_data_ptr<int64_t>(),
                                             static_cast<int>(most), read.mutable_data_ptr<int64_t>(),
                                             found.mutable_data_ptr<int64_t>());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(heron, library) {
    library.def(
        "rosa_read_one_(Tensor id, Tensor(a!) ids, Tensor(b!) nodes, Tensor(c!) roots, int t, bool ring, int window, "
        "int max_match, int end, Tensor(d!) read, Tensor(e!) found) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(heron, CUDA, library) { library.impl("rosa_read_one_", TORCH_BOX(&run)); }
#endif
