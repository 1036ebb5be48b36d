#include "codec/bitmask.h"

#include <cstring>

namespace sparsecnn::codec {
namespace {

constexpr std::uint64_t kOnes = 0x0101010101010101ULL;
constexpr std::uint64_t kLow7 = 0x7f7f7f7f7f7f7f7fULL;

// Every nonzero byte becomes 1. Adding 0x7f to the low seven bits carries into the top bit exactly
// when one of them is set, and never into the next byte.
inline std::uint64_t nonzero_bytes(std::uint64_t x) {
  return ((((x & kLow7) + kLow7) | x) >> 7) & kOnes;
}

}  // namespace

void bitmask_pack(const std::uint8_t* mask, std::size_t count, std::uint8_t* bits) {
  const std::size_t whole = count / 8;
  for (std::size_t i = 0; i < whole; ++i) {
    std::uint64_t x;
    std::memcpy(&x, mask + 8 * i, 8);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    x = __builtin_bswap64(x);
#endif
    // Byte j holds b_j in {0, 1} at bit 8j. The factor has ones at 7k, k = 1..8, and all sums
    // 8j + 7k differ, so nothing carries; k = 8 - j puts b_j at bit 56 + j.
    bits[i] = static_cast<std::uint8_t>((nonzero_bytes(x) * 0x0102040810204080ULL) >> 56);
  }
  if (count % 8 != 0) {
    unsigned last = 0;
    for (std::size_t j = 0; j < count % 8; ++j) last |= (mask[8 * whole + j] != 0 ? 1u : 0u) << j;
    bits[whole] = static_cast<std::uint8_t>(last);
  }
}

bool bitmask_unpack(const std::uint8_t* bits, std::size_t count, std::uint8_t* mask) {
  const std::size_t whole = count / 8;
  for (std::size_t i = 0; i < whole; ++i) {
    // Copy the byte eight times, keep bit j in copy j.
    std::uint64_t x = nonzero_bytes((bits[i] * kOnes) & 0x8040201008040201ULL);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    x = __builtin_bswap64(x);
#endif
    std::memcpy(mask + 8 * i, &x, 8);
  }
  const std::size_t rest = count % 8;
  if (rest == 0) return true;
  const unsigned last = bits[whole];
  for (std::size_t j = 0; j < rest; ++j) {
    mask[8 * whole + j] = static_cast<std::uint8_t>((last >> j) & 1u);
  }
  return (last >> rest) == 0;
}

}  // namespace sparsecnn::codec
