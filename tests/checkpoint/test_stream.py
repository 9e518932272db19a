"""Streaming tensors: values, devices, memory."""

import gc
import logging
import subprocess
import sys
import textwrap

import pytest
import torch

import svdq_compile
from svdq_compile.checkpoint.manifest import read_manifest
from svdq_compile.checkpoint.tensors import check_values, stream
from svdq_compile.errors import HeaderError, NonFiniteError, ScaleError, ZeroScaleError
from svdq_compile.testing.checkpoints import SMALL, write_checkpoint
from svdq_compile.testing.compare import differing, stored_bytes
from svdq_compile.testing.memory_checkpoints import read_contents, render

NAN, INF = float("nan"), float("inf")


def test_every_tensor_comes_once_with_its_bytes(sharded):
    manifest, stored = read_manifest(sharded), read_contents(sharded).tensors
    seen = {}
    for name, part, tensor in stream(manifest):
        key = name if part is None else manifest.linears[name].keys[part]
        assert key not in seen
        seen[key] = stored_bytes(tensor)[2]
    assert seen == {key: tensor.data for key, tensor in stored.items()}


def test_tensors_do_not_share_the_file(checkpoint):
    """A model must survive its file being overwritten."""
    before = svdq_compile.load_transformer(checkpoint)
    model = svdq_compile.load_transformer(checkpoint)
    file = checkpoint / "diffusion_pytorch_model.safetensors"
    with file.open("r+b") as stream:
        stream.write(b"\0" * file.stat().st_size)
    gc.collect()
    assert differing(before, model) == []
    assert model.proj_out.weight.abs().sum() > 0


def test_meta_device_keeps_shapes_and_checks_values(checkpoint, load_error):
    model = svdq_compile.load_transformer(checkpoint, device="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    contents = read_contents(checkpoint)
    contents.tensors["proj_out.bias"].data = b"\xff" * 32
    for name, data in render(contents).items():
        (checkpoint / name).write_bytes(data)
    assert load_error(checkpoint, NonFiniteError, device="meta").key == "proj_out.bias"


@pytest.mark.parametrize("part", ["weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale"])
@pytest.mark.parametrize(
    ("value", "error"),
    [(NAN, ScaleError), (INF, ScaleError), (-INF, ScaleError), (-1.0, ScaleError), (0.0, ZeroScaleError)],
)
@pytest.mark.parametrize("at", [0, -1])
def test_scales_are_positive_numbers(part, value, error, at):
    tensor = torch.ones(64)
    tensor[at] = value
    if part == "weight_scale" and value == 0:
        # An all-zero block may have the scale zero.
        check_values(tensor, part, key="k")
        tensor = tensor[at]
    with pytest.raises(error) as caught:
        check_values(tensor, part, key="k", file="f")
    assert type(caught.value) is error
    assert (caught.value.key, caught.value.file) == ("k", "f")


@pytest.mark.parametrize("part", ["bias", "lora_down", "lora_up", None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_other_tensors_are_finite(part, dtype):
    tensor = torch.linspace(-2, 0, 64).to(dtype)
    check_values(tensor, part, key="k")
    for value in (NAN, INF, -INF):
        tensor[7] = value
        with pytest.raises(NonFiniteError) as caught:
            check_values(tensor, part, key="k")
        assert caught.value.found.startswith("1 of 64, ")


def test_all_byte_codes():
    codes = torch.arange(256, dtype=torch.uint8)
    check_values(codes, "qweight", key="k")
    for code in range(256):
        block_scales = codes[code : code + 1].view(torch.float8_e4m3fn)
        if code in (0x7F, 0xFF) or code > 0x80:
            with pytest.raises(ScaleError):
                check_values(block_scales, "weight_scale", key="k")
        else:
            check_values(block_scales, "weight_scale", key="k")
        if code in (0x7F, 0xFF):
            with pytest.raises(NonFiniteError):
                check_values(block_scales, "qweight", key="k")
        else:
            check_values(block_scales, "qweight", key="k")


def test_a_file_changed_after_its_header_was_checked(checkpoint):
    manifest = read_manifest(checkpoint)
    (manifest.folder / "diffusion_pytorch_model.safetensors").write_bytes(b"\x01" * 100)
    with pytest.raises(HeaderError) as caught:
        list(stream(manifest))
    assert caught.value.file == str(checkpoint / "diffusion_pytorch_model.safetensors")


def test_nothing_is_loaded_when_the_last_tensor_is_bad(checkpoint):
    model = svdq_compile.load_transformer(checkpoint)
    good = svdq_compile.load_transformer(checkpoint)
    contents = read_contents(checkpoint)
    last = max(contents.tensors)
    contents.tensors[last].data = b"\xff" * len(contents.tensors[last].data)
    for name, data in render(contents).items():
        (checkpoint / name).write_bytes(data)
    with pytest.raises(svdq_compile.CheckpointError):
        svdq_compile.load_into(model, checkpoint)
    assert differing(model, good) == []


MEASURE = """
    import resource, sys, torch, svdq_compile, diffusers, accelerate, safetensors
    svdq_compile.load_transformer(sys.argv[1], device="meta")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    svdq_compile.load_transformer(sys.argv[2], device="meta")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_host_memory_stays_below_one_shard_and_a_gigabyte(tmp_path, checkpoint):
    """What is left on ``meta`` takes no memory, so the peak is what passing through needs."""
    logging.disable(logging.WARNING)
    config = {**SMALL, "attention_head_dim": 128, "num_attention_heads": 12, "axes_dims_rope": [16, 56, 56]}
    folder = write_checkpoint(tmp_path / "large", config=config, rank=32, shards=4)
    sizes = [file.stat().st_size for file in folder.glob("*.safetensors")]
    code = [sys.executable, "-c", textwrap.dedent(MEASURE), str(checkpoint), str(folder)]
    peak = int(subprocess.run(code, capture_output=True, text=True, check=True).stdout) * 1024
    logging.disable(logging.NOTSET)
    assert sum(sizes) > 300e6
    assert peak < max(sizes) + 1e9
    # The bound above holds even for a loader that keeps everything; this one does not.
    assert peak < 0.75 * sum(sizes)
