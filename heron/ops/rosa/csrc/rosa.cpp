// Exact ROSA over many streams: O(T log T) for every stream, whatever it holds. README.md derives it.
//
// The suffix automaton of the whole k is built first. Its links form a tree in which the ends of a state's strings are the
// leaves of one subtree, here one range of slots. The query then walks the automaton through strings that have already
// ended before i, and a segment tree over the slots knows the latest end so far in any range.

#include "streams.h"

#include <cstddef>

namespace {

constexpr int32_t NONE = -1;
constexpr int32_t ROOT = 0;
constexpr int32_t MOST_DENSE_SYMBOLS = 16;

// Transitions as a table (state, symbol), for small alphabets.
class DenseEdges {
  public:
    DenseEdges(size_t n_states, int32_t n_symbols) : n_symbols_(n_symbols), target_(n_states * n_symbols) {}

    void clear() {}
    void add_state(int32_t state) { std::fill_n(row(state), n_symbols_, NONE); }
    void copy(int32_t from, int32_t to) { std::copy_n(row(from), n_symbols_, row(to)); }
    void set(int32_t state, int32_t symbol, int32_t target) { row(state)[symbol] = target; }
    int32_t get(int32_t state, int32_t symbol) { return symbol < n_symbols_ ? row(state)[symbol] : NONE; }

  private:
    int32_t* row(int32_t state) { return target_.data() + size_t(state) * n_symbols_; }

    int32_t n_symbols_;
    std::vector<int32_t> target_;
};

// Transitions in a hash table, those of one state chained for copying. An automaton of T symbols has less than 3 T
// transitions, and none is ever taken away, so a table of 4 T slots does not fill up.
class HashedEdges {
  public:
    HashedEdges(size_t n_states, int32_t /* n_symbols */) : newest_(n_states) {
        size_t n_slots = 16;
        while (n_slots < 2 * n_states) n_slots *= 2;
        slots_.resize(n_slots);
    }

    void clear() { std::fill(slots_.begin(), slots_.end(), Slot{}); }
    void add_state(int32_t state) { newest_[state] = NONE; }
    void copy(int32_t from, int32_t to) {
        for (int32_t at = newest_[from]; at != NONE; at = slots_[at].older) set(to, slots_[at].symbol, slots_[at].target);
    }
    void set(int32_t state, int32_t symbol, int32_t target) {
        const size_t at = find(state, symbol);
        if (slots_[at].state == NONE) {
            slots_[at] = {state, symbol, target, newest_[state]};
            newest_[state] = int32_t(at);
        }
        slots_[at].target = target;
    }
    int32_t get(int32_t state, int32_t symbol) { return slots_[find(state, symbol)].target; }

  private:
    struct Slot {
        int32_t state = NONE, symbol = NONE, target = NONE, older = NONE;
    };

    // Where the transition is, or the free slot where it belongs.
    size_t find(int32_t state, int32_t symbol) const {
        const uint64_t hash = (uint64_t(uint32_t(state)) << 32 | uint32_t(symbol)) * 0x9E3779B97F4A7C15u;
        const size_t mask = slots_.size() - 1;
        size_t at = (hash ^ hash >> 32) & mask;
        while (slots_[at].state != NONE && (slots_[at].state != state || slots_[at].symbol != symbol)) at = (at + 1) & mask;
        return at;
    }

    std::vector<Slot> slots_;
    std::vector<int32_t> newest_;
};

// The maximum over ranges of slots, for values that are put in in ascending order.
class LatestEnds {
  public:
    explicit LatestEnds(size_t n_slots) : n_slots_(n_slots), latest_(2 * n_slots) {}

    void clear() { std::fill(latest_.begin(), latest_.end(), NONE); }
    void put(size_t slot, int32_t end) {
        for (size_t node = slot + n_slots_; node >= 1; node /= 2) latest_[node] = end;
    }
    int32_t in_range(size_t begin, size_t end) const {
        int32_t latest = NONE;
        for (begin += n_slots_, end += n_slots_; begin < end; begin /= 2, end /= 2) {
            if (begin % 2) latest = std::max(latest, latest_[begin++]);
            if (end % 2) latest = std::max(latest, latest_[--end]);
        }
        return latest;
    }

  private:
    size_t n_slots_;
    std::vector<int32_t> latest_;
};

// All that one thread needs for streams of `length` symbols, used again for each of them.
template <class Edges>
class Matcher {
  public:
    Matcher(int32_t length, int32_t n_symbols)
        : length_(length),
          edges_(2 * size_t(length), n_symbols),
          states_(2 * size_t(length)),
          prefix_(length),
          by_longest_(2 * size_t(length)),
          count_(size_t(length) + 2),
          ends_(length) {}

    void run(const int32_t* q, const int32_t* k, int32_t max_match, int64_t* src, int64_t* match_length) {
        build(k);
        lay_out();
        ends_.clear();
        int32_t at = ROOT, matched = 0;  // the longest suffix of q[..i] in k[..i-1], at most max_match, and its state
        int32_t end = NONE, n_put = 0;   // where it ended last; how many ends the segment tree knows
        for (int32_t i = 0; i < length_; ++i) {
            if (matched > 0 && matched < max_match && k[end + 1] == q[i]) {
                // The last match goes on. All ends of the longer string follow ends of the shorter one: this is the latest.
                at = edges_.get(at, q[i]);
                ++matched;
                ++end;
            } else {
                follow(q[i], i, max_match, at, matched);
                if (matched > 0) {
                    for (; n_put < i; ++n_put) ends_.put(states_[prefix_[n_put]].begin, n_put);
                    end = ends_.in_range(states_[at].begin, states_[at].begin + states_[at].n_ends);
                }
            }
            match_length[i] = matched;
            src[i] = matched > 0 ? end : NONE;
        }
    }

