"""Pictures of denoising runs, and how far they are from those of the pipeline's own transformer."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import statistics
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..dtypes import DTYPE_NAMES
from ..errors import OptionError
from .metrics import psnr, ssim
from .perceptual import load_lpips
from .plain import finite_or_none
from .record import Call, recorded, spread

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL import Image


@dataclasses.dataclass(frozen=True)
class Denoising:
    """What to draw: every prompt with every seed, one picture at a time.

    Args:
        prompts: what to show.
        seeds: of the noise, which is drawn on the CPU and so the same on every machine.
        steps: denoising steps.
        width: pixels; None for the pipeline's own.
        height: pixels; None for the pipeline's own.
        cfg: true_cfg_scale.
        negative_prompt: what to avoid.

    Raises:
        OptionError: ``prompts`` is one text instead of several.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    steps: int = 50
    width: int | None = None
    height: int | None = None
    cfg: float = 4.0
    negative_prompt: str = " "

    def __post_init__(self) -> None:
        if isinstance(self.prompts, str):
            raise OptionError(f"prompts takes a tuple of texts, not the string {self.prompts!r}: ({self.prompts!r},)")

    @property
    def pictures(self) -> list[tuple[str, int]]:
        """Prompt and seed of each picture."""
        return list(itertools.product(self.prompts, self.seeds))


@dataclasses.dataclass(frozen=True)
class Picture:
    """One picture against the reference's: PSNR in dB, SSIM, and LPIPS or None. ``str()`` is a caption."""

    prompt: str
    seed: int
    psnr: float
    ssim: float
    lpips: float | None

    def __str__(self) -> str:
        perceptual = "" if self.lpips is None else f"  LPIPS {self.lpips:.3f}"
        return f"PSNR {self.psnr:.2f} dB  SSIM {self.ssim:.3f}{perceptual}"


@dataclasses.dataclass(frozen=True)
class Pictures:
    """A run's pictures against those of its reference.

    Args:
        name: of the transformer that drew them.
        rows: one for each picture, in the order of :attr:`Denoising.pictures`.
        seconds: that drawing took, compilation included.
        images: RGB, as many.
    """

    name: str
    rows: tuple[Picture, ...]
    seconds: float
    images: tuple[Image.Image, ...] = dataclasses.field(repr=False)

    @property
    def psnr(self) -> float:
        """Mean over the pictures, in dB; infinite as soon as one is the reference's own."""
        return statistics.fmean(row.psnr for row in self.rows)

    @property
    def ssim(self) -> float:
        """Mean over the pictures."""
        return statistics.fmean(row.ssim for row in self.rows)

    @property
    def lpips(self) -> float | None:
        """Mean over the pictures; None if it was not measured."""
        found = [row.lpips for row in self.rows if row.lpips is not None]
        return statistics.fmean(found) if found else None

    @property
    def worst_psnr(self) -> float:
        """That of the picture with the least."""
        return min(row.psnr for row in self.rows)

    @property
    def worst_ssim(self) -> float:
        """That of the picture with the least."""
        return min(row.ssim for row in self.rows)

    def to_dict(self) -> dict:
        """Plain data for JSON; infinity becomes None."""
        means = {name: getattr(self, name) for name in ("psnr", "worst_psnr", "ssim", "worst_ssim", "lpips")}
        rows = [finite_or_none(dataclasses.asdict(row)) for row in self.rows]
        return {**finite_or_none(means), "seconds": self.seconds, "pictures": rows}


class DenoisingRun:
    """The pictures a pipeline draws with its own transformer, and what compares others with them.

        run = DenoisingRun(pipe, Denoising(prompts=("a red seven",), steps=20))
        print(run.compare(load_transformer("path/to/export", device="cuda")).psnr)

    PSNR and SSIM are those of the 8-bit pictures, the ones a PNG file holds.

    Args:
        pipe: a text-to-image pipeline; the transformer it has now is the reference.
        plan: what to draw.
        kept_steps: of how many denoising steps of each picture, evenly spaced, to keep the transformer's calls.

    Attributes:
        name: the reference's dtype, ``BF16``.
        images: the reference's pictures.
        calls: the reference's forward passes that were kept, in order.
        seconds: that drawing took.
        lpips_missing: why there is no LPIPS; empty if there is.
    """

    def __init__(self, pipe: DiffusionPipeline, plan: Denoising, *, kept_steps: int = 0) -> None:
        self._pipe = pipe
        self.plan = plan
        self.name = DTYPE_NAMES[pipe.transformer.dtype]
        self.calls: list[Call] = []
        self._lpips, self.lpips_missing = load_lpips()
        start = time.perf_counter()
        self.images = tuple(self._draw_and_record(kept_steps))
        self.seconds = time.perf_counter() - start

    def compare(self, transformer: nn.Module, name: str = "") -> Pictures:
        """Draws with another transformer.

        Args:
            transformer: takes the pipeline's own place for the length of the call; on the same device.
            name: for tables and sheets.

        Returns:
            Its pictures, with PSNR, SSIM and LPIPS of each against the reference's.
        """
        start = time.perf_counter()
        with _lent(self._pipe, transformer):
            images = tuple(picture(self._pipe, self.plan, *which) for which in self.plan.pictures)
        seconds = time.perf_counter() - start
        pairs = zip(self.plan.pictures, images, self.images, strict=True)
        return Pictures(name, tuple(self._row(*which, *pair) for which, *pair in pairs), seconds, images)

    def _draw_and_record(self, kept_steps: int) -> Iterator[Image.Image]:
        for which in self.plan.pictures:
            with recorded(self._pipe.transformer) if kept_steps else contextlib.nullcontext([]) as calls:
                yield picture(self._pipe, self.plan, *which)
            if kept_steps:
                self.calls += spread(calls, self.plan.steps, kept_steps)

    def _row(self, prompt: str, seed: int, image: Image.Image, reference: Image.Image) -> Picture:
        x, y = pixels(image), pixels(reference)
        lpips = None if self._lpips is None else float(self._lpips(x, y))
        return Picture(prompt, seed, float(psnr(x, y)), float(ssim(x, y)), lpips)


def picture(pipe: DiffusionPipeline, plan: Denoising, prompt: str, seed: int) -> Image.Image:
    """One picture of a plan."""
    return pipe(
        prompt=prompt,
        negative_prompt=plan.negative_prompt,
        true_cfg_scale=plan.cfg,
        num_inference_steps=plan.steps,
        width=plan.width,
        height=plan.height,
        # Noise drawn on the CPU is the same on every machine.
        generator=torch.Generator("cpu").manual_seed(seed),
    ).images[0]


def pixels(image: Image.Image) -> torch.Tensor:
    """A picture's 8-bit RGB values over 255: (1, 3, h, w), float64."""
    import numpy

    values = torch.from_numpy(numpy.array(image.convert("RGB")))
    return values.permute(2, 0, 1)[None].double() / 255


@contextlib.contextmanager
def _lent(pipe: DiffusionPipeline, transformer: nn.Module) -> Iterator[None]:
    """A transformer in the place of the pipeline's own."""
    own, pipe.transformer = pipe.transformer, transformer
    try:
        yield
    finally:
        pipe.transformer = own
