// The trees over one long stream of tokens, for the host and for a GPU: at each position the longest suffix, of at most
// max_match tokens, that ended before, and where it ended last. README.md derives it.
//
// The positions read so far lie in binary search trees, one for each residue of their token. The key of a position is the
// stream read backwards from it, and a node is newer than all nodes below it. So the way from a root down to the place of
// a new key meets, for every length, the latest position that shares so many tokens before any other that does. The new
// position becomes the root; what the way splits becomes its two subtrees. Of equal keys the newest alone is kept.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define HERON_BOTH __host__ __device__ inline
#else
#define HERON_BOTH inline
#endif

namespace heron_trees {

constexpr uint32_t NONE = UINT32_MAX;

struct Node {
    uint32_t smaller, larger;
};

struct Rules {
    int32_t max_match;
    int64_t end;  // a token that ends a document, across which nothing matches; -1: there is none
};

// Orders two tokens that stand `depth` before the ends of their keys. In the order of their numbers, a stream of ascending
// tokens would make a list of a tree.
HERON_BOTH uint32_t scrambled(uint32_t token, uint32_t depth) {
    uint32_t x = token + depth * 0x9E3779B9u;
    x = (x ^ x >> 15) * 0x85EBCA6Bu;
    return (x ^ x >> 13) * 0xC2B2AE35u;
}

// What the tokens at one depth say of the order of two keys.
enum Verdict : int32_t { GO_ON, SAME, BEFORE, BEHIND };

// The keys at j and t, of which `depth` tokens are the same. A key ends at the beginning of its stream, or of its
// document, and comes before those that it begins.
template <class First, class Second>
HERON_BOTH Verdict verdict(const First& first, int64_t j, const Second& second, int64_t t, int32_t depth,
                           const Rules& rules) {
    if (depth >= rules.max_match) return SAME;
    const bool inside = depth > 0;
    const bool first_ends = depth > j || (inside && first(j - depth) == rules.end);
    const bool second_ends = depth > t || (inside && second(t - depth) == rules.end);
    if (first_ends || second_ends) return !second_ends ? BEFORE : first_ends ? SAME : BEHIND;
    const uint32_t a = first(j - depth), b = second(t - depth);
    if (a != b) return scrambled(a, depth) < scrambled(b, depth) ? BEFORE : BEHIND;
    return GO_ON;
}

struct Comparison {
    int32_t shared;   // tokens that both keys begin with
    Verdict verdict;  // of the first one's place: the second one's, before it, or behind it
};

// Where the matches of one position go: of those found on the way, each longer than the one before, the last ones whose
// followers differ; the longest first.
struct Results {
    int64_t* src;
    int32_t* length;
    int64_t* next;  // what followed; 0: there is no match
    int32_t most;

    HERON_BOTH void clear() const {
        for (int32_t i = 0; i < most; ++i) src[i] = -1, length[i] = 0, next[i] = 0;
    }

    HERON_BOTH void add(uint32_t found, int32_t shared, uint32_t follower) const {
        int32_t place = 0;  // of an older match with the same follower, or of the one that is pushed out
        while (place + 1 < most && src[place] >= 0 && next[place] != follower) ++place;
        for (; place > 0; --place) {
            src[place] = src[place - 1];
            length[place] = length[place - 1];
            next[place] = next[place - 1];
        }
        src[0] = found;
        length[0] = shared;
        next[0] = follower;
    }
};

// The arrays of a stream. `mask` of a position is its place in them: with a window they are rings.
struct Trees {
    uint32_t* tokens;
    Node* nodes;
    uint32_t* roots;
    uint32_t mask, n_roots;
    int64_t window;  // matches may end so many tokens back; 0: anywhere
    Rules rules;

    HERON_BOTH uint32_t token(int64_t at) const { return tokens[at & mask]; }
    HERON_BOTH uint32_t& root_of(uint32_t token) const { return roots[token & (n_roots - 1)]; }

    // Makes t, whose token is there, a root above the tree of `root`.
    //   compare(j, shared)   the keys at j and t, which share so many tokens at least
    //   meet(j, shared)      takes each match that is longer than all before
    //   set(place, value)    writes
    template <class Compare, class Meet, class Set>
    HERON_BOTH void insert(uint32_t t, uint32_t root, const Compare& compare, const Meet& meet, const Set& set) const {
        const int64_t oldest = window == 0 ? 0 : int64_t(t) - window;
        Node* mine = nodes + (t & mask);
        uint32_t *smaller = &mine->smaller, *larger = &mine->larger;  // where the next node of each side belongs
        int32_t of_smaller = 0, of_larger = 0, longest = 0;           // tokens shared with the last node of each side
        for (uint32_t j = root; j != NONE && j >= oldest;) {
            Node* at = nodes + (j & mask);
            const Node below = *at;  // asked for before any token: both are far away
            const Comparison with = compare(j, of_smaller < of_larger ? of_smaller : of_larger);
            if (with.shared > longest) meet(j, longest = with.shared);
            if (with.verdict == SAME) {
                set(smaller, below.smaller);
                set(larger, below.larger);
                return;
            }
            if (with.verdict == BEFORE) {
                set(smaller, j);
                smaller = &at->larger;
                of_smaller = with.shared;
                j = below.larger;
            } else {
                set(larger, j);
                larger = &at->smaller;
                of_larger = with.shared;
                j = below.smaller;
            }
        }
        set(smaller, NONE);
        set(larger, NONE);
    }
};

}  // namespace heron_trees
