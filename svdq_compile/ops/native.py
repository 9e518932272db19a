"""Whether a GPU multiplies block-scaled 4-bit operands itself, and whether it does so correctly."""

from __future__ import annotations

import functools
import logging

import torch

log = logging.getLogger(__name__)

CHECK_SIZES = (160, 192, 512)
"""M, N, K of the check: more than one tile each way, and edges."""


def has_native_fp4(device: torch.device) -> bool:
    """Whether ``nvfp4`` runs on the block-scaled tensor cores of a device (sm_100, sm_103, sm_120, sm_121)."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    if torch.cuda.get_device_capability(device) < (10, 0):
        return False
    from svdq_kernels.blockscaled import NATIVE_TILES

    if torch.cuda.get_device_capability(device) not in NATIVE_TILES:
        return False
    # Where nothing has touched the GPU yet, code is generated for it but nothing runs.
    return not torch.cuda.is_initialized() or _is_right(device)


@functools.cache
def _is_right(device: torch.device) -> bool:
    """Whether the kernel gives the specification's sums on this machine, found out once per process and device.

    The operands are small integers, so that every order of the sums gives the same float32.
    """
    from svdq_kernels.blockscaled import multiply_nvfp4

    from . import codec

    m, n, k = CHECK_SIZES
    generator = torch.Generator().manual_seed(0)
    operands = []
    for rows in (m, n):
        codes = torch.randint(0, 16, (rows, k), generator=generator, dtype=torch.uint8, device="cpu")
        powers = torch.randint(0, 4, (rows, k // 16), generator=generator, device="cpu")
        scales = torch.exp2(powers.float()).to(torch.float8_e4m3fn)
        operands.append((codes, scales))
    expected = codec.decode_nvfp4(*operands[0], torch.float64) @ codec.decode_nvfp4(*operands[1], torch.float64).t()
    one = torch.ones((), device=device)
    moved = [part.to(device) for codes, scales in operands for part in (codec.pack_codes(codes), scales)]
    name = torch.cuda.get_device_name(device)
    try:
        actual = multiply_nvfp4(*moved, one, one, None, None, None, torch.float32).cpu()
    except Exception:
        log.warning("%s: the block-scaled kernel does not run here and is not used", name, exc_info=True)
        return False
    right = torch.equal(actual.double(), expected)
    if not right:
        log.warning("%s: the block-scaled kernel is wrong here and is not used", name)
    return right
