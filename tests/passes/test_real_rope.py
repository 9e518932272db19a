"""Complex rotary embeddings: diffusers' own, other spellings, and what is left alone."""

import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen

from svdq_compile.passes.real_rope import real_rope
from svdq_compile.testing.graphs import captured
from svdq_compile.testing.oracle import assert_bits_equal, assert_within_budget

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def qwen(x, freqs):
    return apply_rotary_emb_qwen(x, freqs, use_real=False)


def inputs(tokens=7, dtype=torch.bfloat16, wide=torch.float32):
    g = torch.Generator().manual_seed(0)
    angles = torch.randn(tokens, 8, generator=g, dtype=wide) * 9
    return torch.randn(2, tokens, 3, 16, generator=g).to(dtype), torch.polar(torch.ones_like(angles), angles)


def complex_values(gm):
    values = (node.meta.get("example_value") for node in gm.graph.nodes)
    return [value for value in values if isinstance(value, torch.Tensor) and value.is_complex()]


def rewritten(function, *arguments, **options):
    reports = []

    def backend(gm, example_inputs):
        reports.append(real_rope(gm))
        return gm.forward

    return torch.compile(function, backend=backend, fullgraph=True, **options), reports


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bits_are_those_of_the_complex_product(dtype):
    arguments = inputs(dtype=dtype)
    compiled, reports = rewritten(qwen)
    assert_bits_equal(compiled(*arguments), qwen(*arguments))
    assert [len(report.matched) for report in reports] == [1]


def test_any_number_of_tokens():
    compiled, reports = rewritten(qwen, dynamic=True)
    for tokens in (7, 2, 30):
        arguments = inputs(tokens)
        assert_bits_equal(compiled(*arguments), qwen(*arguments))
    assert len(reports) == 1


def test_only_the_table_is_complex_and_is_viewed_once():
    def both(q, k, freqs):
        return qwen(q, freqs), qwen(k, freqs)

    q, freqs = inputs()
    gm = captured(both, q, q + 1, freqs)
    report = real_rope(gm)
    assert len(report.matched) == 2
    assert report.left == ()
    assert len(complex_values(gm)) == 1
    assert len(gm.graph.find_nodes(op="call_function", target=torch.view_as_real)) == 1
    assert all("example_value" in node.meta for node in gm.graph.nodes if node.op == "call_function")


def test_compiled_by_inductor():
    arguments = inputs(dtype=torch.float32)
    wide = inputs(wide=torch.float64, dtype=torch.float32)
    oracle = torch.view_as_real(torch.view_as_complex(wide[0].double().unflatten(-1, (-1, 2))) * wide[1][:, None])
    compiled = torch.compile(qwen, backend="svdq", fullgraph=True)
    assert_within_budget(compiled(*arguments), oracle.flatten(3), low_precision=qwen(*arguments))


def pairs(x):
    return x.float().unflatten(-1, (-1, 2))


SPELLINGS = {
    "swapped": lambda x, f: torch.view_as_real(f[:, None] * torch.view_as_complex(pairs(x))),
    "method": lambda x, f: torch.view_as_real(torch.view_as_complex(pairs(x)).mul(f.unsqueeze(-2))),
    "function": lambda x, f: torch.view_as_real(torch.mul(torch.view_as_complex(pairs(x)), torch.unsqueeze(f, 1))),
    "two_views": lambda x, f: torch.view_as_real(torch.view_as_complex(pairs(x)) * torch.view_as_complex(pairs(x + 1))),
    "double": lambda x, f: torch.view_as_real(torch.view_as_complex(pairs(x)) * f[:, None].to(torch.complex128)),
    "computed": lambda x, f: torch.view_as_real(torch.view_as_complex(pairs(x)) * (f + f)[:, None]),
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_other_spellings(spelling):
    arguments = inputs()
    compiled, reports = rewritten(spelling)
    assert_bits_equal(compiled(*arguments), spelling(*arguments))
    assert len(reports[0].matched) == 1


LEFT = {
    "no product": (lambda x, f: torch.view_as_real(f + f), "no product"),
    "real factor": (lambda x, f: torch.view_as_real(torch.view_as_complex(pairs(x)) * f.real[:, None]), "not complex"),
    "number": (lambda x, f: torch.view_as_real(torch.view_as_complex(pairs(x)) * 2), "not complex"),
    "no view": (lambda x, f: torch.view_as_real(f * f), "no factor is a view"),
    "conjugate": (lambda x, f: torch.view_as_real(torch.view_as_complex(pairs(x)) * f.conj()[:, None]), "conjugate"),
}


@pytest.mark.parametrize(("function", "reason"), LEFT.values(), ids=LEFT)
def test_anything_else_is_left_and_said(function, reason):
    arguments = inputs()
    gm = captured(function, *arguments)
    before = gm.code
    report = real_rope(gm)
    assert report.matched == ()
    assert reason in report.left[0][1]
    assert gm.code == before


def test_a_product_that_is_used_twice_is_left():
    def twice(x, freqs):
        product = torch.view_as_complex(pairs(x)) * freqs[:, None]
        return torch.view_as_real(product), product.abs()

    report = real_rope(captured(twice, *inputs()))
    assert report.matched == ()
    assert "otherwise" in report.left[0][1]


@pytest.mark.parametrize("factor", [0, 1], ids=["pairs", "table"])
def test_a_product_is_left_where_a_tensor_is_written_to_behind_it(factor):
    def written(x, freqs):
        factors = pairs(x), freqs.clone()
        product = torch.view_as_complex(factors[0]) * factors[1][:, None]
        factors[factor].zero_()
        return torch.view_as_real(product)

    compiled, reports = rewritten(written)
    assert_bits_equal(compiled(*inputs()), written(*inputs()))
    ((_, why),) = reports[0].left
    assert "written to" in why
