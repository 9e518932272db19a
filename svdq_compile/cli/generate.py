"""svdq-compile generate: pictures from a stock diffusers pipeline, quantised or not, compiled or not.

Options may come from a YAML file whose keys are the long option names; the command line wins over it.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..bench.plan import listed
from ..errors import OptionError
from ..ops.modes import COMPUTE_MODES
from ..spec import STORAGES
from .common import DTYPES, add_device, is_png, pick_device, positive
from .compare import SHEET, compare, parse_candidate
from .config import read_config

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL import Image

    from ..quality.denoise import Denoising

DEFAULTS = {
    "model": None,
    "transformer": None,
    "prompt": None,
    "negative_prompt": " ",
    "count": 1,
    "seed": 0,
    "steps": 50,
    "width": None,
    "height": None,
    "cfg": 4.0,
    "dtype": "bfloat16",
    "device": None,
    "compile": "none",
    "backend": "svdq",
    "mode": None,
    "capture": False,
    "compute": "auto",
    "storage": "packed",
    "attention": None,
    "compare": None,
    "output": ".",
}
"""Values of options that neither the command line nor the YAML file gives."""

OTHER_PICTURES = (".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
"""Suffixes of pictures that are not written."""

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds this subcommand."""
    parser = subparsers.add_parser(
        "generate",
        help="pictures from a pipeline",
        description=__doc__,
        allow_abbrev=False,
        # An option that is not given must not hide the YAML file's.
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("config", nargs="?", default=None, metavar="CONFIG.yaml", help="options by name")
    add_options(parser)
    parser.set_defaults(run=run)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds what may also stand in a YAML file."""
    add = parser.add_argument
    add("--model", metavar="PATH", help="pipeline folder or Hub id")
    add("--transformer", metavar="PATH", help="checkpoint to take instead of the pipeline's transformer")
    add("--prompt", metavar="TEXT", help="what to show")
    add("--negative-prompt", metavar="TEXT", help="what to avoid (one space)")
    add("--count", type=positive, metavar="N", help="number of pictures (1)")
    add("--seed", type=int, metavar="S", help="seed of the first picture; the next one takes S + 1 (0)")
    add("--steps", type=positive, metavar="N", help="denoising steps (50)")
    add("--width", type=positive, metavar="W", help="pixels (the pipeline's own)")
    add("--height", type=positive, metavar="H", help="pixels (the pipeline's own)")
    add("--cfg", type=float, metavar="SCALE", help="true_cfg_scale (4.0)")
    add("--dtype", choices=DTYPES, help="dtype of what is not packed (bfloat16)")
    add_device(parser)
    add("--compile", choices=("none", "regional", "whole"), help="what of the transformer to compile (none)")
    add("--backend", metavar="NAME", help="backend of torch.compile (svdq)")
    add("--mode", choices=MODES, help="mode of torch.compile")
    add("--capture", action="store_true", help="run the transformer as CUDA graphs, one for each input shape")
    add("--compute", choices=COMPUTE_MODES, help="arithmetic of quantised linears (auto: by device)")
    add("--storage", choices=STORAGES, help="quantised weights as in the file, or NVFP4 ones as FP8 (packed)")
    add("--attention", metavar="NAME", help="attention backend of diffusers, such as _native_cudnn")
    add(
        "--compare",
        type=listed(parse_candidate),
        metavar="MODE|PATH[:MODE],...",
        help=f"compute modes of --transformer or other checkpoints, next to the pipeline's own; writes {SHEET}",
    )
    add("--output", metavar="PATH", help="folder for SEED.png, or NAME.png; with --count a contact sheet (.)")


def run(args: argparse.Namespace) -> int:
    """Loads the pipeline, draws the pictures and prints the seconds each took, and what a quantised transformer weighs.

    Raises:
        OptionError: an option is missing or has a bad value.
        CheckpointError: the pipeline or the checkpoint cannot be used.
        StorageError: the storage has not what the compute mode needs.
    """
    options = settings(args)
    check_backend(options)
    check_output(options.output)
    if options.compare is not None:
        compare(options, plan_of(options), prepare)
        return 0
    import torch

    from ..model.resident import resident
    from .pipeline import load_pipeline

    device = pick_device(options.device)
    pipe = load_pipeline(
        options.model,
        device,
        getattr(torch, options.dtype),
        transformer=options.transformer,
        compute=options.compute,
        storage=options.storage,
    )
    size = resident(pipe.transformer)
    if size.storage != "dense":
        print(f"transformer: {size}", flush=True)
    prepare(pipe, options)
    draw(pipe, options)
    return 0


def settings(args: argparse.Namespace) -> argparse.Namespace:
    """Defaults, overridden by the YAML file, overridden by the command line.

    Raises:
        OptionError: the file is bad, or neither gives a model and a prompt.
    """
    given = {name: value for name, value in vars(args).items() if name in DEFAULTS}
    from_file = read_config(args.config, add_options) if args.config is not None else {}
    options = argparse.Namespace(**{**DEFAULTS, **from_file, **given})
    for name in ("model", "prompt"):
        if getattr(options, name) is None:
            raise OptionError(f"there is no {name}: give --{name}, or `{name}:` in the YAML file")
    return options


def plan_of(options: argparse.Namespace) -> Denoising:
    """The pictures the options ask for: one prompt with ``count`` seeds."""
    from ..quality.denoise import Denoising

    seeds = tuple(range(options.seed, options.seed + options.count))
    sizes = (options.steps, options.width, options.height)
    return Denoising((options.prompt,), seeds, *sizes, options.cfg, options.negative_prompt)


def check_backend(options: argparse.Namespace) -> None:
    """Refuses a backend of ``torch.compile`` that is not installed, and choices of it where nothing is compiled.

    Raises:
        OptionError: no such backend, and the nearest; or a mode or a backend other than the default without
            ``--compile``.
    """
    if options.compile == "none":
        for name, asks_for_nothing in (("mode", (None, "default")), ("backend", (DEFAULTS["backend"],))):
            chosen = getattr(options, name)
            if chosen not in asks_for_nothing:
                raise OptionError(f"--{name} {chosen} is for --compile regional or whole, not none")
        return
    import torch

    known = torch.compiler.list_backends(exclude_tags=())
    if options.backend not in known:
        near = difflib.get_close_matches(options.backend, known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
        raise OptionError(f"torch.compile knows no backend {options.backend!r}; {hint}")


def check_output(output: str) -> None:
    """Refuses the name of a picture that is no PNG.

    Raises:
        OptionError: it has the suffix of another kind of picture.
    """
    if Path(output).suffix.lower() in OTHER_PICTURES:
        raise OptionError(f"--output {output}: pictures are PNG files; give a folder or NAME.png")


def prepare(pipe: DiffusionPipeline, options: argparse.Namespace) -> None:
    """Sets the attention backend, marks the transformer for compilation and, last, captures it."""
    if options.attention is not None:
        with _as_option_error("--attention"):
            pipe.transformer.set_attention_backend(options.attention)
    how = {"backend": options.backend, "mode": options.mode}
    if options.compile == "regional":
        pipe.transformer.compile_repeated_blocks(fullgraph=True, **how)
    elif options.compile == "whole":
        pipe.transformer.compile(**how)
    if options.capture:
        from ..cuda_graphs.captured import capture

        capture(pipe.transformer)


def draw(pipe: DiffusionPipeline, options: argparse.Namespace) -> list[Path]:
    """Writes one PNG per seed, and a contact sheet if asked for; prints seconds and file of each.

    Returns:
        The files, in the order they were written.
    """
    from ..quality.denoise import picture

    plan, output = plan_of(options), Path(options.output)
    is_file = is_png(options.output)
    (output.parent if is_file else output).mkdir(parents=True, exist_ok=True)
    images, files = [], []
    for prompt, seed in plan.pictures:
        start = time.perf_counter()
        image = picture(pipe, plan, prompt, seed)
        seconds = time.perf_counter() - start
        file = output / f"{seed}.png"
        if is_file:
            file = output if options.count == 1 else output.with_name(f"{output.stem}-{seed}.png")
        image.save(file)
        images.append(image)
        files.append(file)
        print(f"seed {seed}: {seconds:.2f} s  {file}", flush=True)
    if is_file and options.count > 1:
        contact_sheet(images).save(output)
        files.append(output)
        print(f"contact sheet: {output}")
    return files


def contact_sheet(images: list[Image.Image]) -> Image.Image:
    """Pictures of one size side by side, in rows as many as they are long."""
    from PIL import Image

    columns = math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet


@contextlib.contextmanager
def _as_option_error(option: str):
    try:
        yield
    except (ValueError, RuntimeError, ImportError) as error:
        raise OptionError(f"{option}: {error}") from error
