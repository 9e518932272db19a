"""Linears of two streams and their residuals, compiled on a GPU, against float64."""

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code

from svdq_compile.ops.joint_linear import joint_linear
from svdq_compile.spec import COMPONENTS, Format
from svdq_compile.testing.oracle import assert_bits_equal, assert_within_budget
from svdq_compile.testing.weights import random_linear
from svdq_compile.testing.wide import wide_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("fresh_dynamo"),
]
OUT_FEATURES, IN_FEATURES = 304, (272, 2064)


class Joint(nn.Module):
    """The operator behind a tensor of both streams' tokens, as the pass puts it behind attention.

    Args:
        formats: of both linears.
        options: of both linears.
    """

    def __init__(self, formats=(Format.NVFP4_SVD, Format.NVFP4), **options):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.linears = nn.ModuleList(
            random_linear(OUT_FEATURES, k, format=format, generator=g, **options)
            for k, format in zip(IN_FEATURES, formats, strict=True)
        )

    def gates(self, modulation):
        return [each.unsqueeze(1) for each in modulation.chunk(3, dim=-1)[1:]]

    def forward(self, xs, residuals, modulation):
        parts = [[*(getattr(own.weight, name) for name in COMPONENTS), own.bias] for own in self.linears]
        compute = self.linears[0].weight.operator_compute
        return joint_linear(xs, *parts, residuals, self.gates(modulation), compute)

    def formula(self, xs, residuals, modulation, wide):
        given = zip(self.linears, xs, residuals, self.gates(modulation), strict=True)
        return [r.to(wide) + gate.to(wide) * wide_linear(own, x, wide) for own, x, r, gate in given]


def inputs(batch, tokens, dtype=torch.bfloat16):
    """x are slices of longer sequences."""
    g = torch.Generator().manual_seed(sum(tokens))

    def randn(*size):
        return torch.randn(size, generator=g).to(dtype).cuda()

    xs = [randn(batch, sum(tokens), k)[:, -count:] for count, k in zip(tokens, IN_FEATURES, strict=True)]
    return xs, [randn(batch, count, OUT_FEATURES) for count in tokens], randn(batch, 3 * OUT_FEATURES)


def assert_right(actual, module, arguments):
    low = module(*arguments)
    for result, exact, other in zip(actual, module.formula(*arguments, torch.float64), low, strict=True):
        assert result.is_contiguous()
        assert_within_budget(result, exact, low_precision=other)


@pytest.mark.parametrize("tokens", [(40, 5), (300, 129), (1500, 20)], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"formats": (Format.FP8_SVD, Format.NVFP4_SVD), "rank": 48, "bias": False},
        {"formats": 2 * (Format.FP8,), "dtype": torch.float16},
        {"dynamic": True},
        {"compute": "nvfp4"},
    ],
    ids=str,
)
def test_within_the_budget(tokens, batch, options):
    options = {"compute": "fp8"} | options
    module, arguments = Joint(**options).cuda(), inputs(batch, tokens, options.get("dtype", torch.bfloat16))
    compiled = torch.compile(module, backend="svdq", fullgraph=True)
    with torch.no_grad():
        actual, (code,) = run_and_get_code(compiled, *arguments)
        assert_right(actual, module, arguments)
        for repeated, result in zip(compiled(*arguments), actual, strict=True):
            assert_bits_equal(repeated, result)
    fused = options["compute"] == "fp8" and batch * min(tokens) > 16
    if options.get("formats") != 2 * (Format.FP8,):
        assert ("_residual_kernel" in code) == fused


def test_sizes_change():
    module = Joint(compute="fp8").cuda()
    compiled = torch.compile(module, backend="svdq", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for batch, tokens in ((2, (300, 129)), (2, (1500, 20)), (3, (17, 700)), (2, (64, 64)), (2, (1, 9))):
            arguments = inputs(batch, tokens)
            assert_right(compiled(*arguments), module, arguments)
