// The kernels of WKV7 as a library for a CPU.
#include "hardware.h"

#include "../../../heron/ops/wkv7/csrc/wkv7s.cu"

// Of the last block that ran.
extern "C" int wkv7s_shared_bytes() { return int(4 * emulator::shared_words.size()); }
