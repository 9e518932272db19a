"""``svdq::joint_linear``: diffusers' own steps, one stream behind the other."""

import pytest
import torch

from svdq_compile.errors import SvdqError
from svdq_compile.ops.joint_linear import joint_linear
from svdq_compile.ops.modes import COMPUTE_MODES, NEEDS_CODES
from svdq_compile.spec import COMPONENTS, Format
from svdq_compile.testing.oracle import assert_bits_equal
from svdq_compile.testing.weights import random_linear

# test_schema compares outputs with torch.allclose, which has no float8.
OPCHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
FORMATS = [Format.NVFP4_SVD, Format.NVFP4, Format.FP8, Format.FP8_SVD]
TOKENS, FEATURES, OUT_FEATURES = (5, 7), (48, 64), 32


class Streams:
    """Two streams' linears, activations, residuals and gates."""

    def __init__(self, dtype=torch.bfloat16, batch=2, **options):
        g = torch.Generator().manual_seed(0)

        def randn(*size):
            return torch.randn(size, generator=g).to(dtype)

        self.layers = [random_linear(OUT_FEATURES, k, generator=g, dtype=dtype, **options) for k in FEATURES]
        self.x = [randn(batch, s, k) for s, k in zip(TOKENS, FEATURES, strict=True)]
        self.residual = [randn(batch, s, OUT_FEATURES) for s in TOKENS]
        self.gate = [randn(batch, 1, OUT_FEATURES) for _ in TOKENS]

    @property
    def arguments(self):
        parts = [[*(getattr(own.weight, name) for name in COMPONENTS), own.bias] for own in self.layers]
        return self.x, *parts, self.residual, self.gate, self.layers[0].weight.operator_compute

    def expected(self):
        given = zip(self.layers, self.x, self.residual, self.gate, strict=True)
        return [residual + gate * layer(x) for layer, x, residual, gate in given]


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert a.is_contiguous()
        assert_bits_equal(a, b)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("compute", COMPUTE_MODES)
def test_bits_are_those_of_diffusers_steps(format, compute):
    if format is Format.FP8_SVD and compute in NEEDS_CODES:
        pytest.skip("gave up the codes")
    streams = Streams(format=format, compute=compute)
    assert_same(joint_linear(*streams.arguments), streams.expected())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
def test_dtypes(dtype, bias):
    streams = Streams(dtype=dtype, bias=bias)
    assert_same(joint_linear(*streams.arguments), streams.expected())


def test_what_does_not_lie_contiguous():
    streams = Streams()
    streams.residual = [each.mT.contiguous().mT for each in streams.residual]
    streams.x = [torch.cat((each, each), 1)[:, : each.shape[1]] for each in streams.x]
    assert_same(joint_linear(*streams.arguments), streams.expected())


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(format, bias):
    torch.library.opcheck(joint_linear, Streams(format=format, bias=bias).arguments, test_utils=OPCHECKS)


WRONG = {
    "an activation less": (0, lambda x: x[:1], "two of each"),
    "batch sizes": (0, lambda x: [x[0][:1], x[1]], "a residual is"),
    "dtypes of the streams": (0, lambda x: [x[0].half(), x[1]], "dtype|streams are"),
    "two dimensions": (0, lambda x: [x[0][0], x[1]], "three dimensions"),
    "features": (1, lambda parts: [parts[0][:, :8], *parts[1:]], "features"),
    "a part less": (1, lambda parts: parts[:-1], "needs 8"),
    "out_features": (2, lambda parts: [parts[0][:-1], *parts[1:]], "out_features"),
    "a residual less": (3, lambda residual: residual[:1], "two of each"),
    "a residual's tokens": (3, lambda residual: residual[::-1], "a residual is"),
    "a residual's dtype": (3, lambda residual: [residual[0], residual[1].float()], "x's dtype"),
    "a gate of every token": (4, lambda gate: [gate[0].expand(-1, 5, -1), gate[1]], "a gate is"),
    "a gate of all sequences": (4, lambda gate: [gate[0], gate[1][:1]], "a gate is"),
    "a gate's dtype": (4, lambda gate: [gate[0].half(), gate[1]], "x's dtype"),
    "no mode": (5, lambda compute: "int8", "needs one of"),
}


@pytest.mark.parametrize(("position", "change", "message"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_refused(position, change, message):
    given = list(Streams().arguments)
    given[position] = change(given[position])
    with pytest.raises(RuntimeError, match=message):
        joint_linear(*given)


def test_it_has_no_gradient():
    streams = Streams(dtype=torch.float32)
    streams.gate[0].requires_grad_()
    with torch.enable_grad(), pytest.raises(SvdqError, match="no gradient"):
        sum(each.sum() for each in joint_linear(*streams.arguments)).backward()
