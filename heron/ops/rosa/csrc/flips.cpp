// What the output of ROSA would be worth with one bit of its input flipped, for every bit: the exact finite differences
// behind the bit-flip gradient.
//
// Before row i, `cells[d - 1]` holds the length of the match that ends at distance d, above a low part that is larger for
// smaller d: their maximum is the longest match and, of those, the latest. A flip at t leaves all rows before t alone, so
// each starts from the row before t of the base run and goes on to the end: T^3 / 6 cells a stream, sixteen or eight in an
// instruction.

#include "streams.h"

namespace {

enum Flipped : int32_t { QUERY = 0, KEY = 1, ALL = 2 };  // ALL: q, k and v are one stream

struct Problem {
    const uint8_t *q, *k, *v;  // (n_streams, length)
    const float* gain;         // (n_streams, length, n_symbols): what each value is worth there
    const float* no_match;     // (n_streams, length)
    int64_t n_streams;
    int32_t length, n_symbols, n_bits, max_match;
    Flipped flipped;
    double* difference;  // (n_streams, length, n_bits): with the bit 1, less with the bit 0
};

// A cell is of signed type, as its greatest value is quickest to find: the lower half less one for the distance, the upper
// one for the length.
template <class Cell>
constexpr int HALF = sizeof(Cell) * 4;

template <class Cell>
constexpr Cell LOW = (Cell{1} << HALF<Cell>) - 1;

// Cells are taken so many at a time; those too many meet keys that equal no symbol.
constexpr int32_t BYTES = 32;
constexpr int32_t NO_SYMBOL = 256;

template <class Cell>
constexpr int32_t LANES = BYTES / sizeof(Cell);

// Takes cells[0..n) from one row to the next, whose query is `symbol`, and returns the largest. latest_first: the keys
// before that row, the last one first.
template <class Cell>
inline __attribute__((always_inline)) Cell advance(Cell* cells, const Cell* latest_first, Cell symbol, int32_t n,
                                                   Cell most) {
    typedef Cell Vector __attribute__((vector_size(BYTES)));
    typedef Cell Unaligned __attribute__((vector_size(BYTES), aligned(sizeof(Cell)), may_alias));
    Vector best = {};
    for (int32_t c = 0; c < n; c += LANES<Cell>) {
        Unaligned& here = *reinterpret_cast<Unaligned*>(cells + c);
        const Vector before = here, low = before & LOW<Cell>, longer = before + (Cell{1} << HALF<Cell>), limit = low + most;
        const Vector equal = *reinterpret_cast<const Unaligned*>(latest_first + c) == symbol;
        const Vector counted = longer < limit ? longer : limit;
        const Vector now = equal ? counted : low;
        here = now;
        best = now > best ? now : best;
    }
    // Half the lanes against the other half, until one is left: shuffled in registers.
    for (int32_t width = LANES<Cell> / 2; width; width /= 2) {
        Vector other;
        for (int32_t lane = 0; lane < LANES<Cell>; ++lane) other[lane] = best[lane ^ width];
        best = best > other ? best : other;
    }
    return best[0];
}

FOR_EACH_CPU int16_t advance_row(int16_t* cells, const int16_t* latest_first, int16_t symbol, int32_t n, int16_t most) {
    return advance(cells, latest_first, symbol, n, most);
}

FOR_EACH_CPU int32_t advance_row(int32_t* cells, const int32_t* latest_first, int32_t symbol, int32_t n, int32_t most) {
    return advance(cells, latest_first, symbol, n, most);
}

template <class Cell>
class Flipper {
  public:
    explicit Flipper(const Problem& problem)
        : p_(problem),
          length_(problem.length),
          most_(static_cast<Cell>(static_cast<Cell>(std::min(problem.max_match, problem.length - 1)) << HALF<Cell>)),
          base_(length_ + LANES<Cell>),
          cells_(length_ + LANES<Cell>),
          latest_first_(length_ + LANES<Cell>, NO_SYMBOL),
          worth_(length_) {}

