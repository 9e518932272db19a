"""Two quantised linears with GELU between them, compiled on a GPU, against float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor.utils import run_and_get_code

from svdq_compile.spec import Format
from svdq_compile.testing.oracle import assert_within_budget
from svdq_compile.testing.weights import random_linear
from svdq_compile.testing.wide import wide_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("fresh_dynamo"),
]


class MLP(nn.Module):
    def __init__(self, **options):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.up = random_linear(528, 272, generator=g, **options)
        self.down = random_linear(320, 528, generator=g, **options)

    def forward(self, x, gate, residual):
        return residual + gate * self.down(F.gelu(self.up(x), approximate="tanh"))

    def formula(self, x, gate, residual, wide):
        hidden = F.gelu(wide_linear(self.up, x, wide), approximate="tanh").to(x.dtype)
        return residual.to(wide) + gate.to(wide) * wide_linear(self.down, hidden, wide)


@pytest.mark.parametrize("tokens", [5, 129, 1500])
@pytest.mark.parametrize(
    "options",
    [
        {"compute": "fp8"},
        {"compute": "fp8", "format": Format.NVFP4},
        {"compute": "fp8", "format": Format.FP8_SVD, "rank": 48},
        {"compute": "fp8", "dtype": torch.float16, "bias": False},
        {"compute": "fp8", "dynamic": True},
        {"compute": "nvfp4"},
        {"compute": "bf16"},
    ],
    ids=str,
)
def test_within_the_budget(tokens, options):
    module = MLP(**options).cuda()
    g = torch.Generator().manual_seed(tokens)
    dtype = options.get("dtype", torch.bfloat16)
    sizes = (2, tokens, 272), (2, 1, 320), (2, tokens, 320)
    arguments = tuple(torch.randn(size, generator=g).to(dtype).cuda() for size in sizes)
    with torch.no_grad():
        actual, (code,) = run_and_get_code(torch.compile(module, backend="svdq", fullgraph=True), *arguments)
        oracle = module.formula(*arguments, torch.float64)
        assert_within_budget(actual, oracle, low_precision=module(*arguments))
        again = torch.compile(module, backend="svdq", fullgraph=True)(*arguments)
        assert torch.equal(again, actual)
    fused = options["compute"] == "fp8" and "dynamic" not in options
    if tokens == 1500 or not fused:
        assert ("_gelu_quantize_kernel" in code) == fused
