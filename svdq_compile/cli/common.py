"""What several subcommands share: options, devices, output."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..checkpoint.source import SUBFOLDER
from ..errors import OptionError
from ..ops.modes import COMPUTE_MODES
from ..spec import STORAGES

if TYPE_CHECKING:
    import torch

COMPUTE_HELP = (
    "by device (auto), 4-bit operands (nvfp4), e4m3 operands (fp8), 4-bit weight only (bf16), "
    "or ModelOpt's simulation bit for bit (modelopt)"
)
DTYPES = ("bfloat16", "float16", "float32")


class Result(Protocol):
    """What a command prints: a table by ``str()``, plain data by ``to_dict()``."""

    def to_dict(self) -> dict: ...


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="where to run (cuda if there is one, else cpu)")


def add_compute(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--compute", choices=COMPUTE_MODES, default="auto", help=COMPUTE_HELP)


def add_storage(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--storage",
        choices=STORAGES,
        default="packed",
        help="quantised weights as in the file (packed), or NVFP4 ones as FP8",
    )


def show(result: Result, as_json: bool) -> int:
    """Prints a result and returns exit code 0."""
    print(json.dumps(result.to_dict(), indent=2) if as_json else result)
    return 0


def short_name(checkpoint: str) -> str:
    """A checkpoint's folder or file name; the pipeline's where it is the transformer in one."""
    path = Path(checkpoint)
    return path.parent.name if path.name == SUBFOLDER and path.parent.name else path.name


def is_png(path: str) -> bool:
    """Whether a path names a PNG file, by its suffix."""
    return Path(path).suffix.lower() == ".png"


def require_png(option: str, path: str | None) -> None:
    """Refuses a picture's file that is no PNG.

    Args:
        option: whose value the path is.
        path: None for none.

    Raises:
        OptionError: it has another suffix.
    """
    if path is not None and not is_png(path):
        raise OptionError(f"{option} {path} is no PNG file")


def complete_options(args: argparse.Namespace, defaults: Mapping[str, object], refusal: str | None) -> None:
    """Gives options that are not given their values.

    Args:
        args: the command line, whose parser leaves out what is not given (``argparse.SUPPRESS``).
        defaults: name -> value of each of the options.
        refusal: says why they would do nothing, after the name of one that is given; None if they would not.

    Raises:
        OptionError: one is given and would do nothing.
    """
    given = [name for name in defaults if hasattr(args, name)]
    if given and refusal is not None:
        raise OptionError(f"--{given[0].replace('_', '-')} {refusal}")
    vars(args).update({name: value for name, value in defaults.items() if name not in given})


def pick_device(name: str | None) -> torch.device:
    """The device of that name, or the GPU if there is one, else the CPU.

    Raises:
        OptionError: no such device here.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"--device {name}: {str(error).splitlines()[0]}") from error


def positive(text: str) -> int:
    """An argparse type: a whole number, one or more."""
    return _at_least(1, text)


def zero_or_more(text: str) -> int:
    """An argparse type: a whole number, zero or more."""
    return _at_least(0, text)


def whole(text: str) -> int:
    """An argparse type: a whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None


def _at_least(least: int, text: str) -> int:
    value = whole(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"{text} is not {least} or more")
    return value
