"""Save and load a model: one safetensors file, sparse weights packed, no pickle.

The file holds every parameter and persistent buffer bit for bit, their memory formats, which
parameters are frozen, the training flags and the structure (see ``manifest.py``). It does not hold
non-persistent buffers, hooks, reports, or code: nothing in a file is ever executed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sparsecnn.formats.csr import CSRWeight
from sparsecnn.nn import CSRConv2d, CSRLinear, PatternConv2d, WinogradConv2d
from sparsecnn.nn.layout import input_layouts
from sparsecnn.nn.microbatch import microbatches
from sparsecnn.storage import _layers
from sparsecnn.storage._restore import Contents, build_model, restore_into
from sparsecnn.storage.manifest import Manifest, checksum, describe
from sparsecnn.storage.pack import (
    ARRAY_KINDS,
    ARRAY_NAMES,
    Packed,
    pack_arrays,
    pack_csr,
    pack_dense,
    unpack_arrays,
    unpack_csr,
    unpack_dense,
)

_DTYPES = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool,
}  # fmt: skip
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model to one safetensors file.

    CSR weights, and dense weights with enough zeros, are stored as values and the smaller of a
    bitmask and a relative index (Han, Mao, Dally, ICLR 2016); weights in a pattern or in the
    Winograd domain as their arrays; everything else raw. The file is written beside the target and
    moved over it when complete: a failure leaves an existing target as it was.

    Args:
        model: on any device; not modified. Modules that are neither layers of torch.nn common in
            CNNs nor of this package are recorded by name only.
        path: of the file to write; its folder must exist.

    Raises:
        TypeError: ``model`` is not a module, or ``path`` is not a path.
        ValueError: a tensor or module that cannot be stored, by name.
        OSError: the file cannot be written.

    Cost: two passes over the tensors, and memory for the packed ones.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"save: expected model an nn.Module, got {type(model).__name__}")
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "save: expected path of a file, got a folder", path)
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "save: expected path in an existing folder", path)
    arrays, manifest = _flatten(model)
    with _replacing(target) as temporary:
        try:
            save_file(arrays, temporary, metadata=manifest.encode())
        except SafetensorError as error:  # how the writer reports a full disk
            raise OSError(f"save: could not write {target}: {error}") from error


def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Read a model written by ``save``.

    Args:
        path: of the file.
        model: the architecture, as it was before any conversion or as it is in the file. It is
            changed in place: layers are swapped as the file says, then every parameter and buffer
            takes the value, dtype and memory format of the file; devices and ``requires_grad`` of
            the layers it keeps stay. None: the file alone gives the model, on the CPU, which needs
            all its modules to be of known types (for example ``nn.Sequential`` of layers).

    Returns:
        ``model`` (or the layer that replaced it, when it is itself one layer), or the new model.

    Raises:
        TypeError: ``model`` is not a module.
        OSError: the file cannot be read.
        ValueError: the file is truncated, damaged, foreign or of another version, or does not fit
            the model. Nothing has been changed then.

    What a file can make this allocate is bounded by its size (``pack.MAX_EXPANSION``).
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"load: expected model an nn.Module or None, got {type(model).__name__}")
    name = os.fspath(path)
    with open(name, "rb"):  # missing, a folder, not readable: the usual OSError
        pass
    try:
        contents = _unflatten(*_read(name))
        return build_model(contents) if model is None else restore_into(model, contents)
    except (ValueError, RecursionError) as error:
        text = str(error).removeprefix("load: ")
        raise ValueError(f"load: {os.fsdecode(name)}: {text}") from error


def _flatten(model: nn.Module) -> tuple[dict[str, Tensor], Manifest]:
    """Arrays to store and the manifest about them."""
    arrays: dict[str, Tensor] = {}
    packed: dict[str, dict[str, Any]] = {}
    aliases: dict[str, str] = {}
    channels_last: list[str] = []
    frozen: list[str] = []
    first_key: dict[int, str] = {}
    first_path: dict[int, str] = {}

    def put(key: str, done: Packed | None, raw: Tensor | None) -> None:
        named = {f"{key}#{n}": t for n, t in done.arrays.items()} if done else {}
        named |= {key: raw} if raw is not None else {}
        if clash := set(named) & set(arrays):
            raise ValueError(f"save: expected distinct names of tensors, got {clash} twice")
        arrays.update(named)
        if done:
            packed[key] = done.spec

    records = describe(model)
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        in_packed = _layers.packed_arrays(module)
        is_first = first_path.setdefault(id(module), path) == path
        for name, tensor in _layers.own_tensors(module).items():
            key = prefix + name
            _check_storable(key, tensor)
            if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
                frozen.append(key)
            if name in in_packed and is_first:
                first_key.setdefault(id(tensor), key)
                continue
            original = first_key.setdefault(id(tensor), key)
            if original != key:
                aliases[key] = original
                continue
            plain = tensor.detach().cpu()
            if _is_channels_last(plain):
                channels_last.append(key)
            done = pack_dense(plain)
            put(key, done, None if done else plain.contiguous())
        if in_packed and is_first:
            assert isinstance(module, (CSRConv2d, CSRLinear, PatternConv2d, WinogradConv2d))
            weight = module.weight
            done = pack_csr(weight) if isinstance(weight, CSRWeight) else pack_arrays(weight)
            put(prefix + "weight", done, None)
    arrays = _unshared(arrays)
    manifest = Manifest(
        modules=records,
        packed=packed,
        aliases=aliases,
        channels_last=tuple(channels_last),
        frozen=tuple(frozen),
        layouts=input_layouts(model),
        microbatches=microbatches(model),
        arrays={k: checksum(k, t) for k, t in arrays.items()},
    )
    return arrays, manifest


def _unshared(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of those arrays that view a part of a storage, share one, or have odd strides.

    Files hold none such. A tensor of one element passes for contiguous whatever its stride is.
    """
    seen: set[int] = set()
    out: dict[str, Tensor] = {}
    for key, tensor in arrays.items():
        storage = tensor.untyped_storage()
        whole = storage.nbytes() == tensor.numel() * tensor.element_size()
        plain = tensor.stride() == torch.empty(tensor.shape, device="meta").stride()
        is_own = whole and plain and storage.data_ptr() not in seen
        out[key] = tensor if is_own else tensor.clone(memory_format=torch.contiguous_format)
        seen.add(storage.data_ptr())
    return out


