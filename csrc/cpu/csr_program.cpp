#include "cpu/csr_program.h"

#include <algorithm>

namespace sparsecnn::cpu {
namespace {

int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

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

// Cuts the filters of each group into chunks of about equal nonzeros. Where zeros are uneven a
// chunk may hold many filters: then more chunks, until the largest fits the scratch.
void cut_filters(CsrProgram& program, const CsrConv2dParams& params, int64_t element) {
  CsrPlan& plan = program.plan;
  const int64_t groups = plan.shape.groups, kg = plan.shape.filters_per_group();
  const int64_t room = chunk_room(plan, element);
  std::vector<int64_t>& begin = program.tiles.chunk_begin;
  for (;; plan.filter_chunks += 1 + plan.filter_chunks / 8) {
    begin.clear();
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t i = 0; i < plan.filter_chunks; ++i) {
        begin.push_back(chunk_start(plan, params.row_ptr, g, i));
      }
    }
    begin.push_back(plan.shape.k);
    int64_t most = 0;
    for (size_t i = 1; i < begin.size(); ++i) most = std::max(most, begin[i] - begin[i - 1]);
    if (most <= room || plan.filter_chunks >= kg) break;
  }
}

void lay_out(CsrProgram& program, const CsrConv2dParams& params) {
  CsrPlan& plan = program.plan;
  const int64_t element = element_bytes(params);
  lay_out_panel(plan, program.tiles, element);
  cut_filters(program, params, element);
  lay_out_chunks(plan, program.tiles, element);
  plan.bounds_offset = plan.thread_bytes;
  if (!plan.streamed) {
    plan.thread_bytes +=
        round_up(4 * ((plan.channel_blocks + 1) * plan.max_chunk_filters + kBoundsPad), kCacheLine);
  }
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
                                        const TilePlan& plan) {
  auto program = std::make_shared<CsrProgram>();
  static_cast<TilePlan&>(program->plan) = plan;
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

}  // namespace

int64_t CsrProgram::bytes() const {
  return static_cast<int64_t>(sizeof(CsrProgram) + 4 * counts.size() + 8 * panel_entries.size() +
                              sizeof(CsrEntry<float>) * entries_float.size() +
                              sizeof(CsrEntry<double>) * entries_double.size()) +
         tiles.bytes();
}

std::shared_ptr<const CsrProgram> csr_program(const CsrConv2dParams& params, int64_t nnz,
                                              const TileMachine& machine, int32_t threads,
                                              HashFunction hash) {
  // Never destroyed: other threads may outlive main.
  static ProgramCache<CsrProgram>* const kept = new ProgramCache<CsrProgram>;
  ProgramKey key = program_key(params, machine, threads);
  key.arrays[0] = params.values;
  key.arrays[1] = params.col_idx;
  key.arrays[2] = params.row_ptr;
  key.count = nnz;
  const ConvShape& s = params.shape;
  const bool streamed = s.n * s.p * s.q > kStoredVectors * machine.lanes;
  // Rows decide the chunks of every plan; only a streamed one copies the rest.
  uint64_t now = hash(params.row_ptr, 4 * (s.k + 1), 1);
  if (streamed) {
    const int64_t size = params.dtype == DType::kBFloat16 ? 2 : element_bytes(params);
    now = hash(params.col_idx, 4 * nnz, now);
    now = hash(params.values, size * nnz, now);
  }
  if (auto found = kept->find(key, now)) return found;
  const auto stored = static_cast<double>(nnz);
  const TileWork work{1, static_cast<double>(s.k), stored, stored};
  const TilePlan plan =
      tile_plan(params, &work, 1, s.channels_per_group(), streamed, machine, threads);
  std::shared_ptr<const CsrProgram> program = build(params, nnz, plan);
  if (program) kept->remember(key, now, program);
  return program;
}

}  // namespace sparsecnn::cpu
