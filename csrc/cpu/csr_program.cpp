#include "cpu/csr_program.h"

#include <algorithm>
#include <cstring>
#include <list>
#include <mutex>
#include <unordered_map>

namespace sparsecnn::cpu {
namespace {

constexpr int64_t kCacheBytes = int64_t{512} << 20;  // all programs together
constexpr size_t kCacheEntries = 4096;               // with a program or only seen once

int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

int64_t element_bytes(const CsrConv2dParams& params) {
  return params.dtype == DType::kFloat64 ? 8 : 4;
}

// First filter of chunk i of group g, so that chunks hold about equally many nonzeros. One row
// counts as nnz + 8: an empty row still costs its bias and its store.
int64_t chunk_start(const CsrPlan& plan, const int32_t* row_ptr, int64_t g, int64_t i) {
  const int64_t kg = plan.shape.filters_per_group(), k0 = g * kg;
  const auto weight = [&](int64_t k) {
    return static_cast<int64_t>(row_ptr[k0 + k] - row_ptr[k0]) + 8 * k;
  };
  if (i == 0) return k0;
  if (i >= plan.filter_chunks) return k0 + kg;
  const int64_t target = weight(kg) * i / plan.filter_chunks;
  int64_t lo = 0, hi = kg;
  while (lo < hi) {
    const int64_t mid = (lo + hi) / 2;
    if (weight(mid) < target) {
      lo = mid + 1;
    } else {
      hi = mid;
    }
  }
  return k0 + lo;
}

// The smallest channel pitch, in vectors, whose lines spread a block's share of a panel most evenly
// over the sets of the L1 cache. A block touches a window of the packed rows of its super-block;
// with a pitch of, say, 64 lines the windows of all channels would compete for the same sets.
int64_t spread_pitch(const CsrPlan& plan, int64_t element) {
  const ConvShape& s = plan.shape;
  const int64_t vector_bytes = plan.lanes * element;
  const int64_t dense = int64_t{plan.rows} * plan.cols;
  if (plan.in_place) return s.w / plan.lanes;
  if (plan.super_y * plan.super_x == 1) return dense;
  const int64_t rows = csr_pack_axis(s.r, s.dil_h, s.stride_h, plan.ny, nullptr, nullptr);
  const int64_t cols = csr_pack_axis(s.s, s.dil_w, s.stride_w, plan.nx, nullptr, nullptr);
  const int64_t channels = std::min<int64_t>(plan.channel_block, 64);
  const int64_t step = std::max<int64_t>(1, kCacheLine / vector_bytes);
  int64_t best = dense, best_load = INT64_MAX;
  for (int64_t pad = 0; pad < kPitchPads; ++pad) {
    const int64_t pitch = dense + pad * step;
    int64_t load[kL1Sets] = {};
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t y = 0; y < rows; ++y) {
        const int64_t first = (c * pitch + y * plan.cols) * vector_bytes / kCacheLine;
        const int64_t last = ((c * pitch + y * plan.cols + cols) * vector_bytes - 1) / kCacheLine;
        for (int64_t line = first; line <= last; ++line) ++load[line % kL1Sets];
      }
    }
    const int64_t most = *std::max_element(load, load + kL1Sets);
    if (most < best_load) {
      best_load = most;
      best = pitch;
    }
  }
  return best;
}

