"""``svdq::linear_group``: ``svdq::linear`` of each member, side by side."""

import pytest
import torch

from svdq_compile.errors import SvdqError
from svdq_compile.ops.linear_group import linear_group
from svdq_compile.ops.modes import COMPUTE_MODES, NEEDS_CODES
from svdq_compile.spec import Format
from svdq_compile.testing.oracle import assert_bits_equal
from svdq_compile.testing.weights import random_linear, share_activation

# test_schema compares outputs with torch.allclose, which has no float8.
OPCHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
FORMATS = [Format.NVFP4_SVD, Format.NVFP4, Format.FP8, Format.FP8_SVD]


def members(sizes=(32, 64, 16), **options):
    generator = torch.Generator().manual_seed(0)
    layers = [random_linear(n, 48, generator=generator, **options) for n in sizes]
    share_activation(*layers)
    return layers


def arguments(layers, x):
    weights = [layer.weight for layer in layers]
    first = weights[0]

    def each(name):
        return [getattr(w, name) for w in weights if getattr(w, name) is not None]

    return (
        x,
        each("qweight"),
        each("weight_scale"),
        each("weight_scale_2"),
        first.input_scale,
        first.pre_quant_scale,
        first.lora_down,
        each("lora_up"),
        [layer.bias for layer in layers],
        first.operator_compute,
    )


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("compute", COMPUTE_MODES)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_bits_are_those_of_separate_calls(format, compute, dynamic):
    if format is Format.FP8_SVD and compute in NEEDS_CODES:
        pytest.skip("gave up the codes")
    layers = members(format=format, compute=compute, dynamic=dynamic)
    for x in (torch.randn(2, 5, 48).bfloat16(), torch.randn(1, 48).bfloat16()):
        actual = linear_group(*arguments(layers, x))
        assert actual.is_contiguous()
        assert_bits_equal(actual, torch.cat([layer(x) for layer in layers], -1))


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(format, bias):
    layers = members(format=format, bias=bias)
    torch.library.opcheck(linear_group, arguments(layers, torch.randn(2, 5, 48).bfloat16()), test_utils=OPCHECKS)


def test_one_member_and_no_rank():
    layers = members(sizes=(32,), rank=0)
    x = torch.randn(3, 48).bfloat16()
    assert_bits_equal(linear_group(*arguments(layers, x)), layers[0](x))


def test_lists_that_do_not_fit_are_refused():
    given = list(arguments(members(), torch.randn(2, 48).bfloat16()))
    for position in (2, 3, 7, 8):
        short = [*given[:position], given[position][:-1], *given[position + 1 :]]
        with pytest.raises(RuntimeError, match="for 3 members"):
            linear_group(*short)
    with pytest.raises(RuntimeError, match="no member"):
        linear_group(given[0], [], [], [], *given[4:7], [], [])


def test_it_has_no_gradient():
    x = torch.randn(2, 48, requires_grad=True)
    with torch.enable_grad(), pytest.raises(SvdqError, match="no gradient"):
        linear_group(*arguments(members(dtype=torch.float32), x)).sum().backward()
