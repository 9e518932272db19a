"""svdq-compile verify: error of quantised checkpoints against the unquantised model, per linear and in pictures.

SQNR is 10 * log10(||reference||^2 / ||reference - output||^2) in dB. Without --denoise the inputs are seeded random
numbers: they rank layers and show broken ones, and say little about images. With it they are those of a denoising run
of the unquantised model, and each checkpoint draws the same pictures for PSNR, SSIM and, where it is installed, LPIPS.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..bench.plan import listed, one_of
from ..errors import OptionError, StorageError
from ..ops.modes import COMPUTE_MODES
from .common import (
    COMPUTE_HELP,
    add_device,
    add_json,
    add_storage,
    complete_options,
    pick_device,
    positive,
    require_png,
    short_name,
    show,
    whole,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..quality.denoise import DenoisingRun
    from ..quality.report import Skipped

KEPT_STEPS = 4
"""Denoising steps of each picture whose inputs the linears are compared on."""

DRAWING = {
    "model": None,
    "prompt": None,
    "prompts": None,
    "negative_prompt": " ",
    "steps": 50,
    "width": None,
    "height": None,
    "cfg": 4.0,
    "sheet": None,
}
"""Options that say what to draw, and their values where they are not given."""

RANDOM = {"tokens": 64}
"""Options of random inputs, likewise."""


class Candidate(NamedTuple):
    """A checkpoint, loaded, in a compute mode."""

    checkpoint: str
    compute: str
    model: nn.Module


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds this subcommand."""
    parser = subparsers.add_parser(
        "verify", help="error of checkpoints against the unquantised model", description=__doc__
    )
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="quantised transformers or pipelines: folder, file or Hub id")
    add("--against", required=True, metavar="PATH", help="the unquantised one")
    add("--layers", default="*", metavar="GLOB", help="names of the linears to list (all)")
    modes = listed(one_of(COMPUTE_MODES))
    add("--compute", type=modes, default=("auto",), metavar="MODE,...", help=COMPUTE_HELP)
    add_storage(parser)
    tokens = {"type": positive, "default": argparse.SUPPRESS}
    add("--tokens", **tokens, help="image tokens of random inputs, and text tokens (64)")
    add(
        "--seed",
        type=listed(whole),
        default=(0,),
        metavar="S,...",
        help="of random inputs, or of each picture of a prompt (0)",
    )
    drawing = parser.add_argument_group("pictures", argument_default=argparse.SUPPRESS)
    add = drawing.add_argument
    denoising = "draw every prompt with every seed; inputs are those of this run"
    add("--denoise", action="store_true", default=False, help=denoising)
    add("--model", metavar="PATH", help="pipeline to draw with (--against)")
    add("--prompt", action="append", metavar="TEXT", help="what to show; may be given again")
    add("--prompts", metavar="FILE", help="more of them, one a line")
    add("--negative-prompt", metavar="TEXT", help="what to avoid (one space)")
    add("--steps", type=positive, help="denoising steps (50)")
    add("--width", type=positive, help="pixels (the pipeline's own)")
    add("--height", type=positive, help="pixels (the pipeline's own)")
    add("--cfg", type=float, metavar="SCALE", help="true_cfg_scale (4.0)")
    add("--sheet", metavar="FILE.png", help="also write a contact sheet")
    add_device(parser)
    parser.add_argument("--brief", action="store_true", help="leave out the linears, keep their summaries")
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Loads the models, runs them on the same inputs and prints the errors, worst first.

    Raises:
        OptionError: options contradict each other.
        CheckpointError: a model cannot be read, or the two do not fit.
        StorageError: the storage has not what the only compute mode needs.
    """
    complete(args)
    prompts = chosen_prompts(args)
    from ..model.load import load_transformer
    from ..quality.report import Comparison, Report
    from ..verification import random_inputs, verify

    device = pick_device(args.device)
    if args.denoise:
        drawn, reference = denoise(args, prompts, device)
        inputs = [call.inputs for call in drawn.calls]
        phrase = f"{len(inputs)} forward passes of the reference's denoising"
    else:
        drawn, reference = None, load_transformer(args.against, device)
        inputs, phrase = random_inputs(reference, tokens=args.tokens, seed=args.seed[0]), "random numbers"
    comparisons, skipped = [], []
    for checkpoint, compute, model in candidates(args, reference, device, skipped):
        linears = verify(model, reference, inputs, layers=args.layers)
        pictures = drawn and drawn.compare(model, f"{short_name(checkpoint)}: {compute}")
        comparisons.append(Comparison(checkpoint, compute, linears, pictures))
    if args.sheet is not None:
        from ..quality.sheet import compared_sheet

        Path(args.sheet).parent.mkdir(parents=True, exist_ok=True)
        compared_sheet(drawn, [comparison.pictures for comparison in comparisons]).save(args.sheet)
    more = {"denoising": drawn.plan, "lpips_missing": drawn.lpips_missing} if drawn else {}
    return show(Report(phrase, tuple(comparisons), tuple(skipped), brief=args.brief, **more), args.json)


def complete(args: argparse.Namespace) -> None:
    """Gives the options of pictures and of random inputs that are not given their values.

    Raises:
        OptionError: one of pictures, or more than one seed, is given without ``--denoise``, or one of random inputs
            with it.
    """
    if len(args.seed) > 1 and not args.denoise:
        raise OptionError("--seed: random inputs have one; several are for --denoise, which is not given")
    complete_options(args, DRAWING, None if args.denoise else "is for --denoise, which is not given")
    complete_options(args, RANDOM, "is for random inputs, not for --denoise" if args.denoise else None)


def chosen_prompts(args: argparse.Namespace) -> tuple[str, ...]:
    """The prompts of the command line and of the file; none without ``--denoise``.

    Raises:
        OptionError: a denoising run without prompts, or a sheet that is no PNG.
    """
    if not args.denoise:
        return ()
    require_png("--sheet", args.sheet)
    prompts = tuple(args.prompt or ())
    if args.prompts is not None:
        from .quantize import read_prompts

        prompts += tuple(read_prompts(Path(args.prompts), None))
    if not prompts:
        raise OptionError("--denoise needs a prompt: give --prompt or --prompts")
    return prompts


def denoise(args: argparse.Namespace, prompts: tuple[str, ...], device: torch.device) -> tuple[DenoisingRun, nn.Module]:
    """The pictures of the unquantised transformer, and itself."""
    from ..checkpoint.manifest import read_manifest
    from ..dtypes import TORCH_DTYPES
    from ..quality.denoise import Denoising, DenoisingRun
    from .pipeline import load_pipeline

    dtype = TORCH_DTYPES[read_manifest(args.against).dtype]
    pipe = load_pipeline(args.model or args.against, device, dtype, transformer=args.against)
    plan = Denoising(prompts, args.seed, args.steps, args.width, args.height, args.cfg, args.negative_prompt)
    return DenoisingRun(pipe, plan, kept_steps=KEPT_STEPS), pipe.transformer


def candidates(
    args: argparse.Namespace, reference: nn.Module, device: torch.device, skipped: list[Skipped]
) -> Iterator[Candidate]:
    """Each checkpoint in each compute mode; the modes share its tensors.

    Args:
        args: the command line.
        reference: gives the dtype.
        device: where the checkpoints go.
        skipped: of several modes, those a checkpoint cannot have are added here.
    """
    from ..model.load import load_transformer
    from ..quality.report import Skipped

    for path in args.paths:
        model = load_transformer(path, device, reference.dtype, storage=args.storage)
        for compute in args.compute:
            reason = refusal(model, compute)
            if reason is None:
                yield Candidate(path, compute, model)
            elif len(args.compute) == 1:
                raise reason
            else:
                skipped.append(Skipped(path, compute, str(reason).splitlines()[0]))


def refusal(model: nn.Module, compute: str) -> StorageError | None:
    """Switches a model to a compute mode; why that cannot be, or None."""
    from ..model.load import set_compute

    try:
        set_compute(model, compute)
    except StorageError as error:
        return error
    return None
