"""From a read file to a module: everything is checked and built first, then applied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sparsecnn.nn import apply_layout_
from sparsecnn.nn._common import inherit
from sparsecnn.nn.layout import convert_input_, input_layouts
from sparsecnn.nn.microbatch import has_own_forward, microbatch_, microbatches
from sparsecnn.storage import _layers
from sparsecnn.storage.manifest import Manifest, ModuleRecord

_SHOWN = 8  # names per error message


@dataclass(frozen=True)
class Contents:
    """A read and unpacked file.

    Attributes:
        manifest: its structure.
        state: tensor of every state key, tied ones the same object; of a packed weight its arrays.
        sparse: packed weight of each layer that has one, by path.
    """

    manifest: Manifest
    state: dict[str, Tensor]
    sparse: dict[str, _layers.PackedWeight]


@dataclass
class _Plan:
    """New modules by path of the model, and the paths at or below which the model's own go."""

    swaps: dict[str, nn.Module] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def build_model(contents: Contents) -> nn.Module:
    """The model of a file of allowed types only.

    Raises:
        ValueError: custom modules, or structure and tensors do not fit.
    """
    custom = [r for r in contents.manifest.modules if r.type == "custom"]
    if custom:
        names = _listed(f"{r.custom} at {r.path or 'the root'}" for r in custom)
        raise ValueError(
            f"load: expected model, because the file holds modules of your own: {names}; "
            "pass model=<the architecture>"
        )
    root = _build_tree(contents, "")
    slots = _slots(root)
    _check_keys(set(contents.state), set(slots))
    _check_shapes(slots, contents)
    _apply_layouts(root, contents.manifest.layouts)
    _apply_microbatches(root, contents.manifest.microbatches)
    _install(slots, {key: contents.state[key] for key in slots}, contents)
    _settle(root)
    return root


def restore_into(model: nn.Module, contents: Contents) -> nn.Module:
    """Load a file into an architecture, swapping layers as the file says.

    Returns:
        ``model``, or the layer that takes its place when the root itself is swapped.

    Raises:
        ValueError: model and file do not fit; the model is then unchanged.
    """
    for key, (module, name) in _slots(model).items():
        if _layers.own_tensors(module)[name].is_meta:
            raise ValueError(f"load: expected model with tensors, got {key} on the meta device")
    plan = _plan_swaps(model, contents)
    if plan.problems:
        raise ValueError(
            f"load: expected model with the structure of the file, got {_listed(plan.problems)}"
        )
    own = dict(model.named_modules(remove_duplicate=False))
    for path in contents.manifest.microbatches:
        if path not in plan.swaps and path in own and has_own_forward(own[path]):
            raise ValueError(
                f"load: expected model without a forward of its own instance at {path!r}, where "
                "the file takes the batch in parts"
            )
    kept = {k: v for k, v in _slots(model).items() if not _is_below(k, plan.swaps)}
    fresh = {path: _slots(new, path) for path, new in plan.swaps.items()}
    slots = {key: slot for found in (kept, *fresh.values()) for key, slot in found.items()}
    _check_keys(set(contents.state), set(slots))
    _check_shapes(slots, contents)
    old_tensors, old_users = _place_kept(kept, contents)
    new_tensors: dict[str, Tensor] = {}
    moved: dict[tuple[int, torch.device], Tensor] = {}
    for path, found in fresh.items():
        device = _device_of(own[path], model)
        for key in found:
            tensor = contents.state[key]
            if (id(tensor), device) not in moved:
                taken = id(tensor) in old_users  # tied in the file only
                moved[id(tensor), device] = (tensor.clone() if taken else tensor).to(device)
            new_tensors[key] = moved[id(tensor), device]

    # Nothing below raises: the model changes now.
    for path, new in plan.swaps.items():
        inherit(new, own[path])
        parent, _, name = path.rpartition(".")
        if path:
            own[parent]._modules[name] = new
    root = plan.swaps.get("", model)
    _apply_layouts(root, contents.manifest.layouts)
    _apply_microbatches(root, contents.manifest.microbatches)
    # After the layout, which rearranges weights: the file's own memory formats win.
    for key, tensor in old_tensors.items():
        _assign(*kept[key], tensor)
    _install(slots, new_tensors, contents)
    modules = dict(root.named_modules(remove_duplicate=False))
    for record in contents.manifest.modules:
        if record.path in modules:  # not so inside an activation that stays of a folded norm
            modules[record.path].training = record.training
    _settle(root)
    return root


def _settle(root: nn.Module) -> None:
    """Bring weights that a layer keeps in an order of its own into that order."""
    for module in root.modules():
        if getattr(module, "keeps_memory_format", False):
            module._apply(lambda t: t)


