"""``svdq::joint_feed_forward``: the steps of two streams, one behind the other."""

import pytest
import torch
import torch.nn.functional as F

from svdq_compile.errors import SvdqError
from svdq_compile.ops.joint_feed_forward import joint_feed_forward
from svdq_compile.ops.modes import COMPUTE_MODES, NEEDS_CODES
from svdq_compile.spec import COMPONENTS, Format
from svdq_compile.testing.oracle import assert_bits_equal
from svdq_compile.testing.weights import random_linear

# test_schema compares outputs with torch.allclose, which has no float8.
OPCHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
FORMATS = [Format.NVFP4_SVD, Format.NVFP4, Format.FP8, Format.FP8_SVD]
FEATURES, HIDDEN = 48, 80


class Layers:
    """Two streams' linears, first and second each, and their activations."""

    def __init__(self, format=Format.NVFP4_SVD, other=None, dtype=torch.bfloat16, **options):
        g = torch.Generator().manual_seed(0)
        self.linears = [
            [
                random_linear(n, k, format=each, generator=g, dtype=dtype, **options)
                for n, k in ((HIDDEN, FEATURES), (FEATURES, HIDDEN))
            ]
            for each in (format, other or format)
        ]
        self.x, self.residual, self.gate = (
            [torch.randn(2, tokens, FEATURES, generator=g).to(dtype) for tokens in sizes]
            for sizes in ((7, 3), (7, 3), (1, 1))
        )

    @property
    def arguments(self):
        parts = [
            [*(getattr(linear.weight, name) for name in COMPONENTS), linear.bias]
            for layer in self.linears
            for linear in layer
        ]
        mode = self.linears[0][0].weight.operator_compute
        return self.x, *parts, self.residual, self.gate, mode, mode

    def expected(self):
        given = zip(self.x, self.linears, self.residual, self.gate, strict=True)
        return [residual + gate * down(F.gelu(up(x), approximate="tanh")) for x, (up, down), residual, gate in given]


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("compute", COMPUTE_MODES)
def test_bits_are_those_of_the_steps(format, compute):
    if format is Format.FP8_SVD and compute in NEEDS_CODES:
        pytest.skip("gave up the codes")
    layers = Layers(format, compute=compute)
    for actual, expected in zip(joint_feed_forward(*layers.arguments), layers.expected(), strict=True):
        assert actual.is_contiguous()
        assert_bits_equal(actual, expected)


@pytest.mark.parametrize("other", FORMATS[1:2], ids=str)
def test_formats_of_the_streams_may_differ(other):
    layers = Layers(other=other, compute="fp8")
    for actual, expected in zip(joint_feed_forward(*layers.arguments), layers.expected(), strict=True):
        assert_bits_equal(actual, expected)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(format, bias):
    torch.library.opcheck(joint_feed_forward, Layers(format, bias=bias).arguments, test_utils=OPCHECKS)


WRONG = {
    "an activation less": (0, lambda x: x[:1], "two of each"),
    "a residual less": (5, lambda residual: residual[:1], "two of each"),
    "a gate less": (6, lambda gate: gate[:1], "two of each"),
    "two dimensions": (0, lambda x: [x[0], x[1][0]], "three dimensions"),
    "dtypes of the streams": (0, lambda x: [x[0], x[1].half()], "the streams are"),
    "in_features": (0, lambda x: [x[0], x[1][..., :-16]], "in_features differ"),
    "hidden features": (1, lambda parts: [parts[0][:-16], *parts[1:]], "first linears' out_features"),
    "out_features": (4, lambda parts: [parts[0][:-16], *parts[1:]], "second linears' out_features"),
    "a residual's dtype": (5, lambda residual: [residual[0].float(), residual[1]], "need x's dtype"),
    "a residual's tokens": (5, lambda residual: residual[::-1], "a residual is"),
    "a gate's shape": (6, lambda gate: [gate[0][:, 0], gate[1]], "a gate is"),
}


@pytest.mark.parametrize(("position", "change", "message"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_refused(position, change, message):
    given = list(Layers().arguments)
    given[position] = change(given[position])
    with pytest.raises(RuntimeError, match=message):
        joint_feed_forward(*given)


def test_it_has_no_gradient():
    layers = Layers(dtype=torch.float32)
    layers.x[0].requires_grad_()
    with torch.enable_grad(), pytest.raises(SvdqError, match="no gradient"):
        sum(each.sum() for each in joint_feed_forward(*layers.arguments)).backward()
