"""svdq-compile bench forward: one forward of a whole transformer, next to compiled BF16 and torchao FP8.

The real size of Qwen-Image with random weights, made on the device: no file, no download.
"""

from __future__ import annotations

import argparse
import dataclasses

from ..bench.forward_plan import MODELS, NO_PEERS, PEERS, SIZES, ForwardPlan, parse_size
from ..bench.plan import MODES, listed, one_of
from ..spec import STORAGES
from .common import add_device, pick_device, positive, require_png, zero_or_more

PLAIN = ("batch", "text", "model", "blocks", "rank", "attention", "whole", "dynamic", "capture", "lora_cost", "ablate")
PLAIN += ("compile_time", "repeats", "kernels", "csv", "chart")
"""Fields of the plan that have the name of their option."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds this benchmark."""
    parser = subparsers.add_parser("forward", help="a whole transformer, next to BF16 and FP8", description=__doc__)
    add, plan = parser.add_argument, ForwardPlan
    sizes = ",".join(f"{height}x{width}" for height, width in SIZES)
    peers = (*PEERS, NO_PEERS)
    add("--sizes", type=listed(parse_size), default=SIZES, metavar="HxW,...", help=f"of the image in pixels ({sizes})")
    add("--batch", type=positive, default=plan.batch, metavar="N", help=f"images of one forward ({plan.batch})")
    add("--text", type=positive, default=plan.text, metavar="N", help=f"prompt tokens ({plan.text})")
    add("--model", choices=MODELS, help="the real one (on a GPU), or a tiny one for trying the command (elsewhere)")
    add("--blocks", type=positive, metavar="N", help="blocks of the transformer (all)")
    add("--modes", type=listed(one_of(MODES)), default=MODES, metavar="MODE,...", help=f"({','.join(MODES)})")
    add("--storage", type=listed(one_of(STORAGES)), default=STORAGES, metavar="STORAGE,...", help="(packed,expanded)")
    add("--peers", type=listed(one_of(peers)), default=PEERS, metavar="PEER,...", help=f"({','.join(PEERS)}), or none")
    add("--rank", type=zero_or_more, default=plan.rank, metavar="R", help=f"low-rank columns, 0 for none ({plan.rank})")
    add("--attention", metavar="NAME", help="diffusers' attention backend for all (_native_cudnn on a GPU)")
    add("--whole", action="store_true", help="compile the model as a whole instead of block by block")
    add("--dynamic", action="store_true", help="sizes share compiled code instead of being compiled each for itself")
    add("--no-capture", dest="capture", action="store_false", help="do not measure ours in a CUDA graph as well")
    add("--lora-cost", action="store_true", help="measure ours without the low-rank branches as well, and in turns")
    add("--ablate", action="store_true", help="measure ours with each graph pass switched off as well, and in turns")
    add("--compile-time", action="store_true", help="measure compilation in processes of their own as well")
    add("--repeats", type=positive, default=plan.repeats, metavar="N", help=f"timed forwards ({plan.repeats})")
    add("--kernels", type=zero_or_more, default=0, metavar="N", help="list so many kernels of each by time (0)")
    add("--csv", metavar="FILE", help="also write every measurement there")
    add("--chart", metavar="FILE", help="also draw a PNG there")
    add_device(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measures and prints.

    Raises:
        OptionError: options ask for what cannot be measured, or written.
    """
    from ..bench.forward import run as measure

    return measure(make_plan(args), pick_device(args.device))


def make_plan(args: argparse.Namespace) -> ForwardPlan:
    """What the arguments ask for.

    Raises:
        OptionError: a chart that is no PNG.
    """
    require_png("--chart", args.chart)
    plan = ForwardPlan(**{name: getattr(args, name) for name in PLAIN})
    peers = tuple(peer for peer in args.peers if peer != NO_PEERS)
    return dataclasses.replace(plan, sizes=args.sizes, modes=args.modes, storages=args.storage, peers=peers)