def _apply_layouts(root: nn.Module, layouts: Mapping[str, str]) -> None:
    """Input conversions as in the file, and no others."""
    before = input_layouts(root)
    for path in before:
        if path and path not in layouts:
            convert_input_(root.get_submodule(path), None)
    layout = layouts.get("", "contiguous" if "" in before else None)
    if layout is not None:
        apply_layout_(root, layout)
    modules = dict(root.named_modules(remove_duplicate=False))
    for path, inner in layouts.items():
        if path in modules and path:  # else inside an activation that stays of a folded norm
            convert_input_(modules[path], inner)


def _apply_microbatches(root: nn.Module, parts: Mapping[str, int]) -> None:
    """Batches in parts as in the file, and no others."""
    for path in microbatches(root):
        microbatch_(root.get_submodule(path), None)
    modules = dict(root.named_modules(remove_duplicate=False))
    for path, images in parts.items():
        if path in modules:
            microbatch_(modules[path], images)


def _plan_swaps(model: nn.Module, contents: Contents) -> _Plan:
    """Compare file and model module by module."""
    plan = _Plan()
    own = dict(model.named_modules(remove_duplicate=False))
    file_names = _own_names(contents)
    by_file: dict[str, nn.Module] = {}
    for record in contents.manifest.modules:
        path = record.path
        if _is_below(path, plan.swaps):
            continue
        if path not in own:
            if not _is_below(path.rpartition(".")[0], plan.swaps):
                plan.problems.append(f"no module at {path}, where the file has {_title(record)}")
            continue
        if record.same_as in by_file:
            plan.swaps[path] = by_file[record.same_as]
            continue
        try:
            new = _decide(record, own[path], file_names.get(path, set()), contents)
        except ValueError as error:
            plan.problems.append(f"at {path or 'the root'}: {error}")
            continue
        if new is not None:
            plan.swaps[path] = by_file[path] = new
    known = {r.path for r in contents.manifest.modules}
    for path, module in own.items():
        if path not in known and not _is_below(path, plan.swaps):
            plan.problems.append(f"{type(module).__name__} at {path}, which the file lacks")
    return plan


def _decide(
    record: ModuleRecord, old: nn.Module, names: set[str], contents: Contents
) -> nn.Module | None:
    """The module to put in place of ``old``, None to keep it.

    Raises:
        ValueError: the file's module must not stand where ``old`` stands.
    """
    if record.type == "custom":
        act = getattr(old, "act", None)
        folded = isinstance(old, nn.modules.batchnorm._BatchNorm) and isinstance(act, nn.Module)
        # A batch norm with an activation of its own inside leaves that activation when folded.
        if folded and type(old).__name__ != record.custom == type(act).__name__:
            return act
        return None
    same_type = _layers.type_name(old) == record.type
    if same_type and record.type not in _layers.PACKED_LAYERS:
        difference = _layers.argument_difference(record.args, old)
        same_names = set(_layers.own_tensors(old)) == names
        refactorized = record.type in _layers.FACTORIZED and difference is not None
        if record.type in _layers.CONTAINERS and not refactorized:
            return None
        if difference is None and same_names:
            return None
        if not isinstance(old, (nn.Conv2d, nn.Linear)) and not refactorized:
            raise ValueError(difference or f"the file has tensors {sorted(names)}")
    has_chains = any(r.type == "ChainConv2d" for r in contents.manifest.modules)
    obstacle = _layers.replacement_obstacle(record.type, record.args, bool(names), old, has_chains)
    if obstacle is not None:
        raise ValueError(obstacle)
    new = _build_tree(contents, record.path)
    if record.type in _layers.FACTORIZED and (obstacle := _layers.ends_obstacle(new, old)):
        raise ValueError(obstacle)
    return new


def _build_tree(contents: Contents, top: str) -> nn.Module:
    """Build the modules of the file at and below a path; tensors are on the meta device."""
    built: dict[str, nn.Module] = {}
    prefix = f"{top}." if top else ""
    for record in contents.manifest.modules:
        path = record.path
        if path != top and not path.startswith(prefix):
            continue
        parent = path.rpartition(".")[0]
        if record.same_as is not None and record.same_as in built:
            module = built[record.same_as]
        else:
            module = _layers.build(record.type, record.args, contents.sparse.get(path))
        module.training = record.training
        if path != top:
            try:
                if built[parent]._modules.get(path.rpartition(".")[2]) is not module:
                    built[parent].add_module(path.rpartition(".")[2], module)
            except (KeyError, TypeError) as error:
                raise ValueError(f"load: expected a legal module name, got {path!r:.80}") from error
        built[path] = module
    # Modules shared without listing their children could span more paths than any file lists.
    for path, _ in built[top].named_modules(prefix=top, remove_duplicate=False):
        if path not in built:
            raise ValueError(f"load: expected every module listed, got {path!r:.80} unlisted")
    return built[top]


