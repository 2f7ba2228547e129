// ROSA over one long stream of tokens: at each position the longest suffix, of at most max_match tokens, that ended
// before, and where it ended last. README.md derives it.
//
// The positions read so far lie in binary search trees, one for each residue of their token. The key of a position is the
// stream read backwards from it, and a node is newer than all nodes below it. So the way from a root down to the place of
// a new key meets, for every length, the latest position that shares so many tokens before any other that does. The new
// position becomes the root; what the way splits becomes its two subtrees. Of equal keys the newest alone is kept.

#include <algorithm>
#include <cstdint>
#include <new>
#include <vector>

namespace {

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
uint32_t scrambled(uint32_t token, uint32_t depth) {
    uint32_t x = token + depth * 0x9E3779B9u;
    x = (x ^ x >> 15) * 0x85EBCA6Bu;
    return (x ^ x >> 13) * 0xC2B2AE35u;
}

struct Comparison {
    int32_t shared;  // tokens that both keys begin with
    bool same;       // the keys are equal
    bool before;     // the first one's place is before the second one's
};

// The keys at j and t, of which `shared` tokens are known to be the same. A key ends at the beginning of its stream, or of
// its document, and comes before those that it begins.
template <class First, class Second>
Comparison compare(const First& first, int64_t j, const Second& second, int64_t t, int32_t shared, const Rules& rules) {
    for (; shared < rules.max_match; ++shared) {
        const bool inside = shared > 0;
        const bool first_ends = shared > j || (inside && first(j - shared) == rules.end);
        const bool second_ends = shared > t || (inside && second(t - shared) == rules.end);
        if (first_ends || second_ends) return {shared, first_ends && second_ends, first_ends};
        const uint32_t a = first(j - shared), b = second(t - shared);
        if (a != b) return {shared, false, scrambled(a, shared) < scrambled(b, shared)};
    }
    return {shared, true, false};
}

// Where the matches of one position go: of those found on the way, each longer than the one before, the last ones whose
// followers differ; the longest first.
struct Results {
    int64_t* src;
    int32_t* length;
    int32_t most;

    void clear() const {
        std::fill_n(src, most, -1);
        std::fill_n(length, most, 0);
    }

    template <class Token>
    void add(uint32_t found, int32_t shared, const Token& token) const {
        int32_t place = 0;  // of an older match with the same follower, or of the one that is pushed out
        while (place + 1 < most && src[place] >= 0 && token(src[place] + 1) != token(int64_t(found) + 1)) ++place;
        std::copy_backward(src, src + place, src + place + 1);
        std::copy_backward(length, length + place, length + place + 1);
        src[0] = found;
        length[0] = shared;
    }
};

class Stream {
  public:
    // Matches may end `window` tokens back; 0: anywhere.
    Stream(Rules rules, int64_t window, uint32_t n_roots) : rules_(rules), window_(window), roots_(n_roots, NONE) {
        if (window == 0) return;
        uint64_t n_kept = 1;
        while (n_kept < uint64_t(window) + rules.max_match + 2) n_kept *= 2;
        mask_ = uint32_t(n_kept - 1);
        tokens_.resize(n_kept);
        nodes_.resize(n_kept);
    }

    void read(uint32_t token, const Results& results, int64_t* next) {
        results.clear();
        const uint32_t t = uint32_t(n_++);
        if (window_ == 0) {
            tokens_.push_back(token);
            nodes_.emplace_back();
        }
        tokens_[t & mask_] = token;
        uint32_t& root = roots_[token & (roots_.size() - 1)];
        insert(t, root, results);
        root = t;
        for (int32_t i = 0; i < results.most; ++i) next[i] = results.src[i] < 0 ? 0 : this->token(results.src[i] + 1);
    }

    int64_t first_kept() const { return window_ == 0 ? 0 : std::max<int64_t>(0, n_ - mask_ - 1); }
    int64_t bytes() const {
        return tokens_.capacity() * sizeof(uint32_t) + nodes_.capacity() * sizeof(Node) + roots_.size() * sizeof(uint32_t);
    }
    uint32_t token(int64_t at) const { return tokens_[at & mask_]; }
    const uint32_t* roots() const { return roots_.data(); }
    const Node* nodes() const { return nodes_.data(); }

