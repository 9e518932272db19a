"""Linears with GELU between them, as one operator."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from svdq_compile.ops.feed_forward import feed_forward
from svdq_compile.ops.linear import linear
from svdq_compile.passes.fuse_feed_forward import fuse_feed_forward
from svdq_compile.passes.insert_linear import insert_linear
from svdq_compile.spec import Format
from svdq_compile.testing.oracle import assert_bits_equal, assert_within_budget
from svdq_compile.testing.weights import random_linear

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class MLP(nn.Module):
    """``down(between(up(x)))``; what ``between`` returns beside its result is returned too."""

    def __init__(self, between, up=None):
        super().__init__()
        self.up = up or random_linear(64, 32)
        self.down = random_linear(48, 64, format=Format.NVFP4)
        self.between = between

    def forward(self, x):
        hidden, *more = self.between(self.up(x))
        return self.down(hidden), *more


def gelu(y):
    return (F.gelu(y, approximate="tanh"),)


def rewritten(module):
    """The result of the module with the pass applied, its number of matches, what it left, and operators called."""
    seen = {}

    def backend(gm, example_inputs):
        insert_linear(gm)
        report = fuse_feed_forward(gm)
        seen["fused"], seen["left"] = len(report.matched), report.left
        seen["calls"] = [node.target for node in gm.graph.nodes if node.target in (linear, feed_forward)]
        return gm.forward

    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    actual, expected = torch.compile(module, backend=backend, fullgraph=True)(x), module(x)
    for a, b in zip(actual, expected, strict=True):
        assert_bits_equal(a, b)
    return seen


@pytest.mark.parametrize(
    "between",
    [
        gelu,
        lambda y: (F.dropout(F.gelu(y, approximate="tanh"), 0.1, False),),
        lambda y: (F.dropout(F.gelu(y, approximate="tanh"), p=0.0),),
        lambda y: (nn.Dropout(0.1).eval()(F.gelu(input=y, approximate="tanh")),),
    ],
    ids=["gelu", "dropout", "dropout p=0", "modules"],
)
def test_two_linears_become_one_operator(between):
    seen = rewritten(MLP(between))
    assert seen == {"fused": 1, "left": (), "calls": [feed_forward]}


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (lambda y: (F.gelu(y),), "exact form"),
        (lambda y: (g := gelu(y)[0], g), "used elsewhere"),
        (lambda y: (gelu(y)[0], y), "used elsewhere"),
        (lambda y: (gelu(y + 1)[0],), "no quantised linear"),
    ],
    ids=["exact", "gelu kept", "sums kept", "something between"],
)
def test_what_is_left(between, reason):
    seen = rewritten(MLP(between))
    assert seen["calls"] == [linear, linear]
    ((_, why),) = seen["left"]
    assert reason in why


def test_a_dense_first_linear_is_left():
    seen = rewritten(MLP(gelu, up=nn.Linear(32, 64).bfloat16().requires_grad_(False)))
    assert seen["calls"] == [linear]
    assert "no quantised linear" in seen["left"][0][1]


def test_linears_are_left_where_a_tensor_is_written_to_between_them():
    class Written(MLP):
        def forward(self, x):
            x = x.clone()
            y = self.up(x)
            x += 1
            return self.down(*self.between(y)), x

    seen = rewritten(Written(gelu))
    assert seen["calls"] == [linear, linear]
    assert "written to" in seen["left"][0][1]


def test_float64_stays_float64_in_compiled_code():
    g = torch.Generator().manual_seed(0)
    up, down = (random_linear(n, k, bias=False, generator=g) for n, k in ((64, 32), (48, 64)))
    x = torch.randn(2, 5, 32, generator=g).double()

    def function(x):
        return down(F.gelu(up(x), approximate="tanh"))

    actual = torch.compile(function, backend="svdq", fullgraph=True)(x)
    torch._dynamo.reset()
    apart = torch.compile(function, backend="svdq", fullgraph=True, options={"skip_passes": "fuse_feed_forward"})(x)
    assert_within_budget(actual, function(x), low_precision=apart)


def test_other_activations_are_none_of_its_business():
    assert rewritten(MLP(lambda y: (F.silu(y),))) == {"fused": 0, "left": (), "calls": [linear, linear]}
