"""svdq-compile explain: what would compute each linear of a checkpoint here, and why."""

from __future__ import annotations

import argparse

from .common import add_compute, add_device, add_json, add_storage, pick_device, show


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds this subcommand."""
    parser = subparsers.add_parser(
        "explain", help="per linear, what computes it on this machine and why", description=__doc__
    )
    parser.add_argument("path", help="transformer folder, pipeline folder, .safetensors file or Hub id")
    add_compute(parser)
    add_storage(parser)
    add_device(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Loads the transformer and prints the explanation."""
    from ..explanation import explain
    from ..model.load import load_transformer

    model = load_transformer(args.path, pick_device(args.device), compute=args.compute, storage=args.storage)
    return show(explain(model), args.json)
