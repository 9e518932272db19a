"""Edits of ``config.json``: how the checkpoint is quantised, and which model it belongs to."""

from __future__ import annotations

import random
from typing import Any

from ..errors import (
    CheckpointError,
    ConfigError,
    LeftoverKeyError,
    MissingKeyError,
    ShapeError,
    UnknownQuantAlgoError,
)
from .memory_checkpoints import Contents, Files
from .mutations import Outcome, Stage, edit, fails

ILL_TYPED: tuple[Any, ...] = (None, True, 3, 1.5, "text", [], ["x"], {})


def _without(values: tuple[Any, ...], *types: type) -> list[Any]:
    return [value for value in values if not isinstance(value, types)]


@edit(Stage.CONTENTS, group="quantization_entry")
def quant_method_unknown(contents: Contents, rng: random.Random) -> Outcome:
    method = rng.choice([*ILL_TYPED, "bitsandbytes", "ModelOpt", ""])
    contents.config["quantization_config"]["quant_method"] = method
    return fails(UnknownQuantAlgoError)


@edit(Stage.CONTENTS, group="quantization_entry")
def quant_algo_unknown(contents: Contents, rng: random.Random) -> Outcome:
    algo = rng.choice([*ILL_TYPED, "MXFP4", "NVFP4_AWQ", "nvfp4", "W4A8", "NVFP4_SVD "])
    contents.config["quantization_config"]["quant_algo"] = algo
    return fails(UnknownQuantAlgoError)


@edit(Stage.CONTENTS, group="quantization_entry")
def quant_entry_missing(contents: Contents, rng: random.Random) -> Outcome:
    del contents.config["quantization_config"][rng.choice(["quant_method", "quant_algo"])]
    return fails(UnknownQuantAlgoError)


@edit(Stage.CONTENTS, group="quantization_entry")
def quantization_config_missing(contents: Contents, rng: random.Random) -> Outcome:
    del contents.config["quantization_config"]
    return fails(ConfigError)


@edit(Stage.CONTENTS, group="quantization_entry")
def quantization_config_ill_typed(contents: Contents, rng: random.Random) -> Outcome:
    contents.config["quantization_config"] = rng.choice(ILL_TYPED)
    return fails(ConfigError)


@edit(Stage.CONTENTS, group="quantization_entry")
def quant_group_ill_typed(contents: Contents, rng: random.Random) -> Outcome:
    quantization = contents.config["quantization_config"]
    groups = quantization["config_groups"]
    table, key = rng.choice(
        [
            (quantization, "config_groups"),
            (groups, "group_0"),
            (groups, "group_1"),
            (groups["group_0"], "weights"),
            (groups["group_0"], "input_activations"),
        ]
    )
    table[key] = rng.choice(_without(ILL_TYPED, dict))
    return fails(ConfigError)


@edit(Stage.CONTENTS, group="quantization_entry")
def quantizer_of_other_kind(contents: Contents, rng: random.Random) -> Outcome:
    group = contents.config["quantization_config"]["config_groups"]["group_0"]
    entry = group[rng.choice(["weights", "input_activations"])]
    fp8 = entry["num_bits"] == 8
    key, values = rng.choice(
        [
            ("num_bits", [4 if fp8 else 8, 0, -4, 16, "4", None, [4], {}]),
            ("type", ["int", None, 4, ["float"]]),
            ("group_size", [32, 8, 0, -1, "16", 128, [16]]),
        ]
    )
    entry[key] = rng.choice(values)
    return fails(UnknownQuantAlgoError)


@edit(Stage.CONTENTS, group="quantization_entry")
def activations_called_dynamic(contents: Contents, rng: random.Random) -> Outcome:
    """Then the calibrated scales would be dropped."""
    contents.config["quantization_config"]["config_groups"]["group_0"]["input_activations"]["dynamic"] = True
    return fails(LeftoverKeyError)


@edit(Stage.CONTENTS)
def num_layers_wrong(contents: Contents, rng: random.Random) -> Outcome:
    stored = contents.config["num_layers"]
    wrong = [stored + 1, stored - 1, -stored, 0, 10**9, 10**30, str(stored), None, [stored], stored + 0.5, {}]
    contents.config["num_layers"] = rng.choice(wrong)
    return fails(ConfigError)


