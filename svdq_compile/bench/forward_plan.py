"""What ``bench forward`` measures: image sizes, prompt length, contenders. Importing this imports no torch."""

from __future__ import annotations

import argparse
import dataclasses
import re

from ..spec import STORAGES
from .plan import MODES

PIXELS_PER_TOKEN = 16
"""Along each side of the image: the VAE makes eight of one, a patch two."""

SIZES = ((1328, 1328), (1024, 1024), (512, 512))
MODELS = QWEN_IMAGE, SMALL = "qwen-image", "small"
PEERS = BF16, FP8 = "bf16", "torchao-fp8"
NO_PEERS = "none"
BLOCKS = 60
BLOCKS_KEPT = 2
"""At each end of all sixty; ModelOpt's exports leave them unquantised."""


@dataclasses.dataclass(frozen=True)
class ForwardPlan:
    """Everything a run is asked to do.

    Args:
        sizes: (height, width) of the images, in pixels.
        batch: images of one forward.
        text: prompt tokens.
        model: one of :data:`MODELS`; None takes the real one on a GPU and the small one elsewhere.
        blocks: how many, None for the model's own number.
        rank: R of the low-rank branches.
        modes: compute modes of ours.
        storages: how weights lie in memory.
        peers: those of :data:`PEERS` to compare with.
        attention: diffusers' attention backend for all; None takes cuDNN's on a GPU and torch's choice elsewhere.
        whole: the model is compiled as a whole, not block by block.
        dynamic: sizes share compiled code, as in one process that draws them in turn; else each has its own.
        capture: ours are measured in a CUDA graph as well.
        lora_cost: ours are measured without their low-rank branches as well, and in turns with them.
        ablate: ours are measured with each graph pass switched off as well, and in turns with all of them.
        compile_time: compilation is measured in processes of their own as well.
        repeats: timed forwards.
        kernels: how many kernels of each contender are listed by time.
        csv: file to write, or None.
        chart: PNG file to draw, or None.
    """

    sizes: tuple[tuple[int, int], ...] = SIZES
    batch: int = 1
    text: int = 128
    model: str | None = None
    blocks: int | None = None
    rank: int = 32
    modes: tuple[str, ...] = MODES
    storages: tuple[str, ...] = STORAGES
    peers: tuple[str, ...] = PEERS
    attention: str | None = None
    whole: bool = False
    dynamic: bool = False
    capture: bool = True
    lora_cost: bool = False
    ablate: bool = False
    compile_time: bool = False
    repeats: int = 10
    kernels: int = 0
    csv: str | None = None
    chart: str | None = None

    def on(self, device_type: str) -> ForwardPlan:
        """The same with what depends on the device decided."""
        gpu = device_type == "cuda"
        model = self.model or (QWEN_IMAGE if gpu else SMALL)
        attention = self.attention or ("_native_cudnn" if gpu else "native")
        return dataclasses.replace(self, model=model, attention=attention)


def parse_size(text: str) -> tuple[int, int]:
    """``1328x1328``: height and width in pixels, both multiples of :data:`PIXELS_PER_TOKEN`."""
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write HEIGHTxWIDTH, for example 1024x1024")
    size = int(found[1]), int(found[2])
    if any(side == 0 or side % PIXELS_PER_TOKEN for side in size):
        raise argparse.ArgumentTypeError(f"{text}: both sides must be multiples of {PIXELS_PER_TOKEN}")
    return size


def blocks_kept(blocks: int) -> int:
    """Blocks at each end that stay unquantised, in proportion to :data:`BLOCKS_KEPT` of :data:`BLOCKS`."""
    return BLOCKS_KEPT * blocks // BLOCKS
