"""From a MODEL argument of the command line to a network or the tensors of a checkpoint."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsecnn.storage import load
from sparsecnn.storage.manifest import KEY

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
# Keys under which training scripts put the state dict beside optimizer and epoch.
CONTAINERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "weights")
HELP = (
    "checkpoint file (.pt .pth .bin .ckpt with a plain state dict, .safetensors), "
    "torchvision:NAME, timm:NAME (both with random weights), or module.path:factory, called "
    "without arguments"
)


class CliError(Exception):
    """Bad input of the user: reported in one line with exit status 2."""


@dataclass(frozen=True)
class Source:
    """What a MODEL argument held.

    Attributes:
        name: to show.
        model: the network in evaluation mode; None for a checkpoint without an architecture.
        tensors: the checkpoint's tensors by key, masks applied; empty where a model was built.
    """

    name: str
    model: nn.Module | None
    tensors: dict[str, Tensor]


def open_source(spec: str, arch: str | None = None) -> Source:
    """Resolve a MODEL argument.

    Args:
        spec: see `HELP`.
        arch: architecture for a checkpoint: torchvision:NAME, timm:NAME or module.path:factory.

    Raises:
        CliError: anything that cannot be found, read or fitted together.
    """
    is_file = os.path.exists(spec) or spec.endswith(SUFFIXES) or ":" not in spec
    if not is_file:
        if arch is not None:
            raise CliError(f"expected --arch only with a checkpoint file, got MODEL {spec!r}")
        return Source(spec, build(spec), {})
    path = Path(spec)
    if not path.exists():
        hint = "" if spec.endswith(SUFFIXES) else "; other models are written as " + _FORMS
        raise CliError(f"expected MODEL to be an existing file, got {spec!r}{hint}")
    if path.is_dir():
        raise CliError(f"expected MODEL to be a file, got the folder {spec!r}")
    if path.stat().st_size == 0:
        raise CliError(f"expected {spec} to hold a checkpoint, got an empty file")
    model = None if arch is None else build(arch)
    if path.suffix == ".safetensors" and _is_ours(path):
        try:
            return Source(path.name, load(path, model).eval(), {})
        except ValueError as error:
            more = "" if arch else " (for an architecture of your own: --arch module.path:factory)"
            raise CliError(f"{error}{more}") from error
    tensors = _bake_masks(_read(path))
    if model is None:
        return Source(path.name, None, tensors)
    _fill(model, tensors, str(arch), path)
    return Source(path.name, model, {})


def open_model(spec: str, arch: str | None = None) -> tuple[str, nn.Module]:
    """`open_source` for commands that must run the network.

    Raises:
        CliError: in addition, a checkpoint without an architecture.
    """
    source = open_source(spec, arch)
    if source.model is None:
        raise CliError(
            f"expected --arch for {spec}, which holds weights but no architecture; e.g. "
            "--arch torchvision:resnet50"
        )
    return source.name, source.model


_FORMS = "torchvision:NAME, timm:NAME or module.path:factory"


def build(spec: str) -> nn.Module:
    """The network of an architecture argument, in evaluation mode.

    Raises:
        CliError: unknown form, library, name or factory.
    """
    library, _, name = spec.partition(":")
    if not library or not name:
        raise CliError(f"expected an architecture as {_FORMS}, got {spec!r}")
    if library == "torchvision":
        return _with_residuals(_torchvision(name))
    if library == "timm":
        return _with_residuals(_timm(name))
    return _factory(library, name)


def _with_residuals(model: nn.Module) -> nn.Module:
    """Scales of batch norms that training would start from zero, set to one.

    They switch whole residual branches off: folded into the convolution before them they would
    make it all zeros, and every figure about such a network far too good.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine and not module.weight.any():
            nn.init.ones_(module.weight)
    return model


def _torchvision(name: str) -> nn.Module:
    try:
        from torchvision import models
    except (ImportError, RuntimeError) as error:
        raise CliError(_missing("torchvision", error)) from error
    known: list[str] = models.list_models()
    if name not in known:
        raise CliError(_unknown("torchvision", name, known))
    # These two warn about their initial weights and have extra outputs in training mode only.
    extra = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    model: nn.Module = models.get_model(name, weights=None, **extra)
    return model.eval()


def _timm(name: str) -> nn.Module:
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        raise CliError(_missing("timm", error)) from error
    known: list[str] = timm.list_models()
    if name.split(".")[0] not in known:
        raise CliError(_unknown("timm", name, known))
    model: nn.Module = timm.create_model(name, pretrained=False)
    return model.eval()


