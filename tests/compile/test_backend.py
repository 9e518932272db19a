"""A checkpoint ModelOpt exported, compiled every way a user can: the same picture, and no compilation too many."""

import copy
import re
from pathlib import Path

import pytest
import torch

import svdq_compile
from svdq_compile._compat import FUNCTIONAL_LINEAR, CustomGraphPass
from svdq_compile.errors import FingerprintError, OptionError, StrictError
from svdq_compile.ops.feed_forward import feed_forward
from svdq_compile.ops.linear import linear
from svdq_compile.ops.linear_group import linear_group
from svdq_compile.spec import Format
from svdq_compile.testing.checkpoints import example_inputs
from svdq_compile.testing.graphs import RecordingBackend, unique_graphs
from svdq_compile.testing.oracle import assert_bits_equal, assert_within_budget
from svdq_compile.testing.weights import random_linear

EXPORT = Path(__file__).parents[1] / "data" / "modelopt-two-blocks"
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture(scope="module")
def loaded():
    return svdq_compile.load_transformer(EXPORT)


@pytest.fixture
def model(loaded):
    return copy.deepcopy(loaded)


def run(model, **sizes):
    return model(**example_inputs(model, **sizes))[0]


@pytest.fixture(scope="module")
def expected(loaded):
    """The eager result and the float64 oracle."""
    with torch.no_grad():
        eager = run(loaded)
        wide = copy.deepcopy(loaded).double()
        inputs = {
            k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v
            for k, v in example_inputs(loaded).items()
        }
        return eager, wide(**inputs)[0]


@pytest.mark.parametrize("backend", ["svdq", "inductor", "aot_eager"])
def test_whole_model(model, expected, backend):
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert_within_budget(run(compiled), expected[1], low_precision=expected[0])
    assert unique_graphs() == 1


@pytest.mark.parametrize("backend", ["svdq", "inductor", "aot_eager"])
def test_regional(model, expected, backend):
    """Two blocks of one recipe share one graph."""
    model.compile_repeated_blocks(backend=backend, fullgraph=True)
    assert_within_budget(run(model), expected[1], low_precision=expected[0])
    assert unique_graphs() == 1


def test_compiled_eagerly_is_bit_equal(model, expected):
    """Dynamo without a compiler changes nothing."""
    assert_bits_equal(run(torch.compile(model, backend="eager", fullgraph=True)), expected[0])


def test_every_quantised_linear_becomes_the_operator(model):
    recorder = RecordingBackend()
    run(torch.compile(model, backend=recorder, fullgraph=True))
    assert len(recorder.reports) == 1
    assert len(recorder.reports[0].matched) == 28
    assert len(recorder.reports[0].left) == recorder.count(FUNCTIONAL_LINEAR) == 6
    # What else there is: 5 groups of 16 linears, and 4 feed-forward layers of 8.
    assert (recorder.count(linear), recorder.count(linear_group), recorder.count(feed_forward)) == (4, 5, 4)
    formats = [match.fingerprint.spec.format for match in recorder.reports[0].matched]
    assert (formats.count(Format.NVFP4_SVD), formats.count(Format.NVFP4)) == (12, 16)


def test_a_block_of_another_kind_adds_one_graph(model):
    """One block becomes dense, as the first and last blocks of an export are; another gets another rank."""
    block = model.transformer_blocks[0]
    for module in block.modules():
        if isinstance(module, torch.nn.Linear):
            dense = torch.randn(module.out_features, module.in_features).bfloat16() / 16
            module.weight = torch.nn.Parameter(dense, requires_grad=False)
    eager = run(model)
    recorder = RecordingBackend()
    model.compile_repeated_blocks(backend=recorder, fullgraph=True)
    wide = copy.deepcopy(model).double()
    for block in wide.transformer_blocks:
        block._compiled_call_impl = None
    inputs = {
        k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in example_inputs(model).items()
    }
    assert_within_budget(run(model), wide(**inputs)[0], low_precision=eager)
    assert sorted(len(report.matched) for report in recorder.reports) == [0, 14]


def test_image_size_and_prompt_length_change(model):
    """The counts are what dynamic shapes cost Dynamo itself on this model: a specialised graph, then general ones."""
    recorder = RecordingBackend(lower=False)
    model.compile_repeated_blocks(backend=recorder, fullgraph=True)
    twin = copy.deepcopy(model)
    for block in twin.transformer_blocks:
        block._compiled_call_impl = None
    for sizes in ({"text": 5}, {"text": 7}, {"text": 9}, {"text": 12}):
        run(model, **sizes)
    assert len(recorder.reports) <= 3
    for sizes in ({"height": 6}, {"height": 6, "width": 8}, {"height": 2, "width": 2, "text": 3}):
        assert_bits_equal(run(model, **sizes), run(twin, **sizes))
    assert len(recorder.reports) <= 5


def test_dynamic_from_the_start_compiles_twice_at_most(model):
    recorder = RecordingBackend(lower=False)
    compiled = torch.compile(model, backend=recorder, fullgraph=True, dynamic=True)
    for sizes in ({}, {"text": 7}, {"text": 9, "height": 6}, {"height": 2}):
        assert_bits_equal(run(compiled, **sizes), run(model, **sizes))
    assert len(recorder.reports) <= 2