def _check_storable(key: str, tensor: Tensor) -> None:
    reason = ""
    if is_lazy(tensor):
        reason = "a parameter without a shape; run the model once"
    elif type(tensor.detach()) is not Tensor:
        reason = f"a {type(tensor).__name__}"
    elif tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        reason = f"layout {tensor.layout}, quantized {tensor.is_quantized}, device {tensor.device}"
    elif tensor.dtype not in _DTYPES:
        reason = str(tensor.dtype)
    if reason:
        raise ValueError(
            f"save: expected {key} a plain dense tensor of a known dtype, got {reason}"
        )


def _is_channels_last(tensor: Tensor) -> bool:
    """By strides, which also decide the memory format of outputs where sizes of 1 are ambiguous."""
    memory_format = _CHANNELS_LAST.get(tensor.dim())
    if memory_format is None:
        return False
    like = torch.empty(tensor.shape, device="meta")
    last = torch.empty(tensor.shape, device="meta", memory_format=memory_format)
    return tensor.stride() == last.stride() != like.stride()


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A temporary file in the target's folder that replaces it when the block succeeds."""
    temporary = target.with_name(f".{target.name[:64]}.{secrets.token_hex(8)}.tmp")
    # Created here, so that the process' umask applies and nothing existing is overwritten.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    mode = stat.S_IMODE((target if target.exists() else temporary).stat().st_mode)
    try:
        yield temporary
        os.chmod(temporary, mode)  # the writer may put a file with permissions of its own there
        _sync(temporary)
        os.replace(temporary, target)
    except BaseException:  # KeyboardInterrupt too: no debris
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync(target.parent)


