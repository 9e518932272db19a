"""Edits that change a checkpoint's files and nothing it stands for."""

from __future__ import annotations

import random

from .memory_checkpoints import Contents, Files, join_file, reshard, split_file, weight_files
from .mutations import NEUTRAL, Outcome, Stage, edit


def _shard(contents: Contents, rng: random.Random):
    return rng.choice(list(contents.shards.values()))


@edit(Stage.NEUTRAL)
def header_keys_shuffled(contents: Contents, rng: random.Random) -> Outcome:
    shard = _shard(contents, rng)
    keys = list(shard.tensors)
    rng.shuffle(keys)
    shard.layout = list(shard.tensors)
    shard.tensors = {key: shard.tensors[key] for key in keys}
    return NEUTRAL


@edit(Stage.NEUTRAL)
def data_reordered(contents: Contents, rng: random.Random) -> Outcome:
    shard = _shard(contents, rng)
    shard.layout = list(shard.tensors)
    rng.shuffle(shard.layout)
    return NEUTRAL


@edit(Stage.HEADER)
def header_padded(files: Files, rng: random.Random) -> Outcome:
    name = rng.choice(weight_files(files))
    header, data = split_file(files[name])
    files[name] = join_file(header, data, padding=rng.randrange(1, 5000))
    return NEUTRAL


@edit(Stage.NEUTRAL)
def free_metadata(contents: Contents, rng: random.Random) -> Outcome:
    _shard(contents, rng).metadata |= {"author": "\u00e9\u2603", "step": str(rng.random()), "": ""}
    return NEUTRAL


@edit(Stage.NEUTRAL)
def metadata_removed(contents: Contents, rng: random.Random) -> Outcome:
    _shard(contents, rng).metadata.clear()
    return NEUTRAL


@edit(Stage.NEUTRAL, group="resharded")
def resharded(contents: Contents, rng: random.Random) -> Outcome:
    reshard(contents, rng.randrange(2 if contents.index is None else 1, 6), rng)
    return NEUTRAL


@edit(Stage.NEUTRAL, group="resharded")
def single_file_renamed(contents: Contents, rng: random.Random) -> Outcome | None:
    if contents.index is not None:
        return None
    contents.shards = {"model.fp4.safetensors": next(iter(contents.shards.values()))}
    return NEUTRAL


@edit(Stage.NEUTRAL)
def quantization_config_extended(contents: Contents, rng: random.Random) -> Outcome:
    quantization = contents.config["quantization_config"]
    target = rng.choice([quantization, quantization["config_groups"]["group_0"]])
    target["x_" + str(rng.random())] = rng.choice([None, [1], {"deep": {}}, "text"])
    return NEUTRAL


@edit(Stage.NEUTRAL)
def config_extended(contents: Contents, rng: random.Random) -> Outcome:
    contents.config["pooled_projection_dim"] = rng.choice([768, None, "x"])
    return NEUTRAL


@edit(Stage.NEUTRAL)
def producer_changed(contents: Contents, rng: random.Random) -> Outcome:
    contents.config["quantization_config"]["producer"] = rng.choice([{"name": "modelopt", "version": "9"}, None])
    return NEUTRAL


@edit(Stage.NEUTRAL, group="quantization_entry")
def lora_rank_changed(contents: Contents, rng: random.Random) -> Outcome:
    group = contents.config["quantization_config"]["config_groups"]["group_0"]
    group["lora_rank"] = rng.choice([1, 64, -1, "8", None, [8], {"a": 8}])
    return NEUTRAL


@edit(Stage.NEUTRAL, group="ignore")
def ignore_changed(contents: Contents, rng: random.Random) -> Outcome:
    choices = [
        [],
        None,
        "all",
        ["*"],
        ["[", "transformer_blocks.1.*"],
        [1, None],
        {"a": 1},
        ["[z-a]*", "*a" * 40],
    ]
    contents.config["quantization_config"]["ignore"] = rng.choice(choices)
    return NEUTRAL


@edit(Stage.NEUTRAL, group="quantization_entry")
def quantization_entry_removed(contents: Contents, rng: random.Random) -> Outcome:
    quantization = contents.config["quantization_config"]
    group = quantization["config_groups"]["group_0"]
    part = rng.choice(["weights", "input_activations"])
    entries = [
        (quantization, "config_groups"),
        (quantization, "ignore"),
        (quantization, "producer"),
        (group, part),
    ]
    entries += [
        (group, "targets"),
        (group[part], "num_bits"),
        (group[part], "type"),
        (group[part], "dynamic"),
    ]
    table, key = rng.choice(entries)
    table.pop(key, None)
    return NEUTRAL


@edit(Stage.NEUTRAL, group="quantization_entry")
def svd_called_plain(contents: Contents, rng: random.Random) -> Outcome | None:
    quantization = contents.config["quantization_config"]
    if quantization["quant_algo"] == "FP8":
        return None
    quantization["quant_algo"] = "NVFP4" if quantization["quant_algo"] == "NVFP4_SVD" else "NVFP4_SVD"
    return NEUTRAL


@edit(Stage.NEUTRAL)
def index_metadata_changed(contents: Contents, rng: random.Random) -> Outcome | None:
    if contents.index is None:
        return None
    contents.index["metadata"] = rng.choice([None, {"total_size": -1}, [], "x"])
    return NEUTRAL


@edit(Stage.NEUTRAL)
def other_files_beside(contents: Contents, rng: random.Random) -> Outcome:
    contents.extra |= {"README.md": b"# text", "modelopt_state.pth": b"\x80\x04.", "pytorch_model.bin": b"PK"}
    return NEUTRAL
