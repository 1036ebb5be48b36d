"""From a plan to modules: which new module stands under which name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from ..nn import FusedConv2d, ResidualBlock
from .blocks import Block
from .chains import Chain
from .copy import LAYOUTS, duplicate, in_layout, replace_by_name_
from .kernels import CANDIDATES, Layer, build_dense
from .layouts import Cut
from .survey import Site


def other_layout(layout: str) -> str:
    """The memory layout that is not `layout`."""
    return LAYOUTS[1 - LAYOUTS.index(layout)]


@dataclass(frozen=True)
class Plan:
    """A variant of the model.

    Attributes:
        layout: memory layout it runs in, up to the cut if there is one.
        folds: sites whose batch norm and activation are folded.
        swaps: sites with the kernel that won.
        blocks: residual blocks whose addition runs in their last layer.
        chains: layers that run as one.
        cut: where the layout changes.
        images: how many at a time; 0 for the whole batch.
    """

    layout: str
    folds: frozenset[Site] = frozenset()
    swaps: frozenset[Site] = frozenset()
    blocks: frozenset[Block] = frozenset()
    chains: frozenset[Chain] = frozenset()
    cut: Cut | None = None
    images: int = 0

    def layout_of(self, site: Site) -> str:
        """Memory layout around a site."""
        behind = self.cut is not None and site in self.cut.after
        return other_layout(self.layout) if behind else self.layout

    @property
    def label(self) -> str:
        """Name of the variant for the timer."""
        if self.swaps:
            kind = "swapped"
        elif self.blocks or self.chains:
            kind = "fused"
        else:
            kind = "folded" if self.folds else "original"
        return f"{kind} {self.layouts}"

    @property
    def layouts(self) -> str:
        """The layout, or both of them with the place where it changes."""
        if self.cut is None:
            return self.layout
        return f"{self.layout}, {other_layout(self.layout)} from {self.cut.name}"

    @property
    def is_original(self) -> bool:
        """Whether nothing is replaced."""
        return not (self.folds or self.swaps or self.blocks or self.chains or self.images)


class Assembler:
    """Makes the new modules of plans; variants share their tensors.

    Args:
        model: that the names belong to; never changed.
        sites: its layers.
    """

    def __init__(self, model: nn.Module, sites: list[Site]) -> None:
        self.model = model
        self.sites = sites
        self.names = {module: name for name, module in model.named_modules()}
        # Folded dense layers by layout, and what they were made of.
        self._dense: dict[tuple[Site, str], tuple[Layer, nn.Module]] = {}
        self._made: dict[tuple[object, ...], nn.Module] = {}

    def swaps(self, plan: Plan) -> dict[str, nn.Module]:
        """Name -> new module of everything the plan replaces."""
        swaps: dict[str, nn.Module] = {}
        for site in self.sites:
            folded = site.folded
            if site.layer is None or (site not in plan.folds and site not in plan.swaps):
                continue
            if site in plan.swaps:
                swaps[site.name] = self._winner(site, plan.layout_of(site), site.layer.activation)
            elif folded is not None and folded.replaced:
                swaps[site.name] = self._folded_dense(site, site.layer, plan.layout_of(site))
            if folded is not None:
                for module, rest in folded.replaced.items():
                    swaps[self.names[module]] = rest
        last = {block.last: block.activation for block in plan.blocks}
        for chain in plan.chains:
            first, *others = chain.sites
            swaps[first.name] = self._chain(chain, last.get(chain.sites[-1]))
            for site in others:
                swaps[site.name] = nn.Identity()
            for site in chain.sites:
                assert site.folded is not None
                for module, rest in site.folded.replaced.items():
                    swaps[self.names[module]] = rest
        inner = {site for chain in plan.chains for site in chain.sites[1:]}
        for block in plan.blocks:
            body, shortcut = (
                [self._part(part, swaps) for part in path if part not in inner]
                for path in (block.body, block.shortcut)
            )
            if block.last not in inner:  # else the chain adds
                body[-1] = self._adding(block, plan)
            below = f"{block.name}."
            swaps = {name: m for name, m in swaps.items() if not name.startswith(below)}
            swaps[block.name] = ResidualBlock(body, shortcut)
        return swaps

    def _winner(self, site: Site, layout: str, activation: str) -> nn.Module:
        """The kernel that won a site, with an activation of ours."""
        choice = site.choice
        assert choice is not None and site.layer is not None
        kernel = choice.kernel_in(layout)
        if activation == site.layer.activation:
            return duplicate(site.built[kernel].module, share=True)
        key = (site, site.layer, kernel, activation)
        if key not in self._made:
            layer = replace(site.layer, activation=activation)
            self._made[key] = CANDIDATES[kernel].build(layer)
        return duplicate(self._made[key], share=True)

    def _folded_dense(self, site: Site, layer: Layer, layout: str) -> nn.Module:
        dense = self._dense.get((site, layout))
        if dense is None or dense[0] is not layer:
            dense = layer, build_dense(layer, layout)
            self._dense[site, layout] = dense
        return duplicate(dense[1], share=True)

    def _chain(self, chain: Chain, activation: str | None) -> nn.Module:
        key = (chain, activation)
        if key not in self._made:
            self._made[key] = chain.build(activation)
        return duplicate(self._made[key], share=True)

    def _adding(self, block: Block, plan: Plan) -> nn.Module:
        """The last layer of a block, which takes a residual and the block's activation."""
        site = block.last
        assert site.layer is not None and isinstance(site.layer.module, nn.Conv2d)
        if site in plan.swaps:
            return self._winner(site, plan.layout_of(site), block.activation)
        fused = FusedConv2d.from_dense(site.layer.module, activation=block.activation)
        weight = in_layout(fused.weight.detach(), plan.layout_of(site))
        fused.weight = nn.Parameter(weight, fused.weight.requires_grad)
        return fused

    def _part(self, part: Site | str, swaps: Mapping[str, nn.Module]) -> nn.Module:
        """A layer or module of a block as the plan has it."""
        name = part if isinstance(part, str) else part.name
        if name in swaps:
            return swaps[name]
        below = f"{name}."
        inside = {n.removeprefix(below): m for n, m in swaps.items() if n.startswith(below)}
        return replace_by_name_(duplicate(self.model.get_submodule(name), share=True), inside)
