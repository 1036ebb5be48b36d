"""The structure manifest of a model file: what stands where, as JSON in the safetensors header.

The metadata of the file is one string under the key ``sparsecnn`` (one, because the order of
several is not fixed and the same model shall give the same bytes): format version, CRC-32 of the
JSON in hexadecimal, and the JSON, with one space between them. The JSON holds

1. ``modules``: every submodule, parents first: ``path``, ``type`` (an allowed type or
   ``custom``), ``training``, and ``args`` (constructor arguments), ``class`` (name of a custom
   type, never constructed) or ``same_as`` (path of the same module object);
2. ``packed``: specification of each packed tensor (see ``pack.py``) by state key; the arrays of
   key ``k`` are called ``k#values``, ``k#mask`` and so on; ``k`` itself is a raw tensor;
3. ``aliases``: keys of tied tensors, each with the key that is stored;
4. ``channels_last``: keys stored row-major whose memory was channels_last; ``frozen``:
   parameters that do not require gradients; ``layouts``: path of a module that converts its
   inputs -> memory format; ``microbatches``: path of a module that takes its batch in parts ->
   images of a part;
5. ``arrays``: CRC-32 of each stored array over its name, dtype, shape and bytes.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsecnn.nn.layout import LAYOUTS
from sparsecnn.storage import _layers

KEY = "sparsecnn"
VERSION = "3"
_MAX_DEPTH = 64


@dataclass(frozen=True)
class ModuleRecord:
    """One submodule.

    Attributes:
        path: dotted name, "" for the root.
        type: an allowed type, or "custom".
        training: its flag.
        args: constructor arguments of an allowed type.
        custom: class name of a custom type, for messages and comparison only.
        same_as: path of the earlier record that is the same module object.
    """

    path: str
    type: str
    training: bool
    args: dict[str, Any] = field(default_factory=dict)
    custom: str = ""
    same_as: str | None = None


@dataclass(frozen=True)
class Manifest:
    """Everything in a file but the arrays; see the module's text."""

    modules: tuple[ModuleRecord, ...]
    packed: dict[str, dict[str, Any]]
    aliases: dict[str, str]
    channels_last: tuple[str, ...]
    frozen: tuple[str, ...]
    layouts: dict[str, str]
    microbatches: dict[str, int]
    arrays: dict[str, int]

    def encode(self) -> dict[str, str]:
        """Metadata of the file."""
        text = json.dumps(
            {
                "modules": [_encode_record(r) for r in self.modules],
                "packed": self.packed,
                "aliases": self.aliases,
                "channels_last": self.channels_last,
                "frozen": self.frozen,
                "layouts": self.layouts,
                "microbatches": self.microbatches,
                "arrays": self.arrays,
            },
            separators=(",", ":"),
        )
        return {KEY: f"{VERSION} {_crc_text(text)} {text}"}

    @classmethod
    def decode(cls, metadata: Mapping[str, str] | None) -> Manifest:
        """Read and check the metadata of a file.

        Raises:
            ValueError: not ours, another version, damaged, or a field of the wrong form.
        """
        if not metadata or KEY not in metadata:
            raise ValueError("expected a file written by sparsecnn.save, got one without its mark")
        version, _, rest = metadata[KEY].partition(" ")
        checksum, _, text = rest.partition(" ")
        if version != VERSION:
            raise ValueError(
                f"expected format version {VERSION}, got {version!r:.40}; "
                "read it with the sparsecnn that wrote it"
            )
        if checksum != _crc_text(text):
            raise ValueError("expected a manifest that matches its checksum, got a damaged one")
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"expected a manifest in JSON, got {text!r:.80}") from error
        names = set(cls.__dataclass_fields__)
        if not isinstance(data, dict) or set(data) != names:
            raise ValueError(f"expected a manifest with {sorted(names)}, got {data!r:.80}")
        modules = _decode_records(data["modules"])
        paths = {r.path for r in modules}
        layouts = _dict_of(data, "layouts", str)
        for path, layout in layouts.items():
            if layout not in LAYOUTS or path not in paths:
                raise ValueError(
                    f"expected layout one of {', '.join(LAYOUTS)} for a module of the file, "
                    f"got {layout!r:.80} for {path!r:.80}"
                )
        microbatches = _dict_of(data, "microbatches", int)
        for path, images in microbatches.items():
            if images < 1 or path not in paths:
                raise ValueError(
                    "expected microbatches of at least one image for a module of the file, "
                    f"got {images!r:.80} for {path!r:.80}"
                )
        return cls(
            modules=modules,
            packed=_dict_of(data, "packed", dict),
            aliases=_dict_of(data, "aliases", str),
            channels_last=_strings(data, "channels_last"),
            frozen=_strings(data, "frozen"),
            layouts=layouts,
            microbatches=microbatches,
            arrays=_dict_of(data, "arrays", int),
        )


