"""``factorize_``: whole networks, at once or layer by layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsecnn._models import evaluating, progress_bar
from sparsecnn.measure.batchnorm import recalibrate_batchnorm
from sparsecnn.nn._common import inherit

from .api import Factorize, Factorized, NoGain, check_layer, solve, take_place
from .arguments import (
    Config,
    FilterFn,
    Order,
    assign,
    check_arguments,
    check_data,
    named,
    needs_data,
)
from .collect import collect_moments, layer_inputs
from .method import chain_macs, chain_params, method_of
from .moments import Moments
from .problem import LayerProblem, UnsupportedLayer, relative_error
from .ranks import GlobalPolicy
from .reconstruct import reconstruct_
from .report import FactorizeReport, LayerReport
from .survey import Site, fold_norm_, set_module, survey
from .timing import time_layer


def factorize_(
    model: nn.Module,
    config: Config,
    example_inputs: Tensor | Sequence[Any],
    calib: Iterable[Tensor | tuple[Any, ...]] | None = None,
    *,
    gradients: Mapping[str, Tensor] | None = None,
    filter_fn: FilterFn | None = None,
    order: Order = "one_shot",
    asymmetric: bool = True,
    reconstruct: int = 0,
    finetune: Callable[[nn.Module, str], object] | None = None,
    recalibrate: bool = True,
    strict: bool = False,
    measure: bool = True,
    seed: int = 0,
    progress: bool = False,
) -> FactorizeReport:
    """Factorize the layers of a network, in place.

    Order "one_shot": all layers, then `finetune` once (Kim et al. 2016). Order "layerwise": from
    the first layer to the last, each one fitted on what the already factorized layers feed it,
    reconstructed and fine-tuned before the next one (Jaderberg et al. 2014; Astrid & Lee 2017).
    A factorized network needs training to come back to its accuracy; the rates are small, for CP
    very small.

    Args:
        model: the network. Factorized layers are `FactorizedConv2d` and `FactorizedLinear` under
            the old names; `sparsecnn.accelerate` fuses their stages where that is faster.
        config: one for all convolutions (all linear layers for "fc_svd"), or a mapping from layer
            names, "re:<regular expression>" (matched in full) and "_default" to configs or None
            (stays dense). A name beats expressions, these beat "_default".
        example_inputs: one input tensor or the positional arguments; gives the geometry.
        calib: inputs without labels, each a tensor or a tuple of positional arguments: for the
            methods that need data, `reconstruct` and batch norm statistics. Kept while this runs.
        gradients: of `collect_gradients`, for `Mahalanobis`.
        filter_fn: `filter_fn(module, name)`, leaves layers out.
        order: "one_shot" or "layerwise".
        asymmetric: layer by layer, aim at the responses of the original network from the inputs of
            the factorized one.
        reconstruct: steps of gradient descent on each layer's response error, 0 for none.
        finetune: `finetune(model, name)`, called after every layer of "layerwise" and once, with
            the name "", at the end of "one_shot".
        recalibrate: estimate batch norm statistics anew from `calib`, if there are any; not after
            `finetune`, which has trained them.
        strict: raise for a layer that cannot be factorized instead of listing it. A layer that the
            config names always raises.
        measure: time every layer before and after, a quarter of a second each.
        seed: of everything random.
        progress: show a bar.

    Returns:
        Per layer the ranks, errors, MACs, weights, measured times, or why it stayed dense.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an unknown layer or value, weights that are not finite, a model with masks or
            swapped layers, or missing `calib` or `gradients`. Layers that were done before the
            error stay so with "layerwise"; with "one_shot" the model is as it was.
        UnsupportedLayer: see `strict`.

    Cost: that of the methods; a forward pass for the geometry and one per layer over `calib` where
    data is needed.
    """
    check_arguments(model, config, calib, order, reconstruct, finetune, gradients)
    sites = survey(model, example_inputs)
    chosen = assign(sites, config, filter_fn)
    check_data(chosen, calib, gradients)
    run = _Run(
        model, example_inputs, {site.name: site for site in sites},
        list(calib) if calib is not None else None, gradients or {}, chosen, named(config), strict,
        seed, measure, reconstruct, asymmetric and order == "layerwise",
    )  # fmt: skip
    try:
        run.prepare()
        with progress_bar(progress, "factorize", len(chosen)) as tick:
            if order == "one_shot":
                run.one_shot(tick)
            else:
                run.layerwise(tick, finetune)
    except BaseException:
        if order == "one_shot" or not run.replaced:
            for undo in reversed(run.undo):
                undo()
        raise
    if order == "one_shot" and finetune is not None and run.replaced:
        finetune(model, "")
    if recalibrate and run.replaced and finetune is None:
        run.recalibrate()
    return run.report


@dataclass
class _Run:
    """One call of `factorize_`: its arguments, and what has been done so far."""

    model: nn.Module
    example_inputs: Tensor | Sequence[Any]
    sites: Mapping[str, Site]
    calib: list[Tensor | tuple[Any, ...]] | None
    gradients: Mapping[str, Tensor]
    chosen: Mapping[str, Factorize]
    named: frozenset[str]
    strict: bool
    seed: int
    measure: bool
    reconstruct: int
    asymmetric: bool
    report: FactorizeReport = field(default_factory=FactorizeReport)
    replaced: list[str] = field(default_factory=list)
    undo: list[Callable[[], None]] = field(default_factory=list)
    global_ranks: dict[str, tuple[int, ...]] = field(default_factory=dict)
    problems: dict[str, LayerProblem] = field(default_factory=dict)
    reference: nn.Module | None = None

    def prepare(self) -> None:
        """Fold what must be folded, copy what must be kept, rank what is ranked together."""
        for name, config in self.chosen.items():
            if method_of(config.method).needs_data and not self.sites[name].obstacle:
                undo = fold_norm_(self.model, self.sites[name], self.example_inputs)
                if undo is not None:
                    self.undo.append(undo)
                    self.report.notes.append(f"folded {self.sites[name].norm} into {name}")
        if self.reconstruct or self.asymmetric:
            self.reference = copy.deepcopy(self.model).eval()
        self._rank_together()

    def _rank_together(self) -> None:
        """Ask the policies that look at several layers, each one once."""
        groups: dict[Factorize, list[str]] = {}
        for name, config in self.chosen.items():
            if isinstance(config.rank, GlobalPolicy):
                groups.setdefault(config, []).append(name)
        names = [name for of_config in groups.values() for name in of_config]
        moments = self._moments([name for name in names if needs_data(self.chosen[name])])
        for name in names:
            try:
                problem = self._problem(name, moments)
                check_layer(problem, method_of(self.chosen[name].method))
                self.problems[name] = problem
            except UnsupportedLayer:
                continue  # listed when its turn comes
        for config, of_config in groups.items():
            assert isinstance(config.rank, GlobalPolicy)
            problems = {name: self.problems[name] for name in of_config if name in self.problems}
            ranks = config.rank.select_all(problems, method_of(config.method), self._trial)
            self.global_ranks.update(ranks)

    def one_shot(self, tick: Callable[[], None]) -> None:
        """All factorizations first, on the network as it is; then the replacements."""
        known = {n: p.moments for n, p in self.problems.items() if p.moments is not None}
        moments = known | self._moments([n for n in self._on_data(self.chosen) if n not in known])
        made = {}
        for name in self.chosen:
            made[name] = self._factorize(name, moments)
            tick()
        for name, layer in made.items():
            if layer is not None:
                self._replace(name, layer)
        if self.reconstruct:
            for name in self.replaced:
                self._reconstruct(name)

    def layerwise(
        self, tick: Callable[[], None], finetune: Callable[[nn.Module, str], object] | None
    ) -> None:
        """One layer after the other, each on the network as it has become."""
        self.problems.clear()  # moments of the network as it was
        for name in self.chosen:
            layer = self._factorize(name, self._moments(self._on_data([name])))
            if layer is not None:
                self._replace(name, layer)
                if self.reconstruct:
                    self._reconstruct(name)
                if finetune is not None:
                    finetune(self.model, name)
            tick()

    def recalibrate(self) -> None:
        """Batch norm statistics of the factorized network."""
        norms = [
            m for m in self.model.modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
        ]  # fmt: skip
        if self.calib is not None and norms:
            recalibrate_batchnorm(self.model, self.calib)
            self.report.notes.append(f"re-estimated {len(norms)} batch norms")

    def _on_data(self, names: Iterable[str]) -> list[str]:
        """The layers whose method itself, not only the policy of its ranks, works on data."""
        return [name for name in names if method_of(self.chosen[name].method).needs_data]

    def _moments(self, names: Sequence[str]) -> dict[str, Moments]:
        """What the data say of layers, in one pass; nothing of those that cannot be factorized."""
        wanted = [name for name in names if not self.sites[name].obstacle]
        if self.calib is None or not wanted:
            return {}
        return collect_moments(
            self.model, wanted, self.calib, seed=self.seed,
            patches=any(method_of(self.chosen[name].method).needs_patches for name in wanted),
            reference=self.reference if self.asymmetric else None,
        )  # fmt: skip

    def _problem(self, name: str, moments: Mapping[str, Moments]) -> LayerProblem:
        site = self.sites[name]
        if site.obstacle:
            raise UnsupportedLayer(f"factorize_: {name}: {site.obstacle}")
        x = site.inputs
        assert x is not None
        conv = not isinstance(site.module, nn.Linear)
        hw = (int(x.shape[-2]), int(x.shape[-1])) if conv and x.dim() > 2 else None
        batch = int(x.shape[0]) if x.dim() == (4 if conv else 2) else 1
        return LayerProblem.of(
            site.module, in_hw=hw, batch=batch,
            moments=moments.get(name), gradients=self.gradients.get(name), seed=self.seed,
            name=name,
        )  # fmt: skip

    def _factorize(self, name: str, moments: Mapping[str, Moments]) -> Factorized | None:
        """The layer's chain, or None where it stays dense; adds to the report."""
        config, site = self.chosen[name], self.sites[name]
        method = method_of(config.method)
        entry = LayerReport(name, type(site.module).__name__, str(method))
        self.report.layers.append(entry)
        try:
            p = self._problem(name, moments)
            entry.dense_macs = entry.macs = p.dense_macs
            entry.dense_params = entry.params = p.dense_params
            check_layer(p, method)
            entry.full_ranks = method.full_ranks(p)
            if name in self.global_ranks:
                ranks = config.rounded(p, self.global_ranks[name])
            else:
                ranks = config.ranks(p)
            config.check_gain(p, ranks)
        except (UnsupportedLayer, NoGain) as error:
            if isinstance(error, UnsupportedLayer) and (self.strict or name in self.named):
                self.report.layers.pop()
                raise
            entry.reason = str(error).removeprefix(f"factorize_: {name}: ").removeprefix(
                f"factorize: {name}: "
            )
            if self.measure and entry.dense_macs and site.inputs is not None:
                times = time_layer(_bare(site.module), None, site.inputs)
                entry.dense_us = times["dense"].median_s * 1e6
            return None
        weight = site.module.weight
        assert isinstance(weight, Tensor)
        layer, entry.note = solve(p, method, ranks, weight)
        take_place(layer, site.module)
        stages = method.stages(p, ranks)
        entry.ranks = ranks
        entry.macs, entry.params = chain_macs(p, stages), chain_params(p, stages)
        self._errors(entry, site, layer)
        return layer

    @torch.no_grad()
    def _errors(self, entry: LayerReport, site: Site, layer: Factorized) -> None:
        weight, x = site.module.weight, site.inputs
        assert isinstance(weight, Tensor) and x is not None
        entry.weight_error = relative_error(layer.dense_weight(), weight.detach())
        dense = _bare(site.module)
        chain = _bare(layer)
        with evaluating(chain):
            entry.response_error = relative_error(chain(x), dense(x))
        if self.measure:
            times = time_layer(dense, chain, x)
            entry.dense_us = times["dense"].median_s * 1e6
            entry.convs_us = times["convs"].median_s * 1e6
            entry.chain_us = times["chain"].median_s * 1e6 if "chain" in times else None

    def _replace(self, name: str, layer: nn.Module) -> None:
        self._set(name, layer)
        self.undo.append(lambda: self._set(name, self.sites[name].module))
        self.replaced.append(name)

    def _set(self, name: str, layer: nn.Module) -> None:
        for alias in self.sites[name].names:
            set_module(self.model, alias, layer)

    def _reconstruct(self, name: str) -> None:
        assert self.reference is not None and self.calib is not None
        chain = self.model.get_submodule(name)
        if not any(p.requires_grad for p in chain.parameters()):
            self.report.notes.append(f"not reconstructed {name}: its weights are frozen")
            return
        pairs = layer_inputs(self.model, name, self.calib, reference=self.reference)
        original = self.reference.get_submodule(name)
        before, after = reconstruct_(
            chain, original, pairs, steps=self.reconstruct, seed=self.seed
        )
        self.report.notes.append(f"reconstructed {name}: {before:.4f} > {after:.4f}")

    def _trial(
        self, name: str, ranks: tuple[int, ...] | None, evaluate: Callable[[nn.Module], float]
    ) -> float:
        """What `evaluate` says of the network with one layer factorized; nothing stays."""
        if ranks is None:
            with evaluating(self.model):
                return evaluate(self.model)
        config, original = self.chosen[name], self.sites[name].module
        weight = original.weight
        assert isinstance(weight, Tensor)
        p = self.problems[name]
        self._set(name, solve(p, method_of(config.method), config.rounded(p, ranks), weight)[0])
        try:
            with evaluating(self.model):
                return evaluate(self.model)
        finally:
            self._set(name, original)


def _bare(module: nn.Module) -> nn.Module:
    """The same parameters without the user's hooks."""
    bare = copy.copy(module)
    inherit(bare, nn.Identity())
    bare.training = False
    return bare