// Cuts the filters of each group into chunks of about equal nonzeros. Where zeros are uneven a
// chunk may hold many filters: then more chunks, until the largest fits the scratch.
void cut_filters(CsrProgram& program, const CsrConv2dParams& params, int64_t element) {
  CsrPlan& plan = program.plan;
  const int64_t groups = plan.shape.groups, kg = plan.shape.filters_per_group();
  const int64_t panel = csr_panel_bytes(plan, plan.channel_block, element);
  const int64_t room =
      (plan.scratch_budget - panel) / csr_filter_bytes(plan, plan.channel_blocks, element);
  for (;; plan.filter_chunks += 1 + plan.filter_chunks / 8) {
    program.chunk_begin.clear();
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t i = 0; i < plan.filter_chunks; ++i) {
        program.chunk_begin.push_back(chunk_start(plan, params.row_ptr, g, i));
      }
    }
    program.chunk_begin.push_back(plan.shape.k);
    plan.max_chunk_filters = 0;
    for (size_t i = 1; i < program.chunk_begin.size(); ++i) {
      plan.max_chunk_filters =
          std::max(plan.max_chunk_filters, program.chunk_begin[i] - program.chunk_begin[i - 1]);
    }
    if (plan.max_chunk_filters <= std::max<int64_t>(room, 1) || plan.filter_chunks >= kg) break;
  }
  plan.chunk_begin = program.chunk_begin.data();
  plan.items = plan.image_groups * plan.blocks_y * plan.blocks_x * groups * plan.filter_chunks;
}

void lay_out(CsrProgram& program, const CsrConv2dParams& params) {
  CsrPlan& plan = program.plan;
  const ConvShape& s = plan.shape;
  const int64_t element = element_bytes(params);
  plan.channel_pitch = spread_pitch(plan, element);

  const int64_t taps = plan.channel_block * s.r * s.s;
  program.tables.assign(static_cast<size_t>(taps + plan.rows + plan.cols + plan.span), -1);
  plan.tap_offset = program.tables.data();
  plan.row_source = plan.tap_offset + taps;
  plan.col_source = plan.row_source + plan.rows;
  plan.col_slot = plan.col_source + plan.cols;
  std::vector<int32_t> tap_row(static_cast<size_t>(s.r)), tap_col(static_cast<size_t>(s.s));
  csr_pack_axis(s.r, s.dil_h, s.stride_h, plan.ny * plan.super_y, plan.row_source, tap_row.data());
  csr_pack_axis(s.s, s.dil_w, s.stride_w, plan.nx * plan.super_x, plan.col_source, tap_col.data());
  int32_t* tap = plan.tap_offset;
  for (int64_t c = 0; c < plan.channel_block; ++c) {
    for (int64_t r = 0; r < s.r; ++r) {
      for (int64_t q = 0; q < s.s; ++q) {
        *tap++ = static_cast<int32_t>(
            (c * plan.channel_pitch + int64_t{tap_row[r]} * plan.cols + tap_col[q]) * plan.lanes);
      }
    }
  }
  for (int32_t j = 0; j < plan.cols; ++j) plan.col_slot[plan.col_source[j]] = j;

  cut_filters(program, params, element);

  const int64_t sums =
      int64_t{plan.ny} * plan.nx * plan.super_y * plan.super_x * plan.lanes * element;
  plan.panel_offset = 0;
  const int64_t panel = plan.channel_block * plan.channel_pitch * plan.lanes * element;
  plan.partial_offset = plan.in_place ? 0 : round_up(panel, kCacheLine);
  plan.bias_offset = plan.partial_offset + round_up(plan.max_chunk_filters * sums, kCacheLine);
  plan.bounds_offset = plan.bias_offset + round_up(plan.max_chunk_filters * element, kCacheLine);
  plan.thread_bytes = plan.bounds_offset;
  if (!plan.streamed) {
    plan.thread_bytes +=
        round_up(4 * ((plan.channel_blocks + 1) * plan.max_chunk_filters + kBoundsPad), kCacheLine);
  }
}

float widen(float v) { return v; }
double widen(double v) { return v; }
float widen(uint16_t bits) {  // bfloat16
  const uint32_t u = static_cast<uint32_t>(bits) << 16;
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}

