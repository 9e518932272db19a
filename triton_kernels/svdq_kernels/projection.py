"""Partial down-projections, summed once for all tiles of a GEMM: by a launch of its own, or beside another kernel."""

import torch
import triton
import triton.language as tl


@triton.jit
def sum_block(block, partials_ptr, h_ptr, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK values of ``h = partials[0] + partials[1] + ...`` in float32 and in this order, rounded once to h's dtype.

    Args:
        block: which values.
        partials_ptr: [SPLITS, size] contiguous.
        h_ptr: [size].
    """
    offs = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    h = tl.load(partials_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        h += tl.load(partials_ptr + split * tl.cast(size, tl.int64) + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(h_ptr + offs, h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sum_kernel(partials_ptr, h_ptr, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """The whole of h; arguments as :func:`sum_block`'s."""
    sum_block(tl.program_id(0), partials_ptr, h_ptr, size, SPLITS, BLOCK)


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
    h = torch.empty(1, *partials.shape[1:], dtype=dtype, device=partials.device)
    write_sum(partials, h)
    return h


def write_sum(partials: torch.Tensor, h: torch.Tensor) -> None:
    """The same, into an h that is there."""
    if h.numel():
        with torch.cuda.device_of(partials):
            _sum_kernel[(triton.cdiv(h.numel(), BLOCK),)](partials, h, h.numel(), SPLITS=partials.shape[0], BLOCK=BLOCK)


def beside_arguments(beside: tuple[torch.Tensor, torch.Tensor] | None) -> dict[str, object]:
    """What a kernel takes that makes another linear's sum on the side, by its parameters' names.

    Args:
        beside: as :func:`write_sum`'s arguments; None for no sum.
    """
    partials, h = beside or (None, None)
    sizes = {"beside_size": h.numel(), "BESIDE_SPLITS": partials.shape[0]} if beside else {}
    return {"beside_partials_ptr": partials, "beside_h_ptr": h, "beside_size": None, "BESIDE_SPLITS": None} | sizes
