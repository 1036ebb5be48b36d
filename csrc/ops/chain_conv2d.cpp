// chain_conv2d: schema, checks, allocation.
#include <algorithm>

#include "cpu/kernel_table.h"
#include "ops/conv.h"
#include "ops/cuda_stream.h"

namespace sparsecnn::ops {
namespace {

constexpr const char* kOp = "chain_conv2d";

struct Call {
  std::vector<Tensor> kept;  // what the pointers point to
  Tensor y;
  ChainConv2dParams params;
};

// "relu6,relu6,none": one name per stage.
std::vector<std::string> split(const std::string& names) {
  std::vector<std::string> found(1);
  for (const char c : names) {
    if (c == ',') {
      found.emplace_back();
    } else {
      found.back() += c;
    }
  }
  return found;
}

ChainStage make_stage(const int64_t (&size)[4], const Tensor& x, const Tensor& weight,
                      const Geometry& geometry) {
  check_same(weight, x, kOp, "every weight");
  STD_TORCH_CHECK(weight.dim() == 4, kOp,
                  ": expected weights with 4 dimensions (K, C/G, R, S), got ", weight.dim());
  const int64_t groups = geometry.groups;
  STD_TORCH_CHECK(weight.size(0) > 0 && weight.size(1) > 0, kOp,
                  ": expected stages with channels, got a weight with ", weight.size(0),
                  " filters of ", weight.size(1), " channels");
  STD_TORCH_CHECK(groups == 1 || (groups == size[1] && groups == weight.size(0)), kOp,
                  ": expected stages dense (groups 1) or depthwise (groups = C = K), got groups ",
                  groups, " with C = ", size[1], " and K = ", weight.size(0));
  STD_TORCH_CHECK(weight.size(1) * groups == size[1], kOp, ": expected a weight for ", size[1],
                  " channels, got ", weight.size(1), " in ", groups, " groups");
  for (const int64_t pad : geometry.padding) {
    STD_TORCH_CHECK(pad >= 0, kOp, ": expected padding >= 0, got ", pad);
  }
  ChainStage stage{};
  stage.shape = conv_shape(kOp, size, weight.size(0), geometry);
  stage.weight = weight.const_data_ptr();
  for (int i = 0; i < 4; ++i) stage.weight_stride[i] = weight.strides()[i];
  return stage;
}

Call prepare(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
             const std::optional<Tensor>& residual, const Ints& has_bias, const Ints& stride,
             const Ints& padding, const Ints& dilation, const Ints& groups,
             const Name& activations) {
  const size_t stages = weights.size();
  const std::vector<std::string> names = split(activations.text);
  STD_TORCH_CHECK(stages >= 1 && stages <= static_cast<size_t>(kMaxChainStages), kOp,
                  ": expected 1 to ", kMaxChainStages, " stages, got ", stages);
  const size_t expected =
      std::count_if(has_bias.begin(), has_bias.end(), [](int64_t has) { return has != 0; });
  STD_TORCH_CHECK(has_bias.size() == stages && biases.size() == expected, kOp,
                  ": expected has_bias for ", stages, " stages and as many biases, got ",
                  has_bias.size(), " with ", expected, " of ", biases.size(), " biases");
  STD_TORCH_CHECK(
      names.size() == stages && groups.size() == stages && stride.size() == 2 * stages &&
          dilation.size() == 2 * stages && padding.size() == 4 * stages,
      kOp, ": expected for each of ", stages,
      " stages 2 strides, 4 pads, 2 dilations, groups and an activation, got ", stride.size(), ", ",
      padding.size(), ", ", dilation.size(), ", ", groups.size(), ", ", names.size());
  STD_TORCH_CHECK(x.dim() == 4, kOp, ": expected x with 4 dimensions (N, C, H, W), got ", x.dim());
  Call call{{}, Tensor(), {}};
  ChainConv2dParams& p = call.params;
  p.stages = static_cast<int32_t>(stages);
  p.n = x.size(0);
  p.dtype = dtype_of(x, kOp);
  p.layout = layout_of(x);
  call.kept.push_back(to_layout(x, p.layout));
  p.x = call.kept.back().const_data_ptr();
  size_t bias = 0;
  int64_t size[4] = {x.size(0), x.size(1), x.size(2), x.size(3)};
  for (size_t i = 0; i < stages; ++i) {
    const auto part = [i](const Ints& all, size_t n) {
      return Ints(all.begin() + i * n, all.begin() + (i + 1) * n);
    };
    const Tensor& weight = weights[i];
    const Ints kernel = weight.dim() == 4 ? Ints{weight.size(2), weight.size(3)} : Ints{1, 1};
    ChainStage& stage = p.stage[i];
    stage = make_stage(size, x, weight,
                       {kernel, part(stride, 2), part(padding, 4), part(dilation, 2), groups[i]});
    stage.activation = activation_of(names[i], kOp);
    stage.bias = nullptr;
    if (has_bias[i] != 0) {
      const Tensor& b = biases[bias++];
      check_same(b, x, kOp, "every bias");
      STD_TORCH_CHECK(b.dim() == 1 && b.size(0) == stage.shape.k, kOp, ": expected bias of shape (",
                      stage.shape.k, ",)");
      call.kept.push_back(as_contiguous(b));
      stage.bias = call.kept.back().const_data_ptr();
    }
    size[1] = stage.shape.k, size[2] = stage.shape.p, size[3] = stage.shape.q;
  }
  p.residual = nullptr;
  if (residual) {
    check_same(*residual, x, kOp, "residual");
    bool fits = residual->dim() == 4;
    for (int i = 0; fits && i < 4; ++i) fits = residual->size(i) == size[i];
    STD_TORCH_CHECK(fits, kOp, ": expected residual of the output's shape (", size[0], ", ",
                    size[1], ", ", size[2], ", ", size[3], ")");
    call.kept.push_back(to_layout(*residual, p.layout));
    p.residual = call.kept.back().const_data_ptr();
  }
  call.y = empty_like_layout(x, {size[0], size[1], size[2], size[3]}, p.layout);
  p.y = call.y.mutable_data_ptr();
  return call;
}

Tensor chain_conv2d_cpu(const Tensor& x, std::vector<Tensor> weights, std::vector<Tensor> biases,
                        std::optional<Tensor> residual, Ints has_bias, Ints stride, Ints padding,
                        Ints dilation, Ints groups, Name activations) {
  const Call call = prepare(x, weights, biases, residual, has_bias, stride, padding, dilation,
                            groups, activations);
  const ChainConv2dParams& params = call.params;
  check_cpu_dtype(kOp, params.dtype);
  if (call.y.numel() == 0) return call.y;

  const cpu::ChainKernels& table = cpu::kernels().chain;
  const int64_t threads = cpu_threads();
  const cpu::ChainPlan plan = cpu::plan_chain(
      params, params.dtype == DType::kFloat64 ? table.of_double : table.of_float, threads);
  run_items(kOp, threads, plan.items, plan.thread_bytes,
            [&](int64_t begin, int64_t end, char* scratch) {
              table.conv2d(params, plan, begin, end, scratch);
            });
  return call.y;
}

#ifdef SPARSECNN_CUDA
Tensor chain_conv2d_cuda(const Tensor& x, std::vector<Tensor> weights, std::vector<Tensor> biases,
                         std::optional<Tensor> residual, Ints has_bias, Ints stride, Ints padding,
                         Ints dilation, Ints groups, Name activations) {
  const CudaGuard guard(x);
  const Call call = prepare(x, weights, biases, residual, has_bias, stride, padding, dilation,
                            groups, activations);
  check_cuda_dtype(kOp, call.params.dtype);
  // Freed to the allocator of the stream when the call returns: work enqueued there comes later.
  struct Workspace {
    const Tensor& like;
    Tensor memory;
  } workspace{x, Tensor()};
  const auto allocate = [](void* context, int64_t bytes) -> void* {
    auto* w = static_cast<Workspace*>(context);
    w->memory =
        torch::stable::new_empty(w->like, {(bytes + 3) / 4}, torch::headeronly::ScalarType::Float);
    return w->memory.mutable_data_ptr();
  };
  guard.check(cuda::chain_conv2d(call.params, allocate, &workspace, guard.stream()), kOp);
  return call.y;
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparsecnn, m) {
  m.def(
      "chain_conv2d(Tensor x, Tensor[] weights, Tensor[] biases, Tensor? residual, "
      "int[] has_bias, int[] stride, int[] padding, int[] dilation, int[] groups, str activations) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sparsecnn, CPU, m) {
  m.impl("chain_conv2d", TORCH_BOX(&chain_conv2d_cpu));
}

#ifdef SPARSECNN_CUDA
STABLE_TORCH_LIBRARY_IMPL(sparsecnn, CUDA, m) {
  m.impl("chain_conv2d", TORCH_BOX(&chain_conv2d_cuda));
}
#endif

}  // namespace sparsecnn::ops
