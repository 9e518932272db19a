"""Loading and saving again."""

import json
import shutil

import pytest
import torch

import svdq_compile
from svdq_compile.checkpoint.manifest import read_manifest
from svdq_compile.checkpoint.source import INDEX_NAME, WEIGHTS_NAME
from svdq_compile.errors import SaveError
from svdq_compile.testing.checkpoints import RECIPES, example_inputs, write_checkpoint
from svdq_compile.testing.compare import differing
from svdq_compile.testing.memory_checkpoints import read_contents


def stored(folder):
    """Key -> dtype, shape, bytes of everything in a folder's files."""
    return {key: (t.dtype, t.shape, t.data) for key, t in read_contents(folder).tensors.items()}


def config_of(folder):
    """``config.json`` without what diffusers notes about itself."""
    config = json.loads((folder / "config.json").read_text())
    return {key: value for key, value in config.items() if key not in ("_use_default_values", "_diffusers_version")}


def assert_same_checkpoint(left, right):
    first, second = stored(left), stored(right)
    assert first.keys() == second.keys()
    assert [key for key in first if first[key] != second[key]] == []
    assert config_of(left) == config_of(right)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize(
    ("recipe", "rank"),
    [("mixed", 1), ("mixed", 8), ("mixed", 48), ("all", 1), ("all", 48), ("nvfp4", 8), ("fp8", 8)],
)
def test_saved_bytes_are_the_loaded_ones(tmp_path, recipe, dtype, rank):
    folder = write_checkpoint(tmp_path / "in", recipe=recipe, dtype=dtype, rank=rank)
    model = svdq_compile.load_transformer(folder)
    assert svdq_compile.save_checkpoint(model, tmp_path / "out") == tmp_path / "out"
    assert_same_checkpoint(folder, tmp_path / "out")
    again = svdq_compile.load_transformer(tmp_path / "out")
    assert differing(model, again) == []
    inputs = example_inputs(model, dtype=model.dtype)
    assert torch.equal(model(**inputs)[0], again(**inputs)[0])
    assert model(**inputs)[0].isfinite().all()


def test_a_rank_per_linear(tmp_path):
    folder = write_checkpoint(tmp_path / "in", rank=lambda name: 1 + len(name) % 7, shards=2)
    svdq_compile.save_checkpoint(svdq_compile.load_transformer(folder), tmp_path / "out")
    assert_same_checkpoint(folder, tmp_path / "out")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("dtype", "cast"), [("BF16", torch.float32), ("F16", torch.float32)])
def test_a_wider_model_dtype_is_not_written(tmp_path, recipe, dtype, cast):
    folder = write_checkpoint(tmp_path / "in", recipe=recipe, dtype=dtype)
    model = svdq_compile.load_transformer(folder, dtype=cast)
    assert {p.dtype for p in model.parameters()} == {cast}
    svdq_compile.save_checkpoint(model, tmp_path / "out")
    assert_same_checkpoint(folder, tmp_path / "out")


def test_a_value_the_stored_dtype_cannot_hold_is_refused(tmp_path):
    model = svdq_compile.load_transformer(write_checkpoint(tmp_path / "in", dtype="F16"), dtype=torch.float32)
    model.proj_out.bias[3] = 1e6
    with pytest.raises(SaveError) as caught:
        svdq_compile.save_checkpoint(model, tmp_path / "in")
    assert (caught.value.key, caught.value.found, caught.value.needed) == ("proj_out.bias", "F32", "F16")
    assert read_manifest(tmp_path / "in").dtype == "F16", "a refused save leaves what was there"


def test_a_model_without_quantised_linears_is_refused(tmp_path):
    with pytest.raises(SaveError) as caught:
        svdq_compile.save_checkpoint(torch.nn.Linear(2, 2), tmp_path / "out")
    assert caught.value.found == "Linear"
    assert not (tmp_path / "out").exists()


def test_saving_in_shards(checkpoint, tmp_path):
    model = svdq_compile.load_transformer(checkpoint)
    out = svdq_compile.save_checkpoint(model, tmp_path / "out", max_shard_size=50_000)
    sizes = [file.stat().st_size for file in out.glob("*.safetensors")]
    assert len(sizes) > 3
    assert max(sizes) < 50_000 + 20_000
    assert (out / INDEX_NAME).is_file()
    assert_same_checkpoint(checkpoint, out)
    assert differing(model, svdq_compile.load_transformer(out)) == []


def test_shards_replace_a_file_and_a_file_replaces_shards(checkpoint):
    before = stored(checkpoint)
    svdq_compile.save_checkpoint(svdq_compile.load_transformer(checkpoint), checkpoint, max_shard_size="50KB")
    assert not (checkpoint / WEIGHTS_NAME).exists()
    assert stored(checkpoint) == before
    svdq_compile.save_checkpoint(svdq_compile.load_transformer(checkpoint), checkpoint)
    assert [file.name for file in checkpoint.glob("*.safetensors*")] == [WEIGHTS_NAME]
    assert stored(checkpoint) == before


def test_saving_over_a_pipeline_replaces_its_transformer(tmp_path, checkpoint):
    pipeline = tmp_path / "pipeline"
    shutil.copytree(write_checkpoint(tmp_path / "other", seed=1), pipeline / "transformer")
    (pipeline / "model_index.json").write_text("{}")
    model = svdq_compile.load_transformer(checkpoint)
    assert svdq_compile.save_checkpoint(model, pipeline) == pipeline / "transformer"
    assert differing(model, svdq_compile.load_transformer(pipeline)) == []
    assert not (pipeline / WEIGHTS_NAME).exists()


def test_weights_that_share_memory_are_saved(checkpoint, tmp_path):
    """A fused export's equal factors may be one tensor in memory."""
    model = svdq_compile.load_transformer(checkpoint)
    attention = model.transformer_blocks[1].attn
    for linear in (attention.to_k, attention.to_v):
        assert torch.equal(linear.weight.lora_down, attention.to_q.weight.lora_down)
        linear.weight.lora_down = attention.to_q.weight.lora_down
    svdq_compile.save_checkpoint(model, tmp_path / "out")
    assert_same_checkpoint(checkpoint, tmp_path / "out")


def test_shared_components_of_an_export_are_equal(checkpoint):
    """What the builder promises about real exports."""
    tensors = stored(checkpoint)
    for leaf in ("pre_quant_scale", "svdquant_lora_a", "input_scale", "weight_scale_2"):
        query, key, value = (tensors[f"transformer_blocks.1.attn.to_{x}.{leaf}"] for x in "qkv")
        assert query == key == value
    for leaf in ("svdquant_lora_b", "weight", "weight_scale"):
        assert len({tensors[f"transformer_blocks.1.attn.to_{x}.{leaf}"][2] for x in "qkv"}) == 3