def _factory(module_name: str, name: str) -> nn.Module:
    model = call_factory(module_name, name, f"models are written as {_FORMS}")
    if not isinstance(model, nn.Module):
        raise CliError(
            f"expected {module_name}:{name}() to return a torch.nn.Module, got "
            f"{type(model).__name__}"
        )
    return model.eval()


def call_factory(module_name: str, name: str, hint: str) -> Any:
    """What a function of an importable module returns; a network as it is.

    Args:
        module_name: dotted.
        name: of the function in it, dotted too.
        hint: end of the message about an unknown module.

    Raises:
        CliError: no such module or function, or it fails.
    """
    # The installed command does not look in the current folder, where `python -m` does.
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and module_name.split(".")[0] == error.name.split(".")[0]:
            raise CliError(
                f"expected a module {module_name!r}, got none of that name; {hint}"
            ) from error
        raise CliError(f"importing {module_name!r} failed: {error}") from error
    except Exception as error:
        raise CliError(f"importing {module_name!r} failed: {_short(error)}") from error
    factory: Any = module
    for part in name.split("."):
        if not hasattr(factory, part):
            raise CliError(f"expected {module_name!r} to have {name!r}, got no such attribute")
        factory = getattr(factory, part)
    if isinstance(factory, nn.Module):
        return factory
    if not callable(factory):
        raise CliError(f"expected {module_name}:{name} to be callable, got {factory!r:.60}")
    try:
        return factory()
    except Exception as error:
        raise CliError(f"calling {module_name}:{name} failed: {_short(error)}") from error


def _read(path: Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint file; nothing in it is executed."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise CliError(f"expected a complete safetensors file {path}, got {error}") from error
    with path.open("rb"):  # not readable: the usual OSError
        pass
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # One of a dozen types, by what is wrong with the file; even OSError where it is cut.
        reason = _short(error)
        if any(
            mark in str(error) for mark in ("GLOBAL", "Unsupported class", "Unsupported global")
        ):
            reason = "it holds objects other than tensors; reading those would run code of the file"
        raise CliError(
            f"expected {path} to be a checkpoint that torch.save wrote from a state dict, got a "
            f"damaged or foreign file: {reason}"
        ) from error
    state = found
    for key in CONTAINERS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            state = found[key]
            break
    tensors = (
        {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
        if isinstance(state, Mapping)
        else {}
    )
    if not tensors:
        raise CliError(f"expected {path} to hold a state dict, got {type(found).__name__}")
    if all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    return tensors


def _is_ours(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return KEY in (file.metadata() or {})
    except SafetensorError as error:
        raise CliError(f"expected a complete safetensors file {path}, got {error}") from error


def _bake_masks(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Apply masks that were saved beside the weights, of torch.nn.utils.prune and of `Pruner`."""
    done: dict[str, Tensor] = {}
    used: set[str] = set()
    for key, tensor in tensors.items():
        name, mask = key, ""
        if key.endswith("_orig"):
            name = key.removesuffix("_orig")
            mask = f"{name}_mask"
        elif key.endswith(".original") and "parametrizations." in key:
            mask = f"{key.removesuffix('original')}0.mask"
            prefix, _, rest = key.rpartition("parametrizations.")
            name = prefix + rest.removesuffix(".original")
        if mask in tensors:
            used.add(mask)
            done[name] = torch.where(tensors[mask].bool(), tensor, torch.zeros_like(tensor))
        else:
            done[key] = tensor
    return {key: tensor for key, tensor in done.items() if key not in used}


def _fill(model: nn.Module, tensors: dict[str, Tensor], arch: str, path: Path) -> None:
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        raise CliError(
            f"expected the tensors of {path} to fit {arch}, got {' '.join(lines)[:200]}"
        ) from error


def _missing(library: str, error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name == library:
        return f"expected {library} to be installed, got none; pip install 'sparsecnn[models]'"
    # Typical: a torchvision built for another torch, whose operators do not load.
    return (
        f"importing {library} failed: {_short(error)}; install the torchvision that belongs to "
        f"torch {torch.__version__}"
    )


def _unknown(library: str, name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=3)
    hint = f"; did you mean {', '.join(close)}?" if close else ""
    return f"expected a model of {library}, got {name!r}{hint}"


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__


def first_pass(model: nn.Module, run: Callable[[], object], shape: str) -> None:
    """Run the network once, so that an input it does not take is an error of the user.

    Args:
        model: for the message.
        run: the call.
        shape: of the input, for the message.

    Raises:
        CliError: it raised.
    """
    try:
        with torch.inference_mode():
            run()
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        raise CliError(
            f"expected --input that {type(model).__name__} accepts, got {shape}: {_short(error)}"
        ) from error