// Fills the stream; false when a row's columns do not ascend within their range.
template <class T, class S>
bool stream(CsrProgram& program, std::vector<CsrEntry<T>>& entries, const CsrConv2dParams& params,
            int64_t nnz) {
  CsrPlan& plan = program.plan;
  const ConvShape& s = plan.shape;
  const int64_t panels = plan.channel_blocks, chunks = s.groups * plan.filter_chunks;
  const int64_t panel_columns = plan.channel_block * s.r * s.s, columns = s.columns();
  const int32_t* const col = params.col_idx;
  const S* const values = static_cast<const S*>(params.values);

  program.counts.assign(static_cast<size_t>(s.k * panels), 0);
  program.panel_entries.assign(static_cast<size_t>(chunks * panels), 0);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t k0 = plan.chunk_begin[chunk], filters = plan.chunk_begin[chunk + 1] - k0;
    int32_t* const counts = program.counts.data() + k0 * panels;
    for (int64_t f = 0; f < filters; ++f) {
      int64_t before = -1, panel = 0, bound = panel_columns;
      for (int32_t i = params.row_ptr[k0 + f]; i < params.row_ptr[k0 + f + 1]; ++i) {
        if (col[i] <= before || col[i] >= columns) return false;
        before = col[i];
        for (; before >= bound; bound += panel_columns) ++panel;
        ++counts[panel * filters + f];
      }
    }
  }
  entries.resize(static_cast<size_t>(nnz));
  CsrEntry<T>* out = entries.data();
  std::vector<int32_t> next(params.row_ptr, params.row_ptr + s.k);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t k0 = plan.chunk_begin[chunk], filters = plan.chunk_begin[chunk + 1] - k0;
    const int32_t* counts = program.counts.data() + k0 * panels;
    for (int64_t panel = 0; panel < panels; ++panel, counts += filters) {
      program.panel_entries[static_cast<size_t>(chunk * panels + panel)] = out - entries.data();
      const int32_t* const tap = plan.tap_offset - panel * panel_columns;
      for (int64_t f = 0; f < filters; ++f) {
        int32_t i = next[static_cast<size_t>(k0 + f)];
        for (const int32_t end = i + counts[f]; i < end; ++i) {
          *out++ = {widen(values[i]), static_cast<int32_t>(tap[col[i]] * sizeof(T))};
        }
        next[static_cast<size_t>(k0 + f)] = i;
      }
    }
  }
  plan.entries = entries.data();
  plan.panel_entries = program.panel_entries.data();
  plan.counts = program.counts.data();
  return true;
}

std::shared_ptr<const CsrProgram> build(const CsrConv2dParams& params, int64_t nnz,
                                        const CsrPlan& plan) {
  auto program = std::make_shared<CsrProgram>();
  program->plan = plan;
  lay_out(*program, params);
  if (!plan.streamed) return program;
  bool sound = false;
  switch (params.dtype) {
    case DType::kFloat32:
      sound = stream<float, float>(*program, program->entries_float, params, nnz);
      break;
    case DType::kBFloat16:
      sound = stream<float, uint16_t>(*program, program->entries_float, params, nnz);
      break;
    case DType::kFloat64:
      sound = stream<double, double>(*program, program->entries_double, params, nnz);
      break;
    case DType::kFloat16:
      break;  // refused by the glue: no CPU kernel
  }
  if (!sound) return nullptr;
  return program;
}

struct Key {
  ConvShape shape;
  const void *values, *col_idx, *row_ptr;
  int64_t nnz;
  int32_t dtype, layout, lanes, max_vectors, threads, aligned;
  bool operator==(const Key& o) const { return std::memcmp(this, &o, sizeof(Key)) == 0; }
};
struct KeyHash {
  size_t operator()(const Key& k) const {
    uint64_t words[sizeof(Key) / 8], h = 1469598103934665603ull;  // FNV-1a over the words
    static_assert(sizeof words == sizeof(Key));
    std::memcpy(words, &k, sizeof(Key));
    for (uint64_t w : words) h = (h ^ w ^ (w >> 29)) * 1099511628211ull;
    return static_cast<size_t>(h ^ (h >> 32));
  }
};

