// For kernels that go through many tensors in one launch: a block has a chunk of one of them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

// The tensors of one launch, at most `most`, each with its `size`. It is an argument of the kernel.
template <typename Item, int most>
struct Chunked {
    static constexpr int kMost = most;
    Item tensor[most];
    int first_chunk[most];
    int n;

    // The number of the tensor that a block has a chunk of.
    __device__ __forceinline__ int of_block(int block) const {
        int t = 0;
        for (int end = n; end - t > 1;) {
            const int middle = (t + end) / 2;
            if (first_chunk[middle] <= block)
                t = middle;
            else
                end = middle;
        }
        return t;
    }
};

// Calls launch(table, its chunks, chunks of the tables before it) for tables of all tensors, in chunks of `chunk` values.
template <typename Table, typename Item, typename Launch>
void for_tables(const std::vector<Item>& tensors, int chunk, Launch launch) {
    int before = 0;
    for (size_t first = 0; first < tensors.size(); first += Table::kMost) {
        Table table;
        table.n = static_cast<int>(std::min<size_t>(Table::kMost, tensors.size() - first));
        int chunks = 0;
        for (int t = 0; t < table.n; ++t) {
            table.tensor[t] = tensors[first + t];
            table.first_chunk[t] = chunks;
            chunks += static_cast<int>((table.tensor[t].size + chunk - 1) / chunk);
        }
        launch(table, chunks, before);
        before += chunks;
    }
}

}  // namespace
