"""LayerNorm and modulation in front of quantised linears, as one operator."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from svdq_compile.ops.modulated_norm import modulated_norm
from svdq_compile.passes.fuse_feed_forward import fuse_feed_forward
from svdq_compile.passes.insert_linear import insert_linear
from svdq_compile.passes.modulate import modulate
from svdq_compile.testing.oracle import assert_bits_equal
from svdq_compile.testing.weights import random_linear

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Block(nn.Module):
    """Some linears on what ``before`` makes of an activation and its modulation."""

    def __init__(self, before, linears=3):
        super().__init__()
        self.before = before
        self.linears = nn.ModuleList(random_linear(48, 32) for _ in range(linears))

    def forward(self, x, scale, shift):
        y, *more = self.before(x, scale.unsqueeze(1), shift.unsqueeze(1))
        return *(linear(y) for linear in self.linears), *more


def norm(x, eps=1e-6):
    return F.layer_norm(x, (32,), None, None, eps)


def plain(x, scale, shift):
    return (norm(x) * (1 + scale) + shift,)


def rewritten(module, dtype=torch.bfloat16):
    """The report of the pass, and the operators called; results must not change."""
    seen = {}

    def backend(gm, example_inputs):
        insert_linear(gm)
        fuse_feed_forward(gm)
        seen["report"] = modulate(gm)
        seen["calls"] = [node.target for node in gm.graph.nodes]
        return gm.forward

    g = torch.Generator().manual_seed(0)
    x, scale, shift = (torch.randn(size, generator=g).to(dtype) for size in ((2, 5, 32), (2, 32), (2, 32)))
    actual = torch.compile(module, backend=backend, fullgraph=True)(x, scale, shift)
    for a, b in zip(actual, module(x, scale, shift), strict=True):
        assert_bits_equal(a, b)
    return seen


@pytest.mark.parametrize(
    "before",
    [
        plain,
        lambda x, scale, shift: (shift + (scale + 1) * norm(x),),
        lambda x, scale, shift: (torch.add(torch.mul(norm(x), 1 + scale), shift),),
        lambda x, scale, shift: (nn.LayerNorm(32, elementwise_affine=False)(x) * (1 + scale) + shift,),
    ],
    ids=["diffusers", "other orders", "functions", "module"],
)
def test_norm_and_modulation_become_one_operator(before):
    seen = rewritten(Block(before))
    assert len(seen["report"].matched) == 1
    assert seen["calls"].count(modulated_norm) == 1
    assert F.layer_norm not in seen["calls"]


def test_a_feed_forward_layer_reads_it_too():
    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = random_linear(64, 32), random_linear(32, 64)

        def forward(self, x, scale, shift):
            (y,) = plain(x, scale.unsqueeze(1), shift.unsqueeze(1))
            return (self.down(F.gelu(self.up(y), approximate="tanh")),)

    assert rewritten(MLP())["calls"].count(modulated_norm) == 1


@pytest.mark.parametrize(
    "before",
    [
        lambda x, scale, shift: (norm(x) * scale + shift,),
        lambda x, scale, shift: (norm(x) * (2 + scale) + shift,),
        lambda x, scale, shift: (norm(x) * (1 + scale),),
        lambda x, scale, shift: (F.layer_norm(x, (32,), torch.ones(32).to(x)) * (1 + scale) + shift,),
        lambda x, scale, shift: (F.layer_norm(x, (5, 32)) * (1 + scale) + shift,),
        lambda x, scale, shift: ((norm(x.float()) * (1 + scale) + shift).to(x.dtype),),
    ],
    ids=["no one", "two", "no shift", "weights", "two dimensions", "float32"],
)
def test_other_sums_are_none_of_its_business(before):
    seen = rewritten(Block(before))
    assert seen["report"].matched == ()
    assert modulated_norm not in seen["calls"]


def test_what_something_else_reads_is_left():
    def before(x, scale, shift):
        (y,) = plain(x, scale, shift)
        return y, y.sin()

    seen = rewritten(Block(before))
    assert modulated_norm not in seen["calls"]
    ((_, reason),) = seen["report"].left
    assert "else reads it" in reason


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        (lambda x, scale, shift: plain(x, scale.float(), shift), "dtype"),
        (lambda *given: plain(*(each.double() for each in given)), "float64"),
        (lambda x, scale, shift: plain(x[:1], scale, shift), "larger than x"),
        (lambda x, scale, shift: plain(x, scale.expand_as(x)[..., :1], shift), "value a feature"),
        (lambda x, scale, shift: plain(x, scale, shift.sum()), "value a feature"),
    ],
    ids=["wider scale", "float64", "two modulations of one x", "a scale of each token", "one shift"],
)
def test_what_the_operator_would_compute_otherwise_is_left(before, reason):
    seen = rewritten(Block(before))
    assert modulated_norm not in seen["calls"]
    ((_, why),) = seen["report"].left
    assert reason in why


@pytest.mark.parametrize("written", [0, 1], ids=["x", "scale"])
def test_what_is_written_to_before_the_sum_is_left(written):
    def before(*given):
        x, scale, shift = given = [each.clone() for each in given]
        normalised, gain = norm(x), 1 + scale
        given[written].mul_(2)
        return normalised * gain + shift, *given

    seen = rewritten(Block(before))
    assert modulated_norm not in seen["calls"]
    ((_, reason),) = seen["report"].left
    assert "written to" in reason


def test_dense_linears_get_what_they_always_got():
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(32, 48).bfloat16().requires_grad_(False)

        def forward(self, x, scale, shift):
            return (self.linear(plain(x, scale.unsqueeze(1), shift.unsqueeze(1))[0]),)

    assert modulated_norm not in rewritten(Dense())["calls"]
