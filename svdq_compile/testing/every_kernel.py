"""The kernels of a compute mode beside their tiles' edges, eagerly and compiled, for a tool that watches memory.

    compute-sanitizer --tool memcheck python -m svdq_compile.testing.every_kernel fp8 packed
    compute-sanitizer --tool racecheck --kernel-name-exclude kernel_substring=cudnn \\
        python -m svdq_compile.testing.every_kernel fp8 packed

The arguments are a compute mode and a storage. PYTORCH_NO_CUDA_MEMORY_CACHING=1 gives every tensor an allocation of
its own, whose end memcheck sees; a run without the tool before fills the compilers' caches. Both take
TORCHINDUCTOR_COMPILE_THREADS=1: with Inductor's compile workers the tool can crash. racecheck reports hazards inside of
cuDNN's attention, which orders its warps by other means than barriers.
"""

from __future__ import annotations

import itertools
import sys

import torch

from .checkpoints import SMALL, example_inputs
from .random_model import random_transformer

CONFIG = SMALL | {"num_layers": 1, "attention_head_dim": 64, "axes_dims_rope": [16, 24, 24], "num_attention_heads": 3}
"""One block whose 192 inputs are no multiple of 128."""

SIZES = (
    {"batch": 1, "height": 33, "width": 32, "text": 19},
    {"batch": 2, "height": 9, "width": 7, "text": 3},
)
"""Many tokens and few: on both sides of every line between kernels."""


def main(compute: str, storage: str, device: str = "cuda") -> None:
    """Runs the models; raises RuntimeError where a result is not finite."""
    model = random_transformer(CONFIG, rank=32, blocks_kept=0, device=device, compute=compute, storage=storage)
    compiled = torch.compile(model, backend="svdq")
    for size, (how, run) in itertools.product(SIZES, {"eager": model, "compiled": compiled}.items()):
        with torch.no_grad():
            finite = run(**example_inputs(model, device=device, **size))[0].isfinite().all().item()
        print(f"{compute} {storage} {how} {size}: {'finite' if finite else 'NOT FINITE'}", flush=True)
        if not finite:
            raise RuntimeError("a result is not finite")


if __name__ == "__main__":
    main(*sys.argv[1:])