@edit(Stage.CONTENTS, group="sizes")
def size_wrong(contents: Contents, rng: random.Random) -> Outcome:
    keys = ["attention_head_dim", "num_attention_heads", "joint_attention_dim", "in_channels", "out_channels"]
    key = rng.choice([*keys, "patch_size"])
    old = contents.config[key]
    wrong = [
        old + 1,
        old * 2,
        max(1, old // 2),
        0,
        10**6,
        10**12,
        10**30,
        str(old),
        None,
        [old],
        {},
        old + 0.5,
        True,
    ]
    if key != "patch_size":
        # The model uses its square only.
        wrong.append(-old)
    contents.config[key] = rng.choice(wrong)
    return fails(ConfigError, ShapeError)


@edit(Stage.CONTENTS, group="sizes")
def size_missing(contents: Contents, rng: random.Random) -> Outcome:
    """The class has defaults for them, those of the real model."""
    keys = ["num_layers", "attention_head_dim", "num_attention_heads", "joint_attention_dim", "in_channels"]
    del contents.config[rng.choice([*keys, "out_channels", "axes_dims_rope"])]
    return fails(ConfigError, ShapeError)


@edit(Stage.CONTENTS, group="sizes")
def axes_wrong(contents: Contents, rng: random.Random) -> Outcome:
    wrong = [[4, 6, 8], [16], [], [4, 6], [0, 8, 8], [-4, 14, 6], [5, 5, 6], [4.0, 6.0, 6.0], ["4", "6", "6"]]
    wrong += [None, 16, "4,6,6", {"a": 16}, [True, 9, 6], [[4, 6, 6]], [4, 6, 10**9]]
    contents.config["axes_dims_rope"] = rng.choice(wrong)
    return fails(ConfigError)


@edit(Stage.CONTENTS, group="sizes")
def rotary_size_enormous(contents: Contents, rng: random.Random) -> Outcome:
    """Consistent in itself, and more memory than there is, if it were tried."""
    half = 10 ** rng.choice([7, 9, 12])
    contents.config |= {"attention_head_dim": 4 * half, "axes_dims_rope": [2 * half, half, half]}
    return fails(ConfigError, ShapeError)


@edit(Stage.CONTENTS, group="sizes")
def defaults_forced(contents: Contents, rng: random.Random) -> Outcome:
    """diffusers' own note of which entries were left at their defaults, naming entries that were not."""
    keys = ["axes_dims_rope", "num_layers", "attention_head_dim", "in_channels"]
    contents.config["_use_default_values"] = [rng.choice(keys)]
    return fails(ConfigError, ShapeError, MissingKeyError)


@edit(Stage.CONTENTS, group="sizes")
def condition_embedding_promised(contents: Contents, rng: random.Random) -> Outcome:
    contents.config["use_additional_t_cond"] = True
    return fails(MissingKeyError)


@edit(Stage.CONTENTS, group="class")
def class_is_no_model(contents: Contents, rng: random.Random) -> Outcome:
    names = [
        "DiffusionPipeline",
        "QwenImagePipeline",
        "AutoModel",
        "ModelMixin",
        "NoSuchModel",
        "__builtins__",
    ]
    names += ["utils", "__name__", "", "EulerDiscreteScheduler", "OnnxStableDiffusionPipeline", "os.system"]
    contents.config["_class_name"] = rng.choice([*names, *ILL_TYPED])
    return fails(ConfigError)


@edit(Stage.CONTENTS, group="class")
def class_missing(contents: Contents, rng: random.Random) -> Outcome:
    del contents.config["_class_name"]
    return fails(ConfigError)


@edit(Stage.CONTENTS, group="class")
def class_is_other_model(contents: Contents, rng: random.Random) -> Outcome:
    contents.config["_class_name"] = rng.choice(["AutoencoderKL", "UNet2DModel", "SD3Transformer2DModel"])
    return fails(CheckpointError)


@edit(Stage.BYTES, group="config bytes")
def config_not_json(files: Files, rng: random.Random) -> Outcome:
    whole = files["config.json"]
    options = [
        whole[: rng.randrange(len(whole))],
        b"",
        b"[]",
        b"null",
        b'"x"',
        b"\xef\xbb\xbf" + whole,
        b"\xff" + whole,
    ]
    options += [
        b'{"a":' * 50_000,
        b"[" * 50_000,
        b'{"num_layers": ' + b"9" * 5000 + b"}",
        whole + b"}",
        b"\0",
    ]
    files["config.json"] = rng.choice(options)
    return fails(ConfigError)
