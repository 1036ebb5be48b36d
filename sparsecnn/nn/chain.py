"""``ChainConv2d``: convolutions in a row that run as one op, their intermediates in the cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.nn.utils.prune import BasePruningMethod

from sparsecnn.formats.chain import MAX_STAGES, ChainGeometry, ChainStage
from sparsecnn.nn._common import ChannelsInnermost, check_activation, inherit, own_bias
from sparsecnn.ops._common import try_quick
from sparsecnn.ops.chain_conv2d import CHAIN_CONV2D, check_stage, op_arguments, run_chain_conv2d

_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
}
_MODULES = {name: module for module, name in _ACTIVATIONS.items()}
_OP = "ChainConv2d"


class ChainStageWeights(ChannelsInnermost):
    """Weight, bias and options of one stage; it computes nothing by itself.

    Attributes:
        weight: ``(K, C/G, R, S)``, output channels innermost in memory.
        bias: ``(K,)`` or None.
        activation: applied behind it.
    """

    bias: nn.Parameter | None

    def __init__(self, conv: nn.Conv2d, activation: str) -> None:
        super().__init__()
        self._take_weight(conv)
        self.register_parameter("bias", own_bias(conv))
        self.activation = activation
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.kernel_size, self.stride = conv.kernel_size, conv.stride
        self.padding, self.dilation, self.groups = conv.padding, conv.dilation, conv.groups
        left, right, top, bottom = conv._reversed_padding_repeated_twice
        self.pads = (top, bottom, left, right)
        self.training = conv.training

    def stage(self) -> ChainStage:
        """The stage as the op takes it, sharing the parameters."""
        return ChainStage(
            self.weight, self.bias, (self.stride[0], self.stride[1]), self.pads,
            (self.dilation[0], self.dilation[1]), self.groups, self.activation,
        )  # fmt: skip

    def to_conv(self) -> nn.Conv2d:
        """The plain convolution: its weight a contiguous copy, its bias shared."""
        pairs: Any = (self.kernel_size, self.stride, self.padding, self.dilation)
        conv = nn.Conv2d(  # type: ignore[call-arg]
            self.in_channels, self.out_channels, *pairs, self.groups, self.bias is not None,
            "zeros", "meta", self.weight.dtype,
        )  # fmt: skip
        weight = self.weight.detach().clone(memory_format=torch.contiguous_format)
        conv.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        conv.register_parameter("bias", self.bias)
        conv.training = self.training
        return conv

    def extra_repr(self) -> str:
        """Arguments of the convolution, then the activation."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, "
            f"groups={self.groups}, bias={self.bias is not None}, activation={self.activation}"
        )


