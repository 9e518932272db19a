"""Every configuration of the architecture compiles in one graph and gives the eager result."""

import copy

import pytest
import torch

import svdq_compile
from svdq_compile.ops.linear import linear
from svdq_compile.testing.checkpoints import SMALL, example_inputs, write_checkpoint
from svdq_compile.testing.graphs import RecordingBackend
from svdq_compile.testing.oracle import assert_bits_equal, assert_within_budget

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

VARIANTS = {
    "qwen_image": {},
    "edit_2511": {"zero_cond_t": True},
    "layered": {"use_additional_t_cond": True, "use_layer3d_rope": True},
}


def load(tmp_path, recipe="mixed", **config):
    write_checkpoint(tmp_path, config=SMALL | config, recipe=recipe, blocks_kept=1)
    return svdq_compile.load_transformer(tmp_path)


def inputs_for(model, variant, batch=1):
    inputs = example_inputs(model, batch=batch)
    if variant == "edit_2511":
        # The picture to edit follows the latents; its tokens take the modulation of time step zero.
        tokens = inputs["hidden_states"]
        inputs["hidden_states"] = torch.cat((tokens, tokens.flip(1)), 1)
        inputs["img_shapes"] = [[*shapes, *shapes] for shapes in inputs["img_shapes"]]
    return inputs


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batch", [1, 2])
def test_variants_whole(variant, batch, tmp_path):
    model = load(tmp_path, **VARIANTS[variant])
    inputs = inputs_for(model, variant, batch)
    recorder = RecordingBackend(lower=False)
    compiled = torch.compile(model, backend=recorder, fullgraph=True)
    assert_bits_equal(compiled(**inputs)[0], model(**inputs)[0])
    assert recorder.count(linear) == 14
    assert len(recorder.reports) == 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_regional(variant, tmp_path):
    """Quantised blocks share one graph; the first and last, unquantised, share another."""
    model = load(tmp_path, num_layers=5, **VARIANTS[variant])
    inputs = inputs_for(model, variant)
    expected = model(**inputs)[0]
    recorder = RecordingBackend(lower=False)
    model.compile_repeated_blocks(backend=recorder, fullgraph=True)
    assert_bits_equal(model(**inputs)[0], expected)
    assert sorted(len(report.matched) for report in recorder.reports) == [0, 14]


@pytest.mark.parametrize("recipe", ["mixed", "all", "nvfp4", "fp8"])
def test_recipes_through_inductor(recipe, tmp_path):
    model = load(tmp_path, recipe)
    inputs = example_inputs(model)
    expected = model(**inputs)[0]
    oracle_model = copy.deepcopy(model).double()
    wide = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
    compiled = torch.compile(model, backend="svdq", fullgraph=True)
    assert_within_budget(compiled(**inputs)[0], oracle_model(**wide)[0], low_precision=expected)


@pytest.mark.parametrize("compute", ["auto", "fp8", "bf16"])
def test_expanded_weights(compute, tmp_path):
    """NVFP4_SVD and NVFP4 linears in one graph, for fewer tokens than fp8 quantises and for more."""
    write_checkpoint(tmp_path, config=SMALL, recipe="mixed", blocks_kept=1)
    model = svdq_compile.load_transformer(tmp_path, compute=compute, storage="expanded")
    recorder = RecordingBackend(lower=False)
    compiled = torch.compile(model, backend=recorder, fullgraph=True, dynamic=True)
    for sizes in ({}, {"height": 12, "width": 12, "text": 130}):
        inputs = example_inputs(model, **sizes)
        assert_bits_equal(compiled(**inputs)[0], model(**inputs)[0])
    assert recorder.count(linear) == 14 * len(recorder.reports)


def test_ranks_that_differ_give_a_graph_each(tmp_path):
    write_checkpoint(
        tmp_path,
        config=SMALL | {"num_layers": 4},
        recipe="all",
        blocks_kept=0,
        rank=lambda name: 4 if name.startswith("transformer_blocks.2") else 8,
    )
    model = svdq_compile.load_transformer(tmp_path)
    inputs = example_inputs(model)
    expected = model(**inputs)[0]
    recorder = RecordingBackend(lower=False)
    model.compile_repeated_blocks(backend=recorder, fullgraph=True)
    assert_bits_equal(model(**inputs)[0], expected)
    ranks = [{match.fingerprint.spec.rank for match in report.matched} for report in recorder.reports]
    assert sorted(ranks, key=min) == [{4}, {8}]
