// Content hash by which a kept program (cpu/csr_program.h) recognises its weight.
//
// 32 lanes of two 64-bit words each, g = rotate(g ^ word) * odd and h the same with another
// rotation and factor. Each step is invertible, so one changed word always changes the result. One
// such chain is not enough: a change that comes out of a step as its top bit alone is undone for
// certain by the top bit of the next word. No change leaves both chains that way, since they rotate
// differently. Not cryptographic: contents made to collide would be multiplied as what they collide
// with. The bound is reading the arrays: 1.9 MB of a 512>512 3x3 layer at 90 % in about 30 us from
// L3 (Zen 4, AVX-512).
#pragma once
#include <stdint.h>
#include <string.h>

#include "cpu/vec.h"

namespace sparsecnn {
namespace SPARSECNN_ISA {

// 64 bytes whatever the instruction set: the compiler splits them where registers are smaller.
typedef uint64_t HashLanes __attribute__((vector_size(64)));
constexpr int kHashBlocks = 4;  // independent chains, to hide the latency of a step
constexpr uint64_t kHashFactorG = 0x9e3779b97f4a7c15ull, kHashFactorH = 0xc2b2ae3d27d4eb4full;

struct HashState {
  HashLanes g, h;

  SPARSECNN_INLINE void add(const char* p) {
    HashLanes w;
    memcpy(&w, p, sizeof w);
    const HashLanes x = g ^ w, y = h ^ w;
    g = ((x << 29) | (x >> 35)) * kHashFactorG;
    h = ((y << 47) | (y >> 17)) * kHashFactorH;
  }
};

inline uint64_t content_hash(const void* data, int64_t bytes, uint64_t seed) {
  constexpr int64_t kStep = kHashBlocks * static_cast<int64_t>(sizeof(HashLanes));
  const char* p = static_cast<const char*>(data);
  HashState state[kHashBlocks];
  for (int i = 0; i < kHashBlocks; ++i) {
    for (int l = 0; l < 8; ++l) {
      state[i].g[l] = (seed + 8u * i + l + 1u) * kHashFactorG;
      state[i].h[l] = (seed + 8u * i + l + 1u) * kHashFactorH;
    }
  }
  int64_t left = bytes;
  for (; left >= kStep; left -= kStep, p += kStep) {
    for (int i = 0; i < kHashBlocks; ++i) {
      __builtin_prefetch(p + 2048 + 64 * i);
      state[i].add(p + 64 * i);
    }
  }
  char tail[kStep] = {};
  // An empty tensor has no address, and memcpy takes none that is null even for no bytes.
  if (left > 0) memcpy(tail, p, static_cast<size_t>(left));
  for (int i = 0; i < kHashBlocks; ++i) state[i].add(tail + 64 * i);
  uint64_t result = static_cast<uint64_t>(bytes) ^ seed;
  for (int i = 0; i < kHashBlocks; ++i) {
    for (int l = 0; l < 8; ++l) {
      const uint64_t words[2] = {state[i].g[l], state[i].h[l]};
      for (int j = 0; j < 2; ++j) {
        result = (result ^ words[j] ^ (words[j] >> 32)) * kHashFactorG;
        result ^= result >> 29;
      }
    }
  }
  return result;
}

}  // namespace SPARSECNN_ISA
}  // namespace sparsecnn
