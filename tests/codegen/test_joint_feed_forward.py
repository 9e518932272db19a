"""The code Inductor generates for the feed-forward layers of two streams, on GPUs that need not be there."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from svdq_compile.ops.joint_feed_forward import joint_feed_forward
from svdq_compile.spec import COMPONENTS, Format
from svdq_compile.testing.fake_gpu import compile_on_fake_gpu, fake_gpu
from svdq_compile.testing.generated import compile_kernel, kernels, launches
from svdq_compile.testing.ptx import CUOBJDUMP, SHARED_MEMORY_BYTES, spills
from svdq_compile.testing.weights import random_linear

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
FEATURES, HIDDEN = 128, 512

TWO = [
    *(2 * ["_prepare_kernel", "_gelu_quantize_kernel"]),
    *(2 * ["_expand_kernel"]),
    "_residual_kernel",
]
"""Launches, but for what sums down-projections: no activation kernel for the second linears, one GEMM for both; weights
of one size are unpacked together.
"""


class Streams(nn.Module):
    """Two feed-forward layers with gate and residual, as a transformer block has them."""

    def __init__(self, first=(), second=()):
        super().__init__()
        self.layers = nn.ModuleList()
        for options in (dict(first), dict(second)):
            options = {"compute": "fp8"} | options
            linears = random_linear(HIDDEN, FEATURES, **options), random_linear(FEATURES, HIDDEN, **options)
            self.layers.append(nn.ModuleList(linears))

    def forward(self, xs, gates):
        outs = []
        for x, gate, (up, down) in zip(xs, gates, self.layers, strict=True):
            outs.append(x + gate * down(F.gelu(up(x), approximate="tanh")))
        return outs


class Operator(Streams):
    """The operator itself."""

    def forward(self, xs, gates):
        parts = [
            [*(getattr(linear.weight, name) for name in COMPONENTS), linear.bias]
            for layer in self.layers
            for linear in layer
        ]
        mode = self.layers[0][0].weight.operator_compute
        return joint_feed_forward(xs, *parts, xs, gates, mode, mode)


def inputs(*tokens, dtype=torch.bfloat16):
    xs = [torch.randn(1, count, FEATURES).to(dtype) for count in tokens]
    return xs, [torch.randn(1, 1, FEATURES).to(dtype) for _ in tokens]


def generate(module, arguments, capability=(9, 0), **options):
    with fake_gpu(capability):
        return compile_on_fake_gpu(module, arguments, backend="svdq", fullgraph=True, **options)


def stem(name):
    return "triton_tem" if name.startswith("triton_tem") else name.rpartition("_")[0]


def stems(code):
    return [name for name in map(stem, launches(code)) if name not in ("triton_poi_fused", "_sum_kernel")]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {"format": Format.NVFP4}),
        ({"rank": 64}, {"rank": 16, "bias": False}),
        ({"format": Format.NVFP4}, {}),
    ],
    ids=str,
)
def test_the_second_linears_are_one_launch(first, second, dynamic):
    code = generate(Streams(first, second), inputs(600, 130), dynamic=dynamic)
    launched = [name for name in stems(code) if not name.startswith("triton_p")]
    assert sorted(launched) == sorted(TWO)
    (kernel,) = [each for each in kernels(code) if stem(each.name) == "_residual_kernel"]
    (compiled,) = compile_kernel(kernel.source, "_residual_kernel", (9, 0))
    assert "e4m3.e4m3" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= SHARED_MEMORY_BYTES[9, 0]
    assert not CUOBJDUMP.exists() or spills(compiled) == 0


def test_expanded_weights_need_no_unpacking():
    code = generate(Streams({"format": Format.FP8_SVD}, {"format": Format.FP8}), inputs(600, 130))
    assert "_expand_kernel" not in stems(code)
    assert stems(code).count("_residual_kernel") == 1


SHAPES = [
    ({"compute": "bf16"}, (9, 0), 130),
    ({"compute": "nvfp4"}, (9, 0), 130),
    ({}, (10, 0), 130),
    ({}, (9, 0), 8),
    ({"dynamic": True}, (9, 0), 130),
]


@pytest.mark.parametrize(("options", "capability", "tokens"), SHAPES)
def test_what_the_kernel_does_not_compute_is_lowered_stream_by_stream(options, capability, tokens):
    """Whether or not a graph has the operator, which the pass would not have put there."""
    arguments = inputs(600, tokens)
    apart = generate(Streams(options, options), arguments, capability)
    together = generate(Operator(options, options), arguments, capability)
    # Inductor's own kernels bear the operator's name.
    names = [name.replace("joint_", "") for name in stems(together)]
    assert sorted(names) == sorted(stems(apart))
    assert not any("torch.ops.svdq" in name for name in launches(together))


def test_float32_stays_the_operators_of_linears():
    code = generate(Operator(), inputs(600, 130, dtype=torch.float32))
    assert launches(code).count("torch.ops.svdq.linear.default") == 4
