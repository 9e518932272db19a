"""What ``verify`` prints: linears, whole models and pictures of several checkpoints in several compute modes."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..verification import Verification
    from .denoise import Denoising, Pictures


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A checkpoint in a compute mode against the reference; ``pictures`` is None without a denoising run."""

    checkpoint: str
    compute: str
    linears: Verification
    pictures: Pictures | None


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A compute mode that a checkpoint cannot have, and why."""

    checkpoint: str
    compute: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Report:
    """All comparisons with one reference. ``str()`` is their tables of linears, then one line for each.

    Args:
        inputs: what the models were run on, as a phrase.
        comparisons: in the order they were made.
        skipped: what could not be compared.
        denoising: the plan of the pictures, or None.
        lpips_missing: why there is no LPIPS; empty if there is.
        brief: leaves the linears out.
    """

    inputs: str
    comparisons: tuple[Comparison, ...]
    skipped: tuple[Skipped, ...] = ()
    denoising: Denoising | None = None
    lpips_missing: str = ""
    brief: bool = False

    def to_dict(self) -> dict:
        """Plain data for JSON; NaN and infinity become None."""
        data = {
            "inputs": self.inputs,
            "comparisons": [self._plain(comparison) for comparison in self.comparisons],
            "skipped": [dataclasses.asdict(skipped) for skipped in self.skipped],
        }
        if self.denoising is not None:
            data["denoising"] = {**dataclasses.asdict(self.denoising), "lpips_missing": self.lpips_missing}
        return data

    def _plain(self, comparison: Comparison) -> dict:
        data = {"checkpoint": comparison.checkpoint, "compute": comparison.compute, **comparison.linears.to_dict()}
        if self.brief:
            del data["linears"]
        if comparison.pictures is not None:
            data["denoising"] = comparison.pictures.to_dict()
        return data

    def __str__(self) -> str:
        blocks = []
        if not self.brief:
            blocks = [f"{c.checkpoint}, compute {c.compute}\n{c.linears}\n" for c in self.comparisons]
        return "\n".join([*blocks, *self._lines()])

    def _lines(self) -> list[str]:
        """The line of each comparison below a heading, and what is missing and why."""
        rows = (*self.comparisons, *self.skipped)
        wide = max(len("checkpoint"), *(len(row.checkpoint) for row in rows))
        heading = f"{'checkpoint':{wide}} {'compute':8} {'worst':>7} {'median':>7} {'best':>7} {'model':>7}"
        lines = [f"SQNR in dB of the quantised linears and of the whole model, on {self.inputs}"]
        if self.denoising is not None:
            lines += [f"PSNR in dB, SSIM and LPIPS: mean and worst of {len(self.denoising.pictures)} pictures"]
            heading += f"  {'PSNR':>7} {'worst':>7} {'SSIM':>7} {'worst':>7} {'LPIPS':>7}"
        lines += [heading, *(f"{c.checkpoint:{wide}} {c.compute:8} {_figures(c)}" for c in self.comparisons)]
        lines += [f"{s.checkpoint:{wide}} {s.compute:8} skipped: {s.reason}" for s in self.skipped]
        return [*lines, f"LPIPS: {self.lpips_missing}"] if self.lpips_missing else lines


def _figures(comparison: Comparison) -> str:
    all_linears = comparison.linears.summaries[0]
    decibels = (all_linears.worst, all_linears.median, all_linears.best, comparison.linears.model.sqnr)
    text = " ".join(f"{value:7.2f}" for value in decibels)
    pictures = comparison.pictures
    if pictures is None:
        return text
    lpips = "-" if pictures.lpips is None else f"{pictures.lpips:.4f}"
    psnr = f"{pictures.psnr:7.2f} {pictures.worst_psnr:7.2f}"
    return f"{text}  {psnr} {pictures.ssim:7.4f} {pictures.worst_ssim:7.4f} {lpips:>7}"
