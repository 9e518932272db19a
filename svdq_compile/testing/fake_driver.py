"""Stand-ins for what needs a CUDA driver, or a CUDA build of torch, even on fake tensors."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

aten = torch.ops.aten

GUARDS = "_ZN3c104impl26device_guard_impl_registryE"
"""``c10::impl::device_guard_impl_registry``: one pointer for each ``c10::DeviceType``."""

CPU, CUDA, META = 0, 1, 14
"""Values of ``c10::DeviceType``."""


def attention() -> Callable[..., torch.Tensor]:
    """``F.scaled_dot_product_attention`` that takes a GPU's operator for CUDA tensors.

    It computes nothing: flash attention for 16-bit tensors without a mask, memory-efficient attention otherwise.
    Calls no such operator serves (grouped heads, tensors that are not 4-D) go to torch's function.
    """
    original = torch.nn.functional.scaled_dot_product_attention

    def scaled_dot_product_attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if query.device.type != "cuda" or query.dim() != 4 or enable_gqa:
            return original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if attn_mask is None and query.dtype in (torch.bfloat16, torch.float16):
            return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
            attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, False, dropout_p, is_causal, scale=scale
        )[0]

    return scaled_dot_product_attention


@contextlib.contextmanager
def cuda_device_guard() -> Iterator[None]:
    """Gives a CPU-only build the device guard it lacks for CUDA, without which it cannot even index a fake tensor.

    The guard is the meta device's, which does nothing. CUDA builds have their own, which fake tensors disable.

    Raises:
        RuntimeError: torch keeps its guards in another way than this was written for.
    """
    if torch.backends.cuda.is_built():
        yield
        return
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * (META + 1)).in_dll(library, GUARDS)
    if not guards[CPU] or not guards[META]:
        raise RuntimeError(f"no device guards in libc10.so of torch {torch.__version__}")
    previous = guards[CUDA]
    guards[CUDA] = guards[META]
    try:
        yield
    finally:
        guards[CUDA] = previous
