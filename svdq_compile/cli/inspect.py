"""svdq-compile inspect: what a checkpoint holds, from its headers alone."""

from __future__ import annotations

import argparse

from .common import add_json, show


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds this subcommand."""
    parser = subparsers.add_parser("inspect", help="what a checkpoint holds; reads headers only", description=__doc__)
    parser.add_argument("path", help="transformer folder, pipeline folder, .safetensors file or Hub id")
    parser.add_argument("--revision", help="Hub branch, tag or commit")
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the inspection."""
    from ..inspection import inspect

    return show(inspect(args.path, revision=args.revision), args.json)
