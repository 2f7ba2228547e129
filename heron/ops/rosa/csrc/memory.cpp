// Token streams and indexes of them on the host; trees.h has the method.

#include "trees.h"

#include <algorithm>
#include <cstdint>
#include <new>
#include <vector>

namespace {

using namespace heron_trees;

template <class First, class Second>
Comparison compare(const First& first, int64_t j, const Second& second, int64_t t, int32_t shared, const Rules& rules) {
    for (;; ++shared)
        if (const Verdict found = verdict(first, j, second, t, shared, rules)) return {shared, found};
}

class Stream {
  public:
    Stream(Rules rules, int64_t window, uint32_t n_roots) : rules_(rules), window_(window), roots_(n_roots, NONE) {
        if (window == 0) return;
        uint64_t n_kept = 1;
        while (n_kept < uint64_t(window) + rules.max_match + 2) n_kept *= 2;
        mask_ = uint32_t(n_kept - 1);
        tokens_.resize(n_kept);
        nodes_.resize(n_kept);
    }

    void read(uint32_t token, const Results& results) {
        results.clear();
        const uint32_t t = uint32_t(n_++);
        if (window_ == 0) {
            tokens_.push_back(token);
            nodes_.emplace_back();
        }
        tokens_[t & mask_] = token;
        const Trees trees = this->trees();
        const auto at = [&trees](int64_t place) { return trees.token(place); };
        uint32_t& root = trees.root_of(token);
        trees.insert(
            t, root, [&](uint32_t j, int32_t shared) { return compare(at, j, at, t, shared, rules_); },
            [&](uint32_t j, int32_t shared) { results.add(j, shared, at(int64_t(j) + 1)); },
            [](uint32_t* place, uint32_t value) { *place = value; });
        root = t;
    }

    int64_t first_kept() const { return window_ == 0 ? 0 : std::max<int64_t>(0, n_ - mask_ - 1); }
    int64_t bytes() const {
        return tokens_.capacity() * sizeof(uint32_t) + nodes_.capacity() * sizeof(Node) + roots_.size() * sizeof(uint32_t);
    }
    int64_t n_places() const { return int64_t(tokens_.size()); }
    Trees trees() {
        return {tokens_.data(), nodes_.data(), roots_.data(), mask_, uint32_t(roots_.size()), window_, rules_};
    }
    uint32_t token(int64_t at) const { return tokens_[at & mask_]; }

  private:
    Rules rules_;
    int64_t window_, n_ = 0;
    uint32_t mask_ = UINT32_MAX;
    std::vector<uint32_t> tokens_, roots_;
    std::vector<Node> nodes_;
};

// The trees of a stream that grows no more.
template <class Token>
struct Index {
    const Token* tokens;
    const Node* nodes;
    const uint32_t* roots;
    int64_t n_nodes;
    uint32_t n_roots;
    Rules rules;

    // As Trees::insert for the last of tokens outside, without a change. False: these are no trees.
    template <class Outside>
    bool find(const Outside& outside, int64_t t, const Results& results) const {
        const auto inside = [this](int64_t at) -> uint32_t { return tokens[at]; };
        results.clear();
        int32_t of_smaller = 0, of_larger = 0, longest = 0;
        int64_t newest = n_nodes;
        for (uint32_t j = roots[outside(t) & (n_roots - 1)]; j != NONE;) {
            if (j >= newest) return false;
            newest = j;
            const Comparison with = compare(inside, j, outside, t, std::min(of_smaller, of_larger), rules);
            if (with.shared > longest) results.add(j, longest = with.shared, inside(int64_t(j) + 1));
            if (with.verdict == SAME) break;
            const bool before = with.verdict == BEFORE;
            (before ? of_smaller : of_larger) = with.shared;
            j = before ? nodes[j].larger : nodes[j].smaller;
        }
        return true;
    }
};

template <class Token>
int find_all(const Token* tokens, const Node* nodes, const uint32_t* roots, int64_t n_nodes, uint32_t n_roots, Rules rules,
             const uint32_t* stream, int64_t n_before, int64_t n, int32_t most, int64_t* src, int32_t* length, int64_t* next) {
    const Index<Token> index{tokens, nodes, roots, n_nodes, n_roots, rules};
    const auto outside = [stream](int64_t at) { return stream[at]; };
    for (int64_t i = 0; i < n; ++i)
        if (!index.find(outside, n_before + i, {src + i * most, length + i * most, next + i * most, most})) return 1;
    return 0;
}

}  // namespace

extern "C" {

// max_match >= 1; window >= 0; end >= -1; n_roots a power of two. Null where memory ran out, as copy.
void* heron_stream_new(int32_t max_match, int64_t window, int64_t end, uint32_t n_roots) {
    try {
        return new Stream({max_match, end}, window, n_roots);
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}

void* heron_stream_copy(const void* stream) {
    try {
        return new Stream(*static_cast<const Stream*>(stream));
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}

void heron_stream_free(void* stream) { delete static_cast<Stream*>(stream); }

int64_t heron_stream_bytes(const void* stream) { return static_cast<const Stream*>(stream)->bytes(); }

// Reads n tokens. src, length, next (what followed each match, 0 for none): (n, most). Returns 0, or 1 where memory ran
// out: the stream is of no use then.
int heron_stream_read(void* stream, const uint32_t* tokens, int64_t n, int32_t most, int64_t* src, int32_t* length,
                      int64_t* next) {
    Stream& of = *static_cast<Stream*>(stream);
    try {
        for (int64_t i = 0; i < n; ++i) of.read(tokens[i], {src + i * most, length + i * most, next + i * most, most});
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

// The position of the oldest token that is kept.
int64_t heron_stream_first_kept(const void* stream) { return static_cast<const Stream*>(stream)->first_kept(); }

// Tokens `first` .. `first + n - 1`, which must be among those kept.
void heron_stream_tokens(const void* stream, int64_t first, int64_t n, uint32_t* tokens) {
    for (int64_t i = 0; i < n; ++i) tokens[i] = static_cast<const Stream*>(stream)->token(first + i);
}

// Its arrays, valid until it reads on: n_places tokens and nodes (a ring with a window, of which not all may be in use),
// and n_roots roots.
int64_t heron_stream_n_places(const void* stream) { return static_cast<const Stream*>(stream)->n_places(); }
const uint32_t* heron_stream_ids(void* stream) { return static_cast<Stream*>(stream)->trees().tokens; }
const uint32_t* heron_stream_nodes(void* stream) { return &static_cast<Stream*>(stream)->trees().nodes->smaller; }
const uint32_t* heron_stream_roots(void* stream) { return static_cast<Stream*>(stream)->trees().roots; }

// Matches in an index that end at each of the last n tokens of a stream, given with the n_before tokens before them.
// src, length, next: as of heron_stream_read. Returns 0, or 1 where the index is damaged.
int heron_index_find(const void* tokens, int32_t bytes_of_token, const Node* nodes, const uint32_t* roots, int64_t n_nodes,
                     uint32_t n_roots, int32_t max_match, int64_t end, const uint32_t* stream, int64_t n_before, int64_t n,
                     int32_t most, int64_t* src, int32_t* length, int64_t* next) {
    const Rules rules{max_match, end};
    if (bytes_of_token == 2)
        return find_all(static_cast<const uint16_t*>(tokens), nodes, roots, n_nodes, n_roots, rules, stream, n_before, n,
                        most, src, length, next);
    return find_all(static_cast<const uint32_t*>(tokens), nodes, roots, n_nodes, n_roots, rules, stream, n_before, n, most,
                    src, length, next);
}

}
