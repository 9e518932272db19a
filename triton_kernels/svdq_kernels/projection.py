"""Partial down-projections, summed once for all tiles of a GEMM."""

import torch
import triton
import triton.language as tl


@triton.jit
def _sum_kernel(partials_ptr, h_ptr, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """``h = partials[0] + partials[1] + ...`` in float32 and in this order, rounded once to h's dtype.

    Args:
        partials_ptr: [SPLITS, size] contiguous.
        h_ptr: [size].
    """
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    h = tl.load(partials_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        h += tl.load(partials_ptr + split * tl.cast(size, tl.int64) + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(h_ptr + offs, h.to(h_ptr.dtype.element_ty), mask=mask)


BLOCK = 256
"""Values a program adds up: few, so that a part's loads are spread over all multiprocessors."""


def sum_partials(partials: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """h, the sum over S, as the tensor cores take it.

    Args:
        partials: float32, bfloat16 or float16 [S, M, R], contiguous.
        dtype: bfloat16 or float16, lora_up's.

    Returns:
        dtype [1, M, R], contiguous.
    """
    splits, m, rank = partials.shape
    h = torch.empty(1, m, rank, dtype=dtype, device=partials.device)
    if h.numel():
        with torch.cuda.device_of(partials):
            _sum_kernel[(triton.cdiv(m * rank, BLOCK),)](partials, h, m * rank, SPLITS=splits, BLOCK=BLOCK)
    return h
