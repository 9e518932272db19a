"""Compiled modules on a GPU: our kernels with Inductor's epilogues, against float64 and against eager code."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor.utils import run_and_get_code

from svdq_compile.spec import Format
from svdq_compile.testing.oracle import assert_bits_equal, assert_within_budget
from svdq_compile.testing.weights import random_linear
from svdq_compile.testing.wide import wide_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("fresh_dynamo"),
]

MODES = ("nvfp4", "fp8", "bf16")


class Gated(nn.Module):
    """``residual + gate * gelu(linear(x))``: everything Inductor fuses behind a linear of a transformer block."""

    def __init__(self, mode, **options):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layer = random_linear(320, 272, compute=mode, generator=generator, **options)

    def forward(self, x, gate, residual):
        return residual + gate * F.gelu(self.layer(x), approximate="tanh")

    def formula(self, x, gate, residual, wide):
        y = wide_linear(self.layer, x, wide)
        return residual.to(wide) + gate.to(wide) * F.gelu(y, approximate="tanh")


def inputs(tokens=300, batch=2):
    g = torch.Generator().manual_seed(1)
    sizes = (batch, tokens, 272), (batch, 1, 320), (batch, tokens, 320)
    return tuple(torch.randn(size, generator=g).to(torch.bfloat16).cuda() for size in sizes)


def assert_right(module, actual, arguments):
    oracle = module.formula(*arguments, torch.float64)
    assert_within_budget(actual, oracle, low_precision=module(*arguments))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_rows_behind_the_operand_do_not_matter(tokens, dynamic):
    module, arguments = Gated("fp8", format=Format.FP8_SVD).cuda(), inputs(tokens)
    compiled = torch.compile(module, backend="svdq", fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        compiled(*arguments)
        # What the operand's memory holds before.
        torch.full((2**19,), float("nan"), device="cuda")
        assert_right(module, compiled(*arguments), arguments)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [{}, {"dynamic": True}, {"rank": 48}, {"bias": False, "smooth": False}], ids=str)
def test_one_template_with_its_epilogue(mode, options):
    module, arguments = Gated(mode, **options).cuda(), inputs()
    compiled = torch.compile(module, backend="svdq", fullgraph=True)
    with torch.no_grad():
        actual, codes = run_and_get_code(compiled, *arguments)
        assert_right(module, actual, arguments)
    (code,) = codes
    assert code.count("def triton_tem_") == 1
    assert "extern_kernels." not in code


@pytest.mark.parametrize("format", [Format.NVFP4, Format.FP8, Format.FP8_SVD], ids=str)
def test_other_formats(format):
    module, arguments = Gated("fp8", format=format).cuda(), inputs()
    with torch.no_grad():
        assert_right(module, torch.compile(module, backend="svdq")(*arguments), arguments)


@pytest.mark.parametrize("mode", MODES)
def test_any_number_of_tokens_with_three_graphs(mode):
    module = Gated(mode).cuda()
    compiled = torch.compile(module, backend="svdq", dynamic=True)
    with torch.no_grad():
        for tokens in (300, 129, 17, 1000, 2, 1):
            arguments = inputs(tokens, batch=1)
            assert_right(module, compiled(*arguments), arguments)
    # Up to 16 tokens are another graph, and one token is: sizes of 1 are never symbolic.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


def test_a_marked_dimension():
    module = Gated("fp8").cuda()
    compiled = torch.compile(module, backend="svdq", fullgraph=True)
    # Up to 16 tokens are another graph.
    for tokens, graphs in ((300, 1), (40, 1), (1024, 1), (8, 2), (300, 2)):
        arguments = inputs(tokens, batch=1)
        for argument in (arguments[0], arguments[2]):
            torch._dynamo.mark_dynamic(argument, 1)
        with torch.no_grad():
            assert_right(module, compiled(*arguments), arguments)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("mode", MODES)
def test_float16(mode):
    module = Gated(mode, dtype=torch.float16).cuda()
    arguments = tuple(argument.half() for argument in inputs())
    with torch.no_grad():
        assert_right(module, torch.compile(module, backend="svdq", fullgraph=True)(*arguments), arguments)


def test_max_autotune_of_features_cublas_does_not_take():
    """cuBLAS's e4m3 GEMM, one of the candidates, needs a multiple of 16."""
    layer = random_linear(72, 272, compute="fp8").cuda()
    x = inputs(1000)[0]
    compiled = torch.compile(layer, backend="svdq", mode="max-autotune-no-cudagraphs")
    with torch.no_grad():
        wide, low = (wide_linear(layer, x, dtype) for dtype in (torch.float64, torch.bfloat16))
        assert_within_budget(compiled(x), wide, low_precision=low)


