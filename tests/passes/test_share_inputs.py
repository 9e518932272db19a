"""Linears that share their activation become one operator, and only those."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import svdq_compile
from svdq_compile.model.share import mark_shared
from svdq_compile.ops.linear import linear
from svdq_compile.ops.linear_group import linear_group
from svdq_compile.ops.share import scope, share_key
from svdq_compile.passes.pipeline import rewrite
from svdq_compile.spec import Format
from svdq_compile.testing.checkpoints import SMALL, example_inputs
from svdq_compile.testing.oracle import assert_bits_equal
from svdq_compile.testing.random_model import random_transformer
from svdq_compile.testing.weights import random_linear, share_activation

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
EXPORT = Path(__file__).parents[1] / "data" / "modelopt-two-blocks"
QKV = ("to_q", "to_k", "to_v")


class Attention(nn.Module):
    """Three projections that share."""

    def __init__(self, forward=None, seed=0, sizes=(32, 64, 16), **options):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, n in zip(QKV, sizes, strict=True):
            setattr(self, name, random_linear(n, 48, generator=generator, **options))
        share_activation(*self.children())
        self.mark()
        self.function = forward or (lambda self, x: (self.to_q(x), self.to_k(x), self.to_v(x)))

    def mark(self):
        mark_shared({name: module.weight for name, module in self.named_children()})
        return self

    def forward(self, x):
        return self.function(self, x)


@dataclasses.dataclass
class Seen:
    """What share_inputs reported, and the operators that are in the graph now."""

    matched: tuple
    left: tuple
    calls: list


def compiled(module, **options):
    """The module rewritten by all passes and run as it is, and the reports of share_inputs."""
    reports = []

    def backend(gm, example_inputs):
        report = rewrite(gm)["share_inputs"]
        calls = [node.target for node in gm.graph.nodes if node.target in (linear, linear_group)]
        reports.append(Seen(report.matched, report.left, calls))
        return gm.forward

    return torch.compile(module, backend=backend, fullgraph=True, **options), reports


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert_bits_equal(a, b)


def x_of(*lead):
    return torch.randn(*lead, 48, generator=torch.Generator().manual_seed(1)).bfloat16()


@pytest.mark.parametrize("format", [Format.NVFP4_SVD, Format.NVFP4, Format.FP8, Format.FP8_SVD], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_three_linears_become_one_operator(format, bias):
    module, x = Attention(format=format, bias=bias), x_of(2, 5)
    run, reports = compiled(module)
    assert_same(run(x), module(x))
    assert reports[0].calls == [linear_group]
    assert [len(group) for group in reports[0].matched] == [3]
    assert reports[0].left == ()


def test_the_same_input_computed_twice_is_one():
    def forward(self, x):
        return self.to_q(F.silu(x)), self.to_k(F.silu(x)), self.to_v(F.silu(torch.chunk(x, 1)[0]))

    module, x = Attention(forward), x_of(5)
    run, reports = compiled(module)
    assert_same(run(x), module(x))
    assert sorted(map(str, reports[0].calls)) == sorted(map(str, [linear_group, linear]))


def test_results_may_be_used_before_the_last_is_computed():
    def forward(self, x):
        q = self.to_q(x)
        return (q.sum() * self.to_k(x), self.to_v(x), q)

    module, x = Attention(forward), x_of(5)
    run, reports = compiled(module)
    assert_same(run(x), module(x))
    assert reports[0].calls == [linear_group]


def written_between(self, x):
    q = self.to_q(x)
    x.mul_(2)
    return q, self.to_k(x), self.to_v(x)


def written_producer(self, x):
    x = x.clone()
    q = self.to_q(F.silu(x))
    x.add_(1)
    return q, self.to_k(F.silu(x)), self.to_v(F.silu(x))


def written_in_place(self, x):
    x = x.clone()
    q = self.to_q(x)
    F.relu(x, True)
    return q, self.to_k(x), self.to_v(x)


@torch.library.custom_op("svdq_test::bump", mutates_args=("x",))
def bump(x: torch.Tensor) -> None:
    x.add_(1)


def written_by_an_operator(self, x):
    x = x.clone()
    q = self.to_q(x)
    torch.ops.svdq_test.bump(x)
    return q, self.to_k(x), self.to_v(x)


def late_bias(self, x):
    q = self.to_q(x)
    return q, F.linear(x, self.to_k.weight, q.sum() + self.to_k.bias), self.to_v(x)


def weight_twice(self, x):
    return self.to_q(x), self.to_q(x), self.to_k(x)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (written_between, "written to"),
        (written_producer, "written to"),
        (written_in_place, "written to"),
        (written_by_an_operator, "written to"),
        (late_bias, "a bias is computed"),
        (weight_twice, "used twice"),
    ],
)
def test_what_cannot_be_grouped_is_left_and_said(forward, reason):
    module = Attention(forward)
    run, reports = compiled(module)
    assert_same(run(x_of(5)), module(x_of(5)))
    assert linear_group not in reports[0].calls
    assert {why for _, why in reports[0].left if reason in why}


def test_an_input_that_is_replaced_is_another():
    def forward(self, x):
        x = x.clone()
        q = self.to_q(x)
        x += 1
        return q, self.to_k(x), self.to_v(x)

    module = Attention(forward)
    run, reports = compiled(module)
    assert_same(run(x_of(5)), module(x_of(5)))
    assert [len(group) for group in reports[0].matched] in ([], [2])


def test_different_inputs_are_not_grouped():
    module, x = Attention(lambda self, x: (self.to_q(x), self.to_k(x + 1), self.to_v(x * 2))), x_of(5)
    run, reports = compiled(module)
    assert_same(run(x), module(x))
    assert reports[0].calls == [linear] * 3


@pytest.mark.parametrize("part", ["input_scale", "pre_quant_scale", "lora_down"])
def test_what_differs_in_one_byte_does_not_share(part):
    module, x = Attention(), x_of(5)
    value = getattr(module.to_k.weight, part)
    changed = value.clone().reshape(-1)
    changed.view(torch.uint8)[0] ^= 1
    setattr(module.to_k.weight, part, changed.view(value.shape))
    module.mark()
    run, reports = compiled(module)
    assert_same(run(x), module(x))
    assert reports[0].calls == [linear] * 3
    assert {reason for _, reason in reports[0].left} == {"its smoothing, scale or down-projection is its own"}


def test_modes_that_differ_are_not_grouped():
    module, x = Attention(), x_of(5)
    module.to_k.weight = nn.Parameter(module.to_k.weight.with_compute("bf16"), requires_grad=False)
    run, reports = compiled(module)
    assert_same(run(x), module(x))
    assert sorted(map(str, reports[0].calls)) == sorted(map(str, [linear_group, linear]))
    assert "no other linear of to_q+to_k+to_v" in reports[0].left[0][1]


def test_equal_modules_that_read_one_tensor_are_not_mixed_up():
    """Two modules have the same key, but only each one's own linears share."""
    pair, x = nn.ModuleList([Attention(seed=0), Attention(seed=1)]), x_of(5)

    def both(x):
        return *pair[0](x), *pair[1](x)

    run, reports = compiled(both)
    assert_same(run(x), both(x))
    assert [len(group) for group in reports[0].matched] == [3, 3]


