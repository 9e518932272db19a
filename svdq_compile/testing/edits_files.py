"""Edits of the folder: shards, the index, files that are missing or of another kind."""

from __future__ import annotations

import random

from ..checkpoint.source import INDEX_NAME
from ..errors import CheckpointNotFoundError, ConfigError, ShardIndexError, UnsafeFileError, UnsafePathError
from .memory_checkpoints import Contents, Files, weight_files
from .mutations import Outcome, Stage, edit, fails


@edit(Stage.CONTENTS, group="index")
def key_in_other_shard(contents: Contents, rng: random.Random) -> Outcome | None:
    """A tensor moved without telling the index, or copied."""
    if contents.index is None or len(contents.shards) < 2:
        return None
    source, target = rng.sample(list(contents.shards.values()), 2)
    key = rng.choice(list(source.tensors))
    target.tensors[key] = source.tensors[key]
    if rng.random() < 0.5:
        del source.tensors[key]
    return fails(ShardIndexError)


@edit(Stage.INDEX, group="index")
def index_lies(contents: Contents, rng: random.Random) -> Outcome | None:
    if contents.index is None or len(contents.shards) < 2:
        return None
    weight_map = contents.index["weight_map"]
    key = rng.choice(list(weight_map))
    other = rng.choice([name for name in contents.shards if name != weight_map[key]])
    change = rng.choice(["drop", "extra", "wrong"])
    if change == "drop":
        del weight_map[key]
    else:
        weight_map[key + ("_x" if change == "extra" else "")] = other
    return fails(ShardIndexError)


@edit(Stage.INDEX, group="index")
def weight_map_malformed(contents: Contents, rng: random.Random) -> Outcome | None:
    if contents.index is None:
        return None
    value = rng.choice([None, [], "x", {"a": 1}, {"a": ["b"]}, {"a": None}, {}])
    contents.index["weight_map"] = value
    if value is None and rng.random() < 0.5:
        del contents.index["weight_map"]
    return fails(ShardIndexError)


@edit(Stage.FILES, group="files")
def shard_missing(files: Files, rng: random.Random) -> Outcome | None:
    if INDEX_NAME not in files:
        return None
    del files[rng.choice(weight_files(files))]
    return fails(ShardIndexError)


@edit(Stage.INDEX, group="index")
def shard_path_leaves(contents: Contents, rng: random.Random) -> Outcome | None:
    if contents.index is None:
        return None
    name = rng.choice(list(contents.shards))
    path = rng.choice(
        ["../" + name, "/" + name, "sub/" + name, "./" + name, "..", ".", "", "a/../" + name, "/etc/passwd"]
    )
    weight_map = contents.index["weight_map"]
    for key in [key for key in weight_map if weight_map[key] == name]:
        weight_map[key] = path
    return fails(UnsafePathError)


@edit(Stage.INDEX, group="index")
def shard_name_odd(contents: Contents, rng: random.Random) -> Outcome | None:
    """Names no file can have, or nobody wrote."""
    if contents.index is None:
        return None
    odd = rng.choice(["x" * 5000, "a\0b", "\ud800", "nothing", "\u2603 ?*"]) + ".safetensors"
    contents.index["weight_map"][contents.pick(rng)] = odd
    return fails(ShardIndexError)


@edit(Stage.FILES, group="files")
def shard_is_pickle(files: Files, rng: random.Random) -> Outcome | None:
    if INDEX_NAME not in files:
        return None
    name = rng.choice(weight_files(files))
    pickle = name.replace(".safetensors", rng.choice([".bin", ".pt", ".pth"]))
    files[pickle] = files.pop(name)
    files[INDEX_NAME] = files[INDEX_NAME].replace(f'"{name}"'.encode(), f'"{pickle}"'.encode())
    return fails(UnsafeFileError)


@edit(Stage.FILES, group="files")
def pickle_only(files: Files, rng: random.Random) -> Outcome:
    for name in weight_files(files):
        files[name.replace(".safetensors", rng.choice([".bin", ".pt", ".ckpt"]))] = files.pop(name)
    files.pop(INDEX_NAME, None)
    return fails(UnsafeFileError)


@edit(Stage.FILES, group="files")
def weights_missing(files: Files, rng: random.Random) -> Outcome:
    for name in (*weight_files(files), INDEX_NAME, "modelopt_state.pth", "pytorch_model.bin"):
        files.pop(name, None)
    return fails(CheckpointNotFoundError)


@edit(Stage.FILES, group="files")
def index_missing(files: Files, rng: random.Random) -> Outcome | None:
    if len(weight_files(files)) < 2:
        return None
    del files[INDEX_NAME]
    return fails(ShardIndexError)


@edit(Stage.FILES, group="files")
def index_not_json(files: Files, rng: random.Random) -> Outcome | None:
    if INDEX_NAME not in files:
        return None
    whole = files[INDEX_NAME]
    cut = whole[: rng.randrange(len(whole))]
    files[INDEX_NAME] = rng.choice(
        [cut, b"", b"[]", b"null", b"\xef\xbb\xbf" + whole, b"[" * 50_000, b"\x80\x04.", b"9" * 5000]
    )
    return fails(ShardIndexError)


@edit(Stage.FILES, group="files")
def config_missing(files: Files, rng: random.Random) -> Outcome:
    del files["config.json"]
    return fails(ConfigError)