@pytest.mark.parametrize("mode", MODES)
def test_results_of_two_billion_elements(mode, gpu_memory):
    gpu_memory(40)
    layers = nn.Sequential(random_linear(12288, 64, compute=mode), nn.GELU()).cuda()
    x = torch.randn(180_000, 64, device="cuda").bfloat16()
    with torch.no_grad():
        y = torch.compile(layers, backend="svdq", fullgraph=True)(x)
        for rows in (slice(0, 200), slice(-200, None)):
            wide, low = (layers[1](wide_linear(layers[0], x[rows], dtype)) for dtype in (torch.float64, torch.bfloat16))
            assert_within_budget(y[rows], wide, low_precision=low)


def test_a_slice_of_x():
    module = Gated("fp8").cuda()
    x, gate, residual = inputs()
    compiled = torch.compile(lambda x: module(x[:, 3:], gate, residual[:, 3:]), backend="svdq")
    with torch.no_grad():
        assert_right(module, compiled(x), (x[:, 3:], gate, residual[:, 3:]))


@pytest.mark.parametrize("mode", MODES)
def test_cuda_graphs_change_no_bit(mode):
    module = Gated(mode).cuda()
    plain = torch.compile(module, backend="svdq")
    with torch.no_grad():
        expected = [plain(*inputs(tokens)).clone() for tokens in (300, 40)]
        torch._dynamo.reset()
        captured = torch.compile(module, backend="svdq", mode="reduce-overhead")
        for _ in range(4):
            for tokens, wanted in zip((300, 40), expected):
                torch.compiler.cudagraph_mark_step_begin()
                assert_bits_equal(captured(*inputs(tokens)).clone(), wanted)


def test_max_autotune():
    module, arguments = Gated("fp8").cuda(), inputs(1000)
    compiled = torch.compile(module, backend="svdq", mode="max-autotune-no-cudagraphs")
    with torch.no_grad():
        assert_right(module, compiled(*arguments), arguments)


def test_strict_accepts_the_device():
    module, arguments = Gated("auto").cuda(), inputs()
    with torch.no_grad():
        torch.compile(module, backend="svdq", options={"strict": True})(*arguments)


def test_a_real_block():
    """A double-stream block of the released size, compiled as one region."""
    from diffusers import QwenImageTransformer2DModel  # noqa: F401

    from svdq_compile.testing.checkpoints import QWEN_IMAGE, example_inputs
    from svdq_compile.testing.random_model import random_transformer

    config = QWEN_IMAGE | {"num_layers": 1}
    model = random_transformer(config, recipe="all", blocks_kept=0, device="cuda", compute="fp8")
    with torch.no_grad():
        arguments = example_inputs(model, height=64, width=64, text=136, device="cuda")
        eager = model(**arguments)[0]
        exact = _with_compute(model, "bf16")(**arguments)[0]
        _with_compute(model, "fp8").compile_repeated_blocks(backend="svdq", fullgraph=True)
        compiled, codes = run_and_get_code(lambda: model(**arguments)[0])
    (code,) = codes
    launched = [line.strip() for line in code.splitlines() if ".run(" in line]
    print("launches of the block:", len(launched))
    # q, k and v of text and image are one GEMM, both linears behind attention one, the second ones of both feed-forward
    # layers one, and so the 14 linears are 7 kernels.
    assert sum(line.startswith("triton_tem_") for line in launched) == 2
    assert sum(line.startswith("_heads_kernel") for line in launched) == 1
    assert sum(line.startswith("_residual_kernel") for line in launched) == 2
    assert sum(line.startswith("_gelu_quantize_kernel") for line in launched) == 2
    assert "extern_kernels." not in code
    # Both round differently; neither may be farther from the unquantised activations than twice the other.
    error = (eager - exact).float().norm()
    assert (compiled - exact).float().norm() <= 2 * error


def _with_compute(model, mode):
    from svdq_compile import set_compute

    set_compute(model, mode)
    return model
