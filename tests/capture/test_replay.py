"""What a captured model returns: the uncaptured bits, in tensors of the caller's own."""

import copy

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput

import svdq_compile
from svdq_compile.testing.checkpoints import SMALL, example_inputs, write_checkpoint
from svdq_compile.testing.oracle import assert_bits_equal
from svdq_compile.testing.random_model import random_transformer


def vary(inputs, seed):
    """The same shapes, other values."""
    generator = torch.Generator().manual_seed(seed)
    return {
        k: torch.rand(v.shape, generator=generator).to(v.dtype) if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in inputs.items()
    }


def test_bits_for_changing_values_prompts_sizes_and_batches(model, captured):
    plain = copy.deepcopy(model)
    handle, graphs = captured(model)
    calls = [
        dict(text=5),
        dict(text=7),
        dict(height=6, width=2),
        dict(batch=2),
    ]
    for seed in range(3):
        for sizes in calls:
            inputs = vary(example_inputs(model, **sizes), seed)
            assert_bits_equal(model(**inputs)[0], plain(**inputs)[0])
    assert graphs.recorded == len(calls)
    assert [shape.replays for shape in handle.report().shapes] == [3] * len(calls)


def test_tensors_of_inference_mode_and_others_by_turns(model, captured):
    """Inside the mode and outside are graphs of their own; whichever tensors are given, their values are read."""
    plain = copy.deepcopy(model)
    _, graphs = captured(model)
    normal = vary(example_inputs(model), 1)
    with torch.inference_mode():
        calls = [normal, vary(example_inputs(model), 2), vary(normal, 3)]
    for _ in range(2):
        for inputs in calls:
            for mode in (torch.inference_mode, torch.no_grad):
                with mode():
                    assert_bits_equal(model(**inputs)[0], plain(**inputs)[0])
    assert graphs.recorded == 2


def test_outputs_belong_to_the_caller(model, captured):
    """Results of earlier steps and of other shapes stay as they were, and inputs are not written."""
    captured(model)
    plain = copy.deepcopy(model)
    kept = []
    for seed in range(4):
        for text in (5, 7):
            inputs = vary(example_inputs(model, text=text), seed)
            before = {k: v.clone() for k, v in inputs.items() if torch.is_tensor(v)}
            kept.append((model(**inputs)[0], plain(**inputs)[0]))
            for name, value in before.items():
                assert_bits_equal(inputs[name], value)
    for result, expected in kept:
        assert_bits_equal(result, expected)
    assert len({result.data_ptr() for result, _ in kept}) == len(kept)


def test_an_output_fed_back_as_an_input(model, captured):
    plain = copy.deepcopy(model)
    captured(model)
    ours, theirs = example_inputs(model), example_inputs(model)
    for _ in range(3):
        ours["hidden_states"] = model(**ours)[0]
        theirs["hidden_states"] = plain(**theirs)[0]
    assert_bits_equal(ours["hidden_states"], theirs["hidden_states"])


def test_a_dataclass_of_tensors_is_returned_as_one(model, captured):
    plain = copy.deepcopy(model)
    captured(model)
    inputs = example_inputs(model) | {"return_dict": True}
    for _ in range(2):
        result = model(**inputs)
        assert type(result) is Transformer2DModelOutput
        assert_bits_equal(result.sample, plain(**inputs).sample)


def test_an_expanded_timestep_and_a_slice(model, captured):
    """Strides of zero and strides with gaps are kept, and only what they reach is read."""
    plain = copy.deepcopy(model)
    _, graphs = captured(model)
    inputs = example_inputs(model, batch=2)
    wide = torch.randn(2, 16, 48, dtype=torch.bfloat16)
    for step in (0.25, 0.75):
        inputs["timestep"] = torch.tensor(step, dtype=torch.bfloat16).expand(2)
        inputs["hidden_states"] = (wide * step)[..., 8:24]
        assert_bits_equal(model(**inputs)[0], plain(**inputs)[0])
    assert graphs.recorded == 1


def test_positional_arguments(model, captured):
    plain = copy.deepcopy(model)
    captured(model)
    inputs = example_inputs(model)
    first = inputs.pop("hidden_states")
    assert_bits_equal(model(first, **inputs)[0], plain(first, **inputs)[0])


@pytest.mark.parametrize(
    "variant",
    [{"zero_cond_t": True}, {"use_additional_t_cond": True}, {"use_layer3d_rope": True}],
    ids=lambda v: next(iter(v)),
)
def test_variants(captured, variant):
    model = random_transformer(SMALL | variant)
    plain = copy.deepcopy(model)
    captured(model)
    for seed in range(2):
        inputs = vary(example_inputs(model), seed)
        assert_bits_equal(model(**inputs)[0], plain(**inputs)[0])


def test_a_prompt_mask(model, captured):
    plain = copy.deepcopy(model)
    captured(model)
    for ones in (5, 3):
        mask = torch.arange(5)[None] < torch.tensor([[5], [ones]])
        inputs = example_inputs(model, batch=2) | {"encoder_hidden_states_mask": mask}
        assert_bits_equal(model(**inputs)[0], plain(**inputs)[0])


