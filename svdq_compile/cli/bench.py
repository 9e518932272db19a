"""svdq-compile bench: speed on this GPU, of one quantised linear or of a whole transformer.

Every result is compared with the specification before it is timed; a wrong one is FAILED and the exit code 1.
"""

from __future__ import annotations

import argparse

from . import bench_forward, bench_linear

BENCHMARKS = (bench_linear, bench_forward)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds this subcommand."""
    parser = subparsers.add_parser("bench", help="speed of quantised linears on this GPU", description=__doc__)
    benchmarks = parser.add_subparsers(required=True, metavar="WHAT")
    for module in BENCHMARKS:
        module.add_parser(benchmarks)
