"""ModelOpt's export on a GPU: loaded there, compiled there, moved away and back."""

import copy
from pathlib import Path

import pytest
import torch

import svdq_compile
from svdq_compile.ops.weight import SVDQWeight
from svdq_compile.testing.checkpoints import example_inputs
from svdq_compile.testing.graphs import unique_graphs
from svdq_compile.testing.oracle import assert_bits_equal, assert_within_budget

EXPORT = Path(__file__).parents[1] / "data" / "modelopt-two-blocks"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("fresh_dynamo"),
]


@pytest.fixture(scope="module")
def loaded():
    """In nvfp4 mode, which CPUs and every GPU have: what ``auto`` computes differs."""
    return svdq_compile.load_transformer(EXPORT, device="cuda", compute="nvfp4")


@pytest.fixture
def model(loaded):
    return copy.deepcopy(loaded)


def run(model, **sizes):
    return model(**example_inputs(model, device="cuda", **sizes))[0]


@pytest.fixture(scope="module")
def expected(loaded):
    """The CPU's bfloat16 result and the float64 oracle."""
    with torch.no_grad():
        cpu = copy.deepcopy(loaded).to("cpu")
        inputs = example_inputs(cpu)
        narrow = cpu(**inputs)[0]
        wide = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
        return narrow, cpu.double()(**wide)[0]


def test_everything_is_on_the_device(loaded):
    for parameter in loaded.parameters():
        parts = parameter.parts().values() if isinstance(parameter, SVDQWeight) else [parameter]
        assert {part.device.type for part in parts} == {"cuda"}


def test_eager(model, expected):
    assert_within_budget(run(model), expected[1], low_precision=expected[0])


@pytest.mark.parametrize("backend", ["svdq", "inductor", "aot_eager"])
@pytest.mark.parametrize("regional", [True, False], ids=["regional", "whole"])
def test_compiled(model, expected, backend, regional):
    if regional:
        model.compile_repeated_blocks(backend=backend, fullgraph=True)
    else:
        model = torch.compile(model, backend=backend, fullgraph=True)
    assert_within_budget(run(model), expected[1], low_precision=expected[0])
    assert unique_graphs() == 1


def test_cuda_graphs(model, expected):
    compiled = torch.compile(model, backend="svdq", mode="reduce-overhead", fullgraph=True)
    results = []
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        results.append(run(compiled).clone())
    assert_within_budget(results[0], expected[1], low_precision=expected[0])
    for result in results[1:]:
        assert_bits_equal(result, results[0])


def test_eager_is_deterministic_and_moves_back_and_forth(model):
    first = run(model)
    assert_bits_equal(run(model.to("cpu").to("cuda")), first)


def test_sequential_offload(model):
    from accelerate import cpu_offload

    first = run(model)
    offloaded = cpu_offload(model.to("cpu"), execution_device=torch.device("cuda"))
    assert_bits_equal(run(offloaded), first)
    assert_bits_equal(run(offloaded), first)


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_group_offload(model, stream):
    first = run(model)
    model.to("cpu")
    model.enable_group_offload(
        onload_device=torch.device("cuda"),
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=stream,
    )
    assert_bits_equal(run(model), first)
    assert_bits_equal(run(model), first)


def test_patch_on_the_device(model):
    from diffusers import QwenImageTransformer2DModel

    own = QwenImageTransformer2DModel.from_config(model.config).bfloat16().cuda().eval()
    before = run(own)
    with svdq_compile.patch(own, EXPORT, compute="nvfp4"):
        assert_bits_equal(run(own), run(model))
    assert_bits_equal(run(own), before)