def _sync(path: Path) -> None:
    """Flush a file, or a folder's entries where the system allows that."""
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR
    try:
        descriptor = os.open(path, flags)
    except PermissionError:
        if path.is_dir():
            return
        raise
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: str) -> tuple[dict[str, Tensor], Manifest]:
    """Arrays of a file, checked against their checksums, and its manifest."""
    try:
        with safe_open(path, framework="pt") as file:
            manifest = Manifest.decode(file.metadata())
            names = set(file.keys())
            if names != set(manifest.arrays):
                odd = sorted(names ^ set(manifest.arrays))[:3]
                raise ValueError(f"expected the arrays its manifest lists, got others: {odd}")
            # Copies: a tensor must not stay mapped to a file that somebody may overwrite.
            arrays = {name: file.get_tensor(name).clone() for name in names}
    except SafetensorError as error:
        raise ValueError(f"expected a complete safetensors file, got {error}") from error
    for name, tensor in arrays.items():
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"expected a known dtype of {name}, got {tensor.dtype}")
        if checksum(name, tensor) != manifest.arrays[name]:
            raise ValueError(f"expected {name} to match its checksum, got damaged data")
    return arrays, manifest


def _unflatten(arrays: dict[str, Tensor], manifest: Manifest) -> Contents:
    """Unpack the arrays to the state."""
    state: dict[str, Tensor] = {}
    sparse: dict[str, _layers.PackedWeight] = {}
    rest = dict(arrays)
    for key, spec in manifest.packed.items():
        mine = {n: rest.pop(f"{key}#{n}") for n in ARRAY_NAMES if f"{key}#{n}" in rest}
        path, _, name = key.rpartition(".")
        try:
            if spec.get("kind") in ("csr", *ARRAY_KINDS) and name == "weight":
                is_csr = spec["kind"] == "csr"
                weight = unpack_csr(spec, mine) if is_csr else unpack_arrays(spec, mine)
                sparse[path] = weight
                prefix = key.removesuffix("weight")
                for attribute, array in vars(weight).items():
                    if isinstance(array, Tensor):
                        state[prefix + attribute] = array
            else:
                state[key] = unpack_dense(spec, mine)
        except (ValueError, TypeError) as error:
            raise ValueError(f"expected a readable packed tensor {key}, got {error}") from error
    if clash := sorted(set(state) & set(rest)):
        raise ValueError(f"expected every tensor once, got twice: {clash[:3]}")
    state |= rest
    for key, original in manifest.aliases.items():
        if key in state or original not in state or original in manifest.aliases:
            raise ValueError(f"expected {key} tied to a stored tensor, got {original!r:.80}")
        state[key] = state[original]
    for record in manifest.modules:
        if record.same_as in sparse:
            sparse[record.path] = sparse[record.same_as]
    for key in manifest.channels_last:
        if key not in state or state[key].dim() not in _CHANNELS_LAST:
            raise ValueError(f"expected a 4-d or 5-d tensor in channels_last, got {key!r:.80}")
    return Contents(manifest, _relaid(state, manifest), sparse)


def _relaid(state: dict[str, Tensor], manifest: Manifest) -> dict[str, Tensor]:
    """Memory formats restored; tied tensors stay one object."""
    done: dict[int, Tensor] = {}
    for key in manifest.channels_last:
        tensor = state[key]
        if id(tensor) not in done:
            like = torch.empty_like(tensor, memory_format=_CHANNELS_LAST[tensor.dim()])
            done[id(tensor)] = like.copy_(tensor)
    return {key: done.get(id(tensor), tensor) for key, tensor in state.items()}
