#include "cpu/pattern_program.h"

#include <algorithm>
#include <numeric>

namespace sparsecnn::cpu {
namespace {

// Filters that are computed together: up to plan.filter_block of one filter group.
struct Block {
  int32_t group, row, size;  // filter group, first packed row, filters
};

bool is_sound(const PatternConv2dParams& p, int64_t count, int64_t column_count) {
  const ConvShape& s = p.shape;
  const int64_t groups = p.filter_groups, kg = s.filters_per_group();
  const int32_t *const rows = p.group_rows, *const cols = p.group_columns;
  if (rows[0] != 0 || cols[0] != 0 || rows[groups] != s.k || cols[groups] != column_count) {
    return false;
  }
  int64_t stored = 0;
  for (int64_t g = 0; g < groups; ++g) {
    if (rows[g] >= rows[g + 1] || cols[g] > cols[g + 1]) return false;
    if (rows[g + 1] > s.k || cols[g + 1] > column_count) return false;
    if (rows[g] / kg != (rows[g + 1] - 1) / kg) return false;
    stored += int64_t{rows[g + 1] - rows[g]} * (cols[g + 1] - cols[g]);
    int64_t before = -1;
    for (int32_t i = cols[g]; i < cols[g + 1]; ++i) {
      if (p.columns[i] <= before || p.columns[i] >= s.columns()) return false;
      before = p.columns[i];
    }
  }
  if (stored != count) return false;
  std::vector<bool> seen(static_cast<size_t>(s.k));
  for (int64_t i = 0; i < s.k; ++i) {
    const int32_t f = p.filters[i];
    if (f < 0 || f >= s.k || f / kg != i / kg || seen[static_cast<size_t>(f)]) return false;
    seen[static_cast<size_t>(f)] = true;
  }
  return true;
}

// Each filter group as the fewest blocks of at most `most` filters, in packed order.
std::vector<Block> cut_groups(const PatternConv2dParams& p, int32_t most) {
  std::vector<Block> blocks;
  for (int32_t g = 0; g < p.filter_groups; ++g) {
    int32_t row = p.group_rows[g];
    for (const int32_t size : kFilterBlocks) {
      for (; size <= most && p.group_rows[g + 1] - row >= size; row += size) {
        blocks.push_back({g, row, size});
      }
    }
  }
  return blocks;
}

TileWork work_of(const PatternConv2dParams& p, int32_t most) {
  TileWork work{most, 0, 0, 0};
  for (int64_t g = 0; g < p.filter_groups; ++g) {
    const int32_t filters = p.group_rows[g + 1] - p.group_rows[g];
    const double columns = p.group_columns[g + 1] - p.group_columns[g];
    const int32_t blocks = filters / most + __builtin_popcount(filters % most);
    work.blocks += blocks;
    work.columns += blocks * columns;
    work.stored += filters * columns;
  }
  return work;
}

// The input channels that each convolution group reads: ascending, as many for every group, so
// that some may be unread. Empty where that is all of them.
std::vector<int32_t> read_channels(const PatternConv2dParams& p) {
  const ConvShape& s = p.shape;
  const int64_t cg = s.channels_per_group(), kg = s.filters_per_group(), taps = s.r * s.s;
  std::vector<bool> read(static_cast<size_t>(s.c));
  for (int64_t g = 0; g < p.filter_groups; ++g) {
    const int64_t first = p.group_rows[g] / kg * cg;
    for (int32_t i = p.group_columns[g]; i < p.group_columns[g + 1]; ++i) {
      read[static_cast<size_t>(first + p.columns[i] / taps)] = true;
    }
  }
  int64_t most = 0;
  for (int64_t g = 0; g < s.groups; ++g) {
    most = std::max<int64_t>(most,
                             std::count(read.begin() + g * cg, read.begin() + (g + 1) * cg, true));
  }
  most = std::max<int64_t>(most, std::min<int64_t>(cg, 1));
  std::vector<int32_t> channel;
  if (most == cg) return channel;
  for (int64_t g = 0; g < s.groups; ++g) {
    int64_t spare = most - std::count(read.begin() + g * cg, read.begin() + (g + 1) * cg, true);
    for (int64_t c = 0; c < cg; ++c) {
      if (read[static_cast<size_t>(g * cg + c)] || spare-- > 0) {
        channel.push_back(static_cast<int32_t>(c));
      }
    }
  }
  return channel;
}

// Cuts the blocks of each convolution group into chunks of about equal work, none larger than the
// scratch has room for; within a chunk the larger blocks come first. Returns the blocks in order.
std::vector<Block> cut_chunks(PatternProgram& program, const PatternConv2dParams& p,
                              std::vector<Block> blocks, int64_t room) {
  PatternPlan& plan = program.plan;
  const int64_t groups = plan.shape.groups, kg = plan.shape.filters_per_group();
  const auto weight = [&](const Block& b) {
    return int64_t{b.size} * (p.group_columns[b.group + 1] - p.group_columns[b.group] + 8);
  };
  std::vector<int64_t> first(static_cast<size_t>(groups + 1));  // block of each group
  for (const Block& b : blocks) ++first[static_cast<size_t>(b.row / kg + 1)];
  std::partial_sum(first.begin(), first.end(), first.begin());
  std::vector<int64_t>& begin = program.tiles.chunk_begin;
  for (;; plan.filter_chunks += 1 + plan.filter_chunks / 8) {
    begin.clear();
    program.chunk_first.clear();
    int64_t most = 0;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t end = first[static_cast<size_t>(g + 1)];
      int64_t i = first[static_cast<size_t>(g)], total = 0, done = 0, row = g * kg;
      for (int64_t j = i; j < end; ++j) total += weight(blocks[static_cast<size_t>(j)]);
      for (int64_t chunk = 0; chunk < plan.filter_chunks; ++chunk) {
        begin.push_back(row);
        program.chunk_first.push_back(i);
        const int64_t target = total * (chunk + 1) / plan.filter_chunks;
        for (; i < end; ++i) {
          const Block& b = blocks[static_cast<size_t>(i)];
          if (done + weight(b) / 2 > target) break;
          done += weight(b);
          row += b.size;
        }
        most = std::max(most, row - begin.back());
      }
    }
    begin.push_back(plan.shape.k);
    if (most <= room || plan.filter_chunks >= 2 * kg) break;
  }
  program.chunk_first.push_back(static_cast<int64_t>(blocks.size()));
  for (size_t c = 0; c + 1 < program.chunk_first.size(); ++c) {
    std::stable_sort(blocks.begin() + program.chunk_first[c],
                     blocks.begin() + program.chunk_first[c + 1],
                     [](const Block& a, const Block& b) { return a.size > b.size; });
  }
  return blocks;
}

// Which filter is at which place; nothing where filters are in order.
void order_filters(PatternProgram& program, const PatternConv2dParams& p,
                   const std::vector<Block>& blocks) {
  PatternPlan& plan = program.plan;
  std::vector<int32_t>&of = program.filter_of, &by = program.by_filter;
  for (const Block& b : blocks) of.insert(of.end(), p.filters + b.row, p.filters + b.row + b.size);
  bool in_order = true;
  for (size_t i = 0; i < of.size(); ++i) in_order &= of[i] == static_cast<int32_t>(i);
  if (in_order) {
    of.clear();
    return;
  }
  by.resize(of.size());
  const std::vector<int64_t>& begin = program.tiles.chunk_begin;
  for (size_t c = 0; c + 1 < begin.size(); ++c) {
    int32_t* const places = by.data() + begin[c];
    std::iota(places, by.data() + begin[c + 1], 0);
    const int32_t* const filter = of.data() + begin[c];
    std::sort(places, by.data() + begin[c + 1],
              [&](int32_t a, int32_t b) { return filter[a] < filter[b]; });
  }
  plan.filter_of = of.data();
  plan.by_filter = by.data();
}

// Runs, offsets and values of every panel, in the order of the blocks.
template <class T, class S>
void stream(PatternProgram& program, std::vector<T>& values, const PatternConv2dParams& p,
            const std::vector<Block>& blocks, int64_t count, int64_t column_count) {
  PatternPlan& plan = program.plan;
  const ConvShape& s = plan.shape;
  const int64_t groups = p.filter_groups, panels = plan.channel_blocks, kg = s.filters_per_group();
  const int64_t taps = s.r * s.s, cg = s.channels_per_group();
  const int64_t chunks = s.groups * plan.filter_chunks;
  // Place of each channel among those that are read.
  std::vector<int32_t> place(static_cast<size_t>(s.groups * cg));
  for (int64_t i = 0; i < s.groups * plan.channels; ++i) {
    const int64_t g = i / plan.channels, c = plan.channel ? plan.channel[i] : i % plan.channels;
    place[static_cast<size_t>(g * cg + c)] = static_cast<int32_t>(i % plan.channels);
  }
  std::vector<int32_t> offset_of(static_cast<size_t>(column_count));
  // First column of each group in each panel.
  std::vector<int32_t> bound(static_cast<size_t>(groups * (panels + 1)));
  for (int64_t g = 0; g < groups; ++g) {
    const int32_t* const place_of = place.data() + p.group_rows[g] / kg * cg;
    int32_t* const b = bound.data() + g * (panels + 1);
    int64_t panel = 0;
    b[0] = p.group_columns[g];
    for (int32_t i = p.group_columns[g]; i < p.group_columns[g + 1]; ++i) {
      const int64_t c = p.columns[i] / taps, at = place_of[c];
      while (at >= (panel + 1) * plan.channel_block) b[++panel] = i;
      const int64_t in_panel = at - panel * plan.channel_block;
      int64_t offset = plan.tap_offset[in_panel * taps + p.columns[i] % taps];
      // An image read in place by some of its channels is addressed from the group's first.
      if (plan.in_place && plan.channel) offset = c * plan.channel_pitch * plan.lanes;
      offset_of[static_cast<size_t>(i)] = static_cast<int32_t>(offset * sizeof(T));
    }
    while (panel < panels) b[++panel] = p.group_columns[g + 1];
  }
  // Panel by panel, so that the kernel reads on where it stopped.
  program.offsets.reserve(static_cast<size_t>(column_count));
  std::vector<int32_t> run_first(static_cast<size_t>(panels * groups));
  for (int64_t panel = 0; panel < panels; ++panel) {
    for (int64_t g = 0; g < groups; ++g) {
      const int32_t* const b = bound.data() + g * (panels + 1) + panel;
      run_first[static_cast<size_t>(panel * groups + g)] =
          static_cast<int32_t>(program.offsets.size());
      program.offsets.insert(program.offsets.end(), offset_of.begin() + b[0],
                             offset_of.begin() + b[1]);
    }
  }
  std::vector<int64_t> group_values(static_cast<size_t>(groups));  // first of each group
  for (int64_t g = 0, sum = 0; g < groups; ++g) {
    group_values[static_cast<size_t>(g)] = sum;
    sum += int64_t{p.group_rows[g + 1] - p.group_rows[g]} *
           (p.group_columns[g + 1] - p.group_columns[g]);
  }
  program.chunk_blocks.assign(static_cast<size_t>(chunks * kFilterBlockSizes), 0);
  program.runs.resize(blocks.size() * static_cast<size_t>(panels));
  values.resize(static_cast<size_t>(count));
  T* out = values.data();
  const S* const in = static_cast<const S*>(p.values);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t begin = program.chunk_first[static_cast<size_t>(chunk)];
    const int64_t end = program.chunk_first[static_cast<size_t>(chunk + 1)];
    for (int64_t panel = 0; panel < panels; ++panel) {
      program.values_begin.push_back(out - values.data());
      for (int64_t i = begin; i < end; ++i) {
        const Block& b = blocks[static_cast<size_t>(i)];
        const int64_t filters = p.group_rows[b.group + 1] - p.group_rows[b.group];
        const int32_t* const bounds = bound.data() + b.group * (panels + 1) + panel;
        program.runs[static_cast<size_t>(panel) * blocks.size() + static_cast<size_t>(i)] = {
            run_first[static_cast<size_t>(panel * groups + b.group)], bounds[1] - bounds[0]};
        const S* const group = in + group_values[static_cast<size_t>(b.group)];
        for (int32_t column = bounds[0]; column < bounds[1]; ++column) {
          const S* const from =
              group + (column - p.group_columns[b.group]) * filters + b.row - p.group_rows[b.group];
          for (int32_t f = 0; f < b.size; ++f) *out++ = widen(from[f]);
        }
      }
    }
    for (int64_t i = begin; i < end; ++i) {
      for (int32_t size = 0; size < kFilterBlockSizes; ++size) {
        program.chunk_blocks[static_cast<size_t>(chunk * kFilterBlockSizes + size)] +=
            blocks[static_cast<size_t>(i)].size == kFilterBlocks[size];
      }
    }
  }
  plan.values = values.data();
}

