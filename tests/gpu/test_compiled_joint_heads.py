"""q, k and v of two streams, normalised, rotated and joined, compiled on a GPU, against float64."""

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code

from svdq_compile.ops.joint_heads import joint_heads
from svdq_compile.spec import Format
from svdq_compile.testing.oracle import assert_bits_equal, assert_within_budget
from svdq_compile.testing.weights import random_linear, share_activation
from svdq_compile.testing.wide import wide_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("fresh_dynamo"),
]
HEADS, IN_FEATURES, EPS = 3, 272, 1e-6


class Joint(nn.Module):
    """The operator on two streams, of a format each; the first one's norms have no weight."""

    def __init__(self, head_dim, formats=(Format.NVFP4_SVD, Format.NVFP4_SVD), **options):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.head_dim = head_dim
        self.streams = nn.ModuleList()
        for format in formats:
            options["format"] = format
            linears = [random_linear(HEADS * head_dim, IN_FEATURES, generator=g, **options) for _ in range(3)]
            share_activation(*linears)
            self.streams.append(nn.ModuleList(linears))
        dtype = options.get("dtype", torch.bfloat16)
        for name in ("norm_q", "norm_k"):
            self.register_buffer(name, torch.randn(head_dim, generator=g).to(dtype))

    @property
    def norms(self):
        return [None, None, self.norm_q, self.norm_k]

    def forward(self, xs, tables):
        lists = []
        for linears in self.streams:
            weights = [linear.weight for linear in linears]
            own = [getattr(w, name) for name in ("qweight", "weight_scale", "weight_scale_2") for w in weights]
            shared = [getattr(weights[0], name) for name in ("input_scale", "pre_quant_scale", "lora_down")]
            lists.append([*own, *shared, *(w.lora_up for w in weights), *(linear.bias for linear in linears)])
        compute = self.streams[0][0].weight.operator_compute
        return joint_heads(xs, *lists, self.norms, tables, self.head_dim, EPS, compute)

    def formula(self, xs, tables, wide):
        parts = []
        for i, (linears, x, table) in enumerate(zip(self.streams, xs, tables, strict=True)):
            ys = [wide_linear(linear, x, wide).unflatten(-1, (HEADS, self.head_dim)) for linear in linears]
            cos, sin = table.to(wide)[:, None].unbind(-1)
            for member, norm in enumerate(self.norms[2 * i : 2 * i + 2]):
                y = ys[member] * torch.rsqrt(ys[member].pow(2).mean(-1, keepdim=True) + EPS)
                y = y if norm is None else y * norm.to(wide)
                real, imaginary = y.unflatten(-1, (-1, 2)).unbind(-1)
                turned = real * cos - imaginary * sin, real * sin + imaginary * cos
                ys[member] = torch.stack(turned, -1).flatten(-2)
            parts.append(ys)
        return [torch.cat(pair, dim=1) for pair in zip(*parts, strict=True)]


@pytest.mark.parametrize("tokens", [(5, 40), (129, 300), (20, 1500)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"head_dim": 128, "compute": "fp8"},
        {"head_dim": 128, "compute": "fp8", "formats": (Format.NVFP4, Format.NVFP4_SVD), "rank": 32},
        {"head_dim": 64, "compute": "fp8", "formats": (Format.FP8_SVD, Format.FP8_SVD), "rank": 48, "bias": False},
        {"head_dim": 128, "compute": "fp8", "formats": (Format.FP8_SVD, Format.NVFP4), "dtype": torch.float16},
        {"head_dim": 64, "compute": "fp8", "dynamic": True},
        {"head_dim": 128, "compute": "nvfp4"},
    ],
    ids=str,
)
def test_within_the_budget(tokens, options):
    module = Joint(**options).cuda()
    g = torch.Generator().manual_seed(sum(tokens))
    dtype = options.get("dtype", torch.bfloat16)
    xs = [torch.randn(2, count, IN_FEATURES, generator=g).to(dtype).cuda() for count in tokens]
    angles = [torch.randn(count, options["head_dim"] // 2, generator=g).cuda() * 9 for count in tokens]
    tables = [torch.stack((angle.cos(), angle.sin()), -1) for angle in angles]
    with torch.no_grad():
        actual, (code,) = run_and_get_code(torch.compile(module, backend="svdq", fullgraph=True), xs, tables)
        again = torch.compile(module, backend="svdq", fullgraph=True)(xs, tables)
        low = module(xs, tables)
        for result, repeated, exact, other in zip(
            actual, again, module.formula(xs, tables, torch.float64), low, strict=True
        ):
            assert result.is_contiguous()
            assert_within_budget(result, exact, low_precision=other)
            assert_bits_equal(repeated, result)
    fused = options["compute"] == "fp8" and min(tokens) > 16
    if fused or options["compute"] != "fp8":
        assert ("_heads_kernel" in code) == fused
