"""Where a checkpoint lies: folders, shards, pipelines and Hub ids become one config and a list of headers."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from ..errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    ShardIndexError,
    UnsafeFileError,
    UnsafePathError,
)
from .header import Header, TensorInfo, read_header

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
INDEX_NAME = WEIGHTS_NAME + ".index.json"
CONFIG_NAME = "config.json"
SUBFOLDER = "transformer"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclasses.dataclass(frozen=True)
class Source:
    """One checkpoint on disk: its folder, ``config.json`` and every tensor's place."""

    folder: Path
    config: dict
    headers: tuple[Header, ...]

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor of every shard by key, in file order."""
        return {key: info for header in self.headers for key, info in header.tensors.items()}


def open_source(path: str | os.PathLike[str], *, revision: str | None = None) -> Source:
    """Finds a checkpoint's files and reads its config and headers.

    Args:
        path: a transformer folder, a pipeline folder (its ``transformer`` is taken), a ``.safetensors`` file
            beside its ``config.json``, or a Hub id ``owner/name``.
        revision: Hub branch, tag or commit.

    Raises:
        CheckpointError: nothing there, no config, unreadable or contradictory files.
    """
    folder, single = _locate(path, revision)
    config = read_json(folder / CONFIG_NAME)
    files, weight_map = _weight_files(folder, single)
    headers = tuple(read_header(file) for file in files)
    _check_shards(folder, headers, weight_map)
    return Source(folder, config, headers)


def is_hub_id(path: str) -> bool:
    """Whether a path that is not there may be a Hub id, ``owner/name``."""
    owner, _, name = path.partition("/")
    return bool(owner and name) and not {"/", ":"} & set(owner + name) and not owner.startswith((".", "~"))


def read_json(file: Path, error: type[CheckpointError] = ConfigError) -> dict:
    """A JSON object from a file, or an error of the given class that names it."""
    if not _is_file(file):
        raise error("no such file", file=file)
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as reason:
        raise error("the file is not JSON", file=file, found=str(reason)) from None
    if not isinstance(value, dict):
        raise error("the file is not a JSON object", file=file, found=type(value).__name__)
    return value


def _is_file(path: Path) -> bool:
    """Whether a file is there; a name the file system cannot hold is not."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def _locate(path: str | os.PathLike[str], revision: str | None) -> tuple[Path, Path | None]:
    """The folder that holds the transformer, and the one file if a file was named."""
    local = Path(path)
    if _is_file(local):
        if local.suffix != ".safetensors":
            other = f"give a .safetensors file, or the folder that holds it and {CONFIG_NAME}"
            hint = "" if local.suffix in PICKLE_SUFFIXES else other
            raise UnsafeFileError("not a safetensors file", file=local, hint=hint)
        return local.parent, local
    if not _is_dir(local):
        local = _download(os.fspath(path), revision)
    if (local / SUBFOLDER / CONFIG_NAME).is_file():
        return local / SUBFOLDER, None
    return local, None


def _download(repo: str, revision: str | None) -> Path:
    """A Hub repository's transformer files in the local cache."""
    if not is_hub_id(repo):
        raise CheckpointNotFoundError("no such file or folder, and not a Hub id", file=repo)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    # The Hub's "*" also matches "/", so a bare "*.safetensors" would fetch the whole pipeline.
    nested = [f"{SUBFOLDER}/*.json", f"{SUBFOLDER}/*.safetensors"]
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=nested))
        if _is_file(folder / SUBFOLDER / CONFIG_NAME):
            return folder
        flat = ["*.json", "*.safetensors"]
        return Path(snapshot_download(repo, revision=revision, allow_patterns=flat, ignore_patterns=["*/*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointNotFoundError(
            "not a local path, and the Hub does not give it",
            file=repo,
            found=f"{type(error).__name__}: {error}",
        ) from None


def _weight_files(folder: Path, single: Path | None) -> tuple[list[Path], dict[str, str] | None]:
    if single is not None:
        return [single], None
    index = folder / INDEX_NAME
    if index.is_file():
        return _indexed_files(index)
    if (folder / WEIGHTS_NAME).is_file():
        return [folder / WEIGHTS_NAME], None
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found, None
    if found:
        raise ShardIndexError(
            "several safetensors files and no index",
            file=folder,
            found=[f.name for f in found],
            needed=INDEX_NAME,
        )
    pickles = sorted(f.name for f in folder.iterdir() if f.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise UnsafeFileError("the folder holds pickle files only", file=folder, found=pickles, needed=WEIGHTS_NAME)
    raise CheckpointNotFoundError("the folder holds no safetensors file", file=folder, needed=WEIGHTS_NAME)


def _indexed_files(index: Path) -> tuple[list[Path], dict[str, str]]:
    weight_map = read_json(index, ShardIndexError).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ShardIndexError("weight_map must map keys to file names", file=index, key="weight_map")
    files = []
    for name in dict.fromkeys(weight_map.values()):
        file = index.parent / name
        if Path(name).name != name or name in ("", ".", ".."):
            raise UnsafePathError("a shard's path leaves the folder", file=index, found=name)
        if Path(name).suffix != ".safetensors":
            raise UnsafeFileError("a shard is no safetensors file", file=index, found=name)
        if not _is_file(file):
            raise ShardIndexError("a shard is missing", file=index, found="no such file", needed=name)
        files.append(file)
    return files, weight_map


def _check_shards(folder: Path, headers: tuple[Header, ...], weight_map: dict[str, str] | None) -> None:
    where: dict[str, str] = {}
    for header in headers:
        for key in header.tensors:
            if key in where:
                raise ShardIndexError("a key lies in two shards", file=header.file, key=key, found=where[key])
            where[key] = header.file.name
    if weight_map is None or weight_map == where:
        return
    for key in sorted(weight_map.keys() | where.keys()):
        if weight_map.get(key) != where.get(key):
            raise ShardIndexError(
                "the index and the shards disagree",
                file=folder / INDEX_NAME,
                key=key,
                found=where.get(key, "in no shard"),
                needed=weight_map.get(key, "not in the index"),
            )
