// Runs SIMT kernels on the host, to test their logic without a GPU: one OS thread, one block (or
// cluster of blocks) at a time, one ucontext fiber per CUDA thread.
//
// A warp runs until all its lanes wait at a block barrier or have ended, then the next warp runs:
// a missing __syncthreads lets a warp read what others have not written, and dynamic shared memory
// starts each block full of NaN, so the fault shows. CUDA_EMU_ORDER picks the order of warps and
// lanes: 0 ascending, 1 descending, 2 shuffled (fixed seed). Reported as errors: lanes of a warp at
// different collectives, a mask that names an exited lane, threads at different barriers, a block
// barrier that some threads never reach, an illegal launch configuration. An asynchronous copy is
// made when its thread waits for it, no earlier, so that a wait left out shows as well. The shared
// memory of a block that has ended turns into NaN: the rest of its cluster must not read it.
//
// A logic test, no proof: no memory model, no alignment faults, no races between blocks, no PTX.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

namespace emu {

// What the pretended device offers: tests set it to steer the launchers' choices.
struct Device {
  int sm_count = 4;
  int smem_optin_bytes = 227 * 1024;
  int smem_granted_bytes = 48 * 1024;  // raised by cudaFuncSetAttribute, until the next launch
  int64_t max_grid = 2147483647;       // blocks that a launcher may ask for
  int64_t launches = 0;
  std::string kernel;    // the last one launched, as spelled by the launcher
  unsigned cluster = 1;  // and its blocks per cluster
};
inline Device& device() {
  static Device d;
  return d;
}

[[noreturn]] inline void fail(const std::string& what) {
  throw std::runtime_error("cuda_emu: " + what);
}

enum class State { kRun, kBlockBarrier, kClusterBarrier, kWarpCollective, kDone };

constexpr size_t kStackBytes = 64 << 10;

// Most bytes a lane brings to a collective: the operands of a sparse matrix product.
constexpr size_t kMostBytes = 40;

struct Copy {
  void* to;
  const void* from;  // null: zeros
  size_t bytes;
};

// What every lane brought to one collective; the lanes share it for as long as they need it.
struct Brought {
  alignas(8) unsigned char by[32][kMostBytes];
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state;
  dim3 index, block_index;
  unsigned rank;  // of its block in the cluster
  unsigned linear, mask;
  const void* site;                            // which collective or barrier it waits at
  size_t bytes;                                // of what it brought
  alignas(8) unsigned char value[kMostBytes];  // what it brought,
  std::shared_ptr<const Brought> seen;         // what the others brought
  std::vector<Copy> issued;                    // asynchronous copies of no group yet,
  std::vector<std::vector<Copy>> groups;       // and those waiting in groups
};

struct Simulator {
  dim3 grid, block;
  std::vector<Thread> threads;  // of all blocks of the cluster, one after the other
  Thread* current = nullptr;
  ucontext_t scheduler;
  std::vector<float> smem;  // likewise
  size_t block_floats;
  std::function<void()> body;
  std::string error;
  std::vector<int> any_predicate, any_result;  // of __syncthreads_or, by block
};
inline Simulator& sim() {
  static Simulator s;
  return s;
}

inline void wait(State state) {
  Thread* self = sim().current;
  self->state = state;
  swapcontext(&self->context, &sim().scheduler);
}

inline void fiber() {
  try {
    sim().body();
  } catch (const std::exception& e) {
    sim().error = e.what();
  }
  wait(State::kDone);
}

// Exchanges the values of one warp collective if all lanes of the mask have arrived.
inline bool complete_collective(Thread* warp, unsigned lanes, unsigned lane) {
  const unsigned mask = warp[lane].mask;
  for (unsigned l = 0; l < 32; ++l) {
    if (!(mask >> l & 1)) continue;
    if (l >= lanes || warp[l].state == State::kDone) fail("mask names a lane that has exited");
    if (warp[l].state != State::kWarpCollective || warp[l].mask != mask) return false;
    if (warp[l].site != warp[lane].site) fail("lanes of one mask at different collectives");
    if (warp[l].bytes != warp[lane].bytes) fail("lanes of one mask bring different sizes");
  }
  const auto brought = std::make_shared<Brought>();
  for (unsigned l = 0; l < 32; ++l) {
    if (mask >> l & 1)
      std::memcpy(brought->by[l], warp[l].value, warp[l].bytes);
    else
      std::memset(brought->by[l], 0xff, kMostBytes);
  }
  for (unsigned l = 0; l < 32; ++l) {
    if (!(mask >> l & 1)) continue;
    warp[l].seen = brought;
    warp[l].state = State::kRun;
  }
  return true;
}

// Runs one warp until no lane of it can go on.
inline void run_warp(Simulator& s, unsigned first, int order, std::mt19937& random) {
  const unsigned lanes = std::min<unsigned>(32, s.threads.size() - first);
  Thread* warp = &s.threads[first];
  unsigned sequence[32];
  for (unsigned l = 0; l < lanes; ++l) sequence[l] = order == 1 ? lanes - 1 - l : l;
  for (bool progress = true; progress;) {
    progress = false;
    if (order == 2) std::shuffle(sequence, sequence + lanes, random);
    for (unsigned i = 0; i < lanes; ++i) {
      Thread& t = warp[sequence[i]];
      if (t.state != State::kRun) continue;
      s.current = &t;
      swapcontext(&s.scheduler, &t.context);
      progress = true;
      if (!s.error.empty()) throw std::runtime_error(s.error);
    }
    for (unsigned l = 0; l < lanes; ++l)
      if (warp[l].state == State::kWarpCollective && complete_collective(warp, lanes, l))
        progress = true;
  }
}

// Lets the threads of a block pass the barrier at which all of them wait. False if none waits.
inline bool release_block(Simulator& s, unsigned rank, unsigned n) {
  Thread* block = &s.threads[rank * n];
  unsigned waiting = 0;
  const void* site = nullptr;
  for (unsigned i = 0; i < n; ++i) {
    if (block[i].state != State::kBlockBarrier) continue;
    if (waiting++ && block[i].site != site) fail("__syncthreads from different places");
    site = block[i].site;
  }
  if (!waiting) return false;
  if (waiting != n) fail("deadlock: a barrier or a collective that some threads never reach");
  for (unsigned i = 0; i < n; ++i) block[i].state = State::kRun;
  s.any_result[rank] = s.any_predicate[rank];
  s.any_predicate[rank] = 0;
  return true;
}

// Runs the blocks of a cluster; `first` is the index of the first of them.
inline void run_cluster(Simulator& s, dim3 first, unsigned blocks, int order,
                        std::mt19937& random) {
  const unsigned all = s.threads.size(), n = all / blocks;
  if (!s.smem.empty()) std::memset(s.smem.data(), 0xff, s.smem.size() * sizeof(float));
  std::vector<unsigned> ranks, warps;  // warps: first threads, within a block
  for (unsigned rank = 0; rank < blocks; ++rank) ranks.push_back(rank);
  for (unsigned i = 0; i < n; i += 32) warps.push_back(i);
  for (unsigned i = 0; i < all; ++i) {
    Thread& t = s.threads[i];
    t.rank = i / n;
    t.linear = i % n;
    t.block_index = dim3(first.x + t.rank, first.y, first.z);
    t.state = State::kRun;
    t.issued.clear();
    t.groups.clear();
    t.index = dim3(t.linear % s.block.x, t.linear / s.block.x % s.block.y,
                   t.linear / (s.block.x * s.block.y));
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.get();
    t.context.uc_stack.ss_size = kStackBytes;
    t.context.uc_link = nullptr;
    makecontext(&t.context, fiber, 0);
  }
  if (order == 1) {
    std::reverse(ranks.begin(), ranks.end());
    std::reverse(warps.begin(), warps.end());
  }
  s.any_predicate.assign(blocks, 0);
  s.any_result.assign(blocks, 0);
  for (;;) {
    unsigned done = 0, at_cluster_barrier = 0;
    if (order == 2) std::shuffle(ranks.begin(), ranks.end(), random);
    for (unsigned rank : ranks) {
      // A block runs as far as it can before the next one does.
      do {
        if (order == 2) std::shuffle(warps.begin(), warps.end(), random);
        for (unsigned warp : warps) run_warp(s, rank * n + warp, order, random);
      } while (release_block(s, rank, n));
      unsigned ended = 0;
      for (unsigned i = rank * n; i < (rank + 1) * n; ++i) {
        ended += s.threads[i].state == State::kDone;
        at_cluster_barrier += s.threads[i].state == State::kClusterBarrier;
      }
      done += ended;
      if (ended == n && s.block_floats)
        std::memset(&s.smem[rank * s.block_floats], 0xff, s.block_floats * sizeof(float));
    }
    if (done == all) return;
    if (at_cluster_barrier != all)
      fail("deadlock: a barrier or a collective that some threads never reach");
    for (Thread& t : s.threads) t.state = State::kRun;
  }
}

template <class F>
void launch(const char* kernel, dim3 grid, dim3 block, size_t smem_bytes, F body,
            unsigned cluster = 1) {
  Simulator& s = sim();
  Device& d = device();
  const char* order = getenv("CUDA_EMU_ORDER");
  std::mt19937 random(1);
  const unsigned n = block.x * block.y * block.z;
  const bool too_much = smem_bytes > static_cast<size_t>(d.smem_granted_bytes);
  d.smem_granted_bytes = 48 * 1024;
  if (!n || n > 1024 || !grid.x || grid.x > d.max_grid || !grid.y || grid.y > 65535 || !grid.z ||
      grid.z > 65535 || cluster < 1 || cluster > 8 || grid.x % cluster || (cluster > 1 && n % 32))
    fail("illegal launch configuration");
  if (too_much) fail("more dynamic shared memory than granted");
  ++d.launches;
  // The enclosing launcher's template arguments are in the type of its lambda.
  d.kernel = std::string(kernel) + " " + __PRETTY_FUNCTION__;
  d.cluster = cluster;
  s.grid = grid;
  s.block = block;
  s.body = body;
  s.error.clear();
  s.block_floats = (smem_bytes + 15) / 16 * 4;
  s.smem.assign(s.block_floats * cluster, 0.f);
  s.smem.shrink_to_fit();
  s.threads.resize(n * cluster);
  for (Thread& t : s.threads)
    if (!t.stack) t.stack.reset(new char[kStackBytes]);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; x += cluster)
        run_cluster(s, dim3(x, y, z), cluster, order ? atoi(order) : 0, random);
}

