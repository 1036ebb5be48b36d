"""Files of deep compression: pruned weights of few values, Huffman coded.

One safetensors file. Tensors that do not fit the scheme (biases, norms) are in it raw. A float32
tensor of two or more dimensions with at most 256 different nonzero values is an array of bytes:

1. the codebook: float32, little-endian, `values` of them, by ascending bit pattern;
2. `values` code lengths of the Huffman code of the indices into the codebook;
3. 2^b + 1 code lengths of the Huffman code of the gaps, b = `index_bits`;
4. the stream of indices, `index_bytes` long, one index per nonzero in row-major order;
5. the stream of gaps: of z zeros in front of a nonzero, floor(z / 2^b) fillers (symbol 2^b), each
   of which skips 2^b positions, then z mod 2^b. Trailing zeros emit nothing.

The paper marks fillers by the greatest gap and a weight of 0; a symbol of their own saves these
zeros in the other stream and costs one code length. Zero means the bits of +0.0: what is read is
what was written, bit for bit, and `index_bits` is that of the smallest file.

The metadata is one string under ``sparsecnn.compressed``: version, CRC-32 of the JSON, and the JSON
with the sizes of each coded tensor and one CRC-32 of all arrays.

Han, Mao, Dally, "Deep Compression", ICLR 2016.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparsecnn import _codec
from sparsecnn.storage.huffman import HuffmanCode
from sparsecnn.storage.manifest import checksum
from sparsecnn.storage.save_load import _check_storable, _replacing, _unshared

KEY = "sparsecnn.compressed"
VERSION = "1"
MAX_VALUES = 256
INDEX_BITS = range(1, 9)
_FIELDS = {"shape", "values", "nonzeros", "gaps", "index_bits", "index_bytes"}


def save_compressed(
    model: nn.Module, path: str | os.PathLike[str], index_bits: int | None = None
) -> None:
    """Write a pruned and quantized model; see `codebook.share_weights_` for the latter.

    Args:
        model: on any device; not modified. Weights with codebooks are baked first.
        path: of the file to write; its folder must exist. Replaced when complete only.
        index_bits: b of the gaps, 1 to 8; None takes the best for each tensor.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: bad index_bits, parametrized or swapped layers, a tensor that cannot be stored,
            or no weight that the scheme makes smaller.
        OSError: the file cannot be written.

    Cost: a sort of each weight and a few passes over its nonzeros.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"save_compressed: expected an nn.Module, got {type(model).__name__}")
    if index_bits is not None and (isinstance(index_bits, bool) or index_bits not in INDEX_BITS):
        raise ValueError(f"save_compressed: expected index_bits from 1 to 8, got {index_bits!r}")
    _check_plain(model)
    arrays: dict[str, Tensor] = {}
    specs: dict[str, dict[str, Any]] = {}
    for key, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"save_compressed: expected tensors, got extra state {key}")
        _check_storable(key, tensor)
        plain = tensor.detach().cpu().contiguous()
        coded = _coded(plain, INDEX_BITS if index_bits is None else (index_bits,))
        if coded is not None and coded[1].numel() < plain.numel() * plain.element_size():
            specs[key], arrays[key] = coded
        else:
            arrays[key] = plain
    if not specs:
        raise ValueError(
            f"save_compressed: expected a weight of at most {MAX_VALUES} values, got none; "
            "quantize it with share_weights_ and bake_weights_"
        )
    arrays = _unshared(arrays)
    text = json.dumps({"coded": specs, "crc": _checksum(arrays)}, separators=(",", ":"))
    with _replacing(Path(os.path.realpath(path))) as temporary:
        try:
            save_file(arrays, temporary, metadata={KEY: f"{VERSION} {_crc(text)} {text}"})
        except SafetensorError as error:  # how the writer reports a full disk
            raise OSError(f"save_compressed: could not write {path}: {error}") from error


