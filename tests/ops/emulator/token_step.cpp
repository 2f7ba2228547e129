// The kernel of token_step as a library for a CPU, in bf16, with blocks that run at the same time.
//
// A copy is NaN until somebody waits for it.
#include <algorithm>
#include <map>

#include "single_token.h"
#include "together.h"

inline float divide_fast(float x, float y) { return x / y; }
template <typename Part> Part read_once(const Part* from) { return *from; }
inline float larger(float a, float b) { return a != a || a > b ? a : b; }
inline float reciprocal(float x) { return 1 / x; }

namespace {

struct Copy { void* to; const void* from; int bytes; };
struct State {
  int arrivals, missing, bytes, rounds;
  std::vector<Copy> under_way;
};
using Barrier = unsigned long long;
std::map<const void*, State> barriers;  // of all blocks
std::map<std::pair<unsigned, int>, std::pair<int, int>> named;  // by block and number: how many are there, rounds

State& state_of(const void* barrier) {
  if (uintptr_t(barrier) % 8) emulator::fail("a barrier that is not on 8 bytes");
  return barriers.at(barrier);
}
void settle(State& state) {
  if (state.missing != 0 || state.bytes != 0) return;
  state.missing = state.arrivals;
  state.rounds++;
}
void init_barrier(Barrier* barrier, int arrivals) { barriers[barrier] = {arrivals, arrivals, 0, 0, {}}; }
void show_barriers() {}
void arrive(Barrier* barrier) {
  State& state = state_of(barrier);
  if (state.missing-- == 0) emulator::fail("one too many at a barrier");
  settle(state);
}
void expect_bytes(Barrier* barrier, int bytes) {
  state_of(barrier).bytes += bytes;
  arrive(barrier);
}
void bring(void* to, const void* from, int bytes, Barrier* barrier) {
  if (bytes % 16 || bytes <= 0 || uintptr_t(to) % 16 || uintptr_t(from) % 16) emulator::fail("a copy that is not of 16 bytes");
  const auto* begin = reinterpret_cast<const char*>(emulator::shared_words.data());
  if (to < begin || static_cast<char*>(to) + bytes > begin + 4 * emulator::shared_words.size()) emulator::fail("beyond shared memory");
  memset(to, 0xff, bytes);
  state_of(barrier).under_way.push_back({to, from, bytes});
}
bool passed(const void* barrier, int round) {
  State& state = state_of(barrier);
  if (state.rounds <= round) {
    for (const Copy& copy : state.under_way) memcpy(copy.to, copy.from, copy.bytes), state.bytes -= copy.bytes;
    state.under_way.clear();
    settle(state);
  }
  return emulator::seems_over(state.rounds, round);
}
void await(Barrier* barrier, int round) {
  emulator::poll_until([=] { return passed(barrier, round); });
}
void sync_named(int number, int threads) {
  auto& here = named[{blockIdx.x, number}];
  const int round = here.second;
  if (++here.first == threads) here = {0, round + 1};
  emulator::poll_until([&here, round] { return here.second > round; });
}

template <typename Word> void put(Word* to, unsigned bits, unsigned tag) { *to = {bits, tag}; emulator::progress = true; }
unsigned looks = 0;
template <typename Word> void look_at_two(const Word* from, Word& a, Word& b) {
  if (uintptr_t(from) % 16) emulator::fail("two words that are not on 16 bytes");
  if (looks++ % 2) emulator::wait_for(emulator::Wait::kPoll);
  a = from[0], b = from[1];
}

template <typename T>
void multiply_floats(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  multiply_add(c, {a0, a1, a2, a3}, b0, b1);
}
void multiply_bytes(int (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  using namespace emulator;
  const uint32_t in[] = {a0, a1, a2, a3, b0, b1};
  memcpy(my_warp().in[my_lane()], in, sizeof in);
  memcpy(my_warp().c[my_lane()], c, sizeof c);
  collective([](Warp& warp) {
    int8_t a[16][32], b[32][8];
    for (int lane = 0; lane < 32; lane++) {
      for (int i = 0; i < 6; i++) {
        for (int j = 0; j < 4; j++) {
          const auto byte = int8_t(warp.in[lane][i] >> 8 * j);
          const int k = 4 * (lane % 4) + j;
          if (i < 4) a[lane / 4 + 8 * (i % 2)][k + 16 * (i / 2)] = byte;
          if (i >= 4) b[k + 16 * (i - 4)][lane / 4] = byte;
        }
      }
    }
    for (int lane = 0; lane < 32; lane++) {
      for (int i = 0; i < 4; i++) {
        int sum;
        memcpy(&sum, &warp.c[lane][i], sizeof sum);
        for (int k = 0; k < 32; k++) sum += a[lane / 4 + 8 * (i / 2)][k] * b[k][2 * (lane % 4) + i % 2];
        memcpy(&warp.c[lane][i], &sum, sizeof sum);
      }
    }
  });
  memcpy(c, my_warp().c[my_lane()], sizeof c);
}

void take_registers() {}
void give_registers() {}
void sync_multiplying();
void sync_head();
void end_step(unsigned* counters) {
  if (threadIdx.x == 0 && ++counters[1] == gridDim.x) ++counters[0], counters[1] = 0;
}

}  // namespace

#include "../../../heron/ops/token_step/csrc/token_step.cu"

namespace {
void sync_multiplying() { sync_named(1, kMultiply); }
void sync_head() { sync_named(2, 2 * kHead); }
}  // namespace

// Numbers: layers, channels, hidden channels, vocab, ranks; whether gates gate the hidden channels; blocks, and whether
// they give way to one another at every turn; bytes of shared memory that there are. With -n blocks it only says how
// many n blocks take. Addresses: layers, the head and its scales, norm, x, gates, logits, scratch, counters.
extern "C" const char* token_step_emulated(const int* n, void** at, float eps, float eps_head, int* shared_bytes) {
  Problem p{};
  p.n_layers = n[0];
  for (int i = 0; i < kLowRank; i++) p.ranks[i] = n[4 + i];
  size_up(p, n[1], n[2], n[3], static_cast<Tagged*>(at[8]));
  p.gates_hidden = n[8];
  p.layers = static_cast<const Layer*>(at[0]);
  p.head = {at[1], at[2]};
  p.norm_weight = at[3], p.norm_bias = at[4], p.x = at[5], p.gates = at[6], p.logits = at[7];
  p.counters = static_cast<unsigned*>(at[9]);
  p.eps = eps, p.eps_head = eps_head;
  const bool in_codes = p.head.scales != nullptr;
  p.at = shared_of(p, in_codes, n[11], std::abs(n[9]));
  *shared_bytes = p.at.bytes;
  if (n[9] < 0) return nullptr;
  emulator::grid_size = dim3(n[9]);
  emulator::block_size = dim3(kThreads);
  const auto kernel = in_codes ? token_step<Brain, true> : token_step<Brain, false>;
  emulator::body = [&] { kernel(p); };
  barriers.clear(), named.clear();
  emulator::run_together(n[9], kThreads, p.at.bytes, n[10]);
  return nullptr;
}