inline __attribute__((noinline)) void barrier() {
  sim().current->site = __builtin_return_address(0);
  wait(State::kBlockBarrier);
}

inline __attribute__((noinline)) int barrier_or(int predicate) {
  sim().any_predicate[sim().current->rank] |= predicate != 0;
  sim().current->site = __builtin_return_address(0);
  wait(State::kBlockBarrier);
  return sim().any_result[sim().current->rank];
}

// Dynamic shared memory of the current thread's block.
inline float* shared_memory() {
  return sim().smem.data() + sim().current->rank * sim().block_floats;
}

// A warp collective: every lane of the mask brings a value and leaves with all of them.
template <class T>
void exchange(unsigned mask, const T& value, const void* site) {
  static_assert(sizeof(T) <= kMostBytes);
  Thread* self = sim().current;
  self->site = site;
  self->mask = mask;
  self->bytes = sizeof value;
  std::memcpy(self->value, &value, sizeof value);
  if (!(mask >> (self->linear & 31) & 1)) fail("calling lane not in mask");
  wait(State::kWarpCollective);
}

// What another lane brought to the collective that this one has just left.
template <class T>
T brought_by(unsigned lane) {
  T result;
  std::memcpy(&result, sim().current->seen->by[lane & 31], sizeof result);
  return result;
}

