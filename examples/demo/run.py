"""Draw the same digits in BF16, NVFP4 and SVDQuant, and with SVDQuant's low-rank branch switched off.

Calibrates and exports the demo pipeline with NVIDIA ModelOpt, runs the exports in the stock pipeline compiled with
``backend="svdq"``, and writes a contact sheet and a table. Exits with 1 if SVDQuant is not closer to BF16 than
NVFP4 is, or if switching the low-rank branch off does no harm.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import QwenImagePipeline
from PIL import Image
from torch import nn

import svdq_compile
from svdq_compile.cli.common import pick_device, positive
from svdq_compile.cli.quantize import copy_rest
from svdq_compile.model.load import quantised_linears
from svdq_compile.ops.weight import SVDQWeight
from svdq_compile.quality.metrics import psnr
from svdq_compile.quality.plain import finite_or_none
from svdq_compile.quality.record import Call, recorded, spread
from svdq_compile.quality.sheet import contact_sheet
from svdq_compile.quantization.modelopt import export
from svdq_compile.quantization.recipes import Recipe
from svdq_compile.spec import Format

PIPELINE = Path(__file__).parent / "pipeline"
PROMPTS = (
    "a red seven on a white background",
    "a blue three on a white background",
    "a green five on a white background",
    "a purple eight on a white background",
    "a black two on a white background",
    "a orange zero on a white background",
)
CALIBRATION = (
    "a red one on a white background",
    "a orange four on a white background",
    "a green nine on a white background",
    "a blue six on a white background",
    "a purple three on a white background",
    "a black eight on a white background",
)
CALIBRATION_STEPS = 8
CALIBRATION_SEED = 1_000_000
"""Far from the seeds of the pictures: calibration must not see their noise."""
TESTED_STEPS = 10
"""Denoising steps whose inputs the transformers are compared on."""
SIZE = 64
GUIDANCE = 2.5
COLUMNS = ("BF16", "NVFP4", "SVDQuant", "SVDQuant, LoRA off")
MARGIN = 0.95
"""SVDQuant's error must be at most this share of NVFP4's."""
HARM = 2.0
"""The error with the low-rank branch off must be at least this many times the error with it."""


@dataclasses.dataclass(frozen=True)
class Column:
    """One transformer's results; ``images`` are (n, 3, h, w) in [0, 1].

    Args:
        name: heading.
        nbytes: bytes of the stored transformer.
        bits: stored bits for each weight of the linears that are quantised.
        error: mean of ``||y - y_bf16|| / ||y_bf16||`` over the inputs of the BF16 pipeline.
        psnr: mean over the pictures against BF16's, in dB.
        seconds: drawing the pictures, compilation included.
        images: the pictures.
    """

    name: str
    nbytes: int
    bits: float
    error: float
    psnr: float
    seconds: float
    images: torch.Tensor = dataclasses.field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; infinity becomes None."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "images"}
        return finite_or_none(plain)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for everything written")
    parser.add_argument("--steps", type=positive, default=20, help="denoising steps (20)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first picture (0)")
    parser.add_argument("--rank", type=positive, default=32, help="rank of the low-rank branch (32)")
    parser.add_argument("--prompts", type=positive, default=len(PROMPTS), metavar="N", help="only the first N (all)")
    parser.add_argument("--device", help="where to run (cuda if there is one, else cpu)")
    parser.add_argument("--no-compile", action="store_true", help="run everything without torch.compile")
    return parser.parse_args(argv)


def draw(pipe: QwenImagePipeline, transformer: nn.Module, prompts: tuple[str, ...], steps: int, seed: int, kind: str):
    """Pictures of the prompts, or their latents, with a transformer in the place of the pipeline's own."""
    original, pipe.transformer = pipe.transformer, transformer
    try:
        return pipe(
            list(prompts),
            negative_prompt=[" "] * len(prompts),
            true_cfg_scale=GUIDANCE,
            height=SIZE,
            width=SIZE,
            num_inference_steps=steps,
            # Noise drawn on the CPU is the same on every machine.
            generator=[torch.Generator("cpu").manual_seed(seed + i) for i in range(len(prompts))],
            output_type=kind,
        ).images
    finally:
        pipe.transformer = original


def quantise(pipe: QwenImagePipeline, recipe: Recipe, folder: Path) -> Path:
    """Calibrates with ModelOpt and writes a pipeline folder with the quantised transformer."""

    def loop(transformer: nn.Module) -> None:
        draw(pipe, transformer, CALIBRATION, CALIBRATION_STEPS, CALIBRATION_SEED, "latent")

    if folder.exists():
        shutil.rmtree(folder)
    export(pipe.transformer, loop, folder / "transformer", recipe)
    copy_rest(PIPELINE, folder)
    return folder


def without_lora(transformer: nn.Module) -> nn.Module:
    """The same transformer with ``lora_up`` of every linear set to zero; its fingerprints stay."""
    for module in quantised_linears(transformer).values():
        weight = module.weight
        parts = weight.parts()
        if "lora_up" in parts:
            parts["lora_up"] = torch.zeros_like(parts["lora_up"])
            changed = SVDQWeight(parts, weight.fingerprint, weight.dtype)
            module.weight = nn.Parameter(changed, requires_grad=False)
    return transformer


def model_error(transformer: nn.Module, calls: list[Call]) -> float:
    """Mean relative error of a transformer's output over recorded calls."""
    errors = []
    with torch.no_grad():
        for kwargs, expected in calls:
            wide = expected.double()
            errors.append(float((transformer(**kwargs)[0].double() - wide).norm() / wide.norm()))
    return sum(errors) / len(errors)


