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

using Sums = float[2][4];  // two of the tensor cores' results, for more of them at once

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

    // Of the warp that asks for tiles.
    __device__ __forceinline__ void expect(int bytes) {
        if (place.round > 0) await(freed(place.slot), place.round - 1);
        if (lane == 0) expect_bytes(filled(place.slot), bytes);
        __syncwarp();
    }
    __device__ __forceinline__ void bring_tiles(int phase, const Matrix* of) {
        for_tiles(phase, [&](int product, int tile) {
            const Matrix matrix = phase == kLogits ? *of : of[product];
            const int bytes = row_bytes(product), left = p.rows[product] - kRows * tile;
            const int rows = left < kRows ? left : kRows, pitch = (bytes / kUnit + 7) / 8 * 16;  // of the scales
            const int64_t row = kRows * tile + lane % kRows;
#pragma unroll 1
            for (int begin = 0; begin < bytes; begin += kWide) {
                const int n = bytes - begin < kWide ? bytes - begin : kWide;
                const int scales = has_codes(product) ? (n / kUnit + 7) / 8 * 16 : 0;
                expect(rows * (n + scales));
                unsigned char* to = slot_at(place.slot);
                if (lane < rows) {
                    bring(to + lane * kPitch, static_cast<const char*>(matrix.numbers) + row * bytes + begin, n,
                          filled(place.slot));
                } else if (scales != 0 && lane >= kRows && lane < kRows + rows) {
                    bring(to + kRows * kPitch + lane % kRows * kScalePitch,
                          static_cast<const char*>(matrix.scales) + row * pitch + begin / 32, scales,
                          filled(place.slot));
                }
                place.go_on(p.at.slots);
            }
        });
    }
    __device__ __forceinline__ void bring_whole(const void* from, int64_t begin, int bytes) {
        expect(bytes);
        if (lane == 0) bring(slot_at(place.slot), static_cast<const char*>(from) + begin, bytes, filled(place.slot));
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
                    bring_whole(w.wkv_before, static_cast<int64_t>(head) * kStateBytes, kStateBytes);
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

    // sums += those of the 8 rows at `rows`, so many bytes apart, over `count` units, with the vector at `vector`. Lane
    // 4 g + t reads piece t of row g: the numbers that an instruction multiplies may come in any order, if it is the
    // same in both. The sums of rows 2 t and 2 t + 1 are then this lane's.
    template <typename T>
    __device__ __forceinline__ void multiply_units(const unsigned char* rows, int pitch, const unsigned char* vector,
                                                   int count, Sums& sums) const {
        Piece weights[kUnits], numbers[kUnits];
#pragma unroll
        for (int i = 0; i < kUnits; ++i) {
            if (i >= count) break;
            weights[i] = *reinterpret_cast<const Piece*>(rows + lane / 4 * pitch + i * kUnit + lane % 4 * 16);
            numbers[i] = *reinterpret_cast<const Piece*>(vector + i * kUnit + lane % 4 * 16);
        }
#pragma unroll
        for (int i = 0; i < kUnits; ++i) {
            if (i >= count) break;
            const auto &w = weights[i].words, &x = numbers[i].words;
            multiply_floats<T>(sums[0], x[0], x[1], w[0], w[1]);
            multiply_floats<T>(sums[1], x[2], x[3], w[2], w[3]);
        }
    }
    // The same of codes, from a vector's first unit and their scales on.
    __device__ __forceinline__ void multiply_codes(const unsigned char* rows, const unsigned char* scales, int unit,
                                                   int count, Sums& sums) const {
#pragma unroll
        for (int i = 0; i < kUnits; ++i) {
            if (i >= count) break;
            const Piece codes = *reinterpret_cast<const Piece*>(rows + lane / 4 * kPitch + i * kUnit + lane % 4 * 16);
            const auto* x = there<const unsigned char>(p.at.limbs) + (unit + i) * kUnit + lane % 4 * 16;
            const Piece a = *reinterpret_cast<const Piece*>(x), b = *reinterpret_cast<const Piece*>(x + p.at.n_limbs);
            int c[4] = {};
#pragma unroll
            for (int j = 0; j < 4; j += 2) {
                multiply_bytes(c, a.words[j], b.words[j], a.words[j + 1], b.words[j + 1], codes.words[j],
                               codes.words[j + 1]);
            }
            const float by = there<const float>(p.at.scales)[unit + i];
#pragma unroll
            for (int row = 0; row < 2; ++row) {
                const unsigned scale = *reinterpret_cast<const uint16_t*>(
                    scales + (lane % 4 * 2 + row) * kScalePitch + 2 * i);
                sums[0][row] += static_cast<float>(c[row] * 256 + c[2 + row]) * (by * __uint_as_float(scale << 16));
            }
        }
    }
};

}  // namespace
