"""A checkpoint held in memory, in the form mutations work on: contents first, then the bytes of its files."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
from pathlib import Path
from typing import Any

from ..checkpoint.source import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME
from ..spec import COMPONENT_OF_LEAF

Files = dict[str, bytes]
"""File name -> its bytes."""


@dataclasses.dataclass
class StoredTensor:
    """One tensor: what the header says of it, and its bytes."""

    dtype: str
    shape: list[int]
    data: bytes


@dataclasses.dataclass
class Shard:
    """One safetensors file. ``layout`` is the keys' order in the data section; None is the header's."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, Any]
    layout: list[str] | None = None


@dataclasses.dataclass
class Contents:
    """A checkpoint folder, parsed: every key, and everything ``config.json`` and the index say."""

    config: dict[str, Any]
    shards: dict[str, Shard]
    index: dict[str, Any] | None
    extra: Files = dataclasses.field(default_factory=dict)

    def copy(self) -> Contents:
        return copy.deepcopy(self)

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        return {key: tensor for shard in self.shards.values() for key, tensor in shard.tensors.items()}

    def shard_of(self, key: str) -> Shard:
        return next(shard for shard in self.shards.values() if key in shard.tensors)

    def roles(self) -> dict[str, str]:
        """Key -> component name, ``bias`` of a quantised linear, or ``dense``."""
        keys = list(self.tensors)
        quantised = {key.removesuffix(".weight_scale") for key in keys if key.endswith(".weight_scale")}
        roles = {}
        for key in keys:
            module, _, leaf = key.rpartition(".")
            roles[key] = COMPONENT_OF_LEAF.get(leaf, leaf) if module in quantised else "dense"
        return roles

    def pick(self, rng: random.Random, *roles: str) -> str | None:
        """A random key of one of these roles (all roles if none is given), each role being as likely."""
        by_role: dict[str, list[str]] = {}
        for key, role in self.roles().items():
            if not roles or role in roles:
                by_role.setdefault(role, []).append(key)
        return rng.choice(by_role[rng.choice(sorted(by_role))]) if by_role else None

    def add(self, key: str, tensor: StoredTensor, shard: str | None = None) -> None:
        """Puts a tensor into a shard (the first if none is named) and into the index."""
        name = shard or next(iter(self.shards))
        self.shards[name].tensors[key] = tensor
        if self.index is not None:
            self.index["weight_map"][key] = name

    def remove(self, key: str) -> StoredTensor:
        """Takes a tensor out of its shard and of the index."""
        if self.index is not None:
            self.index["weight_map"].pop(key, None)
        return self.shard_of(key).tensors.pop(key)

    def rename(self, old: str, new: str) -> None:
        """Gives a tensor another key, in its shard and in the index."""
        name = next(name for name, shard in self.shards.items() if old in shard.tensors)
        self.add(new, self.remove(old), name)


def read_contents(folder: Path) -> Contents:
    """Parses a valid checkpoint folder."""
    shards = {}
    for file in sorted(folder.glob("*.safetensors")):
        header, data = split_file(file.read_bytes())
        metadata = header.pop("__metadata__", {})
        tensors = {
            key: StoredTensor(entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])])
            for key, entry in header.items()
        }
        shards[file.name] = Shard(tensors, metadata)
    index = folder / INDEX_NAME
    config = json.loads((folder / CONFIG_NAME).read_text())
    return Contents(config, shards, json.loads(index.read_text()) if index.is_file() else None)


def render(contents: Contents) -> Files:
    """The files of a folder with these contents; offsets follow the data, whatever shapes say."""
    files = {name: _render_shard(shard) for name, shard in contents.shards.items()}
    if contents.index is not None:
        files[INDEX_NAME] = json.dumps(contents.index).encode()
    files[CONFIG_NAME] = json.dumps(contents.config).encode()
    return files | contents.extra


def _render_shard(shard: Shard) -> bytes:
    offsets, position = {}, 0
    order = [*(k for k in shard.layout or () if k in shard.tensors)]
    order += [k for k in shard.tensors if k not in set(order)]
    for key in order:
        offsets[key] = [position, position + len(shard.tensors[key].data)]
        position = offsets[key][1]
    header: dict[str, Any] = {"__metadata__": shard.metadata}
    for key, tensor in shard.tensors.items():
        header[key] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets[key]}
    return join_file(header, b"".join(shard.tensors[key].data for key in order))


def split_file(blob: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data section of a safetensors file."""
    length = int.from_bytes(blob[:8], "little")
    return json.loads(blob[8 : 8 + length]), blob[8 + length :]


def join_file(header: dict[str, Any], data: bytes, *, padding: int = 0) -> bytes:
    """A safetensors file; spaces pad the header to a multiple of 8 and then by ``padding`` more."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8 + padding)
    return len(text).to_bytes(8, "little") + text + data


def weight_files(files: Files) -> list[str]:
    """Names of the safetensors files."""
    return sorted(name for name in files if name.endswith(".safetensors"))


def reshard(contents: Contents, count: int, rng: random.Random) -> None:
    """Spreads the tensors over ``count`` files at random, with an index unless it is one file."""
    tensors = list(contents.tensors.items())
    metadata = next(iter(contents.shards.values())).metadata
    stem = WEIGHTS_NAME.removesuffix(".safetensors")
    names = [f"{stem}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)] if count > 1 else [WEIGHTS_NAME]
    contents.shards = {name: Shard({}, dict(metadata)) for name in names}
    contents.index = {"metadata": {}, "weight_map": {}} if count > 1 else None
    for position, (key, tensor) in enumerate(tensors):
        contents.add(key, tensor, names[position] if position < count else rng.choice(names))
