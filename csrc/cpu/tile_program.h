// What the programs of csr_conv2d and pattern_conv2d share: the tables of a plan, and how programs
// are kept between calls.
//
// Kept how: by the addresses of the weight's arrays, and checked by a hash of their contents on
// every call (kernels/hash-inl.h), because a weight may change in place in ways no counter sees. A
// program that does not match any more is not used; had the hash missed a change, numbers would be
// wrong, but nothing read outside the panel. Programs are kept from the second call with the same
// contents on, so that training steps and the temporaries of gradients leave nothing behind, and
// the least recently used go first.
#pragma once
#include <cstdint>
#include <cstring>
#include <list>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "core/params.h"
#include "cpu/tile_plan.h"

namespace sparsecnn::cpu {

// Owns what the pointers of a TilePlan lead to.
struct TileTables {
  std::vector<int32_t> tables;
  std::vector<int64_t> chunk_begin;

  int64_t bytes() const { return static_cast<int64_t>(4 * tables.size() + 8 * chunk_begin.size()); }
};

inline int64_t element_bytes(const ConvParams& params) {
  return params.dtype == DType::kFloat64 ? 8 : 4;
}

// The channel pitch and the tables of taps, rows and columns.
void lay_out_panel(TilePlan& plan, TileTables& owner, int64_t element_bytes);

// Filters that a chunk's scratch has room for.
int64_t chunk_room(const TilePlan& plan, int64_t element_bytes);

// Takes the chunks from owner.chunk_begin, whose largest fits the scratch: items and scratch.
void lay_out_chunks(TilePlan& plan, const TileTables& owner, int64_t element_bytes);

struct ProgramKey {
  ConvShape shape;
  const void* arrays[5];
  int64_t count;
  int32_t dtype, layout, lanes, max_vectors, threads, aligned;
  bool operator==(const ProgramKey& o) const {
    return std::memcmp(this, &o, sizeof(ProgramKey)) == 0;
  }
};

// All but the arrays and their count; zeroed where there is padding.
ProgramKey program_key(const ConvParams& params, const TileMachine& machine, int32_t threads);

struct ProgramKeyHash {
  size_t operator()(const ProgramKey& k) const {
    uint64_t words[sizeof(ProgramKey) / 8], h = 1469598103934665603ull;  // FNV-1a over the words
    static_assert(sizeof words == sizeof(ProgramKey));
    std::memcpy(words, &k, sizeof(ProgramKey));
    for (uint64_t w : words) h = (h ^ w ^ (w >> 29)) * 1099511628211ull;
    return static_cast<size_t>(h ^ (h >> 32));
  }
};

template <class Program>
class ProgramCache {
  static constexpr int64_t kBytes = int64_t{512} << 20;  // all programs of an op together
  static constexpr size_t kEntries = 4096;               // with a program or only seen once

  struct Slot {
    uint64_t hash;
    std::shared_ptr<const Program> program;  // null: seen once with this hash
    std::list<ProgramKey>::iterator age;
  };
  using Slots = std::unordered_map<ProgramKey, Slot, ProgramKeyHash>;

  std::mutex mutex_;
  Slots slots_;
  std::list<ProgramKey> ages_;  // most recently used first
  int64_t bytes_ = 0;

  void drop(typename Slots::iterator it) {
    if (it->second.program) bytes_ -= it->second.program->bytes();
    ages_.erase(it->second.age);
    slots_.erase(it);
  }

 public:
  // The program kept for contents of this hash, or null.
  std::shared_ptr<const Program> find(const ProgramKey& key, uint64_t hash) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto it = slots_.find(key);
    if (it == slots_.end()) return nullptr;
    ages_.splice(ages_.begin(), ages_, it->second.age);
    return it->second.hash == hash ? it->second.program : nullptr;
  }

  void remember(const ProgramKey& key, uint64_t hash,
                const std::shared_ptr<const Program>& program) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto it = slots_.find(key);
    const bool again = it != slots_.end() && it->second.hash == hash;
    if (it != slots_.end()) drop(it);
    ages_.push_front(key);
    slots_.emplace(key, Slot{hash, again ? program : nullptr, ages_.begin()});
    if (again) bytes_ += program->bytes();
    while (slots_.size() > 1 && (slots_.size() > kEntries || bytes_ > kBytes)) {
      drop(slots_.find(ages_.back()));
    }
  }
};

// A value as the kernels accumulate it.
inline float widen(float v) { return v; }
inline double widen(double v) { return v; }
inline float widen(uint16_t bits) {  // bfloat16
  const uint32_t u = static_cast<uint32_t>(bits) << 16;
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}

}  // namespace sparsecnn::cpu
