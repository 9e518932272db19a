"""Copies in front of attention."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from svdq_compile.passes.attention_layout import attention_layout
from svdq_compile.testing.fake_gpu import compile_on_fake_gpu, fake_gpu
from svdq_compile.testing.generated import launches
from svdq_compile.testing.oracle import assert_bits_equal

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def rewritten(function):
    """The report of the pass and the methods called; results must not change."""
    seen = {}

    def backend(gm, example_inputs):
        seen["report"] = attention_layout(gm)
        seen["methods"] = [node.target for node in gm.graph.nodes if node.op == "call_method"]
        return gm.forward

    x = torch.randn(3, 2, 7, 4, 16, generator=torch.Generator().manual_seed(0))
    actual = torch.compile(function, backend=backend, fullgraph=True)(*x)
    expected = function(*x)
    for a, b in zip(actual, expected, strict=True):
        assert_bits_equal(a, b)
    return seen


def heads(x):
    return x.permute(0, 2, 1, 3)


def test_what_diffusers_writes():
    def function(q, k, v):
        q, k, v = (heads(x).contiguous() for x in (q, k, v))
        y = F.scaled_dot_product_attention(query=q, key=k, value=v).permute(0, 2, 1, 3).flatten(2, 3)
        return (F.linear(y.to(q.dtype)[:, 2:].contiguous(), torch.ones(8, 64)),)

    seen = rewritten(function)
    assert len(seen["report"].matched) == 3
    assert seen["methods"].count("contiguous") == 1


@torch.library.custom_op("svdq_test::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


@twice.register_fake
def _(x):
    return torch.empty_like(x)


READERS = {
    "output": lambda y: y,
    "view": lambda y: (y * 2).view(8, 7, 16).contiguous(),
    "view_as_complex": lambda y: torch.view_as_complex(y.unflatten(-1, (8, 2))).contiguous(),
    "twice": lambda y: torch.ops.svdq_test.twice(y).contiguous(),
}
"""What reads an attention's result, by its node's name."""


@pytest.mark.parametrize("reader", READERS)
def test_a_query_s_copy_is_left_where_the_result_s_strides_may_matter(reader):
    def function(q, k, v):
        q, k = (heads(x).contiguous() for x in (q, k))
        return (READERS[reader](F.scaled_dot_product_attention(q, k, heads(v))),)

    report = rewritten(function)["report"]
    assert len(report.matched) == 1
    ((_, why),) = report.left
    assert "laid out as the query" in why
    assert f"and {reader}" in why


def test_a_result_is_viewed_on_a_gpu():
    class Attention(nn.Module):
        def forward(self, q, k, v):
            q, k, v = (heads(x).contiguous() for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v).view(8, 300, 64)

    with fake_gpu((9, 0)):
        code = compile_on_fake_gpu(Attention(), tuple(torch.randn(3, 2, 300, 4, 64).bfloat16()))
    copies = [name for name in launches(code) if name.startswith("triton_poi")]
    assert len(copies) == 1


def test_one_copy_for_keys_and_values():
    def function(q, k, v):
        k = heads(k).contiguous()
        return (F.scaled_dot_product_attention(heads(q), k, k),)

    assert len(rewritten(function)["report"].matched) == 1


def test_a_copy_to_another_memory_format_is_left():
    def function(q, k, v):
        q = heads(q).contiguous(memory_format=torch.contiguous_format)
        return (F.scaled_dot_product_attention(q, heads(k), heads(v)),)

    ((_, why),) = rewritten(function)["report"].left
    assert "memory format" in why


def test_a_copy_that_brings_a_head_s_values_together_is_left():
    def function(q, k, v):
        q, k, v = (x.transpose(2, 3).permute(0, 3, 1, 2).transpose(2, 3)[..., :7] for x in (q, k, v))
        return (F.scaled_dot_product_attention(q.contiguous(), k, v),)

    ((_, why),) = rewritten(function)["report"].left
    assert "next to each other" in why


def test_a_copy_that_is_returned_is_left():
    def function(q, k, v):
        q = heads(q).contiguous()
        return F.scaled_dot_product_attention(q, heads(k), heads(v)), q

    ((_, why),) = rewritten(function)["report"].left
    assert "else reads it" in why


@pytest.mark.parametrize("late", [False, True], ids=["before", "before the second"])
def test_a_copy_is_left_where_a_tensor_is_written_to_before_attention(late):
    def function(q, k, v):
        q = q.clone()
        copy = heads(q).contiguous()
        first = F.scaled_dot_product_attention(copy, heads(k), heads(v)) if late else 0
        q.mul_(0)
        return first + F.scaled_dot_product_attention(copy, heads(k), heads(v)), q

    left = rewritten(function)["report"].left
    assert left
    assert all("written to" in why for _, why in left)


def test_other_copies_are_none_of_its_business():
    seen = rewritten(lambda q, k, v: (heads(q).contiguous(), k, v))
    assert seen["report"].left == ()
    assert "contiguous" in seen["methods"]
