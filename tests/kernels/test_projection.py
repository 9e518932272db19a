"""Sums of projections: the order of additions, one rounding, any size, beside another kernel and alone."""

import pathlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from svdq_compile.testing.oracle import assert_bits_equal
from svdq_compile.testing.tensors import move, run_script

pytest.importorskip("triton")

from svdq_kernels.activation import prepare
from svdq_kernels.projection import BLOCK, sum_partials

APPLY = pathlib.Path(__file__).with_name("apply_kernels.py")


def partials(splits, m, rank, seed, dtype=torch.float32):
    return (torch.randn(splits, m, rank, generator=torch.Generator().manual_seed(seed)) * 2.0**seed).to(dtype)


def in_order(parts, dtype):
    """In float32, one after the other, whatever cancels."""
    h = parts[0].float()
    for part in parts[1:]:
        h = h + part.float()
    return h[None].to(dtype)


def activation(m, k, rank, seed, dtype=torch.float16):
    """Arguments of prepare."""
    g = torch.Generator().manual_seed(seed)
    x, down = torch.randn(m, k, generator=g).to(dtype), torch.randn(rank, k, generator=g).to(dtype)
    return x, torch.ones(k, dtype=dtype), torch.tensor(0.01), down if rank else None


def test_in_the_interpreter(tmp_path):
    # float16 only: the interpreter truncates to bfloat16.
    cases = [(partials(s, m, r, s), torch.float16) for s, m, r in ((1, 5, 16), (2, 70, 32), (7, 3, 1), (3, 0, 16))]
    cases += [(partials(48, 9, 16, 2, dtype), torch.float16) for dtype in (torch.float16, torch.bfloat16)]
    cases.append((torch.tensor([2.0**24, 1.0, 1.0, -(2.0**24)]).view(4, 1, 1), torch.float16))
    for args, actual in zip(cases, run_script(APPLY, [("sum_partials", args) for args in cases], tmp_path, "cpu")):
        assert_bits_equal(actual, in_order(*args))


@pytest.mark.parametrize(("m", "k", "rank"), [(20, 272, 16), (130, 48, 0), (5, 48, 16), (0, 48, 16), (1025, 272, 16)])
def test_beside_an_activation_in_the_interpreter(m, k, rank, tmp_path):
    """In its launch, behind one of another kernel (5 tokens), and without one (none)."""
    parts, args = partials(7, 301, 5, 1), activation(m, k, rank, 0)
    h = torch.full((1, 301, 5), torch.nan, dtype=torch.float16)
    calls = [("prepare_beside", (*args, "plain", parts, h)), ("prepare", (*args, "plain"))]
    (*beside, h), alone = run_script(APPLY, calls, tmp_path, "cpu")
    assert_bits_equal(h, in_order(parts, torch.float16))
    for one, other in zip(beside, alone, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_bits_equal(one, other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@given(
    st.builds(partials, st.integers(1, 8), st.integers(0, 3000), st.sampled_from((1, 16, 48)), st.integers(0, 9)),
    st.builds(
        activation,
        st.sampled_from((0, 1, 5, 128, 1025)),
        st.sampled_from((16, 272, 3072)),
        st.sampled_from((0, 16)),
        st.integers(0, 9),
        st.sampled_from((torch.bfloat16, torch.float16)),
    ),
    st.sampled_from(("plain", "nvfp4", "fp8")),
)
def test_beside_an_activation(parts, args, operand):
    parts, args = parts.cuda(), move(args, "cuda")
    h = torch.full((1, *parts.shape[1:]), torch.nan, dtype=args[0].dtype, device="cuda")
    beside, alone = prepare(*args, operand, beside=(parts, h)), prepare(*args, operand)
    assert_bits_equal(h, in_order(parts, h.dtype))
    for one, other in zip(beside, alone, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_bits_equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@given(
    st.builds(
        partials,
        st.one_of(st.integers(1, 8), st.just(48)),
        st.integers(0, 300),
        st.sampled_from((1, 16, 48, 256)),
        st.integers(0, 9),
        st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    ),
    st.sampled_from((torch.bfloat16, torch.float16)),
)
def test_every_size(parts, dtype):
    assert_bits_equal(sum_partials(parts.cuda(), dtype), in_order(parts, dtype))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_beyond_32_bit_offsets(gpu_memory):
    rank, m = 256, 2**31 // 512 // BLOCK * BLOCK + 3
    gpu_memory(24)
    parts = torch.ones(2, m, rank, device="cuda")
    parts[1, -1] = 3
    h = sum_partials(parts, torch.bfloat16)
    assert (h[0, -1] == 4).all()
    assert (h[0, :-1] == 2).all()
