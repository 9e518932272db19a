"""Compiled groups on a GPU: bits of the ungrouped code where the order of sums is the same, and the budget."""

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code

from svdq_compile.model.share import mark_shared
from svdq_compile.ops.linear_group import linear_group
from svdq_compile.spec import Format
from svdq_compile.testing.oracle import assert_bits_equal, assert_within_budget
from svdq_compile.testing.weights import random_linear, share_activation
from svdq_compile.testing.wide import wide_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("fresh_dynamo"),
]

MODES = ("nvfp4", "fp8", "bf16")


class Projections(nn.Module):
    """to_q, to_k and to_v of unequal widths that share their activation's side."""

    def __init__(self, mode, **options):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, n in (("to_q", 512), ("to_k", 384), ("to_v", 80)):
            setattr(self, name, random_linear(n, 272, compute=mode, generator=generator, **options))
        share_activation(*self.children())
        mark_shared({name: module.weight for name, module in self.named_children()})

    def forward(self, x):
        return [layer(x) for layer in self.children()]

    def formula(self, x, wide):
        return [wide_linear(layer, x, wide) for layer in self.children()]


def x_of(tokens):
    return torch.randn(1, tokens, 272, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16).cuda()


def compiled(module, **options):
    return torch.compile(module, backend="svdq", fullgraph=True, **options)


def assert_right(results, module, x):
    for y, oracle, low in zip(results, module.formula(x, torch.float64), module(x), strict=True):
        assert_within_budget(y, oracle, low_precision=low)


@pytest.mark.parametrize("tokens", [1, 40, 700])
@pytest.mark.parametrize(
    ("mode", "options"),
    [(mode, {}) for mode in MODES] + [("fp8", {"dynamic": True}), ("fp8", {"bias": False, "rank": 48})],
    ids=str,
)
def test_within_the_budget(mode, tokens, options):
    module, x = Projections(mode, **options).cuda(), x_of(tokens)
    actual, codes = run_and_get_code(compiled(module), x)
    assert sum(code.count("def triton_tem_") for code in codes) == 1
    assert_right(actual, module, x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tokens", [1, 700])
def test_bits_are_those_of_the_ungrouped_code(mode, tokens):
    """Tiles of one member have the same size either way, so the sums are the same ones."""
    module, x = Projections(mode).cuda(), x_of(tokens)
    grouped = compiled(module)(x)
    torch._dynamo.reset()
    for actual, expected in zip(grouped, compiled(module, options={"skip_passes": "share_inputs"})(x), strict=True):
        assert_bits_equal(actual, expected)


@pytest.mark.parametrize("format", [Format.NVFP4, Format.FP8, Format.FP8_SVD], ids=str)
def test_other_formats(format):
    module, x = Projections("fp8", format=format).cuda(), x_of(300)
    assert_right(compiled(module)(x), module, x)


def test_any_number_of_tokens():
    module = Projections("fp8").cuda()
    run = compiled(module, dynamic=True)
    for tokens in (300, 129, 17, 1000, 2, 1):
        x = x_of(tokens)
        assert_right(run(x), module, x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tokens", [2, 300])
def test_eager_bits_are_those_of_separate_calls(mode, tokens):
    module, x = Projections(mode).cuda(), x_of(tokens)
    weights = [layer.weight for layer in module.children()]
    own = [[getattr(w, name) for w in weights] for name in ("qweight", "weight_scale", "weight_scale_2")]
    shared = [getattr(weights[0], name) for name in ("input_scale", "pre_quant_scale", "lora_down")]
    ups, biases = [w.lora_up for w in weights], [layer.bias for layer in module.children()]
    actual = linear_group(x, *own, *shared, ups, biases, mode)
    assert_bits_equal(actual, torch.cat(module(x), -1))


def test_max_autotune_and_cuda_graphs():
    module, x = Projections("fp8").cuda(), x_of(1000)
    for mode in ("max-autotune-no-cudagraphs", "reduce-overhead"):
        torch._dynamo.reset()
        run = compiled(module, mode=mode)
        for _ in range(3):
            results = [y.clone() for y in run(x)]
        assert_right(results, module, x)