  private:
    struct State {
        int32_t link, longest, first_end;  // suffix link, length of the longest string, where the strings first end in k
        int32_t n_ends, begin, free;       // the range of slots, and the next slot in it that no child has taken
    };

    int32_t add_state(int32_t link, int32_t longest, int32_t first_end, int32_t n_ends) {
        states_[n_states_] = {link, longest, first_end, n_ends, 0, 0};
        edges_.add_state(n_states_);
        return n_states_++;
    }

    // The usual online construction (Blumer et al. 1985).
    void build(const int32_t* k) {
        n_states_ = 0;
        edges_.clear();
        int32_t whole = add_state(NONE, 0, NONE, 0);
        for (int32_t j = 0; j < length_; ++j) {
            int32_t from = whole;
            whole = prefix_[j] = add_state(ROOT, j + 1, j, 1);
            for (; from != NONE && edges_.get(from, k[j]) == NONE; from = states_[from].link) edges_.set(from, k[j], whole);
            if (from != NONE) states_[whole].link = state_of_longest(from, k[j]);
        }
    }

    // The state whose longest string is that of `from` with `symbol` after it, split off where it has none of its own.
    int32_t state_of_longest(int32_t from, int32_t symbol) {
        const int32_t next = edges_.get(from, symbol), longest = states_[from].longest + 1;
        if (states_[next].longest == longest) return next;
        const int32_t clone = add_state(states_[next].link, longest, states_[next].first_end, 0);
        edges_.copy(next, clone);
        states_[next].link = clone;
        for (; from != NONE && edges_.get(from, symbol) == next; from = states_[from].link) edges_.set(from, symbol, clone);
        return clone;
    }

    // Give every state the range of slots of its subtree; the state of a prefix k[..j] keeps the first slot for the end j.
    void lay_out() {
        std::fill(count_.begin(), count_.end(), 0);
        for (int32_t state = 0; state < n_states_; ++state) ++count_[states_[state].longest + 1];
        for (size_t longest = 1; longest < count_.size(); ++longest) count_[longest] += count_[longest - 1];
        for (int32_t state = 0; state < n_states_; ++state) by_longest_[count_[states_[state].longest]++] = state;

        for (int32_t n = n_states_ - 1; n > 0; --n) {
            State& state = states_[by_longest_[n]];
            states_[state.link].n_ends += state.n_ends;
        }
        for (int32_t n = 1; n < n_states_; ++n) {  // the root, first of all, holds every slot and no end of its own
            State& state = states_[by_longest_[n]];
            State& parent = states_[state.link];
            state.begin = parent.free;
            parent.free += state.n_ends;
            state.free = state.begin + (prefix_[state.first_end] == by_longest_[n]);
        }
    }

    // Take the match from q[..i-1] to q[..i], whose last symbol is `symbol`. `matched` stays in the range of `at`.
    void follow(int32_t symbol, int32_t i, int32_t max_match, int32_t& at, int32_t& matched) {
        for (;;) {
            const int32_t next = edges_.get(at, symbol);
            if (next != NONE && states_[next].first_end < i) {
                at = next;
                ++matched;
                break;
            }
            if (at == ROOT) return;
            at = states_[at].link;
            matched = states_[at].longest;
        }
        if (matched > max_match) {
            matched = max_match;
            while (states_[states_[at].link].longest >= matched) at = states_[at].link;
        }
    }

    int32_t length_, n_states_ = 0;
    Edges edges_;
    std::vector<State> states_;
    std::vector<int32_t> prefix_;      // state of k[..j]
    std::vector<int32_t> by_longest_;  // states in the order of their longest strings
    std::vector<int32_t> count_;
    LatestEnds ends_;
};

struct Problem {
    const int32_t *q, *k;
    int64_t n_streams;
    int32_t length, n_symbols, max_match;
    int64_t *src, *match_length;
};

template <class Edges>
struct Worker {
    explicit Worker(const Problem& problem) : p(problem), matcher(p.length, p.n_symbols) {}

    void run(int64_t stream) {
        const int64_t offset = stream * p.length;
        matcher.run(p.q + offset, p.k + offset, p.max_match, p.src + offset, p.match_length + offset);
    }

    const Problem& p;
    Matcher<Edges> matcher;
};

}  // namespace

// q, k, src, match_length: (n_streams, length), contiguous, n_streams >= 1, 1 <= length < 2^28, symbols >= 0.
// Returns 0, or 1 when there was not enough memory.
extern "C" int heron_rosa(const int32_t* q, const int32_t* k, int64_t n_streams, int32_t length, int32_t max_match,
                          int64_t n_threads, int64_t* src, int64_t* match_length) {
    const int32_t largest = *std::max_element(k, k + n_streams * length);
    const bool dense = largest < MOST_DENSE_SYMBOLS;
    const Problem problem{q, k, n_streams, length, dense ? largest + 1 : 0, max_match, src, match_length};
    return !(dense ? run_streams<Worker<DenseEdges>>(problem, n_threads)
                   : run_streams<Worker<HashedEdges>>(problem, n_threads));
}