def load_compressed(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Read a file of `save_compressed` into its architecture.

    Args:
        path: of the file.
        model: its parameters and buffers take the values of the file, in place.

    Returns:
        The model.

    Raises:
        TypeError: ``model`` is not a module.
        OSError: the file cannot be read.
        ValueError: the file is truncated, damaged or foreign, or holds other tensors than the
            model. Nothing has been changed then.

    What a file can make this allocate is bounded by its size and that of the model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"load_compressed: expected an nn.Module, got {type(model).__name__}")
    name = os.fspath(path)
    with open(name, "rb"):  # missing, a folder, not readable: the usual OSError
        pass
    _check_plain(model)
    slots = model.state_dict()
    try:
        arrays, specs = _read(name)
        if set(arrays) != set(slots) or not set(specs) <= set(arrays):
            odd = sorted({*(set(arrays) ^ set(slots)), *(set(specs) - set(arrays))})
            raise ValueError(f"expected the tensors of the model, got a difference at {odd[:5]}")
        state = {}
        for key, slot in slots.items():
            # Against the model first, so that a decoder never makes more than the model holds.
            spec = specs.get(key)
            shape, dtype = tuple(arrays[key].shape), arrays[key].dtype
            if spec is not None:
                shape, dtype = _checked_spec(key, spec, arrays[key]), torch.float32
            if shape != tuple(slot.shape) or dtype != slot.dtype:
                raise ValueError(
                    f"expected {key} {slot.dtype} {tuple(slot.shape)} as in the model, got "
                    f"{dtype} {shape}"
                )
            state[key] = arrays[key] if spec is None else _decoded(spec, arrays[key].numpy())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"load_compressed: {os.fsdecode(name)}: {error}") from error
    model.load_state_dict(state)
    return model


