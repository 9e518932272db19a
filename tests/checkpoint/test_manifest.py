"""What a checkpoint is found to hold."""

import json
import subprocess
import sys
import time

import pytest

import svdq_compile
from svdq_compile.checkpoint.manifest import read_manifest
from svdq_compile.errors import (
    LoraPairError,
)
from svdq_compile.spec import Format, LinearSpec
from svdq_compile.testing.checkpoints import RECIPES, SMALL, write_checkpoint
from svdq_compile.testing.memory_checkpoints import read_contents, render

QWEN_IMAGE = {
    **SMALL,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
    "axes_dims_rope": [16, 56, 56],
}
LOW_RANK = ("to_q", "to_k", "to_v", "to_out.0", "img_mlp.net.0.proj", "img_mlp.net.2")


def edited(folder, change):
    """The checkpoint after ``change(contents)``."""
    contents = read_contents(folder)
    change(contents)
    for name, data in render(contents).items():
        (folder / name).write_bytes(data)
    return folder


def edit_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_each_linear_is_what_its_keys_say(tmp_path, recipe, dtype):
    manifest = read_manifest(write_checkpoint(tmp_path, recipe=recipe, dtype=dtype, rank=5))
    assert manifest.dtype == dtype
    assert manifest.warnings == ()
    assert len(manifest.linears) == 14
    for name, linear in manifest.linears.items():
        svd = recipe == "all" or (recipe == "mixed" and name.endswith(LOW_RANK))
        format = Format.NVFP4_SVD if svd else Format.FP8 if recipe == "fp8" else Format.NVFP4
        assert linear.spec.format is format
        assert (linear.spec.rank, linear.spec.smooth, linear.spec.dynamic) == (5 if svd else 0, svd, False)
        assert linear.tensors.keys() == linear.spec.components().keys() | {"bias"}
    spec = manifest.linears["transformer_blocks.1.img_mlp.net.2"].spec
    assert (spec.out_features, spec.in_features, spec.dtype) == (32, 128, dtype)


def test_every_tensor_is_counted_once(checkpoint):
    manifest = read_manifest(checkpoint)
    keys = [key for linear in manifest.linears.values() for key in linear.keys.values()] + list(manifest.dense)
    contents = read_contents(checkpoint)
    assert sorted(keys) == sorted(contents.tensors)
    assert manifest.nbytes == sum(len(tensor.data) for tensor in contents.tensors.values())


def test_ranks_are_read_from_the_tensors(tmp_path):
    ranks = {"to_q": 1, "net.2": 48}
    folder = write_checkpoint(tmp_path, rank=lambda name: next((r for n, r in ranks.items() if name.endswith(n)), 7))
    found = {name: x.spec.rank for name, x in read_manifest(folder).linears.items() if x.spec.rank}
    assert found == {
        f"transformer_blocks.1.{'' if 'mlp' in n else 'attn.'}{n}": r for n, r in zip(LOW_RANK, (1, 7, 7, 7, 7, 48))
    }


@pytest.mark.parametrize(
    ("recipe", "tensors", "gigabytes"),
    [("mixed", 5293, 13.713), ("all", 6637, 14.069), ("nvfp4", 4285, 13.512)],
)
def test_the_real_model_is_read_in_no_time(tmp_path, recipe, tensors, gigabytes):
    folder = write_checkpoint(tmp_path, config=QWEN_IMAGE, recipe=recipe, rank=32, blocks_kept=2, shards=2, sparse=True)
    try:
        start = time.process_time()
        manifest = read_manifest(folder)
        seconds = time.process_time() - start
    finally:
        for file in folder.glob("*.safetensors"):
            file.unlink()
    assert seconds < 2
    assert sum(len(x.tensors) for x in manifest.linears.values()) + len(manifest.dense) == tensors
    assert len(manifest.linears) == 56 * 14
    assert manifest.nbytes / 1e9 == pytest.approx(gigabytes, abs=1e-3)
    assert manifest.warnings == ()


def test_reading_needs_no_torch(sharded):
    code = (
        "import sys; from svdq_compile.checkpoint.manifest import read_manifest;"
        f"m = read_manifest({str(sharded)!r}); print(len(m.linears));"
        "print({'torch', 'diffusers', 'triton', 'numpy', 'huggingface_hub'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["14", "set()"]


def test_an_unquantised_checkpoint_has_no_linears(checkpoint):
    def strip(contents):
        for key, role in contents.roles().items():
            if role != "dense":
                contents.remove(key)
        del contents.config["quantization_config"]

    manifest = read_manifest(edited(checkpoint, strip))
    assert (manifest.linears, manifest.quantization_config, manifest.dtype) == ({}, None, "BF16")


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"lora_rank": 16}, "lora_rank 16"),
        ({"ignore": ["transformer_blocks.1.*"]}, "14 quantised linears are listed in ignore"),
        ({"quant_algo": "NVFP4"}, "some linears are nvfp4_svd"),
    ],
)
def test_a_config_that_disagrees_is_a_warning(checkpoint, caplog, entries, words):
    def change(config):
        quantization = config["quantization_config"]
        for key, value in entries.items():
            (quantization if key in quantization else quantization["config_groups"]["group_0"])[key] = value

    manifest = read_manifest(edit_config(checkpoint, change))
    assert len(manifest.warnings) == 1
    assert words in manifest.warnings[0]
    svdq_compile.load_checkpoint(checkpoint)
    assert words in caplog.text
    assert str(checkpoint) in caplog.text


def test_the_same_layer_in_two_formats_is_a_warning(tmp_path):
    def strip(contents):
        for leaf in ("svdquant_lora_a", "svdquant_lora_b", "pre_quant_scale"):
            contents.remove(f"transformer_blocks.2.attn.to_q.{leaf}")

    folder = write_checkpoint(tmp_path, config={**SMALL, "num_layers": 4})
    assert "transformer_blocks.*.attn.to_q" in read_manifest(edited(folder, strip)).warnings[0]


def test_an_unsmoothed_low_rank_branch_needs_the_config_to_say_so(checkpoint):
    key = "transformer_blocks.1.attn.to_out.0.pre_quant_scale"
    folder = edited(checkpoint, lambda contents: contents.remove(key))
    with pytest.raises(LoraPairError) as caught:
        read_manifest(folder)
    assert caught.value.key == key
    edit_config(folder, lambda c: c["quantization_config"]["config_groups"]["group_0"].update(pre_quant_scale=False))
    assert read_manifest(folder).linears["transformer_blocks.1.attn.to_out.0"].spec.smooth is False


def test_dynamic_activations_have_no_input_scale(checkpoint):
    def strip(contents):
        for key, role in contents.roles().items():
            if role == "input_scale":
                contents.remove(key)
        contents.config["quantization_config"]["config_groups"]["group_0"]["input_activations"]["dynamic"] = True

    specs = {linear.spec.dynamic for linear in read_manifest(edited(checkpoint, strip)).linears.values()}
    assert specs == {True}


def test_a_rule_accepts_what_it_describes():
    spec = LinearSpec(Format.NVFP4_SVD, 32, 64, 3, "F16", smooth=True)
    shapes = {name: (part.shape, part.dtype) for name, part in spec.components().items()}
    assert shapes == {
        "qweight": ((32, 32), "U8"),
        "weight_scale": ((32, 4), "F8_E4M3"),
        "weight_scale_2": ((), "F32"),
        "input_scale": ((), "F32"),
        "pre_quant_scale": ((64,), "F16"),
        "lora_down": ((3, 64), "F16"),
        "lora_up": ((32, 3), "F16"),
    }
