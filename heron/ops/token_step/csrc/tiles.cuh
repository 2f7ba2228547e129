// Tiles of matrices, and what else a block reads once: in what order, into and out of a ring in shared memory, and
// through the tensor cores.
#pragma once

namespace {

// Where in the ring a warp is.
struct Place {
    int slot = 0, round = 0;
    __device__ __forceinline__ void go_on(int slots) {
        if (++slot == slots) slot = 0, ++round;
    }
};

using Sums = float[4][4];  // of the tensor cores, which work on several at once

struct Tiles {
    const Problem& p;
    unsigned char* const shared;
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
    const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
    const int heads, first_head;  // the last blocks have fewer rows
    Place place{};

    __device__ __forceinline__ explicit Tiles(const Problem& p)
        : p(p), shared(shared_memory()), heads(p.channels / kHead), first_head(blocks - 1 - block) {}

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
        return p.at.n_limbs > 0 && (product < kDown || product >= kOfOutput);
    }
    __device__ __forceinline__ int row_bytes(int product) const {
        return (product == kOfValue ? p.hidden_channels : p.channels) * (has_codes(product) ? 1 : 2);
    }

    // use(product, tile) for this block's tiles of a phase.
    template <typename Use>
    __device__ __forceinline__ void for_tiles(int phase, const Use& use) const {
        const int first = first_product(phase), end = phase == kProject ? kOfOutput : first + 1;
        int tile = block;
#pragma unroll 1
        for (int product = first; product < end; ++product) {
            const int tiles = (p.rows[product] + kRows - 1) / kRows;
#pragma unroll 1
            for (; tile < tiles; tile += blocks) use(product, tile);
            tile -= tiles;
        }
    }
    // use(matrix, rows, bytes of each) for the parts of a head's upper low-rank matrices that come at once.
    template <typename Use>
    __device__ __forceinline__ void for_ups(const Use& use) const {
#pragma unroll 1
        for (int m = 0; m < kLowRank; ++m) {
            const int bytes = 2 * p.ranks[m], most = kRows * kPitch / bytes / kRows * kRows;
#pragma unroll 1
            for (int row = 0; row < kHead; row += most) use(m, row, most < kHead - row ? most : kHead - row, bytes);
        }
    }

    // Of the warps that ask for tiles, some rows each: one asks for a row in a hundred cycles.
    __device__ __forceinline__ void expect(int bytes) {
        if (place.round > 0) await(freed(place.slot), place.round - 1);
        if (thread == kMultiply) expect_bytes(filled(place.slot), bytes);
        __syncwarp();
    }
    static constexpr int kOfBringer = kRows / kBringers;
    __device__ __forceinline__ void bring_tiles(int phase, const Matrix* of) {
        for_tiles(phase, [&](int product, int tile) {
            const Matrix matrix = phase == kLogits ? *of : of[product];
            const int bytes = row_bytes(product), left = p.rows[product] - kRows * tile;
            const int rows = left < kRows ? left : kRows, pitch = (bytes / kUnit + 7) / 8 * 16;  // of the scales
            const int mine = (warp - kWarps) * kOfBringer + lane % kOfBringer;  // of the tile's rows
            const int64_t row = kRows * tile + mine;
#pragma unroll 1
            for (int begin = 0; begin < bytes; begin += kWide) {
                const int n = bytes - begin < kWide ? bytes - begin : kWide;
                const int scales = has_codes(product) ? (n / kUnit + 7) / 8 * 16 : 0;
                expect(rows * (n + scales));
                unsigned char* to = slot_at(place.slot);
                if (lane < kOfBringer && mine < rows) {
                    bring(to + mine * kPitch, static_cast<const char*>(matrix.numbers) + row * bytes + begin, n,
                          filled(place.slot));
                } else if (scales != 0 && lane < 2 * kOfBringer && mine < rows) {
                    bring(to + kRows * kPitch + mine * kScalePitch,
                          static_cast<const char*>(matrix.scales) + row * pitch + begin / 32, scales,
                          filled(place.slot));
                }
                place.go_on(p.at.slots);
            }
        });
    }
    __device__ __forceinline__ void bring_whole(const void* from, int64_t begin, int bytes) {
        expect(bytes);
        if (thread == kMultiply) bring(slot_at(place.slot), static_cast<const char*>(from) + begin, bytes, filled(place.slot));
        place.go_on(p.at.slots);
    }
    __device__ __forceinline__ void bring_all() {
#pragma unroll 1
        for (int layer = 0; layer < p.n_layers; ++layer) {
            const Layer& w = weights_of(layer);
#pragma unroll 1
            for (int phase = kProject; phase < kLogits; ++phase) {
                bring_tiles(phase, w.of);
                if (phase != kProject) continue;
#pragma unroll 1
                for (int head = first_head; head < heads; head += blocks) {
                    for_ups([&](int m, int row, int rows, int bytes) {
                        bring_whole(w.up[m], static_cast<int64_t>(head * kHead + row) * bytes, rows * bytes);
                    });
                    for (int half = 0; half < 2; ++half)
                        bring_whole(w.wkv_before, (2 * static_cast<int64_t>(head) + half) * kHalfState, kHalfState);
                }
            }
        }
        bring_tiles(kLogits, &p.head);
    }

