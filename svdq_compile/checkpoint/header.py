"""Safetensors headers: which tensors a file holds and where, without reading any of them.

Format: 8 bytes little-endian header length, that many bytes of JSON, then the tensors' bytes back to back
(https://huggingface.co/docs/safetensors). Everything the JSON says is checked against the file before it is used.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

from ..errors import HeaderError, TruncatedFileError

ITEM_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}
"""Bits per element of every byte-sized dtype the format knows."""

MAX_HEADER_BYTES = 100_000_000
"""The safetensors library's own limit."""

MAX_SIZE = 2**63
"""No dimension or offset reaches it; larger numbers would only cost time."""

MAX_DIMS = 64
"""Torch's own limit."""


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One tensor of one file: dtype in safetensors spelling, shape, and its bytes within the data section."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclasses.dataclass(frozen=True)
class Header:
    """The checked header of one file."""

    file: Path
    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]


def read_header(file: Path) -> Header:
    """Reads and checks one file's header; the tensors' bytes stay on disk.

    Raises:
        TruncatedFileError: the file ends early.
        HeaderError: the header is no JSON, lies about sizes, or leaves bytes unaccounted for.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise TruncatedFileError("the file is shorter than a header", file=file, found=f"{size} bytes")
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES:
            raise HeaderError(
                "the header length is implausible", file=file, found=length, needed=f"<= {MAX_HEADER_BYTES}"
            )
        raw = stream.read(length)
    if len(raw) < length:
        raise TruncatedFileError("the file ends inside its header", file=file, found=size, needed=8 + length)
    entries = _parse(raw, file)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise HeaderError("__metadata__ must map strings to strings", file=file, key="__metadata__")
    tensors = {key: _tensor_info(file, key, entry) for key, entry in entries.items()}
    _check_coverage(file, tensors, size - 8 - length)
    return Header(file, metadata, tensors)


def _parse(raw: bytes, file: Path) -> dict:
    def unique(pairs: list) -> dict:
        seen = dict(pairs)
        if len(seen) != len(pairs):
            keys = [k for k, _ in pairs]
            twice = next(k for k in keys if keys.count(k) > 1)
            raise HeaderError("a key appears twice", file=file, key=twice)
        return seen

    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except HeaderError:
        raise
    except (ValueError, RecursionError) as error:
        raise HeaderError("the header is not JSON", file=file, found=str(error)) from None
    if not isinstance(entries, dict):
        raise HeaderError("the header is not a JSON object", file=file, found=type(entries).__name__)
    return entries


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_SIZE


def _tensor_info(file: Path, key: str, entry: object) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise HeaderError("an entry needs exactly dtype, shape and data_offsets", file=file, key=key, found=entry)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        raise HeaderError("unknown dtype", file=file, key=key, found=dtype, needed=", ".join(ITEM_BITS))
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(map(_is_size, shape)):
        raise HeaderError("shape must be a list of sizes", file=file, key=key, found=shape)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)) or offsets[1] < offsets[0]:
        raise HeaderError("data_offsets must be [start, end]", file=file, key=key, found=offsets)
    needed = math.prod(shape) * ITEM_BITS[dtype] // 8
    if offsets[1] - offsets[0] != needed:
        raise HeaderError(
            "data_offsets do not fit shape and dtype",
            file=file,
            key=key,
            found=f"{offsets[1] - offsets[0]} bytes",
            needed=f"{needed} bytes for {dtype} {shape}",
        )
    return TensorInfo(file, dtype, tuple(shape), offsets[0], offsets[1])


def _check_coverage(file: Path, tensors: dict[str, TensorInfo], available: int) -> None:
    """Tensors must lie back to back and end where the file ends."""
    position = 0
    for key, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != position:
            what = "tensors overlap" if info.start < position else "bytes between tensors belong to none"
            raise HeaderError(what, file=file, key=key, found=info.start, needed=position)
        position = info.end
    if position > available:
        raise TruncatedFileError(
            "the file ends before its last tensor",
            file=file,
            found=f"{available} data bytes",
            needed=f"{position}",
        )
    if position < available:
        raise HeaderError(
            "bytes after the last tensor", file=file, found=f"{available} data bytes", needed=f"{position}"
        )
