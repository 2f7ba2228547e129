// How the products of a launch are shared out to blocks. It depends on the matrices alone. The tests also compile it for a CPU.
#pragma once

#include <algorithm>

namespace {

constexpr int kLeast = 128;  // numbers of a row that are worth a block

struct Sharing {
    int rows;    // of a matrix for a block
    int unit;    // numbers of a row for a block are a multiple of it
    int part;    // numbers of a row for a block, where there are so many blocks
    int most;    // blocks for the same rows, which are one cluster: a power of two
    int enough;  // blocks for one matrix
    int many;    // blocks for one matrix with which more of them only read more vectors
};

inline int divided_up(int x, int unit) { return (x + unit - 1) / unit; }

// How many blocks share the rows of a matrix.
inline int parts_of(int out, int in, const Sharing& by) {
    const int tiles = divided_up(out, by.rows);
    int parts = 1;
    const auto wants_more = [&] {
        const int blocks = tiles * parts;
        return blocks < by.many && (in > by.part * parts || (blocks < by.enough && in > kLeast * parts));
    };
    while (parts < by.most && wants_more()) parts *= 2;
    return parts;
}

// Set `cluster`, and of each product `parts`, `span` and `first_block`; how many blocks there are.
template <typename Products>
int share_out(Products& products, const Sharing& by) {
    products.cluster = 1;
    for (int i = 0; i < products.count; ++i) {
        auto& p = products.of[i];
        p.parts = parts_of(p.out, p.in, by);
        p.span = divided_up(p.in, by.unit * p.parts) * by.unit;
        products.cluster = std::max(products.cluster, p.parts);
    }
    int blocks = 0;
    for (int i = 0; i < products.count; ++i) {
        auto& p = products.of[i];
        p.first_block = blocks;
        blocks += divided_up(divided_up(p.out, by.rows) * p.parts, products.cluster) * products.cluster;
    }
    return blocks;
}

}  // namespace