    void run(int64_t stream) {
        const int64_t offset = stream * length_;
        q_ = p_.q + offset;
        v_ = p_.v + offset;
        gain_ = p_.gain + offset * p_.n_symbols;
        no_match_ = p_.no_match + offset;
        const uint8_t* k = p_.k + offset;
        for (int32_t j = 0; j < length_; ++j) latest_first_[length_ - 1 - j] = k[j];

        start(cells_);
        for (int32_t i = 0; i < length_; ++i) worth_[i] = worth(i, row(cells_, i, q_[i]), -1, 0);

        start(base_);
        for (int32_t t = 0; t < length_; ++t) {
            for (int32_t bit = 0; bit < p_.n_bits; ++bit) {
                const double change = flip(t, uint8_t(1 << bit));
                const uint8_t flipped = p_.flipped == KEY ? k[t] : q_[t];
                p_.difference[(offset + t) * p_.n_bits + bit] = flipped >> bit & 1 ? -change : change;
            }
            row(base_, t, q_[t]);
        }
    }

  private:
    void start(std::vector<Cell>& cells) {
        for (int32_t c = 0; c < length_ + LANES<Cell>; ++c) cells[c] = static_cast<Cell>(LOW<Cell> - std::min<int32_t>(c, LOW<Cell>));
    }

    Cell row(std::vector<Cell>& cells, int32_t i, uint8_t symbol) {
        return advance_row(cells.data(), latest_first_.data() + length_ - i, Cell{symbol}, i, most_);
    }

    // The worth of the value that follows the best match of row i, where the value at `t` is another.
    double worth(int32_t i, Cell best, int32_t t, uint8_t mask) const {
        if (best >> HALF<Cell> == 0) return no_match_[i];
        const int32_t next = i - static_cast<int32_t>(LOW<Cell> - (best & LOW<Cell>));  // i - d + 1, c = d - 1
        return gain_[int64_t{i} * p_.n_symbols + (next == t ? v_[next] ^ mask : v_[next])];
    }

    // What all outputs are worth with some bits at t flipped, less what they are worth without.
    double flip(int32_t t, uint8_t mask) {
        const bool in_q = p_.flipped != KEY, in_k = p_.flipped != QUERY;
        cells_ = base_;
        Cell& key = latest_first_[length_ - 1 - t];
        const Cell unflipped = key;
        if (in_k) key ^= mask;
        double change = 0;
        for (int32_t i = t; i < length_; ++i) {
            const uint8_t symbol = in_q && i == t ? q_[i] ^ mask : q_[i];
            const Cell best = row(cells_, i, symbol);
            change += worth(i, best, p_.flipped == ALL ? t : -1, mask) - worth_[i];
            // A query reaches as far as a match that holds it: from here on none does.
            if (!in_k && static_cast<int32_t>(best >> HALF<Cell>) < i - t) break;
        }
        key = unflipped;
        return change;
    }

    const Problem& p_;
    const int32_t length_;
    const Cell most_;
    std::vector<Cell> base_, cells_, latest_first_;
    std::vector<double> worth_;
    const uint8_t *q_ = nullptr, *v_ = nullptr;
    const float *gain_ = nullptr, *no_match_ = nullptr;
};

}  // namespace

// n_streams >= 1, 1 <= length <= 32767, symbols < n_symbols <= 256. Returns 0, or 1 when there was not enough memory.
extern "C" int heron_rosa_flips(const uint8_t* q, const uint8_t* k, const uint8_t* v, const float* gain,
                                const float* no_match, int64_t n_streams, int32_t length, int32_t n_symbols,
                                int32_t n_bits, int32_t max_match, int32_t flipped, int64_t n_threads,
                                double* difference) {
    const Problem problem{q,        k,         v,      gain,      no_match,
                          n_streams, length,    n_symbols, n_bits, max_match,
                          static_cast<Flipped>(flipped), difference};
    return !(length <= 128 ? run_streams<Flipper<int16_t>>(problem, n_threads) : run_streams<Flipper<int32_t>>(problem, n_threads));
}
