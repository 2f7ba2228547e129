// Tiles of matrices, and what else a block reads once: in what order, into and out of a ring in shared memory, and
// through the tensor cores.
#pragma once

namespace {

// Where in the ring a warp is. Every second slot is the other team's, and those of a team follow one another.
struct Place {
    unsigned slot, round = 0;
    __device__ __forceinline__ void go_on(unsigned slots) {
        if ((slot += kTeams) >= slots) slot %= kTeams, ++round;
    }
};

using Sums = float[kAtOnce][4];  // the tensor cores' results: of every fourth unit

struct alignas(8) HalfPiece {
    unsigned words[2];
};

struct Tiles {
    const Problem& p;
    unsigned char* const shared;
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
    const int team = thread / 32 / kWarps, warp = thread / 32 % kWarps;
    const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
    const int heads, first_head;  // the last blocks have fewer rows
    int next = 0;            // whose slot it is
    Place place, others{1};  // of this warp's team; a warp that asks for tiles has both, that of the next slot first

    __device__ __forceinline__ explicit Tiles(const Problem& p)
        : p(p), shared(shared_memory()), heads(p.channels / kHead), first_head(blocks - 1 - block),
          place{static_cast<unsigned>(team) % kTeams} {}

    template <typename V>
    __device__ __forceinline__ V* there(int bytes) const { return reinterpret_cast<V*>(shared + bytes); }
    __device__ __forceinline__ const Layer& weights_of(int layer) const {
        return there<const Layer>(p.at.layers)[layer];
    }
    __device__ __forceinline__ Barrier* filled(int slot) const { return there<Barrier>(p.at.barriers) + slot; }
    __device__ __forceinline__ Barrier* freed(int slot) const { return filled(kMostSlots + slot); }
    __device__ __forceinline__ unsigned char* slot_at(int slot) const {
        return shared + p.at.ring + slot * p.at.slot;
    }
    __device__ __forceinline__ bool has_codes(int product) const {
        return p.at.has_codes && (product < kDown || product >= kOfOutput);
    }
    __device__ __forceinline__ int row_bytes(int product) const {
        return (product == kOfValue ? p.hidden_channels : p.channels) * (has_codes(product) ? 1 : 2);
    }

    // This block's tiles of a phase, which lie side by side.
    __device__ __forceinline__ Part part_of_phase(int phase) const { return there<const Part>(p.at.parts)[phase]; }
    __device__ __forceinline__ void find_parts() const {
        if (thread > kUps) return;
        Part part{};
        if (thread < kUps) part = part_of_tiles(p, thread, blocks, block);
        // The first blocks have no rows of the lower low-rank matrices.
        else if (const int of_ups = (blocks + 1) / 2; block < of_ups) part = part_of(p.channels / kRows, of_ups, block);
        there<Part>(p.at.parts)[thread] = part;
    }
    // use(product, tile) for them.
    template <typename Use>
    __device__ __forceinline__ void for_tiles(int phase, const Use& use) const {
        Part part = part_of_phase(phase);
#pragma unroll 1
        for (int product = first_product(phase); part.count > 0; ++product) {
            const int here = tiles_of(p, product);
#pragma unroll 1
            for (; part.first < here && part.count > 0; ++part.first, --part.count) use(product, part.first);
            part.first -= here;
        }
    }
    // use(row, rows, first matrix) for this block's rows of the upper low-rank matrices that come at once.
    template <typename Use>
    __device__ __forceinline__ void for_ups(const Use& use) const {
        Part part = part_of_phase(kUps);
#pragma unroll 1
        while (part.count > 0) {
            const int eights = part.count < p.at.eights ? part.count : p.at.eights;
#pragma unroll 1
            for (int m = 0; m < kLowRank; m += p.at.matrices) use(kRows * part.first, kRows * eights, m);
            part.first += eights, part.count -= eights;
        }
    }

