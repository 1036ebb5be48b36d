"""Pruning while training: the parts of `protocols` run in one fixed order.

```python
pruner = Pruner(model, importance=Magnitude(sparsity=0.9), schedule=Polynomial(0, 1000, 50))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
pruner.attach(optimizer)
for x, y in loader:
    optimizer.zero_grad()
    (loss_fn(model(x), y) + pruner.penalty()).backward()
    optimizer.step()          # the hook runs after_step()
pruner.finalize()
```

After every optimizer step: (1) proximal steps with each parameter group's own learning rate,
(2) masks re-applied to the dense weights, (3) optimizer state of dead entries zeroed, (4) one tick
of the schedule. Steps 2 and 3 belong to mask mode "hard".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from . import mask as masking
from .budget import Budget
from .followers import find_batch_norms, per_map_parameters
from .granularity import filter_, layer
from .importance import Random
from .parts import (
    check_optimizer,
    check_parts,
    check_regrown,
    check_state,
    check_targets,
    choose_budget,
    choose_granularity,
    choose_selector,
)
from .protocols import (
    Calibration,
    Compensator,
    Granularity,
    Importance,
    Regrowth,
    Regularizer,
    Schedule,
    Selector,
    Stats,
)
from .report import SparsityReport, report_of
from .running import PREFIX, Running
from .schedule import Event, OneShot
from .selection import plan_masks
from .targets import Target, find_targets


class Pruner:
    """Holds masks on a model's weights and changes them on a schedule.

    Building it attaches a mask parametrization to every target (all ones, or what is already
    zero) and changes no weight, except that masks of torch.nn.utils.prune are folded in: their
    zeros stay.

    Args:
        model: the network; stays the same object, its Parameters too.
        granularity: a granularity or its name; default: the importance's, else "element".
        budget: how much may stay; default: the importance's fields.
        importance: scores the weights. Required by the selector `TopK`.
        selector: turns scores into masks; default `TopK` with the importance's scope.
        compensator: repairs survivors at each prune event, before the masks are applied.
        schedule: when to prune; default `OneShot()`, the first tick.
        regrowth: answers the schedule's "regrow" events.
        regularizers: penalties and proximal steps of every optimizer step.
        regularize_until: tick from which they rest; None for never.
        mask_mode: "hard" or "ste", see `mask`.
        targets: what to prune; default `find_targets(model, example_inputs)`.
        example_inputs: see `find_targets`. With a granularity of whole filters it also finds the
            batch norms: their scale and shift, and the layers' biases, are then held at 0 where a
            filter is dead, so that its map is 0 and `remove_zeroed_` can remove it. Without it
            only weights are masked, and a dead filter's map is a constant.
        calibration: collects the statistics that the parts list in `needs`.
        keep_zeros: entries that are zero now stay zero, whatever tool made them.
        generator: where a `Random` importance without a seed gets one.

    Raises:
        TypeError: a part lacks the methods of its protocol.
        ValueError: parts that do not fit together; nothing has been changed then.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        granularity: str | Granularity | None = None,
        budget: Budget | None = None,
        importance: Importance | None = None,
        selector: Selector | None = None,
        compensator: Compensator | None = None,
        schedule: Schedule | None = None,
        regrowth: Regrowth | None = None,
        regularizers: Sequence[Regularizer] = (),
        regularize_until: int | None = None,
        mask_mode: masking.MaskMode = "hard",
        targets: Sequence[Target] | None = None,
        example_inputs: Tensor | Sequence[Any] | None = None,
        calibration: Calibration | None = None,
        keep_zeros: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        if mask_mode not in masking.MODES:
            raise ValueError(f"Pruner: expected mask_mode 'hard' or 'ste', got {mask_mode!r}")
        self.model = model
        self.schedule: Schedule = OneShot() if schedule is None else schedule
        self.mask_mode: masking.MaskMode = mask_mode
        self.compensator = compensator
        self.regrowth = regrowth
        self.regularizers = tuple(regularizers)
        self.regularize_until = regularize_until
        self.calibration = calibration
        self.granularity = choose_granularity(granularity, importance)
        self.budget = choose_budget(budget, importance, self.granularity)
        self.selector = choose_selector(selector, importance)
        # A `Random` without a seed gets one now: state_dict must hold everything that decides.
        seeded = getattr(importance, "seeded", None)
        self.importance: Importance | None = importance if seeded is None else seeded(generator)
        if targets is None:
            targets = find_targets(model, example_inputs)
        self.targets = tuple(targets)
        check_targets(model, self.targets)
        check_parts(self)

        self._step = 0
        self._epoch = 0
        self._frozen = False
        self._optimizer: torch.optim.Optimizer | None = None
        self._hooks: list[RemovableHandle] = []
        self._finalized = False
        self.running = Running(self.needs, self.targets)
        self._per_map: dict[Target, list[nn.Parameter]] = {}
        if example_inputs is not None and self.granularity in (filter_, layer):
            norms = find_batch_norms(model, self.targets, example_inputs)
            self._per_map = {t: per_map_parameters(t, norms.get(t)) for t in self.targets}
        # Everything is checked; from here on the model changes.
        self._base = {t: masking.living(t, keep_zeros) for t in self.targets}
        self._masks: dict[Target, masking.Mask] = {}
        for t in self.targets:
            masking.fold_foreign_mask(t)
            self._masks[t] = masking.attach(t, self._base[t], mask_mode)

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that the parts ask for."""
        parts = (self.importance, self.selector, self.compensator, self.regrowth)
        return frozenset().union(*(part.needs for part in parts if part is not None))

    def attach(self, optimizer: torch.optim.Optimizer) -> Pruner:
        """Run `after_step` after every step of `optimizer`; returns the pruner.

        A step that AMP skips does not count.

        Raises:
            ValueError: already attached, finalized, or no target is in the optimizer.
        """
        self._check_live("attach")
        if self._optimizer is not None:
            raise ValueError("Pruner.attach: expected one optimizer, got a second one")
        check_optimizer(optimizer, self.targets)
        self._optimizer = optimizer
        self._hooks = [optimizer.register_step_post_hook(lambda *_: self.after_step())]
        if self.running.values:  # before the step, W is still what the gradients belong to
            observe = lambda *_: self._each_rate(self.running.observe)  # noqa: E731
            self._hooks.append(optimizer.register_step_pre_hook(observe))
        return self

    def penalty(self) -> Tensor:
        """Sum of the regularizers' penalties, to add to the loss."""
        dense = self.targets[0].dense
        total = torch.zeros((), device=dense.device, dtype=dense.dtype)
        for part in self._acting():
            total = total + part.penalty(self.targets)
        return total

    def _acting(self) -> Sequence[Regularizer]:
        resting = self.regularize_until is not None and self._step >= self.regularize_until
        return () if resting else self.regularizers

    @torch.no_grad()
    def after_step(self) -> None:
        """Proximal steps, masks, optimizer state, schedule tick: in this order.

        Called by the hook of `attach`; call it yourself only in a loop without an optimizer.

        Raises:
            ValueError: finalized, or regularizers without an optimizer.
        """
        self._check_live("after_step")
        if self._optimizer is None and self.regularizers:
            raise ValueError("Pruner.after_step: expected an attached optimizer, got none")
        if self._acting():
            self._each_rate(self._prox)
        self._hold_zeros()
        self.step()

    def _each_rate(self, act: Callable[[list[Target], float], None]) -> None:
        """Call `act` with the targets and the learning rate of every parameter group."""
        # The rate is read now, not at attach: learning-rate schedulers change it.
        for group in () if self._optimizer is None else self._optimizer.param_groups:
            held = {id(p) for p in group["params"]}
            inside = [t for t in self.targets if id(t.dense) in held]
            if inside:
                act(inside, float(group["lr"]))

    def _prox(self, targets: list[Target], lr: float) -> None:
        for part in self._acting():
            part.prox_(targets, lr, self._step)

    def _hold_zeros(self) -> None:
        """Re-apply the masks to values and optimizer state; "ste" lets both move."""
        if self.mask_mode != "hard":
            return
        for t, mask in self._masks.items():
            masking.hold_zeros_(t.dense, mask.mask, self._optimizer)
        self._silence_dead_maps()

    def _silence_dead_maps(self) -> None:
        for t, parameters in self._per_map.items():
            alive = self._masks[t].mask.flatten(1).any(1)
            for parameter in parameters:
                masking.hold_zeros_(parameter, alive, self._optimizer)

    @torch.no_grad()
    def step(self, force: bool = False) -> Event | None:
        """One tick of the schedule and what it asks for.

        Before training, `step()` is tick 0; attached to an optimizer, ticks happen by themselves.

        Args:
            force: prune to the whole budget now if the schedule has nothing for this tick.

        Returns:
            The event that happened or None.

        Raises:
            ValueError: finalized, or a part answered with something unusable: no mask has changed.
        """
        self._check_live("step")
        event = None if self._frozen else self.schedule.event(self._step, self._epoch)
        if event is None and force:
            event = Event("prune")
        if event is not None:
            if event.kind == "prune":
                self._prune(event)
            elif event.kind == "regrow":
                self._regrow()
            else:
                self._frozen = True
        self._step += 1
        return event

    def _prune(self, event: Event) -> None:
        budget = None if self.budget is None else self.budget.at(event.fraction, event.initial)
        targets: Sequence[Target] = self.targets
        if event.layer is not None:
            if event.layer >= len(targets):
                raise ValueError(
                    f"Pruner.step: expected a schedule of at most {len(targets)} layers, got "
                    f"layer {event.layer}"
                )
            targets = targets[event.layer : event.layer + 1]
        if getattr(self.selector, "sequential", False):
            for t in targets:
                self._prune_together([t], budget)
        else:
            self._prune_together(targets, budget)
        if event.regrow:
            self._regrow()

    def _prune_together(self, targets: Sequence[Target], budget: Budget | None) -> None:
        stats = self._collect(targets)
        if self.mask_mode == "hard" or self.regrowth is not None:
            # A hard-dead entry has no value left to be judged by: only a regrowth revives it.
            current = {t: self._masks[t].mask.cpu() for t in targets}
        else:
            current = {t: self._base[t] for t in targets}
        keep, masks = plan_masks(
            targets,
            self.granularity,
            budget,
            self.importance,
            self.selector,
            stats,
            current,
        )
        if self.compensator is not None:
            for t in targets:
                self.compensator.apply(t, keep[t], stats)
        self._set_masks(masks)

    def _collect(self, targets: Sequence[Target]) -> Stats:
        """What the parts need: kept from the run, and measured now if anything must be."""
        measured = None
        wanted = frozenset(need for need in self.needs if not need.startswith(PREFIX))
        if wanted:
            assert self.calibration is not None
            with torch.enable_grad():
                measured = self.calibration.collect(self.model, targets, wanted)
        return self.running.over(measured)

    def _regrow(self) -> None:
        if self.regrowth is None:
            raise ValueError(
                "Pruner.step: expected a regrowth for the schedule's regrow event, got None"
            )
        # Regrowth looks at the weights and at the run; a calibration pass is for prune events.
        stats = self.running.over(None)
        masks = {}
        for t in self.targets:
            old = self._masks[t].mask
            new = self.regrowth.regrow(t, old.clone(), stats)
            check_regrown(self.regrowth, t, old, new)
            masks[t] = new.cpu() & self._base[t]
        self._set_masks(masks)

    def _set_masks(self, masks: dict[Target, Tensor]) -> None:
        for t, mask in masks.items():
            self._masks[t].mask.copy_(mask)
        self._hold_zeros()

    def epoch_end(self) -> None:
        """Count an epoch, for schedules that look at it."""
        self._check_live("epoch_end")
        self._epoch += 1

    def masks(self) -> dict[str, Tensor]:
        """Copies of the masks by weight name ("conv1.weight"): bool, shape of W, True = kept."""
        return {t.key: self._masks[t].mask.clone() for t in self.targets}

    def sparsity(self) -> SparsityReport:
        """Zeros of the targets in the forward pass, entries and whole groups."""
        return report_of(self.targets)

    def finalize(self) -> nn.Module:
        """Bake the masks into plain weights, remove parametrizations and hooks; returns the model.

        The Parameters stay the same objects. A second call does nothing.
        """
        if not self._finalized:
            for hook in self._hooks:
                hook.remove()
            with torch.no_grad():
                self._silence_dead_maps()
            for t, mask in self._masks.items():
                masking.detach(t, mask)
            self._finalized = True
        return self.model

    def _check_live(self, what: str) -> None:
        if self._finalized:
            raise ValueError(f"Pruner.{what}: expected a pruner in use, got a finalized one")

    def state_dict(self) -> dict[str, Any]:
        """Counters and masks: tensors and numbers only, loadable with `weights_only=True`.

        Save it next to the state of the model and of the optimizer. An optimizer's state goes by
        the order of `parameters()`, which a mask changes (weight after bias): when resuming, build
        optimizer and pruner in the same order as before.
        """
        return {
            "version": 1,
            "step": self._step,
            "epoch": self._epoch,
            "frozen": self._frozen,
            "seed": getattr(self.importance, "seed", None),
            "masks": self.masks(),
            "base": {t.key: self._base[t].clone() for t in self.targets},
            "running": self.running.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            ValueError: another version, other layers or other shapes; nothing is changed then.
        """
        self._check_live("load_state_dict")
        check_state(self, state)
        self._step, self._epoch = int(state["step"]), int(state["epoch"])
        self._frozen = bool(state["frozen"])
        if isinstance(self.importance, Random):
            self.importance = replace(self.importance, seed=state["seed"])
        self._base = {t: state["base"][t.key].bool().cpu() for t in self.targets}
        self.running.load_state_dict(state.get("running", {}))
        self._set_masks({t: state["masks"][t.key].bool() for t in self.targets})