def _install(
    slots: Mapping[str, tuple[nn.Module, str]], tensors: Mapping[str, Tensor], contents: Contents
) -> None:
    """Give freshly built layers their tensors; tied ones become one Parameter."""
    frozen = set(contents.manifest.frozen)
    parameters: dict[int, nn.Parameter] = {}
    for key, tensor in tensors.items():
        module, name = slots[key]
        if name not in module._parameters:
            module._buffers[name] = tensor
            continue
        if id(tensor) not in parameters:
            learns = tensor.is_floating_point() and key not in frozen
            parameters[id(tensor)] = nn.Parameter(tensor, requires_grad=learns)
        module._parameters[name] = parameters[id(tensor)]


def _place_kept(
    slots: Mapping[str, tuple[nn.Module, str]], contents: Contents
) -> tuple[dict[str, Tensor], dict[int, int]]:
    """Tensors for the model's own parameters and buffers, on their devices.

    Returns:
        Tensor by key, and which of the model's tensors took which of the file's (by id).
    """
    ready: dict[str, Tensor] = {}
    owner: dict[int, tuple[str, int]] = {}  # the model's tensor -> key and tensor of the file
    users: dict[int, int] = {}  # tensor of the file -> the model's tensor that took it
    for key, (module, name) in slots.items():
        old, new = _layers.own_tensors(module)[name], contents.state[key]
        first, taken = owner.setdefault(id(old), (key, id(new)))
        if taken != id(new):
            raise ValueError(
                f"load: expected {key} and {first} tied as in the model, got two different tensors"
            )
        tensor = new.to(old.device)
        if users.setdefault(id(new), id(old)) != id(old):
            tensor = tensor.clone()  # tied in the file only
        ready[key] = tensor
    return ready, users


def _assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    parameter = module._parameters.get(name)
    if parameter is None:
        module._buffers[name] = tensor
        return
    if parameter.dtype != tensor.dtype:
        parameter.grad = None  # its dtype would not fit
    parameter.data = tensor  # keeps the Parameter: optimizers and ties know it


def _check_keys(have: set[str], want: set[str]) -> None:
    problems = []
    if missing := sorted(want - have):
        problems.append(f"missing in the file: {_listed(missing)}")
    if unexpected := sorted(have - want):
        problems.append(f"unexpected in the file: {_listed(unexpected)}")
    if problems:
        raise ValueError(
            "load: expected the tensors of the model, got a file with others; "
            + "; ".join(problems)
        )


def _check_shapes(slots: Mapping[str, tuple[nn.Module, str]], contents: Contents) -> None:
    problems = []
    for key, (module, name) in slots.items():
        old, new = _layers.own_tensors(module)[name], contents.state[key]
        if name in _layers.packed_arrays(module):
            continue  # validated with the weight
        if old.shape != new.shape:
            problems.append(f"{key} {tuple(new.shape)} for {tuple(old.shape)}")
        elif old.is_floating_point() != new.is_floating_point():
            problems.append(f"{key} of {new.dtype} for {old.dtype}")
        elif wrong := _layers.value_obstacle(module, name, new):
            raise ValueError(f"load: expected {key} {wrong}")
    if problems:
        raise ValueError(
            f"load: expected tensors of the model's shapes, the file has {_listed(problems)}"
        )


def _slots(root: nn.Module, path: str = "") -> dict[str, tuple[nn.Module, str]]:
    """Module and attribute of every parameter and persistent buffer, by state key."""
    found: dict[str, tuple[nn.Module, str]] = {}
    for name, module in root.named_modules(prefix=path, remove_duplicate=False):
        for attribute in _layers.own_tensors(module):
            found[f"{name}.{attribute}" if name else attribute] = (module, attribute)
    return found


def _own_names(contents: Contents) -> dict[str, set[str]]:
    names: dict[str, set[str]] = {}
    for key in contents.state:
        path, _, name = key.rpartition(".")
        names.setdefault(path, set()).add(name)
    return names


def _is_below(path: str, tops: Mapping[str, object]) -> bool:
    """Whether a module path or state key lies strictly below one of the paths."""
    while path:
        path = path.rpartition(".")[0]
        if path in tops:
            return True
    return False


def _device_of(old: nn.Module, model: nn.Module) -> torch.device:
    for module in (old, model):
        for tensor in (*module.parameters(), *module.buffers()):
            return tensor.device
    return torch.device("cpu")


def _title(record: ModuleRecord) -> str:
    return record.custom if record.type == "custom" else record.type


def _listed(items: Iterable[str]) -> str:
    every = list(items)
    more = f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return ", ".join(every[:_SHOWN]) + more
