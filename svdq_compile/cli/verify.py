"""svdq-compile verify: error of a quantised checkpoint against the unquantised model, per linear.

Inputs are seeded random numbers: they rank layers and show broken ones, and say little about images.
"""

from __future__ import annotations

import argparse

from .common import add_compute, add_device, add_json, add_storage, pick_device, positive, show


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds this subcommand."""
    parser = subparsers.add_parser(
        "verify", help="error of a checkpoint against the unquantised model", description=__doc__
    )
    parser.add_argument("path", help="the quantised transformer or pipeline: folder, file or Hub id")
    parser.add_argument("--against", required=True, metavar="PATH", help="the unquantised one")
    parser.add_argument("--layers", default="*", metavar="GLOB", help="names of the linears to list (all)")
    parser.add_argument("--tokens", type=positive, default=64, help="image tokens, and text tokens (64)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random inputs (0)")
    add_compute(parser)
    add_storage(parser)
    add_device(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Loads both models, runs them on the same inputs and prints the errors, worst first."""
    from ..model.load import load_transformer
    from ..verification import random_inputs, verify

    device = pick_device(args.device)
    reference = load_transformer(args.against, device)
    model = load_transformer(args.path, device, reference.dtype, compute=args.compute, storage=args.storage)
    inputs = random_inputs(reference, tokens=args.tokens, seed=args.seed)
    return show(verify(model, reference, inputs, layers=args.layers), args.json)
