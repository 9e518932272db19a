"""svdq-compile quantize: an NVFP4 or SVDQuant checkpoint of an unquantised pipeline.

NVIDIA ModelOpt calibrates on pictures of your prompts and needs the transformer's memory twice; --data-free
looks at the weights alone and needs no ModelOpt.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint.source import SUBFOLDER
from ..errors import OptionError, QuantizeError
from ..spec import Format
from .common import DTYPES, add_device, complete_options, pick_device, positive

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn

FORMATS = (Format.NVFP4_SVD, Format.NVFP4, Format.FP8)

RANK = 32
"""Rank where ``--rank`` is not given."""

CALIBRATION = {
    "count": None,
    "steps": 30,
    "width": None,
    "height": None,
    "cfg": 4.0,
    "negative_prompt": " ",
    "seed": 0,
    "dtype": "bfloat16",
}
"""Options that say how to calibrate, and their values where they are not given."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds this subcommand."""
    parser = subparsers.add_parser("quantize", help="make a checkpoint with ModelOpt", description=__doc__)
    add = parser.add_argument
    add("model", help="unquantised pipeline folder or Hub id")
    add("--output", required=True, metavar="DIR", help="pipeline folder to write; DIR/transformer must be new")
    add("--format", choices=[str(format) for format in FORMATS], default="nvfp4_svd", help="(nvfp4_svd)")
    add("--rank", type=positive, help=f"rank of the low-rank branch ({RANK})")
    add("--blocks-kept", type=int, default=2, metavar="N", help="unquantised blocks at each end (2)")
    everything = "a low-rank branch for text and modulation linears too, with --prompts; --data-free always does so"
    add("--all-svd", action="store_true", help=everything)
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--prompts", metavar="FILE", help="calibration prompts, one a line")
    data.add_argument("--data-free", action="store_true", help="nvfp4 or nvfp4_svd without calibration")
    calibrating = parser.add_argument_group("calibration", argument_default=argparse.SUPPRESS)
    add_calibration = calibrating.add_argument
    add_calibration("--count", type=positive, metavar="N", help="take only the first N prompts (all)")
    add_calibration("--steps", type=positive, help="denoising steps per prompt (30)")
    add_calibration("--width", type=positive, help="pixels (the pipeline's own)")
    add_calibration("--height", type=positive, help="pixels (the pipeline's own)")
    add_calibration("--cfg", type=float, metavar="SCALE", help="true_cfg_scale (4.0)")
    add_calibration("--negative-prompt", metavar="TEXT", help="(one space)")
    add_calibration("--seed", type=int, help="the same seed gives the same files (0)")
    add_calibration("--dtype", choices=DTYPES, help="dtype to calibrate and export in (bfloat16)")
    add_device(parser)
    add("--transformer-only", action="store_true", help="write DIR/transformer and nothing else")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Quantises, writes DIR and prints where it is.

    Raises:
        OptionError: options contradict each other, or the prompts file is empty.
        QuantizeError: the model cannot be quantised as asked.
        MissingPackageError: ModelOpt is not installed.
        CheckpointError: the model cannot be read.
    """
    from .pipeline import pipeline_folder

    output = Path(args.output)
    target = output / SUBFOLDER
    if target.exists():
        raise OptionError(f"{target} exists; remove it or choose another --output")
    for option, given in (("--all-svd", args.all_svd), ("--rank", args.rank is not None)):
        if given and args.format != Format.NVFP4_SVD:
            raise OptionError(f"{option} is for --format nvfp4_svd, not {args.format}")
    complete(args)
    prompts = None if args.data_free else read_prompts(Path(args.prompts), args.count)
    needs_pipeline = prompts is not None or not args.transformer_only
    source = pipeline_folder(args.model) if needs_pipeline else None
    if source is not None and source.resolve() in output.resolve().parents:
        raise OptionError(f"--output {output} lies inside {source}, which is to be copied")
    if prompts is None:
        export_data_free(args, source or args.model, target)
    else:
        calibrate_and_export(args, source, prompts, target)
    if not args.transformer_only:
        copy_rest(source, output)
    print(f"written: {target if args.transformer_only else output}")
    return 0


def complete(args: argparse.Namespace) -> None:
    """Gives the rank and the options of the calibration that are not given their values.

    Raises:
        OptionError: one is given, or ``--all-svd``, and there is no calibration.
    """
    if args.data_free and args.all_svd:
        raise OptionError(
            "--all-svd is for calibration with --prompts; --data-free gives every linear of the quantised blocks "
            "a low-rank branch: leave --all-svd out"
        )
    refusal = "is for calibration with --prompts, not for --data-free" if args.data_free else None
    complete_options(args, CALIBRATION, refusal)
    args.rank = args.rank or RANK


def read_prompts(file: Path, count: int | None) -> list[str]:
    """The first ``count`` lines of a file that are not blank.

    Raises:
        OptionError: there are fewer than asked for, or none.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise OptionError(f"{file} is not UTF-8 text: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if len(prompts) < (count or 1):
        raise OptionError(f"{file} holds {len(prompts)} prompts, needs {count or 1}")
    return prompts[:count]


def export_data_free(args: argparse.Namespace, model: str | Path, target: Path) -> None:
    """Writes a checkpoint quantised from the weights alone."""
    from ..model.load import load_transformer
    from ..model.save import save_checkpoint

    if args.format == Format.FP8:
        raise QuantizeError("--data-free makes nvfp4 and nvfp4_svd, not fp8")
    transformer = load_transformer(
        model,
        pick_device(args.device),
        quantize=args.format,
        rank=args.rank,
        blocks_kept=args.blocks_kept,
    )
    save_checkpoint(transformer, target)


def calibrate_and_export(args: argparse.Namespace, source: Path, prompts: list[str], target: Path) -> None:
    """Writes a checkpoint calibrated by running the pipeline on the prompts."""
    import torch

    from ..quantization.modelopt import export
    from ..quantization.recipes import Recipe
    from .pipeline import is_quantised, load_pipeline

    skip = {"skip": ()} if args.all_svd else {}
    recipe = Recipe(format=Format(args.format), rank=args.rank, blocks_kept=args.blocks_kept, **skip)
    if is_quantised(str(source)):
        raise QuantizeError(f"{source} is quantised already; give the unquantised pipeline")
    pipe = load_pipeline(str(source), pick_device(args.device), getattr(torch, args.dtype))
    export(pipe.transformer, calibration(pipe, prompts, args), target, recipe, seed=args.seed, copy=False)


def calibration(pipe: DiffusionPipeline, prompts: list[str], args: argparse.Namespace) -> Callable[[nn.Module], None]:
    """A loop that runs a transformer in the pipeline on every prompt, without decoding pictures."""
    import torch

    pipe.set_progress_bar_config(disable=True)

    def loop(model: nn.Module) -> None:
        original, pipe.transformer = pipe.transformer, model
        try:
            for i, prompt in enumerate(prompts):
                pipe(
                    prompt=prompt,
                    negative_prompt=args.negative_prompt,
                    true_cfg_scale=args.cfg,
                    num_inference_steps=args.steps,
                    width=args.width,
                    height=args.height,
                    generator=torch.Generator("cpu").manual_seed(args.seed + i),
                    output_type="latent",
                )
        finally:
            pipe.transformer = original

    return loop


def copy_rest(source: Path, output: Path) -> None:
    """Copies everything of a pipeline folder but its transformer and hidden files."""
    for entry in sorted(source.iterdir()):
        if entry.name == SUBFOLDER or entry.name.startswith("."):
            continue
        if entry.is_dir():
            shutil.copytree(entry, output / entry.name, dirs_exist_ok=True)
        else:
            shutil.copy2(entry, output / entry.name)