def describe(model: nn.Module) -> tuple[ModuleRecord, ...]:
    """Records of all submodules, parents first.

    Raises:
        ValueError: a sparse layer whose arguments do not describe it, or extra state that is not a
            tensor.
    """
    records: list[ModuleRecord] = []
    first_path: dict[int, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ValueError(
                f"save: expected modules whose state is tensors, got extra state of "
                f"{type(module).__name__} at {path or 'the root'}"
            )
        name = _layers.type_name(module)
        args = _layers.arguments_of(module) if name else None
        if name is None or args is None:
            if name in _layers.PACKED_LAYERS:
                raise ValueError(
                    f"save: expected {name} at {path} with its own attributes and forward, "
                    "got a modified one"
                )
            if getattr(type(module), "is_sparsecnn_layer", False):
                raise ValueError(
                    f"save: expected layers that files can hold, got {type(module).__name__} at "
                    f"{path or 'the root'}; sparsecnn.densify turns it into a dense layer"
                )
            name, args = "custom", {}
        records.append(
            ModuleRecord(
                path=path,
                type=name,
                training=module.training,
                args=args,
                custom=type(module).__name__ if name == "custom" else "",
                same_as=first_path.get(id(module)),
            )
        )
        first_path.setdefault(id(module), path)
    return tuple(records)


def checksum(name: str, tensor: Tensor) -> int:
    """CRC-32 over the name, dtype, shape and bytes of a contiguous CPU tensor."""
    head = zlib.crc32(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}".encode())
    data = tensor.reshape(-1).view(torch.uint8).numpy()
    return zlib.crc32(data.data, head) if data.size else head


def _crc_text(text: str) -> str:
    # Whatever text a damaged header holds, also lone surrogates, must give a number.
    return f"{zlib.crc32(text.encode('utf-8', 'surrogatepass')):08x}"


def _encode_record(record: ModuleRecord) -> dict[str, Any]:
    out: dict[str, Any] = {"path": record.path, "type": record.type, "training": record.training}
    if record.same_as is not None:
        return out | {"same_as": record.same_as}
    return out | ({"class": record.custom} if record.type == "custom" else {"args": record.args})


def _decode_records(value: object) -> tuple[ModuleRecord, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"expected modules a list with the root first, got {value!r:.80}")
    records: dict[str, ModuleRecord] = {}
    for item in value:
        record = _decode_record(item)
        path, parent = record.path, record.path.rpartition(".")[0]
        if path.count(".") >= _MAX_DEPTH or path in records or (path == "") != (not records):
            raise ValueError(f"expected modules with new paths, root first, got {path!r:.80}")
        if path:
            if parent not in records or not path.rpartition(".")[2]:
                raise ValueError(f"expected modules with parents first, got {path!r:.80}")
            if records[parent].type in _layers.LAYERS:
                raise ValueError(f"expected no module inside a layer, got {path!r:.80}")
        if record.same_as is not None:
            original = records.get(record.same_as)
            if original is None or original.same_as is not None or original.type != record.type:
                raise ValueError(f"expected same_as an earlier module, got {record.same_as!r:.80}")
            if f"{path}.".startswith(f"{record.same_as}." if record.same_as else ""):
                raise ValueError(f"expected no module inside itself, got {path!r:.80}")
            record = ModuleRecord(
                path, record.type, record.training, original.args, original.custom, record.same_as
            )
        records[path] = record
    return tuple(records.values())


def _decode_record(item: object) -> ModuleRecord:
    if not isinstance(item, dict):
        raise ValueError(f"expected a module record, got {item!r:.80}")
    kind, path, training = item.get("type"), item.get("path"), item.get("training")
    if not isinstance(path, str) or not isinstance(kind, str) or not isinstance(training, bool):
        raise ValueError(f"expected a module with path, type and training, got {item!r:.120}")
    if kind != "custom" and kind not in _layers.ALLOWED:
        raise ValueError(f"expected a layer type sparsecnn knows at {path!r:.80}, got {kind!r:.80}")
    extra = "same_as" if "same_as" in item else "class" if kind == "custom" else "args"
    form = dict if extra == "args" else str
    if set(item) != {"path", "type", "training", extra} or not isinstance(item[extra], form):
        raise ValueError(f"expected {extra} and no more in the record of {path!r:.80}")
    if extra == "args":
        _layers.check_arguments(kind, item["args"])
    return ModuleRecord(
        path=path,
        type=kind,
        training=training,
        args=item["args"] if extra == "args" else {},
        custom=item["class"] if extra == "class" else "",
        same_as=item.get("same_as"),
    )


def _dict_of(data: Mapping[str, Any], name: str, form: type) -> dict[str, Any]:
    value = data[name]
    if not isinstance(value, dict) or any(type(v) is not form for v in value.values()):
        raise ValueError(f"expected {name} an object of {form.__name__}, got {value!r:.80}")
    return value


def _strings(data: Mapping[str, Any], name: str) -> tuple[str, ...]:
    value = data[name]
    if not isinstance(value, list) or any(not isinstance(v, str) for v in value):
        raise ValueError(f"expected {name} a list of strings, got {value!r:.80}")
    return tuple(value)