template <class T>
T shuffle(unsigned mask, T value, unsigned source, const void* site) {
  exchange(mask, value, site);
  return brought_by<T>(source);
}

inline unsigned ballot(unsigned mask, int predicate, const void* site) {
  exchange(mask, predicate != 0, site);
  unsigned bits = 0;
  for (unsigned l = 0; l < 32; ++l)
    if (mask >> l & 1 && brought_by<bool>(l)) bits |= 1u << l;
  return bits;
}

inline void copy_async(const Copy& copy) {
  if (reinterpret_cast<uintptr_t>(copy.to) % copy.bytes != 0 ||
      reinterpret_cast<uintptr_t>(copy.from) % copy.bytes != 0)
    fail("unaligned asynchronous copy");
  sim().current->issued.push_back(copy);
}

inline void copy_async_commit() {
  Thread* self = sim().current;
  self->groups.push_back(std::move(self->issued));
  self->issued.clear();
}

// Makes the copies of all groups but the last `left`.
inline void copy_async_wait(size_t left) {
  std::vector<std::vector<Copy>>& groups = sim().current->groups;
  const size_t done = groups.size() > left ? groups.size() - left : 0;
  for (size_t g = 0; g < done; ++g)
    for (const Copy& copy : groups[g]) {
      if (copy.from)
        std::memcpy(copy.to, copy.from, copy.bytes);
      else
        std::memset(copy.to, 0, copy.bytes);
    }
  groups.erase(groups.begin(), groups.begin() + static_cast<std::ptrdiff_t>(done));
}

}  // namespace emu

