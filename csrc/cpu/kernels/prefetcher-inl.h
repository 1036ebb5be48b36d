// Which channels a weight reads, and their prefetching by the row loop. Included by tiles-inl.h.
#pragma once
#include "cpu/vec.h"

namespace sparsecnn {
namespace SPARSECNN_ISA {

// Places in a list of channels; all of a range where there is no list.
struct ChannelList {
  const int32_t* list;
  SPARSECNN_INLINE int64_t operator[](int64_t i) const { return list ? list[i] : i; }
};

// Input of the next block, brought to L2 by the row loop of this one, a few rows per visit of a
// filter: no hardware prefetcher follows rows that lie a plane apart.
struct Prefetcher {
  const char* first;         // where the rows of the first channel are counted from
  ChannelList channel;       // from there
  int64_t next_channel;      // to be prefetched
  int64_t channels;          // of them in all
  const int64_t* rows;       // (count): bytes from the channel's start
  int32_t count, next;       // rows of a channel, the next of them
  int64_t row_bytes, pitch;  // of a row, between channels
  int64_t per_visit;         // rows

  SPARSECNN_INLINE void visit() {
    for (int64_t i = 0; i < per_visit && next_channel < channels; ++i) {
      const char* const row = first + channel[next_channel] * pitch + rows[next];
      for (int64_t b = 0; b < row_bytes; b += 64) __builtin_prefetch(row + b, 0, 2);
      if (++next == count) {
        next = 0;
        ++next_channel;
      }
    }
  }
};

}  // namespace SPARSECNN_ISA
}  // namespace sparsecnn
