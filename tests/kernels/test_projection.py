"""sum_partials: the order of additions, one rounding, any size."""

import pathlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from svdq_compile.testing.oracle import assert_bits_equal
from svdq_compile.testing.tensors import run_script

pytest.importorskip("triton")

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


def test_in_the_interpreter(tmp_path):
    # float16 only: the interpreter truncates to bfloat16.
    cases = [(partials(s, m, r, s), torch.float16) for s, m, r in ((1, 5, 16), (2, 70, 32), (7, 3, 1), (3, 0, 16))]
    cases += [(partials(48, 9, 16, 2, dtype), torch.float16) for dtype in (torch.float16, torch.bfloat16)]
    cases.append((torch.tensor([2.0**24, 1.0, 1.0, -(2.0**24)]).view(4, 1, 1), torch.float16))
    for args, actual in zip(cases, run_script(APPLY, [("sum_partials", args) for args in cases], tmp_path, "cpu")):
        assert_bits_equal(actual, in_order(*args))


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