class ChainConv2d(nn.Module):
    """Convolutions in a row as one op: ``y = act_n(W_n * ... act_1(W_1 * x + b_1) ... + b_n + r)``.

    Made from plain layers by ``from_convs`` or ``from_sequential``; each stage dense (groups 1) or
    depthwise. With ``residual=True`` r is the input, added before the last activation; a tensor
    given to ``forward`` is added instead.

    State dict: ``stages.<i>.weight`` of shape ``(K, C/G, R, S)`` and ``stages.<i>.bias``; weights
    keep their output channels innermost in memory, whatever is loaded into them.
    """

    is_sparsecnn_layer: ClassVar[bool] = True

    def __init__(self, stages: Sequence[ChainStageWeights] = (), *, residual: bool = False) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.residual = residual
        self._geometry_of_stages: ChainGeometry | None = None

    @property
    def _geometry(self) -> ChainGeometry:
        """Made at the first use: a file is read stage by stage."""
        if self._geometry_of_stages is None:
            self._geometry_of_stages = ChainGeometry.of([s.stage() for s in self._stages()])
        return self._geometry_of_stages

    @classmethod
    def from_convs(
        cls, convs: Sequence[nn.Conv2d], activations: Sequence[str], *, residual: bool = False
    ) -> ChainConv2d:
        """Take the place of convolutions in a row, each followed by an activation.

        Args:
            convs: 1 to 8 layers, padded with zeros, dense or depthwise. Masks of
                ``torch.nn.utils.prune`` and parametrizations are baked in.
            activations: one name for each.
            residual: add the input before the last activation.

        Raises:
            TypeError: an element of ``convs`` is no ``nn.Conv2d``, or dtypes differ.
            ValueError: lengths, channels or the shape of the residual do not fit.
            NotImplementedError: a convolution that the kernel has no form for; names why.
        """
        convs = list(convs)
        if not 1 <= len(convs) <= MAX_STAGES or len(activations) != len(convs):
            raise ValueError(
                f"{_OP}: expected 1 to {MAX_STAGES} convs and an activation for each, got "
                f"{len(convs)} and {len(activations)}"
            )
        for i, (conv, activation) in enumerate(zip(convs, activations, strict=True)):
            if not isinstance(conv, nn.Conv2d):
                raise TypeError(f"{_OP}: expected convs of nn.Conv2d, got {type(conv).__name__}")
            check_activation(_OP, activation)
            if conv.padding_mode != "zeros" and any(conv._reversed_padding_repeated_twice):
                raise NotImplementedError(
                    f"{_OP}: expected padding_mode 'zeros' in stage {i}, got "
                    f"{conv.padding_mode!r}; pad in a layer of its own"
                )
            check_stage(f"{_OP}: stage {i}", conv.weight.shape, conv.groups)
            if conv.weight.dtype != convs[0].weight.dtype:
                raise TypeError(
                    f"{_OP}: expected all stages of {convs[0].weight.dtype}, got "
                    f"{conv.weight.dtype} in stage {i}"
                )
            if i and conv.in_channels != convs[i - 1].out_channels:
                raise ValueError(
                    f"{_OP}: expected stage {i} to take the {convs[i - 1].out_channels} channels "
                    f"of stage {i - 1}, got {conv.in_channels}"
                )
        if residual:
            _check_residual(convs)
        stages = [ChainStageWeights(c, a) for c, a in zip(convs, activations, strict=True)]
        self = cls(stages, residual=residual)
        self.training = convs[0].training
        return self

    @classmethod
    def from_sequential(cls, seq: nn.Sequential, *, residual: bool = False) -> ChainConv2d:
        """Take the place of an ``nn.Sequential``, possibly nested, with its flags and hooks.

        It may hold ``nn.Conv2d``, each followed by an ``nn.BatchNorm2d`` in eval mode (folded) and
        one of ``nn.ReLU``, ``nn.ReLU6``, ``nn.SiLU``, ``nn.Hardswish``, or not; and ``nn.Identity``
        anywhere.

        Args:
            seq: the layers.
            residual: add the input before the last activation.

        Raises:
            TypeError: ``seq`` is not an ``nn.Sequential``; else as `from_convs`.
            ValueError: as `from_convs`.
            NotImplementedError: a module, or an order of modules, that a chain cannot take.
        """
        if not isinstance(seq, nn.Sequential):
            raise TypeError(f"{_OP}: expected an nn.Sequential, got {type(seq).__name__}")
        convs: list[nn.Conv2d] = []
        activations: list[str] = []
        for name, module in _flatten(seq, ""):
            _refuse_hooks(name, module)
            if type(module) is nn.Conv2d:
                convs.append(module)
                activations.append("none")
                follows = "conv"
                continue
            if not convs:
                raise NotImplementedError(
                    f"{_OP}: expected an nn.Conv2d first, got {type(module).__name__} {name!r}"
                )
            if type(module) is nn.BatchNorm2d and follows == "conv":
                convs[-1] = _fold(convs[-1], module, name)
                follows = "norm"
            elif type(module) in _ACTIVATIONS and follows != "activation":
                activations[-1] = _ACTIVATIONS[type(module)]
                follows = "activation"
            else:
                raise NotImplementedError(
                    f"{_OP}: expected nn.Conv2d, then nn.BatchNorm2d or not, then an activation or "
                    f"not, got {type(module).__name__} {name!r} behind a {follows}"
                )
        self = cls.from_convs(convs, activations, residual=residual)
        inherit(self, seq)
        return self

    def to_sequential(self) -> nn.Sequential:
        """The stages as plain layers, without the residual; biases are shared, weights copied."""
        layers: list[nn.Module] = []
        for stage in self._stages():
            layers.append(stage.to_conv())
            if stage.activation != "none":
                layers.append(_MODULES[stage.activation]())
        seq = nn.Sequential(*layers)
        inherit(seq, self)
        return seq

    def _stages(self) -> Iterator[ChainStageWeights]:
        for stage in self.stages:
            assert isinstance(stage, ChainStageWeights)
            yield stage

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``(N, C, H, W)`` or ``(C, H, W)`` to the output of the last stage.

        Args:
            x: input in either memory format, which the output keeps.
            residual: like the output, added before the last activation.
        """
        if x.dim() == 3:
            r = None if residual is None else residual.unsqueeze(0)
            return self.forward(x.unsqueeze(0), r).squeeze(0)
        if residual is None and self.residual:
            residual = x
        stages = list(self.stages)
        own = [s._parameters for s in stages]
        # Weights and biases that are computed (parametrized, pruned) are attributes of the stage.
        if all("weight" in p and "bias" in p for p in own):
            weights: list[Any] = [p["weight"] for p in own]
            biases: list[Any] = [p["bias"] for p in own]
            arguments = op_arguments(x, weights, biases, residual, self._geometry)
            y = try_quick(CHAIN_CONV2D, arguments, weights, [*biases, residual])
            if y is not None:
                return y
        else:
            weights, biases = [s.weight for s in stages], [s.bias for s in stages]
        return run_chain_conv2d(x, weights, biases, residual, self._geometry)

    def extra_repr(self) -> str:
        """Whether the input is added."""
        return f"residual={self.residual}"


def _flatten(seq: nn.Sequential, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, module in seq.named_children():
        if type(module) is nn.Identity:
            continue
        if isinstance(module, nn.Sequential):
            _refuse_hooks(prefix + name, module)
            yield from _flatten(module, f"{prefix}{name}.")
        else:
            yield prefix + name, module


def _refuse_hooks(name: str, module: nn.Module) -> None:
    """Nobody would call the hooks of a module inside a chain."""
    hooks = [
        *module._forward_hooks.values(),
        *module._backward_hooks.values(),
        *module._backward_pre_hooks.values(),
        *(h for h in module._forward_pre_hooks.values() if not isinstance(h, BasePruningMethod)),
    ]
    if hooks:
        raise NotImplementedError(
            f"{_OP}: expected no hooks inside the chain, got {len(hooks)} on {name!r}; "
            "remove them or leave the module out"
        )


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d, name: str) -> nn.Conv2d:
    """A convolution with an evaluated batch normalization in its weight and bias."""
    if norm.training or norm.running_mean is None or norm.running_var is None:
        raise NotImplementedError(
            f"{_OP}: expected BatchNorm2d {name!r} in eval mode with running statistics; call "
            ".eval() first"
        )
    if norm.num_features != conv.out_channels:
        raise ValueError(
            f"{_OP}: expected BatchNorm2d {name!r} of {conv.out_channels} channels, got "
            f"{norm.num_features}"
        )
    weight, bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight,
        norm.bias,
    )  # fmt: skip
    pairs: Any = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    folded = nn.Conv2d(  # type: ignore[call-arg]
        conv.in_channels, conv.out_channels, *pairs, conv.groups, True, conv.padding_mode, "meta",
        conv.weight.dtype,
    )  # fmt: skip
    folded.weight = nn.Parameter(weight.detach(), requires_grad=conv.weight.requires_grad)
    folded.bias = nn.Parameter(bias.detach(), requires_grad=conv.weight.requires_grad)
    folded.training = conv.training
    return folded


def _check_residual(convs: Sequence[nn.Conv2d]) -> None:
    """Refuse a chain whose output has not the shape of its input."""
    if convs[0].in_channels != convs[-1].out_channels:
        raise ValueError(
            f"{_OP}: expected as many output as input channels with residual=True, got "
            f"{convs[-1].out_channels} and {convs[0].in_channels}"
        )
    for i, conv in enumerate(convs):
        left, right, top, bottom = conv._reversed_padding_repeated_twice
        reach = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        if any(s != 1 for s in conv.stride) or [top + bottom, left + right] != reach:
            raise ValueError(
                f"{_OP}: expected stages that keep H and W with residual=True, got stage {i} with "
                f"stride {tuple(conv.stride)} and padding {conv.padding!r}"
            )