std::shared_ptr<const PatternProgram> build(const PatternConv2dParams& params, int64_t count,
                                            int64_t column_count, const TileMachine& machine,
                                            int32_t threads) {
  auto program = std::make_shared<PatternProgram>();
  program->channel = read_channels(params);
  const int64_t channels =
      program->channel.empty()
          ? params.shape.channels_per_group()
          : static_cast<int64_t>(program->channel.size()) / params.shape.groups;
  TileWork options[kFilterBlockSizes];
  int32_t option_count = 0;
  for (const int32_t size : kFilterBlocks) {
    options[option_count] = work_of(params, size);
    // No group is so large: the same blocks, but fewer vectors fit.
    if (option_count > 0 && options[option_count].blocks == options[option_count - 1].blocks) {
      options[option_count - 1] = options[option_count];
    } else {
      ++option_count;
    }
  }
  PatternPlan& plan = program->plan;
  static_cast<TilePlan&>(plan) =
      tile_plan(params, options, option_count, channels, true, machine, threads);
  plan.channel = program->channel.empty() ? nullptr : program->channel.data();
  const int64_t element = element_bytes(params);
  lay_out_panel(plan, program->tiles, element);
  const std::vector<Block> blocks = cut_chunks(
      *program, params, cut_groups(params, plan.filter_block), chunk_room(plan, element));
  lay_out_chunks(plan, program->tiles, element);
  order_filters(*program, params, blocks);
  switch (params.dtype) {
    case DType::kFloat32:
      stream<float, float>(*program, program->values_float, params, blocks, count, column_count);
      break;
    case DType::kBFloat16:
      stream<float, uint16_t>(*program, program->values_float, params, blocks, count, column_count);
      break;
    case DType::kFloat64:
      stream<double, double>(*program, program->values_double, params, blocks, count, column_count);
      break;
    case DType::kFloat16:
      break;  // refused by the glue: no CPU kernel
  }
  plan.chunk_blocks = program->chunk_blocks.data();
  plan.chunk_first = program->chunk_first.data();
  plan.runs = program->runs.data();
  plan.blocks = static_cast<int64_t>(blocks.size());
  plan.values_begin = program->values_begin.data();
  plan.offsets = program->offsets.data();
  return program;
}

}  // namespace