def bits_per_weight(transformer: nn.Module) -> float:
    """Stored bits for each weight of the quantised linears; 16 if there are none."""
    weights = [module.weight for module in quantised_linears(transformer).values()]
    if not weights:
        return 16.0
    return 8 * sum(weight.packed_nbytes() for weight in weights) / sum(weight.numel() for weight in weights)


def sheet_of(columns: list[Column], prompts: tuple[str, ...]) -> Image.Image:
    """Rows are prompts, columns are transformers."""
    pictures = [[picture(image) for image in column.images] for column in columns]
    return contact_sheet(pictures, [column.name for column in columns], prompts, scale=3)


def picture(image: torch.Tensor) -> Image.Image:
    """A picture (3, h, w) in [0, 1] in 8 bits."""
    return Image.fromarray((image.permute(1, 2, 0).clamp(0, 1) * 255).round().byte().numpy())


def table(columns: list[Column]) -> str:
    """The results as text."""
    lines = [f"{'transformer':20} {'bytes':>9} {'bits/weight':>11} {'error':>8} {'PSNR dB':>8}"]
    lines += [f"{c.name:20} {c.nbytes:9} {c.bits:11.2f} {c.error:8.4f} {c.psnr:8.2f}" for c in columns]
    return "\n".join(lines)


def failures(columns: list[Column]) -> list[str]:
    """What contradicts the claims of this demo, one sentence each."""
    _, nvfp4, svdquant, off = columns
    found = []
    if not svdquant.error <= MARGIN * nvfp4.error:
        found.append(
            f"SVDQuant's error {svdquant.error:.4f} is not clearly below NVFP4's {nvfp4.error:.4f} "
            f"(needed: at most {MARGIN} times it)"
        )
    if not svdquant.psnr > nvfp4.psnr:
        found.append(f"SVDQuant's PSNR {svdquant.psnr:.2f} dB is not above NVFP4's {nvfp4.psnr:.2f} dB")
    if not off.error >= HARM * svdquant.error:
        found.append(
            f"without the low-rank branch the error is {off.error:.4f}, with it {svdquant.error:.4f} "
            f"(needed: at least {HARM:g} times it)"
        )
    if not off.psnr < svdquant.psnr:
        found.append(f"without the low-rank branch PSNR is {off.psnr:.2f} dB, with it {svdquant.psnr:.2f} dB")
    return found


def say(start: float, text: str) -> None:
    """Prints a line with the seconds since ``start``."""
    print(f"[{time.perf_counter() - start:4.0f} s] {text}", flush=True)


def load_pipeline(device: torch.device) -> QwenImagePipeline:
    """The trained demo pipeline in BF16, without chatter."""
    for known in ("transformers .* is not tested", "Torchinductor does not support code generation for complex"):
        warnings.filterwarnings("ignore", message=known, category=UserWarning)
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    pipe = QwenImagePipeline.from_pretrained(PIPELINE, dtype=torch.bfloat16).to(device)
    # Calibration shows its progress through diffusers.
    diffusers.utils.logging.enable_progress_bar()
    pipe.set_progress_bar_config(disable=True)
    # As in a loaded checkpoint, so that blocks which stay BF16 share one compiled graph with BF16's own.
    pipe.transformer.requires_grad_(False)
    return pipe


def main(argv: list[str] | None = None) -> int:
    """Runs the demo.

    Returns:
        Exit code: 0, or 1 if the results contradict what they shall show.
    """
    args, began = parse_arguments(argv), time.perf_counter()
    device, prompts = pick_device(args.device), PROMPTS[: args.prompts]
    pipe = load_pipeline(device)
    folders = {}
    for format in (Format.NVFP4, Format.NVFP4_SVD):
        say(began, f"calibrating and exporting {format} with ModelOpt")
        recipe = Recipe(format, rank=args.rank, blocks_kept=1)
        folders[format] = quantise(pipe, recipe, args.output / str(format))

    def load(format: Format) -> nn.Module:
        return svdq_compile.load_transformer(folders[format], device)

    makers: tuple[Callable[[], nn.Module], ...] = (
        lambda: pipe.transformer,
        lambda: load(Format.NVFP4),
        lambda: load(Format.NVFP4_SVD),
        lambda: without_lora(load(Format.NVFP4_SVD)),
    )
    stored = (PIPELINE, folders[Format.NVFP4], folders[Format.NVFP4_SVD], folders[Format.NVFP4_SVD])
    columns: list[Column] = []
    calls: list[Call] = []
    for name, make, folder in zip(COLUMNS, makers, stored, strict=True):
        say(began, f"drawing {len(prompts)} pictures with {name}")
        transformer = make()
        if not args.no_compile:
            transformer.compile_repeated_blocks(backend="svdq", fullgraph=True, dynamic=False)
        start = time.perf_counter()
        with recorded(transformer) as seen:
            images = draw(pipe, transformer, prompts, args.steps, args.seed, "pt").float().cpu()
        seconds = time.perf_counter() - start
        if not columns:
            calls = spread(seen, args.steps, TESTED_STEPS)
        reference = columns[0].images if columns else images
        columns.append(
            Column(
                name,
                svdq_compile.inspect(folder).manifest.nbytes,
                bits_per_weight(transformer),
                model_error(transformer, calls),
                float(psnr(images, reference).mean()),
                seconds,
                images,
            )
        )

    sheet = args.output / "contact_sheet.png"
    sheet_of(columns, prompts).save(sheet)
    found = failures(columns)
    results = {"prompts": prompts, "steps": args.steps, "seed": args.seed, "rank": args.rank}
    results |= {"columns": [column.to_dict() for column in columns], "failures": found}
    (args.output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"\n{table(columns)}\n")
    print(f"error: of the transformer's output against BF16's, on {len(calls)} inputs of {len(prompts)} pictures each")
    print(f"contact sheet: {sheet}")
    for sentence in found:
        print(f"FAILED: {sentence}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
