"""Memory kernels ask for when they are launched: a program keeps the tensor descriptors it makes there."""

import torch
import triton


def allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """``size`` bytes of the current GPU, the launch's; torch aligns them to more than a descriptor's 128."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def provide() -> None:
    """Has Triton call :func:`allocate` in the current context; it keeps that to a thread and an asyncio task."""
    triton.set_allocator(allocate)
