"""LayerNorm, modulation and quantised linears, compiled on a GPU, against float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor.utils import run_and_get_code

from svdq_compile.testing.oracle import assert_within_budget
from svdq_compile.testing.weights import random_linear
from svdq_compile.testing.wide import wide_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("fresh_dynamo"),
]


class Normed(nn.Module):
    """Two linears on ``layer_norm(x) * (1 + scale) + shift``, as a transformer block has them."""

    def __init__(self, **options):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.first, self.second = (random_linear(n, 272, generator=g, **options) for n in (320, 80))

    def forward(self, x, scale, shift):
        y = F.layer_norm(x, (272,), None, None, 1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
        return self.first(y), self.second(y)

    def formula(self, x, scale, shift, wide):
        x, scale, shift = (v.to(wide) for v in (x, scale, shift))
        y = F.layer_norm(x, (272,), None, None, 1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
        return [wide_linear(layer, y.to(layer.weight.dtype), wide) for layer in (self.first, self.second)]


@pytest.mark.parametrize(("batch", "tokens"), [(1, 5), (1, 1500), (2, 700)])
@pytest.mark.parametrize("mode", ["fp8", "nvfp4", "bf16"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_within_the_budget(mode, dynamic, batch, tokens):
    module = Normed(compute=mode, dynamic=dynamic).cuda()
    g = torch.Generator().manual_seed(tokens)
    x, scale, shift = (
        torch.randn(size, generator=g).bfloat16().cuda() for size in ((batch, tokens, 272), (batch, 272), (batch, 272))
    )
    x = x * 3 + 1
    with torch.no_grad():
        compiled = torch.compile(module, backend="svdq", fullgraph=True)
        actual, (code,) = run_and_get_code(compiled, x, scale, shift)
        eager = module(x, scale, shift)
        for result, oracle, low in zip(actual, module.formula(x, scale, shift, torch.float64), eager, strict=True):
            assert_within_budget(result, oracle, low_precision=low)
    assert "modulated_norm" in code
