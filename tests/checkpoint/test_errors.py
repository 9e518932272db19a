"""What errors say about a checkpoint: the file, the key, what was found and what was needed."""

import json

import pytest

from svdq_compile.checkpoint.source import INDEX_NAME, WEIGHTS_NAME
from svdq_compile.errors import (
    ConfigError,
    DtypeError,
    LeftoverKeyError,
    LoraPairError,
    MissingKeyError,
    ShapeError,
    UnknownLinearError,
    UnknownQuantAlgoError,
    UnsafePathError,
)
from svdq_compile.testing.memory_checkpoints import read_contents, render


def edited(folder, change):
    """The checkpoint after ``change(contents)``."""
    contents = read_contents(folder)
    change(contents)
    for name, data in render(contents).items():
        (folder / name).write_bytes(data)
    return folder


PREFIX = "transformer_blocks.1.attn.to_q."


def _set(key, **fields):
    return lambda contents: [setattr(contents.tensors[key], name, value) for name, value in fields.items()]


@pytest.mark.parametrize(
    ("change", "error_class", "expected"),
    [
        (
            _set(PREFIX + "weight_scale", dtype="I8"),
            DtypeError,
            {"file": WEIGHTS_NAME, "key": PREFIX + "weight_scale", "found": "I8", "needed": "F8_E4M3"},
        ),
        (
            _set(PREFIX + "bias", dtype="F16"),
            DtypeError,
            {"file": WEIGHTS_NAME, "key": PREFIX + "bias", "found": "F16", "needed": "BF16"},
        ),
        (
            _set(PREFIX + "svdquant_lora_b", shape=[8, 32]),
            ShapeError,
            {"file": WEIGHTS_NAME, "key": PREFIX + "svdquant_lora_b", "found": [8, 32], "needed": [32, 8]},
        ),
        (
            lambda c: c.remove(PREFIX + "input_scale"),
            MissingKeyError,
            {"file": WEIGHTS_NAME, "key": PREFIX + "input_scale", "found": "no such key"},
        ),
        (
            lambda c: c.remove(PREFIX + "svdquant_lora_a"),
            LoraPairError,
            {"file": WEIGHTS_NAME, "key": PREFIX + "svdquant_lora_a", "found": "no such key"},
        ),
        (lambda c: c.remove("img_in.bias"), MissingKeyError, {"file": "", "key": "img_in.bias"}),
        (
            lambda c: c.add("odd.bias", c.tensors["img_in.bias"]),
            LeftoverKeyError,
            {"file": WEIGHTS_NAME, "key": "odd.bias"},
        ),
        (
            _set("txt_norm.weight", shape=[1, 32]),
            ShapeError,
            {"file": WEIGHTS_NAME, "key": "txt_norm.weight", "found": [1, 32], "needed": [32]},
        ),
        (
            lambda c: [c.rename(k, k.replace("to_q", "to_x")) for k in list(c.tensors) if k.startswith(PREFIX)],
            UnknownLinearError,
            {
                "file": WEIGHTS_NAME,
                "key": "transformer_blocks.1.attn.to_x",
                "found": "no such module",
                "needed": "nn.Linear",
            },
        ),
        (
            lambda c: c.config.update(num_layers=4),
            ConfigError,
            {"file": "config.json", "key": "num_layers", "found": 4, "needed": 3},
        ),
        (
            lambda c: c.config.pop("axes_dims_rope"),
            ConfigError,
            {"file": "config.json", "key": "axes_dims_rope"},
        ),
        (
            lambda c: c.config.update(_class_name="DiffusionPipeline"),
            ConfigError,
            {"file": "config.json", "key": "_class_name", "found": "DiffusionPipeline"},
        ),
        (
            lambda c: c.config["quantization_config"].update(quant_algo="MXFP4"),
            UnknownQuantAlgoError,
            {"file": "config.json", "key": "quant_algo", "found": "MXFP4"},
        ),
    ],
)
def test_errors_say_where_and_what(checkpoint, load_error, change, error_class, expected):
    error = load_error(edited(checkpoint, change), error_class)
    assert type(error) is error_class
    assert error.file == str(checkpoint / expected.pop("file"))
    assert {name: getattr(error, name) for name in expected} == expected
    assert error.hint
    for value in (error.file, error.key, error.hint):
        assert value in str(error)


def test_an_index_that_points_elsewhere_is_named(sharded, load_error):
    index = json.loads((sharded / INDEX_NAME).read_text())
    index["weight_map"]["proj_out.bias"] = "/etc/passwd"
    (sharded / INDEX_NAME).write_text(json.dumps(index))
    assert load_error(sharded, UnsafePathError).found == "/etc/passwd"