struct Slot {
  bool streamed;
  uint64_t hash;
  std::shared_ptr<const CsrProgram> program;  // null: seen once with this hash
  std::list<Key>::iterator age;
};

struct Cache {
  std::mutex mutex;
  std::unordered_map<Key, Slot, KeyHash> slots;
  std::list<Key> ages;  // most recently used first
  int64_t bytes = 0;

  void drop(std::unordered_map<Key, Slot, KeyHash>::iterator it) {
    if (it->second.program) bytes -= it->second.program->bytes();
    ages.erase(it->second.age);
    slots.erase(it);
  }

  void remember(const Key& key, bool streamed, uint64_t hash,
                const std::shared_ptr<const CsrProgram>& program) {
    std::lock_guard<std::mutex> lock(mutex);
    auto it = slots.find(key);
    const bool again = it != slots.end() && it->second.hash == hash;
    if (it != slots.end()) drop(it);
    ages.push_front(key);
    slots.emplace(key, Slot{streamed, hash, again ? program : nullptr, ages.begin()});
    if (again) bytes += program->bytes();
    while (slots.size() > 1 && (slots.size() > kCacheEntries || bytes > kCacheBytes)) {
      drop(slots.find(ages.back()));
    }
  }
};

Cache& cache() {
  static Cache* const instance = new Cache;  // never destroyed: other threads may outlive main
  return *instance;
}

}  // namespace

int64_t CsrProgram::bytes() const {
  return static_cast<int64_t>(sizeof(CsrProgram) + 4 * (tables.size() + counts.size()) +
                              8 * (chunk_begin.size() + panel_entries.size()) +
                              sizeof(CsrEntry<float>) * entries_float.size() +
                              sizeof(CsrEntry<double>) * entries_double.size());
}

std::shared_ptr<const CsrProgram> csr_program(const CsrConv2dParams& params, int64_t nnz,
                                              const CsrMachine& machine, int32_t threads,
                                              HashFunction hash) {
  Key key;
  std::memset(&key, 0, sizeof key);  // padding takes part in the comparison
  key.shape = params.shape;
  key.values = params.values;
  key.col_idx = params.col_idx;
  key.row_ptr = params.row_ptr;
  key.nnz = nnz;
  key.dtype = static_cast<int32_t>(params.dtype);
  key.layout = static_cast<int32_t>(params.layout);
  key.lanes = machine.lanes;
  key.max_vectors = machine.max_vectors;
  key.threads = threads;
  key.aligned = csr_is_aligned(params);

  Cache& kept = cache();
  std::shared_ptr<const CsrProgram> found;
  uint64_t expected = 0;
  bool streamed = false;
  {
    std::lock_guard<std::mutex> lock(kept.mutex);
    const auto it = kept.slots.find(key);
    if (it != kept.slots.end()) {
      streamed = it->second.streamed;
      found = it->second.program;
      expected = it->second.hash;
      kept.ages.splice(kept.ages.begin(), kept.ages, it->second.age);
    }
  }
  CsrPlan plan{};
  if (!found) {
    plan = csr_plan(params, nnz, machine, threads);
    streamed = plan.streamed;
  }
  // Rows decide the chunks of every plan; only a streamed one copies the rest.
  uint64_t now = hash(params.row_ptr, 4 * (params.shape.k + 1), 1);
  if (streamed) {
    const int64_t size = params.dtype == DType::kFloat64   ? 8
                         : params.dtype == DType::kFloat32 ? 4
                                                           : 2;
    now = hash(params.col_idx, 4 * nnz, now);
    now = hash(params.values, size * nnz, now);
  }
  if (found && now == expected) return found;
  if (found) plan = csr_plan(params, nnz, machine, threads);  // the weight has changed
  std::shared_ptr<const CsrProgram> program = build(params, nnz, plan);
  if (program) kept.remember(key, streamed, now, program);
  return program;
}

}  // namespace sparsecnn::cpu