  private:
    void insert(uint32_t t, uint32_t root, const Results& results) {
        const auto token = [this](int64_t at) { return this->token(at); };
        const int64_t oldest = window_ == 0 ? 0 : int64_t(t) - window_;
        Node& mine = nodes_[t & mask_];
        uint32_t *smaller = &mine.smaller, *larger = &mine.larger;  // where the next node of each side belongs
        int32_t of_smaller = 0, of_larger = 0, longest = 0;         // tokens shared with the last node of each side
        for (uint32_t j = root; j != NONE && j >= oldest;) {
            Node& node = nodes_[j & mask_];
            const Comparison with = compare(token, j, token, t, std::min(of_smaller, of_larger), rules_);
            if (with.shared > longest) results.add(j, longest = with.shared, token);
            if (with.same) {
                *smaller = node.smaller;
                *larger = node.larger;
                return;
            }
            if (with.before) {
                *smaller = j;
                smaller = &node.larger;
                of_smaller = with.shared;
                j = node.larger;
            } else {
                *larger = j;
                larger = &node.smaller;
                of_larger = with.shared;
                j = node.smaller;
            }
        }
        *smaller = *larger = NONE;
    }

    Rules rules_;
    int64_t window_, n_ = 0;
    uint32_t mask_ = UINT32_MAX;  // of a position: its place below, where the oldest are overwritten
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

    // As Stream::insert for the last of tokens outside, without a change. False: these are no trees.
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
            if (with.shared > longest) results.add(j, longest = with.shared, inside);
            if (with.same) break;
            (with.before ? of_smaller : of_larger) = with.shared;
            j = with.before ? nodes[j].larger : nodes[j].smaller;
        }
        return true;
    }
};

template <class Token>
int find_all(const Token* tokens, const Node* nodes, const uint32_t* roots, int64_t n_nodes, uint32_t n_roots, Rules rules,
             const uint32_t* stream, int64_t n_before, int64_t n, int32_t most, int64_t* src, int32_t* length) {
    const Index<Token> index{tokens, nodes, roots, n_nodes, n_roots, rules};
    const auto outside = [stream](int64_t at) { return stream[at]; };
    for (int64_t i = 0; i < n; ++i)
        if (!index.find(outside, n_before + i, {src + i * most, length + i * most, most})) return 1;
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

// Reads n tokens. src, length, next (what followed each match, 0 for none): (n, most). Returns 0, or 1 where memory ran out: the stream is of no use then.
int heron_stream_read(void* stream, const uint32_t* tokens, int64_t n, int32_t most, int64_t* src, int32_t* length,
                      int64_t* next) {
    Stream& of = *static_cast<Stream*>(stream);
    try {
        for (int64_t i = 0; i < n; ++i) of.read(tokens[i], {src + i * most, length + i * most, most}, next + i * most);
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

// The trees of a stream without a window: (n, 2) nodes and n_roots roots, valid until it reads on.
const uint32_t* heron_stream_nodes(const void* stream) { return &static_cast<const Stream*>(stream)->nodes()->smaller; }
const uint32_t* heron_stream_roots(const void* stream) { return static_cast<const Stream*>(stream)->roots(); }

// Matches in an index that end at each of the last n tokens of a stream, given with the n_before tokens before them.
// Returns 0, or 1 where the index is damaged.
int heron_index_find(const void* tokens, int32_t bytes_of_token, const Node* nodes, const uint32_t* roots, int64_t n_nodes,
                     uint32_t n_roots, int32_t max_match, int64_t end, const uint32_t* stream, int64_t n_before, int64_t n,
                     int32_t most, int64_t* src, int32_t* length) {
    const Rules rules{max_match, end};
    if (bytes_of_token == 2)
        return find_all(static_cast<const uint16_t*>(tokens), nodes, roots, n_nodes, n_roots, rules, stream, n_before, n,
                        most, src, length);
    return find_all(static_cast<const uint32_t*>(tokens), nodes, roots, n_nodes, n_roots, rules, stream, n_before, n, most,
                    src, length);
}

}
