// Content hash by which a kept program (cpu/csr_program.h) recognises its weight.
//
// 32 independent 64-bit lanes, each h = rotate(h ^ word) * odd: invertible in the word and in h, so
// that one changed word always changes the result. The bound is reading the arrays: 1.9 MB of a
// 512>512 3x3 layer at 90 % in about 30 us from L3 (Zen 4, AVX-512).
#pragma once
#include <stdint.h>
#include <string.h>

#include "cpu/vec.h"

namespace sparsecnn {
namespace SPARSECNN_ISA {

// 64 bytes whatever the instruction set: the compiler splits them where registers are smaller.
typedef uint64_t HashLanes __attribute__((vector_size(64)));
constexpr uint64_t kHashMultiplier = 0x9e3779b97f4a7c15ull;  // odd; the golden ratio's bits

SPARSECNN_INLINE void hash_block(HashLanes* h, const char* p) {
  HashLanes w;
  memcpy(&w, p, sizeof w);
  const HashLanes x = *h ^ w;
  *h = ((x << 29) | (x >> 35)) * kHashMultiplier;
}

inline uint64_t content_hash(const void* data, int64_t bytes, uint64_t seed) {
  const char* p = static_cast<const char*>(data);
  HashLanes h[4];
  for (int i = 0; i < 4; ++i) {
    for (int l = 0; l < 8; ++l) h[i][l] = (seed + 8u * i + l + 1u) * kHashMultiplier;
  }
  int64_t left = bytes;
  for (; left >= 256; left -= 256, p += 256) {
    __builtin_prefetch(p + 2048);
    __builtin_prefetch(p + 2112);
    __builtin_prefetch(p + 2176);
    __builtin_prefetch(p + 2240);
    for (int i = 0; i < 4; ++i) hash_block(&h[i], p + 64 * i);
  }
  char tail[256] = {};
  memcpy(tail, p, static_cast<size_t>(left));
  for (int i = 0; i < 4; ++i) hash_block(&h[i], tail + 64 * i);
  uint64_t result = static_cast<uint64_t>(bytes) ^ seed;
  for (int i = 0; i < 4; ++i) {
    for (int l = 0; l < 8; ++l) {
      result = (result ^ h[i][l] ^ (h[i][l] >> 32)) * kHashMultiplier;
      result ^= result >> 29;
    }
  }
  return result;
}

}  // namespace SPARSECNN_ISA
}  // namespace sparsecnn