    // A slot is one warp's for good: a barrier does not tell a round from the one before the last, so only who has seen
    // every one can wait for the next.
    __device__ __forceinline__ bool is_mine() const { return place.slot % kWarps == warp; }
    // use(slot), if the next one is this warp's.
    template <typename Use>
    __device__ __forceinline__ void take_slot(const Use& use) {
        if (is_mine()) {
            await(filled(place.slot), place.round);
            use(slot_at(place.slot));
            __syncwarp();
            if (lane == 0) arrive(freed(place.slot));
        }
        place.go_on(p.at.slots);
    }

    // The next slot; it has arrived for all threads that multiply once these meet.
    __device__ __forceinline__ int await_slot() {
        const int slot = place.slot;
        if (is_mine()) await(filled(slot), place.round);
        place.go_on(p.at.slots);
        return slot;
    }

    // sums += those of the 8 rows at `rows`, so many bytes apart, over `count` units, with the vector at `vector`. Lane
    // 4 g + t reads piece t of row g: the numbers that an instruction multiplies may come in any order, if it is the
    // same in both. The sums of rows 2 t and 2 t + 1 are then this lane's.
    template <typename T>
    __device__ __forceinline__ void multiply_units(const unsigned char* rows, int pitch, const unsigned char* vector,
                                                   int count, Sums& sums) const {
        rows += lane / 4 * pitch + lane % 4 * 16, vector += lane % 4 * 16;
        int unit = 0;
#pragma unroll 1
        for (; unit + 8 <= count; unit += 8) multiply_some<T, 8>(rows + unit * kUnit, vector + unit * kUnit, sums);
        if (count & 4) multiply_some<T, 4>(rows + unit * kUnit, vector + unit * kUnit, sums), unit += 4;
        if (count & 2) multiply_some<T, 2>(rows + unit * kUnit, vector + unit * kUnit, sums), unit += 2;
        if (count & 1) multiply_some<T, 1>(rows + unit * kUnit, vector + unit * kUnit, sums);
    }
    template <typename T, int kCount>
    __device__ __forceinline__ static void multiply_some(const unsigned char* rows, const unsigned char* vector,
                                                         Sums& sums) {
        Piece weights[kCount], numbers[kCount];
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            weights[i] = *reinterpret_cast<const Piece*>(rows + i * kUnit);
            numbers[i] = *reinterpret_cast<const Piece*>(vector + i * kUnit);
        }
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const auto &w = weights[i].words, &x = numbers[i].words;
            multiply_floats<T>(sums[i % 2], x[0], x[1], w[0], w[1]);
            multiply_floats<T>(sums[2 + i % 2], x[2], x[3], w[2], w[3]);
        }
    }

    // The same of codes, whose scales are at `scales`; `unit` is the vector's first.
    __device__ __forceinline__ void multiply_codes(const unsigned char* rows, const unsigned char* scales, int unit,
                                                   int count, Sums& sums) const {
        rows += lane / 4 * kPitch + lane % 4 * 16, scales += lane % 4 * 2 * kScalePitch;
#pragma unroll 1
        for (; count >= 4; count -= 4, unit += 4, rows += 4 * kUnit, scales += 4 * 2)
            multiply_some_codes<4>(rows, scales, unit, sums);
#pragma unroll 1
        for (; count > 0; --count, ++unit, rows += kUnit, scales += 2) multiply_some_codes<1>(rows, scales, unit, sums);
    }
    template <int kCount>
    __device__ __forceinline__ void multiply_some_codes(const unsigned char* rows, const unsigned char* scales, int unit,
                                                        Sums& sums) const {
        const auto* vector = there<const unsigned char>(p.at.limbs) + unit * kUnit + lane % 4 * 16;
        const float* of_vector = there<const float>(p.at.scales) + unit;
        Piece codes[kCount], limbs[2][kCount];
        Run<uint16_t, kCount> of_rows[2];
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            codes[i] = *reinterpret_cast<const Piece*>(rows + i * kUnit);
#pragma unroll
            for (int j = 0; j < 2; ++j)
                limbs[j][i] = *reinterpret_cast<const Piece*>(vector + j * p.at.n_limbs + i * kUnit);
        }
#pragma unroll
        for (int row = 0; row < 2; ++row)
            of_rows[row] = *reinterpret_cast<const Run<uint16_t, kCount>*>(scales + row * kScalePitch);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const auto &w = codes[i].words, &a = limbs[0][i].words, &b = limbs[1][i].words;
            int c[4] = {};
            multiply_bytes(c, a[0], b[0], a[1], b[1], w[0], w[1]);
            multiply_bytes(c, a[2], b[2], a[3], b[3], w[2], w[3]);
            const float by = of_vector[i];
#pragma unroll
            for (int row = 0; row < 2; ++row) {
                const float scale = by * __uint_as_float(static_cast<unsigned>(of_rows[row].values[i]) << 16);
                sums[i][row] += static_cast<float>(c[row] * 256 + c[2 + row]) * scale;
            }
        }
    }
    // What a warp has summed up of 8 rows, as lane t < 4 has it of rows 2 t and 2 t + 1, to `to`.
    __device__ __forceinline__ void put_sums(const Sums& sums, float* to) const {
        if (lane >= 4) return;
#pragma unroll
        for (int row = 0; row < 2; ++row)
            to[2 * lane + row] = (sums[0][row] + sums[1][row]) + (sums[2][row] + sums[3][row]);
    }
};

}  // namespace