#define threadIdx (emu::sim().current->index)
#define blockIdx (emu::sim().current->block_index)
#define blockDim (emu::sim().block)
#define gridDim (emu::sim().grid)
#define EMU_SITE                 \
  [] {                           \
    static int site;             \
    return (const void*)(&site); \
  }()
#define EMU_LANE (emu::sim().current->linear & 31)
#define __syncthreads() emu::barrier()
#define __syncthreads_or(predicate) emu::barrier_or(predicate)
#define __syncwarp() emu::exchange(~0u, 0, EMU_SITE)
#define __ballot_sync(mask, predicate) emu::ballot(mask, predicate, EMU_SITE)
#define __shfl_sync(mask, value, lane) emu::shuffle(mask, value, lane, EMU_SITE)
#define __shfl_xor_sync(mask, value, lanes) \
  emu::shuffle(mask, value, EMU_LANE ^ static_cast<unsigned>(lanes), EMU_SITE)
#define __popc(bits) __builtin_popcount(bits)
#define DYN_SMEM(T, name) T* const name = reinterpret_cast<T*>(emu::shared_memory())
#define CUDA_LAUNCH(kernel, grid, block, smem_bytes, stream, ...) \
  ((void)(stream), emu::launch(#kernel, grid, block, smem_bytes, [&] { kernel(__VA_ARGS__); }))

inline float __uint_as_float(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

// Host side of the runtime, as far as launchers use it.
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid argument";
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? emu::device().sm_count
                                                       : emu::device().smem_optin_bytes;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int value) {
  if (value > emu::device().smem_optin_bytes) return cudaErrorInvalidValue;
  emu::device().smem_granted_bytes = value;
  return cudaSuccess;
}

// The two 16-bit storage types, by integer arithmetic: no toolkit header and no F16C needed.
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if (std::isnan(f)) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}

inline float __half2float(__half v) {
  const uint32_t exponent = v.bits >> 10 & 31, mantissa = v.bits & 1023;
  float f;
  if (exponent == 0) {
    f = static_cast<float>(mantissa) * 0x1p-24f;
  } else {
    // 15 becomes 127; infinity and NaN keep all bits.
    const uint32_t bits = (exponent == 31 ? 255 : exponent + 112) << 23 | mantissa << 13;
    std::memcpy(&f, &bits, 4);
  }
  return v.bits >> 15 ? -f : f;
}

inline __half __float2half_rn(float f) {
  const uint16_t sign = std::signbit(f) ? 0x8000 : 0;
  const float magnitude = std::fabs(f);
  if (std::isnan(f)) return {0x7fff};
  if (magnitude >= 65520.f) return {static_cast<uint16_t>(sign | 0x7c00)};
  // In units of the last place of its binade (never below 2^-24), rounded half to even.
  const int exponent = magnitude < 0x1p-14f ? -14 : std::ilogb(magnitude);
  const int units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  // A subnormal has no implicit 1; a carry into the next binade is what addition does anyway.
  return {static_cast<uint16_t>(sign | (units + ((exponent + 14) << 10)))};
}
