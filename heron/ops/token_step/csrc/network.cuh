// A network, and what blocks tell one another of it, as token_step.cu reads both; sizes, and what lies where.
#pragma once

namespace {

constexpr int kWarps = 8, kMultiply = 32 * kWarps;  // that multiply, and their threads; one more warp asks for tiles
constexpr int kThreads = kMultiply + 128;          // registers are shared out to four warps at a time
constexpr int kRows = 8;                           // of a tile
constexpr int kWide = 2048;                        // bytes of its rows that come at once
constexpr int kPitch = kWide + 64;                 // from one row to the next, so that fewer banks clash
constexpr int kUnit = 64;                          // bytes of a row for one turn of a warp
constexpr int kUnits = kWide / kUnit / kWarps;     // turns
constexpr int kScalePitch = kWide / kUnit * 2;     // bytes of scales for a row
constexpr int kMostSlots = 16, kLeastSlots = 3;    // of the ring
constexpr int kTiles = 8;                          // whose sums the warps exchange at once
constexpr int kSumPitch = kWarps * kRows + 8;      // from one tile's to the next one's
constexpr int kHead = 64, kLowRank = 4, kMixes = 6;
constexpr int kStateBytes = kHead * kHead * 4;
static_assert(kStateBytes <= kRows * kPitch, "a slot holds a state");
constexpr int kGroup = 64;  // numbers that share a scale
constexpr unsigned kAll = 0xffffffffu;

enum Phase { kProject, kOutput, kKey, kValue, kLogits };
// r, k, v and the lower low-rank matrices, of the values' gate, decay, iclr and gate, are one phase.
enum Product { kR, kDown = 3, kOfOutput = kDown + kLowRank, kOfKey, kOfValue, kOfHead, kProducts };
__device__ __forceinline__ int first_product(int phase) { return phase == kProject ? kR : kOfOutput + phase - kOutput; }

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
    float ups[kLowRank][kHead];
    HeadRoom<kHead> room;
};

// Where what lies in shared memory, in bytes.
struct Shared {
    int layers;    // (n_layers,)
    int vectors;   // that are multiplied: up to 6 of (C,), or one of (hidden,)
    int limbs;     // of vectors for codes: all first limbs, then all second ones; so many
    int n_limbs;
    int scales;    // of their groups, fp32
    int residual;  // (C,) fp32
    int now;       // (C,), the token, normed
    int squeezed;  // what the upper low-rank matrices multiply
    int head;      // HeadInputs
    int sums;      // of tiles, by warps, two times
    int norm;      // sums over the block, two
    int barriers;  // of slots that are filled, and of those that are free
    int ring;
    int slot;      // bytes of one
    int slots;
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
    Tagged *projected, *v_first, *squeezed, *y, *hidden;  // of r, k and v; v of layer 0; ...: two numbers in a word
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
    p.projected = p.residual + channels;
    p.v_first = p.projected + 3 * channels / 2;
    p.y = p.v_first + channels / 2;
    p.squeezed = p.y + channels / 2;
    p.hidden = p.squeezed + (p.ranks[0] + p.ranks[1] + p.ranks[2] + p.ranks[3]) / 2;
}

// With as many slots as fit into so many bytes.
inline Shared shared_of(const Problem& p, bool has_codes, int available) {
    Shared at{};
    const int C = p.channels, F = p.hidden_channels;
    const auto larger = [](int a, int b) { return a > b ? a : b; };
    int end = 0;
    const auto take = [&](int bytes) {
        const int begin = end;
        end += (bytes + 15) / 16 * 16;
        return begin;
    };
    at.layers = take(p.n_layers * static_cast<int>(sizeof(Layer)));
    at.n_limbs = has_codes ? larger(3 * C, F) : 0;
    at.vectors = take(2 * larger(kMixes * C, F));
    at.limbs = take(2 * at.n_limbs);
    at.scales = take(4 * at.n_limbs / kGroup);
    at.residual = take(4 * C);
    at.now = take(2 * C);
    at.squeezed = take(2 * (p.ranks[0] + p.ranks[1] + p.ranks[2] + p.ranks[3]));
    at.head = take(sizeof(HeadInputs));
    at.sums = take(4 * 2 * kTiles * kSumPitch);
    at.norm = take(4 * 2 * kWarps);
    at.barriers = take(2 * 8 * kMostSlots);
    at.ring = (end + 127) / 128 * 128;
    at.slot = kRows * (kPitch + (has_codes ? kScalePitch : 0));
    at.slots = (available - at.ring) / at.slot;
    if (at.slots > kMostSlots) at.slots = kMostSlots;
    if (at.slots < kLeastSlots) at.slots = kLeastSlots;
    at.bytes = at.ring + at.slots * at.slot;
    return at;
}

}  // namespace