def test_modules_share_one_graph_until_one_does_not_share():
    blocks, x = [Attention(seed=seed) for seed in range(3)], x_of(5)
    other = blocks[2].to_k.weight
    other.lora_down = other.lora_down + 1
    blocks[2].mark()

    class Holder(nn.Module):
        def forward(self, x):
            return self.block(x)

    reports = []

    def backend(gm, example_inputs):
        reports.append(rewrite(gm)["share_inputs"])
        return gm.forward

    for block in blocks:
        block.compile(backend=backend, fullgraph=True)
        assert_same(block(x), block.function(block, x))
    assert [len(report.matched) for report in reports] == [1, 0]


def test_a_real_export_whole_and_regional():
    model = svdq_compile.load_transformer(EXPORT)
    inputs = example_inputs(model)
    expected = model(**inputs)[0]
    run, reports = compiled(copy.deepcopy(model))
    assert_bits_equal(run(**inputs)[0], expected)
    assert sorted(len(group) for group in reports[0].matched) == [3, 3, 3, 3, 4]
    _, reports = compiled(model)
    regional = []

    def backend(gm, example_inputs):
        regional.append(rewrite(gm)["share_inputs"])
        return gm.forward

    model.compile_repeated_blocks(backend=backend, fullgraph=True)
    assert_bits_equal(model(**inputs)[0], expected)
    assert [sorted(len(group) for group in report.matched) for report in regional] == [[2, 3, 3]]


@pytest.mark.parametrize("config", [{}, {"zero_cond_t": True}], ids=["plain", "zero_cond_t"])
def test_modulations_of_all_blocks(config):
    """With zero_cond_t the text stream's modulations read another tensor than the image's."""
    model = random_transformer(SMALL | {"num_layers": 5} | config, recipe="mixed", rank=8, blocks_kept=0)
    inputs = example_inputs(model)
    run, reports = compiled(model)
    assert_bits_equal(run(**inputs)[0], model(**inputs)[0])
    modulations = [len(group) for group in reports[0].matched if len(group) != 3]
    assert sorted(modulations) == ([4, 1, 4, 1] if config else [2, 4, 4]) or sum(modulations) >= 8


@pytest.mark.parametrize(
    ("key", "path", "expected"),
    [
        ("to_q+to_k", "a b to_q", ("a", "b")),
        ("to_q+to_k", "to_k", ()),
        ("to_q+to_k", "a to_v", None),
        ("m.1+n.1", "blocks 3 n 1", ("blocks", "3")),
        ("*.m.1+n.1", "blocks 3 n 1", ("blocks",)),
        ("*.m.1+n.1", "self n 1", ("self",)),
    ],
)
def test_the_scope_of_a_key(key, path, expected):
    assert scope(key, path.split()) == expected


def test_keys():
    assert share_key(("a", "b.1")) == "a+b.1"
    assert share_key(("a", "b.1"), in_all=True) == "*.a+b.1"