def test_batch_with_masks(model):
    """Two prompts of different length in one batch; what is masked cannot change the picture."""
    inputs = example_inputs(model, batch=2, text=6)
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    inputs["encoder_hidden_states_mask"] = mask
    eager = model(**inputs)[0]
    compiled = torch.compile(model, backend="svdq", fullgraph=True)
    wide = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
    oracle = copy.deepcopy(model).double()(**wide)[0]
    assert_within_budget(compiled(**inputs)[0], oracle, low_precision=eager)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_modes(mode):
    layer = random_linear(32, 48)
    x = torch.randn(5, 48).bfloat16()
    assert_bits_equal(torch.compile(layer, backend="svdq", mode=mode)(x), layer(x))


def test_inductors_options_pass_through():
    layer = random_linear(32, 48)
    x = torch.randn(5, 48).bfloat16()
    seen = []

    class Theirs(CustomGraphPass):
        def __call__(self, graph):
            seen.append(len(graph.find_nodes(op="call_function", target=linear)))

        def uuid(self):
            return "theirs"

    options = {"post_grad_custom_pre_pass": Theirs(), "fx_graph_cache": False, "epilogue_fusion": False}
    assert_bits_equal(torch.compile(layer, backend="svdq", options=options)(x), layer(x))
    assert seen == [1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"options": {"stric": True}}, "unknown option 'stric' \\(did you mean 'strict'"),
        ({"options": {"max_autotun": True}}, "did you mean 'max_autotune'"),
        ({"options": {"strict": 1}}, "'strict' is 1, needs a bool"),
        ({"options": {"max_autotune": "yes"}}, "needs a bool"),
        ({"mode": "max-autotun"}, "unknown mode 'max-autotun' \\(did you mean 'max-autotune'"),
    ],
    ids=["ours", "inductors", "our_type", "inductors_type", "mode"],
)
def test_unknown_options_are_refused_by_name(arguments, message):
    layer = random_linear(32, 48)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=message) as caught:
        torch.compile(layer, backend="svdq", **arguments)(torch.randn(5, 48).bfloat16())
    assert isinstance(caught.value.inner_exception, OptionError)


def test_strict_names_every_slower_path():
    layers = torch.nn.Sequential(random_linear(32, 48), *(random_linear(32, 32) for _ in range(6)))
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="need an NVIDIA GPU") as caught:
        torch.compile(layers, backend="svdq", options={"strict": True})(torch.randn(5, 48).bfloat16())
    error = caught.value.inner_exception
    assert isinstance(error, StrictError)
    kinds = re.findall(r"^  nvfp4_svd (\d+)->.*\): (.*)$", str(error), re.M)
    assert kinds == [("32", "1, 2, 3, 4 and 2 more"), ("48", "0")]
    assert "svdq_compile.explain" in str(error)


class Layered(torch.nn.Module):
    """Its forward is one function, whatever its layer is."""

    def __init__(self, out_features):
        super().__init__()
        self.layer = random_linear(out_features, 16)

    def forward(self, x):
        return self.layer(x)


def test_one_function_may_have_more_than_dynamos_eight_graphs():
    """As a block's has, whose kinds and sizes are many; with fullgraph=True the ninth would be an error."""
    for n in range(1, 11):
        layered = Layered(16 * n)
        layered.compile(backend="svdq", fullgraph=True)
        layered(torch.randn(5, 16).bfloat16())
    assert unique_graphs() == 10


def test_a_limit_somebody_set_stays():
    with torch._dynamo.config.patch(recompile_limit=3):
        torch.compile(random_linear(32, 48), backend="svdq")(torch.randn(5, 48).bfloat16())
        assert torch._dynamo.config.recompile_limit == 3


def test_strict_accepts_what_has_nothing_to_speed_up():
    dense = torch.nn.Linear(48, 32)
    x = torch.randn(5, 48)
    compiled = torch.compile(dense, backend="svdq", options={"strict": True})
    torch.testing.assert_close(compiled(x), dense(x))


def test_a_lying_fingerprint_is_refused():
    """Components that do not fit the fingerprint must not be computed with."""
    layer = random_linear(32, 48)
    x = torch.randn(5, 48).bfloat16()
    compiled = torch.compile(layer, backend="svdq")
    layer.weight.lora_up = layer.weight.lora_up[:-1]
    with pytest.raises(Exception, match="lora_up") as caught:
        compiled(x)
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), (FingerprintError, RuntimeError))


def test_other_uses_of_a_quantised_weight_are_refused_in_graphs():
    layer = random_linear(32, 48)

    def peek(x):
        return layer(x) + layer.weight.sum()

    with pytest.raises(Exception, match="dense weight"):
        torch.compile(peek, backend="svdq")(torch.randn(5, 48).bfloat16())


def test_explain_is_the_same_before_and_after_compiling(model):
    before = svdq_compile.explain(model)
    assert len(before.rows) == 34
    assert {row.kernel for row in before.rows if row.format != "dense"} == {"reference"}
    assert sum(row.nbytes for row in before.rows if row.format != "dense") < 4e6
    assert svdq_compile.explain(torch.compile(model, backend="svdq")) == before
    assert "12 x nvfp4_svd" in str(before)
    assert len(before.to_dict()["linears"]) == 34
