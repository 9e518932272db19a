"""generate --compare: the same pictures by several checkpoints and compute modes, on one sheet with their figures."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..checkpoint.source import is_hub_id
from ..errors import OptionError
from ..ops.modes import COMPUTE_MODES
from .common import is_png, pick_device, short_name

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ..quality.denoise import Denoising

SHEET = "compare.png"
"""The sheet's name where ``--output`` is a folder."""


class Candidate(NamedTuple):
    """A checkpoint and a compute mode; None stands for ``--transformer`` and for ``--compute``."""

    checkpoint: str | None
    compute: str | None


def parse_candidate(text: str) -> Candidate:
    """``MODE``, ``CHECKPOINT`` or ``CHECKPOINT:MODE``."""
    if text in COMPUTE_MODES:
        return Candidate(None, text)
    checkpoint, colon, mode = text.rpartition(":")
    return Candidate(checkpoint, mode) if colon and mode in COMPUTE_MODES else Candidate(text, None)


def compare(
    options: argparse.Namespace, plan: Denoising, prepare: Callable[[DiffusionPipeline, argparse.Namespace], None]
) -> Path:
    """Draws with the pipeline's own transformer, then with each candidate; prints their figures and writes the sheet.

    Args:
        options: of ``generate``.
        plan: what to draw.
        prepare: sets up a pipeline's transformer as the options say.

    Raises:
        OptionError: a mode without a checkpoint, what is neither a mode nor a checkpoint, or the pipeline's own
            transformer is quantised.
        CheckpointError: the pipeline or a checkpoint cannot be used.
        StorageError: the storage has not what a compute mode needs.
    """
    candidates = resolve(options)
    import torch

    from ..quality.denoise import DenoisingRun
    from ..quality.sheet import compared_sheet
    from .pipeline import is_quantised, load_pipeline

    if is_quantised(options.model):
        raise OptionError(
            f"--compare needs an unquantised pipeline to compare with, which {options.model} is not: "
            f"give one as --model, and this as --transformer"
        )
    pipe = load_pipeline(options.model, pick_device(options.device), getattr(torch, options.dtype))
    prepare(pipe, options)
    run = DenoisingRun(pipe, plan)
    print(f"{run.name}: {run.seconds:.2f} s", flush=True)
    # Each name would otherwise be the same.
    one = len({candidate.checkpoint for candidate in candidates}) == 1
    drawn = []
    for candidate in loaded(pipe, options, candidates, prepare):
        name = candidate.compute if one else f"{short_name(candidate.checkpoint)}: {candidate.compute}"
        pictures = run.compare(pipe.transformer, name)
        drawn.append(pictures)
        for row in pictures.rows:
            print(f"{name}, seed {row.seed}: {row}", flush=True)
        print(f"{name}: {pictures.seconds:.2f} s", flush=True)
    if run.lpips_missing:
        print(f"LPIPS: {run.lpips_missing}")
    output = Path(options.output)
    file = output if is_png(options.output) else output / SHEET
    file.parent.mkdir(parents=True, exist_ok=True)
    compared_sheet(run, drawn).save(file)
    print(f"contact sheet: {file}")
    return file


def resolve(options: argparse.Namespace) -> list[Candidate]:
    """The candidates with everything named.

    Raises:
        OptionError: a mode without a checkpoint, what is neither a mode nor a checkpoint, or ``--transformer`` or
            ``--compute`` where every item has its own.
    """
    found = []
    for checkpoint, compute in options.compare:
        if checkpoint is not None and not (is_hub_id(checkpoint) or (checkpoint and Path(checkpoint).exists())):
            item = checkpoint if compute is None else f"{checkpoint}:{compute}"
            raise OptionError(
                f"--compare {item}: neither a compute mode ({', '.join(COMPUTE_MODES)}) nor a checkpoint "
                "(a file, a folder or a Hub id, and :MODE after it if need be)"
            )
        if checkpoint is None and options.transformer is None:
            raise OptionError(f"--compare {compute} is a mode of --transformer, which is not given")
        found.append(Candidate(checkpoint or options.transformer, compute or options.compute))
    checkpoints, modes = zip(*options.compare, strict=True)
    if options.transformer is not None and None not in checkpoints:
        raise OptionError(f"--transformer {options.transformer} does nothing: every item of --compare is a checkpoint")
    if options.compute != "auto" and None not in modes:
        raise OptionError(f"--compute {options.compute} does nothing: every item of --compare has its own mode")
    return found


def loaded(
    pipe: DiffusionPipeline,
    options: argparse.Namespace,
    candidates: list[Candidate],
    prepare: Callable[[DiffusionPipeline, argparse.Namespace], None],
) -> Iterator[Candidate]:
    """Each candidate once the pipeline has its transformer; modes that follow each other share one that is loaded."""
    import torch

    from ..model.load import load_transformer, set_compute

    device, present = pipe.device, None
    for candidate in candidates:
        if options.compile != "none":
            # Every mode compiles anew, and Dynamo keeps only so many versions of one function.
            torch.compiler.reset()
        if candidate.checkpoint == present:
            set_compute(pipe.transformer, candidate.compute)
        else:
            # The one before goes first: two need not fit.
            pipe.transformer = None
            pipe.transformer = load_transformer(
                candidate.checkpoint,
                device,
                getattr(torch, options.dtype),
                compute=candidate.compute,
                storage=options.storage,
            )
            present = candidate.checkpoint
            prepare(pipe, options)
        yield candidate