def test_load_into_patch_and_set_compute_between_calls(model, captured, tmp_path):
    other = write_checkpoint(tmp_path / "other", seed=7)
    _, graphs = captured(model)
    inputs = example_inputs(model)
    own = model(**inputs)[0]

    svdq_compile.set_compute(model, "bf16")
    bf16 = model(**inputs)[0]
    assert_bits_equal(bf16, copy.deepcopy(model)(**inputs)[0])
    assert not torch.equal(bf16, own)
    svdq_compile.set_compute(model, "auto")
    assert_bits_equal(model(**inputs)[0], own)
    # The first graph again: tensors are shared between modes.
    assert graphs.recorded == 2

    with svdq_compile.patch(model, other):
        lent = model(**inputs)[0]
        assert_bits_equal(lent, copy.deepcopy(model)(**inputs)[0])
        assert not torch.equal(lent, own)
    assert_bits_equal(model(**inputs)[0], own)
    assert graphs.recorded == 3

    svdq_compile.load_into(model, other)
    assert_bits_equal(model(**inputs)[0], lent)
    assert graphs.recorded == 4


def test_weights_written_in_place_are_read_by_the_next_replay(model, captured):
    _, graphs = captured(model)
    inputs = example_inputs(model)
    before = model(**inputs)[0]
    model.proj_out.bias.data.add_(1)
    after = model(**inputs)[0]
    assert not torch.equal(before, after)
    assert_bits_equal(after, copy.deepcopy(model)(**inputs)[0])
    assert graphs.recorded == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_to_another_dtype(model, captured, dtype):
    captured(model)
    model(**example_inputs(model))
    model.to(dtype)
    inputs = example_inputs(model, dtype=dtype)
    assert_bits_equal(model(**inputs)[0], copy.deepcopy(model)(**inputs)[0])


def test_regional_and_whole_compile(model, captured, fresh_dynamo):
    inputs = example_inputs(model)
    blocks = copy.deepcopy(model)
    blocks.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    expected = blocks(**inputs)[0]
    _, graphs = captured(blocks)
    assert_bits_equal(blocks(**inputs)[0], expected)

    whole = copy.deepcopy(model)
    whole.compile(backend="aot_eager", fullgraph=True)
    expected = whole(**inputs)[0]
    own = whole._compiled_call_impl
    handle, graphs = captured(whole)
    assert_bits_equal(whole(**inputs)[0], expected)
    assert graphs.recorded == 1
    handle.release()
    assert whole._compiled_call_impl is own

    wrapped = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    expected = wrapped(**inputs)[0]
    _, graphs = captured(wrapped)
    assert_bits_equal(wrapped(**inputs)[0], expected)
    assert graphs.recorded == 1
    assert "_compiled_call_impl" not in wrapped._orig_mod.__dict__


def test_compiling_around_a_captured_model_compiles_the_model(model, captured, fresh_dynamo):
    inputs = example_inputs(model)
    expected = model(**inputs)[0]
    _, graphs = captured(model)
    assert_bits_equal(torch.compile(model, backend="eager", fullgraph=True)(**inputs)[0], expected)
    assert graphs.recorded == 0


def test_a_pipelines_denoising_loop_with_guidance(captured, denoise):
    """Two prompt lengths in turn, under the pipeline's cache contexts."""
    model = random_transformer(SMALL | {"in_channels": 64, "out_channels": 16})
    expected = [denoise(model, seed, steps=4) for seed in range(2)]
    handle, graphs = captured(model)
    for seed, right in enumerate(expected):
        assert_bits_equal(denoise(model, seed, steps=4), right)
    assert graphs.recorded == 2
    assert [shape.replays for shape in handle.report().shapes] == [8, 8]


@pytest.fixture
def sdpa_order():
    """``sdpa_order(places)`` moves as many of SDPA's backends from the front of its order to the end."""
    before = torch._C._get_sdp_priority_order()

    def turn(places):
        order = torch._C._get_sdp_priority_order()
        torch._C._set_sdp_priority_order(order[places:] + order[:places])

    yield turn
    torch._C._set_sdp_priority_order(before)


def before_each_run(model, act):
    """Lets a model's forward do something of its own first."""
    embed = model.time_text_embed.forward

    def forward(*args, **kwargs):
        act()
        return embed(*args, **kwargs)

    model.time_text_embed.forward = forward


def test_a_setting_made_at_its_first_use_does_not_make_two_graphs(model, captured, sdpa_order):
    """torch settles SDPA's order in a process's first attention, on GPUs for which it prefers cuDNN's."""
    turns = [1]
    before_each_run(model, lambda: sdpa_order(turns.pop() if turns else 0))
    handle, graphs = captured(model)
    for _ in range(3):
        model(**example_inputs(model))
    assert graphs.recorded == 1
    assert [shape.replays for shape in handle.report().shapes] == [3]


def test_a_setting_every_run_makes_anew_keeps_graphs_apart(model, captured, sdpa_order):
    """The settings a recorded run began with are not those the next call has."""
    # A replay runs no Python.
    before_each_run(model, lambda: sdpa_order(0 if graphs.depth else 1))
    _, graphs = captured(model)
    for _ in range(2):
        model(**example_inputs(model))
    assert graphs.recorded == 2


def test_a_setting_that_joins_those_of_another_graph_replaces_none(model, captured, sdpa_order):
    """Whatever settings are found, the forward makes them one and the same: the second graph stays beside the first."""
    order = torch._C._get_sdp_priority_order()
    before_each_run(model, lambda: torch._C._set_sdp_priority_order(order))
    handle, graphs = captured(model)
    for places in (0, 1, 0, 1):
        sdpa_order(places)
        model(**example_inputs(model))
    assert graphs.recorded == 2
    assert len(graphs.recordings) == len(handle.report().shapes) == 2