    // Of a warp that asks for tiles.
    static constexpr int kOfAsker = kRows / kAskers;  // rows
    __device__ __forceinline__ int asker() const { return thread / 32 - kMultiply / 32; }
    // For its bytes of a slot.
    __device__ __forceinline__ void expect(int bytes) {
        if (place.round > 0) await(freed(place.slot), place.round - 1);
        if (lane == 0) expect_bytes(filled(place.slot), bytes);
        __syncwarp();
    }
    __device__ __forceinline__ void ask_on() {
        place.go_on(p.at.slots);
        take_turns();
    }
    __device__ __forceinline__ void take_turns() {
        const Place place_here = place;
        place = others, others = place_here;
        next ^= 1;
    }
    // Lane `first` and those behind it bring rows, so many bytes apart in memory; rows that are whole by one copy.
    __device__ __forceinline__ void bring_rows(int first, int rows, unsigned char* to, const void* from, int64_t begin,
                                               int apart, int bytes) {
        const int copies = bytes == apart ? 1 : rows, mine = lane - first;
        if (rows > 0 && mine >= 0 && mine < copies) {
            bring(to + mine * bytes, static_cast<const char*>(from) + begin + static_cast<int64_t>(mine) * apart,
                  bytes == apart ? rows * bytes : bytes, filled(place.slot));
        }
    }
    __device__ __forceinline__ void bring_tiles(int phase, const Matrix* of) {
        for_tiles(phase, [&](int product, int tile) {
            const Matrix matrix = phase == kLogits ? *of : of[product];
            const int64_t row = kRows * tile + kOfAsker * asker();
            const int left = p.rows[product] - static_cast<int>(row);
            const int rows = left < 0 ? 0 : left < kOfAsker ? left : kOfAsker;
            const int bytes = row_bytes(product), pitch = (bytes / kUnit + 7) / 8 * 16;  // of the scales
#pragma unroll 1
            for (int begin = 0; begin < bytes; begin += kWide) {
                const int n = bytes - begin < kWide ? bytes - begin : kWide;
                const int scales = has_codes(product) ? (n / kUnit + 7) / 8 * 16 : 0;
                expect(rows * (n + scales));
                unsigned char* to = slot_at(place.slot);
                bring_rows(0, rows, to + kOfAsker * asker() * n, matrix.numbers, row * bytes + begin, bytes, n);
                if (scales != 0) {
                    bring_rows(kOfAsker, rows, to + kRows * kWide + kOfAsker * asker() * scales, matrix.scales,
                               row * pitch + begin / 32, pitch, scales);
                }
                ask_on();
            }
        });
    }
    // Rows of the upper low-rank matrices, one behind the other: a matrix a warp.
    __device__ __forceinline__ void bring_ups(const Layer& w) {
        for_ups([&](int row, int rows, int first) {
            int begin = 0, mine = 0, bytes = 0;
#pragma unroll 1
            for (int m = first; m < first + p.at.matrices; ++m) {
                if (m % kAskers == asker()) mine = m, bytes = 2 * p.ranks[m];
                else if (bytes == 0) begin += rows * 2 * p.ranks[m];
            }
            expect(rows * bytes);
            if (bytes != 0 && lane == 0) {
                bring(slot_at(place.slot) + begin,
                      static_cast<const char*>(w.up[mine]) + static_cast<int64_t>(row) * bytes, rows * bytes,
                      filled(place.slot));
            }
            ask_on();
        });
    }
    __device__ __forceinline__ void bring_state(const float* from) {
        constexpr int kOfState = kStateBytes / kAskers;
        expect(kOfState);
        if (lane == 0) {
            bring(slot_at(place.slot) + asker() * kOfState,
                  reinterpret_cast<const char*>(from) + asker() * kOfState, kOfState, filled(place.slot));
        }
        ask_on();
    }
    __device__ __forceinline__ void bring_all() {
#pragma unroll 1
        for (int layer = 0; layer < p.n_layers; ++layer) {
            const Layer& w = weights_of(layer);
#pragma unroll 1
            for (int phase = kSqueeze; phase < kLogits; ++phase) {
                bring_tiles(phase, w.of);
                if (phase != kProject) continue;
                bring_ups(w);
#pragma unroll 1
                for (int head = first_head; head < heads; head += blocks) {
                    if (next != 0) take_turns();  // the threads of a head are of the first team
                    bring_state(w.wkv_before + static_cast<int64_t>(head) * kHead * kHead);
                }
            }
        }
        bring_tiles(kLogits, &p.head);
    }

    // This warp has done with a slot.
    __device__ __forceinline__ void leave_slot() {
        __syncwarp();
        if (lane == 0) arrive(freed(place.slot));
        place.go_on(p.at.slots);
    }
    __device__ __forceinline__ void leave_slot(bool is_mine) {
        if (is_mine) leave_slot();
        next ^= 1;
    }

