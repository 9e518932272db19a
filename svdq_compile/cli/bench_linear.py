"""svdq-compile bench linear: the operator's speed at the shapes of Qwen-Image, next to dense BF16 and FP8 linears.

Every result is compared with the specification before it is timed; a wrong one is FAILED and the exit code 1.
"""

from __future__ import annotations

import argparse
import dataclasses

from ..bench.plan import FLUSHES, MODES, SHAPES, TOKENS, Plan, listed, one_of, parse_shape
from ..errors import OptionError
from ..spec import STORAGES
from .common import add_device, pick_device, positive, zero_or_more

PARTS_TOKENS = (4096, 6889)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds this subcommand."""
    parser = subparsers.add_parser("linear", help="one linear, next to BF16 and FP8", description=__doc__)
    add = parser.add_argument
    add("--parts", action="store_true", help="time the stages of the operator instead of it and its peers")
    add("--shapes", type=listed(parse_shape), metavar="INxOUT,...", help=f"in and out features ({_shapes(SHAPES)})")
    add("--tokens", type=listed(positive), metavar="M,...", help=f"rows of the activation ({_numbers(TOKENS)})")
    add("--modes", type=listed(one_of(MODES)), metavar="MODE,...", help=f"compute modes ({','.join(MODES)})")
    add("--storage", type=listed(one_of(STORAGES)), metavar="STORAGE,...", help=f"weights ({','.join(STORAGES)})")
    add("--rank", type=zero_or_more, default=Plan.rank, metavar="R", help=f"low-rank columns, 0 for none ({Plan.rank})")
    add("--dynamic", action="store_true", help="activation scales per token, not calibrated ones")
    add("--repeats", type=positive, default=Plan.rounds, metavar="N", help=f"turns of each candidate ({Plan.rounds})")
    add("--flush", choices=FLUSHES, default=Plan.flush, help="how the L2 cache is emptied (read)")
    add("--csv", metavar="FILE", help="also write every measurement there")
    add_device(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measures and prints.

    Raises:
        OptionError: there is no GPU, and the CPU was not asked for.
    """
    from ..bench.session import run as measure

    device = pick_device(args.device)
    if args.device is None and device.type == "cpu":
        raise OptionError(
            "no GPU that torch can use (see svdq-compile env); "
            "to try the command anyway: --device cpu --shapes 64x64 --tokens 16"
        )
    return measure(make_plan(args), device)


def make_plan(args: argparse.Namespace) -> Plan:
    """What the arguments ask for; ``--parts`` is about large linears unless ``--tokens`` says otherwise."""
    given = {
        "shapes": args.shapes,
        "tokens": args.tokens or (PARTS_TOKENS if args.parts else None),
        "modes": args.modes,
        "storages": args.storage,
    }
    plan = Plan(
        rank=args.rank,
        dynamic=args.dynamic,
        parts=args.parts,
        rounds=args.repeats,
        flush=args.flush,
        csv=args.csv,
    )
    return dataclasses.replace(plan, **{name: value for name, value in given.items() if value is not None})


def _numbers(values: tuple[int, ...]) -> str:
    return ",".join(str(value) for value in values)


def _shapes(shapes: tuple[tuple[int, int], ...]) -> str:
    return ",".join(f"{k}x{n}" for k, n in shapes)
