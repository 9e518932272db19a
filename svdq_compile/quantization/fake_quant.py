"""ModelOpt's NVFP4 fake quantisation for tensors outside CUDA, where ModelOpt itself has none.

    g = amax / (6 * 448),  s = e4m3(blockamax / (6 * g)) * g,  y = e2m1(x / s) * s

with blocks of 16 along the last dimension: bit for bit what ModelOpt 0.47's ``fp4_fake_quant_kernel`` gives.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ..errors import MissingPackageError
from ..ops.modelopt import fake_quantize_modelopt
from ..spec import E2M1_MAX, E4M3_MAX, GROUP_SIZE

INSTALL = "pip install 'svdq-compile[quantize]'"

ZERO_AMAX_SCALE = 1e-12
"""The tensor scale that ModelOpt's kernel uses where the calibrated amax is zero."""

NVFP4_BITS = (4, 2, 8, 4)
"""Bits and exponent bits of e2m1 elements, then of e4m3 block scales, as ModelOpt's operator takes them."""


def fake_quantize(x: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """NVFP4-quantised and multiplied out again, as ModelOpt's kernel does it.

    A last dimension that is not a multiple of 16 is filled up with zeros for the block maxima.

    Args:
        x: float32, float16 or bfloat16 [..., K].
        amax: calibrated largest magnitude, any floating dtype; of several values the largest counts.

    Returns:
        like ``x``.
    """
    tensor_scale = amax.float().amax() / (E2M1_MAX * E4M3_MAX)
    tensor_scale = torch.where(tensor_scale > 0, tensor_scale, torch.full_like(tensor_scale, ZERO_AMAX_SCALE))
    width = x.shape[-1]
    padded = torch.nn.functional.pad(x, (0, -width % GROUP_SIZE))
    # The kernel negates by subtracting from zero, so it never writes -0.0.
    return fake_quantize_modelopt(padded, tensor_scale)[..., :width] + 0.0


@contextlib.contextmanager
def cpu_nvfp4() -> Iterator[None]:
    """Let ModelOpt fake-quantise NVFP4 on every device for the duration.

    CUDA tensors and other formats still go to ModelOpt's own operator. Replaces a module global, so it is not
    thread-safe.

    Raises:
        MissingPackageError: ModelOpt is not installed.
    """
    try:
        from modelopt.torch.quantization import tensor_quant
    except ImportError as error:
        raise MissingPackageError("nvidia-modelopt", "quantising with ModelOpt", INSTALL) from error
    original = tensor_quant.dynamic_block_quantize_op

    def dynamic_block_quantize(inputs, block_size, amax, *bits):
        if inputs.is_cuda or amax is None or block_size != GROUP_SIZE or bits != NVFP4_BITS:
            return original(inputs, block_size, amax, *bits)
        return fake_quantize(inputs, amax)

    tensor_quant.dynamic_block_quantize_op = dynamic_block_quantize
    try:
        yield
    finally:
        tensor_quant.dynamic_block_quantize_op = original