    // sums += those of the 8 rows at `rows`, so many bytes apart, over `count` units, with the vector at `vector`. Lane
    // 4 g + t reads piece t of row g, whose words an instruction takes as they come: 0 and 2 as of its row g, 1 and 3
    // as of its row g + 8. Its columns 2 u and 2 u + 1 are the vector's words of unit u for either: what it multiplies
    // may come in any order, if it is the same in both. Of two units a lane reads the second one first where g is odd,
    // from other banks than its neighbours.
    template <typename T, int kMost>
    __device__ __forceinline__ void multiply_units(const unsigned char* rows, int pitch, const unsigned char* vector,
                                                   int count, Sums& sums) const {
        constexpr int kTurns = kMost / kAtOnce;
        Piece weights[kMost];
        HalfPiece numbers[kTurns];
        const int unit = lane / 8, odd = lane / 4 % 2;
        const unsigned char *row = rows + lane / 4 * pitch + lane % 4 * 16, *x = vector + lane % 4 * 16 + odd * 8;
#pragma unroll
        for (int i = 0; i < kMost; ++i) {
            const int here = i % 2 == 0 ? i + odd : i - odd;
            weights[i] = Piece{};
            if (here < count) weights[i] = *reinterpret_cast<const Piece*>(row + here * kUnit);
        }
#pragma unroll
        for (int i = 0; i < kTurns; ++i) {
            numbers[i] = HalfPiece{};
            const int here = kAtOnce * i + unit;
            if (here < count) numbers[i] = *reinterpret_cast<const HalfPiece*>(x + here * kUnit);
        }
#pragma unroll
        for (int i = 0; i < kMost; ++i) {
            const auto& a = weights[i].words;
            const auto& b = numbers[i / kAtOnce].words;
            multiply_floats<T>(sums[i % kAtOnce], a[0], a[1], a[2], a[3], b[0], b[1]);
        }
    }
    // What lane 4 g + t has of the sum of row g: of units t, 4 + t, ..., whose columns it has.
    __device__ __forceinline__ float sum_of_row(const Sums& sums) const {
        const int turn = lane % 4 ^ lane / 4 % 2;  // in which they were multiplied
        float mine[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) mine[i] = sums[i][0] + sums[i][3];
        return turn < 2 ? (turn == 0 ? mine[0] : mine[1]) : (turn == 2 ? mine[2] : mine[3]);
    }
    // Where word i of a vector lies, so that words 0 and 2 of a piece are neighbours.
    __device__ __forceinline__ static unsigned place_of_word(unsigned i) { return i - i % 4 + i % 2 * 2 + i / 2 % 2; }
    // The same for codes: `unit` is the first unit of the vector, `scales` are those of the rows. An instruction
    // multiplies one unit of each row, and two instructions a pair of units; rows with odd numbers take the second unit
    // of a pair first. Each unit of the pair has four columns: words 0 and 2 of the vector's upper bytes, words 1 and 3
    // of these, and the same of its lower bytes. Lane 4 g + t adds up units t / 2, 2 + t / 2, ... of row g: for even t
    // their products with the upper bytes, which the caller multiplies by 256, for odd t those with the lower bytes.
    __device__ __forceinline__ void multiply_codes(const unsigned char* rows, int pitch, const unsigned char* scales,
                                                   int scale_pitch, int unit, int count, float& sum) const {
        constexpr int kPairs = kUnits / 2;
        Piece codes[kUnits];
        HalfPiece limbs[kPairs];
        unsigned scale[kPairs];
        float by[kPairs];
        const int odd = lane / 4 % 2, mine = lane % 4 / 2;
        const unsigned char *row = rows + lane / 4 * pitch + lane % 4 * 16, *of_row = scales + lane / 4 * scale_pitch;
        const auto* x = there<const unsigned char>(p.at.limbs) + (unit + lane / 16) * 2 * kUnit + lane / 8 % 2 * kUnit +
                        lane % 4 * 16 + odd * 8;
#pragma unroll
        for (int i = 0; i < kUnits; ++i)
            codes[i] = *reinterpret_cast<const Piece*>(row + (i % 2 == 0 ? i + odd : i - odd) * kUnit);
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
            limbs[i] = *reinterpret_cast<const HalfPiece*>(x + i * 4 * kUnit);
            scale[i] = *reinterpret_cast<const uint16_t*>(of_row + (2 * i + mine) * 2);
            by[i] = there<const float>(p.at.scales)[unit + 2 * i + mine];
        }
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
            int c[2][4] = {};
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const auto& a = codes[2 * i + j].words;
                multiply_bytes(c[j], a[0], a[1], a[2], a[3], limbs[i].words[0], limbs[i].words[1]);
            }
            const bool is_first = mine == odd;
            const int whole = (is_first ? c[0][0] : c[1][0]) + (is_first ? c[0][3] : c[1][3]);
            if (2 * i + mine < count) sum += static_cast<float>(whole) * (by[i] * __uint_as_float(scale[i] << 16));
        }
    }
};

}  // namespace