int64_t PatternProgram::bytes() const {
  const size_t small = channel.size() + filter_of.size() + by_filter.size() + chunk_blocks.size() +
                       offsets.size() + values_float.size();
  return static_cast<int64_t>(
             sizeof(PatternProgram) + 4 * small +
             8 * (chunk_first.size() + values_begin.size() + runs.size() + values_double.size())) +
         tiles.bytes();
}

std::shared_ptr<const PatternProgram> pattern_program(const PatternConv2dParams& params,
                                                      int64_t count, int64_t column_count,
                                                      const TileMachine& machine, int32_t threads,
                                                      HashFunction hash) {
  // Never destroyed: other threads may outlive main.
  static ProgramCache<PatternProgram>* const kept = new ProgramCache<PatternProgram>;
  const int64_t k = params.shape.k, groups = params.filter_groups;
  ProgramKey key = program_key(params, machine, threads);
  key.arrays[0] = params.values;
  key.arrays[1] = params.columns;
  key.arrays[2] = params.filters;
  key.arrays[3] = params.group_rows;
  key.arrays[4] = params.group_columns;
  key.count = count;
  uint64_t now = hash(params.group_rows, 4 * (groups + 1), static_cast<uint64_t>(groups));
  now = hash(params.group_columns, 4 * (groups + 1), now);
  now = hash(params.filters, 4 * k, now);
  now = hash(params.columns, 4 * column_count, now);
  const int64_t size = params.dtype == DType::kBFloat16 ? 2 : element_bytes(params);
  now = hash(params.values, size * count, now);
  if (auto found = kept->find(key, now)) return found;
  if (!is_sound(params, count, column_count)) return nullptr;
  auto program = build(params, count, column_count, machine, threads);
  kept->remember(key, now, program);
  return program;
}

}  // namespace sparsecnn::cpu
