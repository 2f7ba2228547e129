// A network, and what blocks tell one another of it, as token_step.cu reads both; sizes, and what lies where.
#pragma once

namespace {

constexpr int kTeams = 2, kWarps = 4;              // that take turns with slots; warps of each
constexpr int kMultiply = 32 * kTeams * kWarps;    // threads that multiply
constexpr int kAskers = 4;                         // warps that ask for tiles
constexpr int kThreads = kMultiply + 32 * kAskers;
constexpr int kRows = 8;                           // of a tile
constexpr int kWide = 2048;                        // bytes of its rows that come at once
constexpr int kUnit = 64;                          // bytes of a row for one turn of a warp
constexpr int kUnits = kWide / kUnit / kWarps;     // of a warp
constexpr int kAtOnce = 4;                         // units
constexpr int kScales = kWide / kUnit * 2;         // bytes of a row's scales that come at once
constexpr int kMostSlots = 16, kLeastSlots = 3;    // of the ring
static_assert(kTeams == 2 && kLeastSlots >= kTeams, "teams take turns, and a slot is always the same team's");
constexpr int kTiles = 8;                          // whose sums the warps exchange at once
constexpr int kSumPitch = kTeams * kWarps * kRows + 8;  // from one tile's to the next one's
constexpr int kHead = 64, kLowRank = 4;
constexpr int kMostEights = 2;                     // of rows of the upper low-rank matrices that come at once
static_assert(kWarps == kLowRank && kAskers == kLowRank, "a warp for each of these");
constexpr int kStateBytes = kHead * kHead * 4;
static_assert(kStateBytes <= kRows * kWide, "a slot holds a state");
constexpr int kGroup = 64;  // numbers that share a scale
constexpr unsigned kAll = 0xffffffffu;

// The lower low-rank matrices (of the values' gate, the decay, the iclr and the gate) are multiplied before r, k and v.
// While those are multiplied, the results travel to all blocks, which need them for the upper low-rank matrices.
enum Phase { kSqueeze, kProject, kOutput, kKey, kValue, kLogits };
enum Product { kR, kDown = 3, kOfOutput = kDown + kLowRank, kOfKey, kOfValue, kOfHead, kProducts };
__host__ __device__ inline int first_product(int phase) {
    return phase == kSqueeze ? kDown : phase == kProject ? kR : kOfOutput + phase - kOutput;
}
__host__ __device__ inline int end_of_products(int phase) {
    return phase == kSqueeze ? kOfOutput : phase == kProject ? kDown : first_product(phase) + 1;
}
__host__ __device__ inline bool has_many(int phase) { return end_of_products(phase) > first_product(phase) + 1; }
// Which of its phase's vectors it multiplies: values and their gate have one.
__host__ __device__ inline int vector_of(int product) {
    return product < kDown ? product : product < kOfOutput ? product - 1 : 0;
}

// Two numbers of 16 bits, or one of 32, and whose they are; written and read as one.
struct alignas(8) Tagged {
    unsigned bits, tag;
};

struct Wanted {
    const Tagged* words;  // two
    unsigned tag;
};

struct Matrix {
    const void* numbers;
    const void* scales;  // bf16, of a matrix of codes; else null
};

// Addresses alone; heron/ops/token_step/cuda.py writes them in this order.
struct Layer {
    const void *norm1_weight, *norm1_bias, *mixes;  // (C,), (C,), (6, C)
    Matrix of[kOfHead];
    const void* up[kLowRank];
    const void *w0, *a0, *v0, *k_k, *k_a, *r_k, *norm_weight, *norm_bias;  // v0 is null in layer 0
    const void *norm2_weight, *norm2_bias, *channel_mix;
    const void *att_before, *ffn_before;
    void *att_after, *ffn_after;
    const float* wkv_before;
    float* wkv_after;
};
static_assert(sizeof(Layer) % 16 == 0, "it is copied in pieces");

// What is of one head, beside its state.
struct HeadInputs {
    alignas(16) float vectors[4][kHead];  // r, k, v, layer 0's v
    float ups[kLowRank][kHead];  // what the upper low-rank matrices give
    HeadRoom<kHead> room;
};

constexpr int kUps = kLogits + 1;  // place of the part of the upper low-rank matrices, behind those of the phases

// A block's share of so many tiles, one behind the other.
struct Part {
    int first, count;
};

// Where what lies in shared memory, in bytes.
struct Shared {
    int layers;    // (n_layers,)
    int vectors;   // that are multiplied: those of (C,) that a block needs, or one of (hidden,)
    int limbs;     // the same for codes: of each group all first ones, then all second ones
    int scales;    // of their groups, fp32
    bool has_codes;
    int residual;  // (C,) fp32, up to where hidden channels are multiplied
    int own;       // of the residual, this block's rows
    int squeezed;  // what the upper low-rank matrices multiply
    int head;      // HeadInputs
    int sums;      // of tiles, by warps, two times
    int norm;      // sums of warps
    int barriers;  // of slots that are filled, and of those that are free
    int parts;     // of a block, by phase; then of the upper low-rank matrices
    int ring;
    int slot;      // bytes of one
    int slots;
    int matrices, eights;  // of the upper low-rank ones, that come at once; 8 rows of each
    int bytes;
};

struct Problem {
    const Layer* layers;
    Matrix head;
    const void *norm_weight, *norm_bias;
    const void* x;      // (C,), the embedded token
    const void* gates;  // (layers, C or hidden), DeepEmbed's; or null
    void* logits;
    Tagged* residual;                                     // (C,), fp32
    Tagged* ups;                                          // (4, C), fp32, of the upper low-rank matrices
    Tagged *projected, *v_first, *squeezed, *y, *hidden;  // of r, k and v; v of layer 0; ...: two numbers in a word
    void* now;            // (C,), the token, normed, until all blocks have read the last one, if it is to lie there
    unsigned* counters;                                   // steps, and blocks that have ended this one
    int n_layers, channels, hidden_channels, ranks[kLowRank];
    int rows[kProducts];
    bool gates_hidden;
    float eps, eps_head;
    Shared at;
};

// What follows from the sizes; the ranks are there. Each word of `scratch` has its place.
inline void size_up(Problem& p, int channels, int hidden_channels, int vocab, Tagged* scratch) {
    p.channels = channels, p.hidden_channels = hidden_channels;
    for (int i = 0; i < kProducts; ++i) p.rows[i] = channels;
    for (int i = 0; i < kLowRank; ++i) p.rows[kDown + i] = p.ranks[i];
    p.rows[kOfKey] = hidden_channels, p.rows[kOfHead] = vocab;
    p.residual = scratch;
    p.ups = p.residual + channels;
    p.projected = p.ups + kLowRank * channels;
    p.v_first = p.projected + 3 * channels / 2;
    p.y = p.v_first + channels / 2;
    p.squeezed = p.y + channels / 2;
    p.hidden = p.squeezed + (p.ranks[0] + p.ranks[1] + p.ranks[2] + p.ranks[3]) / 2;
    p.now = p.hidden + hidden_channels / 2;
}

// The first blocks have one more.
__host__ __device__ inline Part part_of(int all, int blocks, int block) {
    const int each = all / blocks, more = all % blocks;
    return {block * each + (block < more ? block : more), each + (block < more)};
}
__host__ __device__ inline int tiles_of(const Problem& p, int product) { return (p.rows[product] + kRows - 1) / kRows; }

// A block's share of the tiles of all lower low-rank matrices. They go to the last blocks, which have fewer tiles of r,
// k and v. A block whose tiles of r, k and v multiply two vectors gets none, so no block needs more than two of those.
__host__ __device__ inline Part part_of_squeeze(const Problem& p, int all, int blocks, int block) {
    const int of_one = tiles_of(p, kR), projected = kDown * of_one;
    const int each = projected / blocks, more = projected % blocks;
    int with_two = -1;                                 // the last block found that multiplies two vectors
    int without = blocks, place = blocks - 1 - block;  // the others, and which of them this is, from the last one on
    bool has_two = false;
    for (int tile = of_one; tile < projected; tile += of_one) {
        const int of_longer = more * (each + 1);
        const int its = tile < of_longer ? tile / (each + 1) : more + (tile - of_longer) / each;
        if (part_of(projected, blocks, its).first == tile || its == with_two) continue;
        with_two = its, --without;
        if (its > block) --place;
        has_two = has_two || its == block;
    }
    if (without == 0) return part_of(all, blocks, blocks - 1 - block);
    return has_two ? Part{} : part_of(all, without, place);
}
// A block's tiles of a phase.
__host__ __device__ inline Part part_of_tiles(const Problem& p, int phase, int blocks, int block) {
    int all = 0;
    for (int product = first_product(phase); product < end_of_products(phase); ++product) all += tiles_of(p, product);
    return phase == kSqueeze ? part_of_squeeze(p, all, blocks, block) : part_of(all, blocks, block);
}

// Of the vectors that r, k and v multiply, or the lower low-rank matrices, those that a block needs.
struct Span {
    int first, last;
    __host__ __device__ int count() const { return last - first + 1; }
};
__host__ __device__ inline Span span_of(const Problem& p, int phase, int blocks, int block) {
    Part part = part_of_tiles(p, phase, blocks, block);
    Span span{0, -1};
    for (int product = first_product(phase); part.count > 0; ++product) {
        const int tiles = tiles_of(p, product);
        if (part.first < tiles) {
            if (span.count() == 0) span.first = vector_of(product);
            span.last = vector_of(product);
            part.count -= tiles - part.first;
            part.first = 0;
        } else {
            part.first -= tiles;
        }
    }
    return span;
}

// With as many slots as fit into so many bytes.
inline Shared shared_of(const Problem& p, bool has_codes, int available, int blocks) {
    Shared at{};
    int in_codes = 0, floats = 0;  // vectors, at most
    for (int block = 0; block < blocks; ++block) {
        const int projected = span_of(p, kProject, blocks, block).count();
        const int here = span_of(p, kSqueeze, blocks, block).count() + (has_codes ? 0 : projected);
        in_codes = has_codes && projected > in_codes ? projected : in_codes, floats = here > floats ? here : floats;
    }
    const int C = p.channels, F = p.hidden_channels;
    const auto larger = [](int a, int b) { return a > b ? a : b; };
    int end = 0;
    const auto take = [&](int bytes) {
        const int begin = end;
        end += (bytes + 15) / 16 * 16;
        return begin;
    };
    at.layers = take(p.n_layers * static_cast<int>(sizeof(Layer)));
    at.has_codes = has_codes;
    at.limbs = take(larger(2 * (in_codes + floats) * C + 4 * C, 2 * F));
    at.vectors = at.limbs + 2 * in_codes * C;
    at.residual = at.vectors + 2 * floats * C;
    at.scales = take(has_codes ? 4 * larger(in_codes * C, F) / kGroup : 0);
    at.own = take(4 * kRows * part_of(tiles_of(p, kOfValue), blocks, 0).count);
    const int of_ups = 2 * (p.ranks[0] + p.ranks[1] + p.ranks[2] + p.ranks[3]);
    at.squeezed = take(of_ups);
    at.matrices = of_ups <= kWide ? kLowRank : 1;
    at.eights = kMostEights * of_ups <= kWide ? kMostEights : 1;
    at.head = take(sizeof(HeadInputs));
    at.sums = take(4 * 2 * kTiles * kSumPitch);
    at.norm = take(4 * 4 * kTeams * kWarps);
    at.barriers = take(2 * 8 * kMostSlots);
    at.parts = take((kUps + 1) * static_cast<int>(sizeof(Part)));
    at.ring = (end + 127) / 128 * 128;
    at.slot = kRows * (kWide + (has_codes ? kScales : 0));
    at.slots = (available - at.ring) / at.slot;
    if (at.slots > kMostSlots) at.slots = kMostSlots;
    if (at.slots < kLeastSlots) at.slots = kLeastSlots;
    at.bytes = at.ring + at.slots * at.slot;
    return at;
}

}  // namespace
