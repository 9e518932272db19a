"""What kernels are tested on: contents and layouts that matter, other devices, and Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def normal(shape: tuple[int, ...], g: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=g)


def wide_range(shape: tuple[int, ...], g: torch.Generator) -> torch.Tensor:
    """Magnitudes from 1e-4 to 1e4 in one block."""
    return normal(shape, g) * 10 ** (normal(shape, g) * 2).clamp(-4, 4)


def quarters(shape: tuple[int, ...], g: torch.Generator) -> torch.Tensor:
    """Multiples of 1/4 up to 6: half of them are e2m1 ties where block and tensor scale are powers of two."""
    return torch.randint(-24, 25, shape, generator=g) / 4


def zero_blocks(shape: tuple[int, ...], g: torch.Generator) -> torch.Tensor:
    """Blocks of +0 and -0 between others; the first token has nothing else."""
    x = normal(shape, g).unflatten(-1, (-1, 16))
    x = torch.where(torch.rand(*x.shape[:-1], 1, generator=g) < 0.5, x * 0, x).flatten(-2)
    x[:1] *= 0
    return x


def not_finite(shape: tuple[int, ...], g: torch.Generator) -> torch.Tensor:
    """A NaN or an infinity in some of the tokens."""
    x = normal(shape, g)
    special = torch.tensor([torch.nan, torch.inf, -torch.inf])[torch.randint(3, shape, generator=g)]
    return torch.where(torch.rand(shape, generator=g) < 1 / (4 * shape[-1]), special, x)


FINITE_FILLS = (normal, quarters, zero_blocks)
FILLS = (*FINITE_FILLS, wide_range, not_finite)


def contiguous(x: torch.Tensor) -> torch.Tensor:
    return x


def padded_rows(x: torch.Tensor) -> torch.Tensor:
    """NaN between the rows, which stay aligned."""
    return torch.cat([x, torch.full((x.shape[0], 24), torch.nan, dtype=x.dtype)], 1)[:, : x.shape[1]]


def unaligned(x: torch.Tensor) -> torch.Tensor:
    """Rows start 1 element past an aligned address, and their stride is odd."""
    return torch.cat([torch.full((x.shape[0], 1), torch.nan, dtype=x.dtype), x], 1)[:, 1:]


def transposed(x: torch.Tensor) -> torch.Tensor:
    return x.t().contiguous().t()


LAYOUTS = (contiguous, padded_rows, unaligned, transposed)
"""Functions of a matrix [M, K] that keep its values."""


def move(value: Any, device: str) -> Any:
    """A tensor, or those in a tuple, on another device with strides and offset; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(move(v, device) for v in value)
    if not isinstance(value, torch.Tensor):
        return value
    storage = value.new_empty(0).set_(value.untyped_storage())
    return storage.to(device).as_strided(value.shape, value.stride(), value.storage_offset())


def run_script(script: Path, cases: list, folder: Path, *arguments: str, interpret: bool = True) -> list:
    """What ``python script cases.pt results.pt arguments...`` makes of cases.

    Args:
        script: reads a list with ``torch.load`` and writes one of the same length.
        cases: what ``torch.load`` may load: tensors, dtypes, strings and numbers in tuples.
        folder: for the two files.
        interpret: runs Triton's kernels in its interpreter, which a process must start with.
    """
    torch.save(cases, folder / "cases.pt")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, str(script), str(folder / "cases.pt"), str(folder / "results.pt"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(done.stderr)
    return torch.load(folder / "results.pt")