def _check_plain(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            raise ValueError(
                f"compressed file: expected plain weights, got a parametrized {name!r}; call "
                "bake_weights_, or finalize the pruner"
            )
        if getattr(type(module), "is_sparsecnn_layer", False):
            raise ValueError(
                f"compressed file: expected dense layers, got {type(module).__name__} at {name!r}; "
                "sparsecnn.densify turns it into one"
            )


def gap_symbols(positions: NDArray[np.int64], bits: int) -> NDArray[np.int64]:
    """Gaps and fillers (symbol 2^bits) of ascending positions, as the module's text says.

    The packed form of the same rule with a fixed width is `_codec.relative_index_encode`.
    """
    zeros = np.diff(positions, prepend=-1) - 1
    fillers = zeros >> bits
    symbols = np.full(len(positions) + int(fillers.sum()), 2**bits, np.int64)
    symbols[np.cumsum(fillers + 1) - 1] = zeros & (2**bits - 1)
    return symbols


def positions_of(symbols: NDArray[np.int64], bits: int) -> NDArray[np.int64]:
    """Inverse of `gap_symbols`."""
    is_filler = symbols == 2**bits
    after: NDArray[np.int64] = np.cumsum(np.where(is_filler, 2**bits, symbols + 1))
    positions: NDArray[np.int64] = after[~is_filler] - 1
    return positions


def _coded(tensor: Tensor, widths: range | tuple[int, ...]) -> tuple[dict[str, Any], Tensor] | None:
    """Sizes and bytes of a tensor in the scheme, None if it does not fit."""
    if tensor.dtype != torch.float32 or tensor.dim() < 2:
        return None
    if not 0 < tensor.numel() <= _codec.MAX_POSITIONS:
        return None
    words = tensor.reshape(-1).view(torch.int32).numpy()
    positions = np.flatnonzero(words)
    book, indices = np.unique(words[positions], return_inverse=True)
    if len(book) > MAX_VALUES:
        return None
    index_code = HuffmanCode.from_counts(np.bincount(indices, minlength=len(book)))
    index_stream = index_code.encode(indices)
    best: tuple[int, int, HuffmanCode, NDArray[np.int64]] | None = None
    for bits in widths:
        symbols = gap_symbols(positions, bits)
        counts = np.bincount(symbols, minlength=2**bits + 1)
        code = HuffmanCode.from_counts(counts)
        size = -(-code.bits(counts) // 8) + len(counts)
        if best is None or size < best[0]:
            best = size, bits, code, symbols
    assert best is not None
    _, bits, gap_code, symbols = best
    spec = {
        "shape": list(tensor.shape),
        "values": len(book),
        "nonzeros": len(positions),
        "gaps": len(symbols),
        "index_bits": bits,
        "index_bytes": len(index_stream),
    }
    parts = [
        book.astype("<i4").view(np.uint8),
        index_code.lengths,
        gap_code.lengths,
        index_stream,
        gap_code.encode(symbols),
    ]
    return spec, torch.from_numpy(np.concatenate(parts))


def _decoded(spec: Mapping[str, Any], data: NDArray[np.uint8]) -> Tensor:
    """The tensor of checked sizes and bytes.

    Raises:
        ValueError: codes or streams are corrupt.
    """
    values, bits = spec["values"], spec["index_bits"]
    sizes = [4 * values, values, 2**bits + 1, spec["index_bytes"]]
    book, index_lengths, gap_lengths, indices, gaps = np.split(data, np.cumsum(sizes))
    symbols = HuffmanCode(gap_lengths).decode(gaps, spec["gaps"])
    positions = positions_of(symbols, bits)
    words = np.zeros(int(np.prod(spec["shape"])), np.int32)
    if len(positions) != spec["nonzeros"] or (len(positions) and positions[-1] >= words.size):
        raise ValueError(
            f"expected {spec['nonzeros']} nonzeros inside shape {spec['shape']}, got "
            f"{len(positions)} up to position {positions[-1] if len(positions) else -1}"
        )
    found = HuffmanCode(index_lengths).decode(indices, spec["nonzeros"])
    words[positions] = book.view("<i4").astype(np.int32)[found]
    return torch.from_numpy(words).view(torch.float32).reshape(spec["shape"])


def _checked_spec(key: str, spec: object, data: Tensor) -> tuple[int, ...]:
    """The shape that a specification claims, after checking all its sizes."""
    if not isinstance(spec, dict) or set(spec) != _FIELDS:
        raise ValueError(f"expected fields {sorted(_FIELDS)} of {key}, got {spec!r:.120}")
    shape, numbers = spec["shape"], [spec[name] for name in _FIELDS - {"shape"}]
    whole = isinstance(shape, list) and len(shape) <= 8
    if not whole or any(type(n) is not int or n < 0 for n in [*shape, *numbers]):
        raise ValueError(f"expected sizes of {key} integers >= 0, got {spec!r:.160}")
    total = int(np.prod(np.array(shape, dtype=object)))
    bits, values = spec["index_bits"], spec["values"]
    ordered = values <= spec["nonzeros"] <= spec["gaps"] <= total <= _codec.MAX_POSITIONS
    if bits not in INDEX_BITS or values > MAX_VALUES or not ordered:
        raise ValueError(
            f"expected index_bits from 1 to 8 and values <= nonzeros <= gaps <= elements of {key}, "
            f"got {spec!r:.160}"
        )
    least = 5 * values + 2**bits + 1 + spec["index_bytes"]
    if data.dtype != torch.uint8 or data.dim() != 1 or data.numel() < least:
        raise ValueError(
            f"expected at least {least} bytes of {key}, got {data.dtype} {tuple(data.shape)}"
        )
    return tuple(shape)


def _read(path: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Arrays and sizes of a file whose checksums are right."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copies: a tensor must not stay mapped to a file that somebody may overwrite.
            arrays = {name: file.get_tensor(name).clone() for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"expected a complete safetensors file, got {error}") from error
    if KEY not in metadata:
        raise ValueError("expected a file written by save_compressed, got one without its mark")
    version, _, rest = metadata[KEY].partition(" ")
    crc, _, text = rest.partition(" ")
    if version != VERSION:
        raise ValueError(f"expected format version {VERSION}, got {version!r:.40}")
    if crc != _crc(text):
        raise ValueError("expected metadata that match their checksum, got damaged ones")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected metadata in JSON, got {text!r:.80}") from error
    if not isinstance(data, dict) or set(data) != {"coded", "crc"}:
        raise ValueError(f"expected metadata with coded and crc, got {data!r:.80}")
    if not isinstance(data["coded"], dict):
        raise ValueError(f"expected coded tensors by name, got {data['coded']!r:.80}")
    if data["crc"] != _checksum(arrays):
        raise ValueError("expected arrays that match their checksum, got damaged data")
    return arrays, data["coded"]


def _checksum(arrays: Mapping[str, Tensor]) -> int:
    """One CRC-32 of all arrays: small files cannot afford one each."""
    text = " ".join(str(checksum(name, arrays[name])) for name in sorted(arrays))
    return zlib.crc32(text.encode())


def _crc(text: str) -> str:
    return f"{zlib.crc32(text.encode('utf-8', 'surrogatepass')):08x}"
