"""What is measured: shapes, tokens, modes and storages, and how they are written on the command line."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable

from ..spec import GROUP_SIZE, STORAGES

MAIN_SHAPES = ((3072, 3072), (3072, 9216), (3072, 12288), (12288, 3072))
"""(in_features, out_features) of Qwen-Image's blocks; 9216 is q, k and v together. Summaries are over these."""

SHAPES = (*MAIN_SHAPES, (3072, 18432))
"""The last one is a block's modulation, which sees one token per image."""

TOKENS = (1, 2, 16, 64, 128, 256, 512, 4096, 6889)
"""6889 is odd on purpose: no tile size divides it."""

LARGE = 4096
"""Tokens from which a linear counts as compute-bound; summaries and ``--parts`` are about those."""

MODES = ("nvfp4", "fp8", "bf16")
FLUSHES = ("write", "read")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything a run is asked to do.

    Args:
        shapes: (in_features, out_features) each.
        tokens: M, each for every shape.
        modes: values of the operator's ``compute``.
        storages: how the weight lies in memory.
        rank: R, 0 for no low-rank branch.
        dynamic: activation scales per token instead of a calibrated one.
        parts: times the stages of the operator instead of the operator and its peers.
        rounds: how often every candidate takes its turn.
        flush: how the L2 cache is emptied (:class:`~svdq_compile.bench.timing.Timer`).
        csv: file to write, or None.
    """

    shapes: tuple[tuple[int, int], ...] = SHAPES
    tokens: tuple[int, ...] = TOKENS
    modes: tuple[str, ...] = MODES
    storages: tuple[str, ...] = STORAGES
    rank: int = 32
    dynamic: bool = False
    parts: bool = False
    rounds: int = 10
    flush: str = "read"
    csv: str | None = None


def parse_shape(text: str) -> tuple[int, int]:
    """``3072x12288`` or ``3072->12288``: in_features, then out_features, both multiples of 16."""
    found = re.fullmatch(r"(\d+)(?:x|->)(\d+)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape: write INxOUT, for example 3072x12288")
    shape = int(found[1]), int(found[2])
    if any(size == 0 or size % GROUP_SIZE for size in shape):
        raise argparse.ArgumentTypeError(f"{text}: both sizes must be multiples of {GROUP_SIZE}")
    return shape


def listed(parse: Callable[[str], object]) -> Callable[[str], tuple]:
    """An argparse type: values between commas, without repetitions."""

    def parse_all(text: str) -> tuple:
        values = [parse(part.strip()) for part in text.split(",") if part.strip()]
        if not values:
            raise argparse.ArgumentTypeError("the list is empty")
        return tuple(dict.fromkeys(values))

    return parse_all


def one_of(choices: tuple[str, ...]) -> Callable[[str], str]:
    """An argparse type: one of these words."""

    def parse(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"{text!r} is unknown: choose from {', '.join(choices)}")
        return text

    return parse
