"""The feed-forward layers of two streams, compiled on a GPU, against float64."""

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
FEATURES, HIDDEN = 272, 528


class Streams(nn.Module):
    """``residual + gate * layer(x)`` of two streams, whose linears may be of different formats."""

    def __init__(self, *options):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList()
        for each in options:
            up, down = (random_linear(*size, generator=g, **each) for size in ((HIDDEN, FEATURES), (FEATURES, HIDDEN)))
            self.layers.append(nn.ModuleList((up, down)))

    def forward(self, xs, gates, residuals):
        out = []
        for (up, down), x, gate, residual in zip(self.layers, xs, gates, residuals, strict=True):
            out.append(residual + gate * down(F.gelu(up(x), approximate="tanh")))
        return out

    def formula(self, xs, gates, residuals, wide):
        out = []
        for (up, down), x, gate, residual in zip(self.layers, xs, gates, residuals, strict=True):
            hidden = F.gelu(wide_linear(up, x, wide), approximate="tanh").to(x.dtype)
            out.append(residual.to(wide) + gate.to(wide) * wide_linear(down, hidden, wide))
        return out


def inputs(tokens, dtype=torch.bfloat16, batch=2):
    g = torch.Generator().manual_seed(sum(tokens))

    def randn(*size):
        return torch.randn(size, generator=g).to(dtype).cuda()

    gates = [randn(batch, 1, FEATURES) for _ in tokens]
    xs, residuals = ([randn(batch, count, FEATURES) for count in tokens] for _ in range(2))
    return xs, gates, residuals


def assert_right(module, actual, arguments):
    exact, low = module.formula(*arguments, torch.float64), module(*arguments)
    for result, wide, other in zip(actual, exact, low, strict=True):
        assert result.is_contiguous()
        assert_within_budget(result, wide, low_precision=other)


FP8 = {"compute": "fp8"}
KINDS = {
    "mixed recipe": (FP8, FP8 | {"format": Format.NVFP4}),
    "all recipe": (FP8, FP8 | {"rank": 48}),
    "text ahead": (FP8 | {"format": Format.NVFP4}, FP8),
    "expanded": (FP8 | {"format": Format.FP8_SVD}, FP8 | {"format": Format.FP8, "bias": False}),
    "float16": tuple([FP8 | {"dtype": torch.float16}] * 2),
    "dynamic scales": (FP8 | {"dynamic": True}, FP8),
    "nvfp4": tuple([{"compute": "nvfp4"}] * 2),
}


@pytest.mark.parametrize("tokens", [(5, 40), (300, 129), (1500, 20), (20, 700)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_within_the_budget(tokens, kind):
    module = Streams(*KINDS[kind]).cuda()
    arguments = inputs(tokens, KINDS[kind][0].get("dtype", torch.bfloat16))
    with torch.no_grad():
        actual, (code,) = run_and_get_code(torch.compile(module, backend="svdq", fullgraph=True), *arguments)
        assert_right(module, actual, arguments)
        again = torch.compile(module, backend="svdq", fullgraph=True)(*arguments)
        for repeated, result in zip(again, actual, strict=True):
            assert_bits_equal(repeated, result)
    launched = [line for line in code.splitlines() if line.strip().startswith("_residual_kernel") and ".run(" in line]
    if kind == "nvfp4":
        assert not launched
    elif kind != "dynamic scales" and min(tokens) > 16:
        assert len(launched) == 1


def test_sizes_change():
    module = Streams(*KINDS["mixed recipe"]).cuda()
    compiled = torch.compile(module, backend="svdq", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for tokens in ((300, 129), (129, 300), (2000, 64), (17, 17), (640, 384), (300, 8)):
            arguments = inputs(tokens, batch=1)
            assert_right(module, compiled(*arguments), arguments)
