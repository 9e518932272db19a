"""The command line: ``svdq-compile SUBCOMMAND``, one module each. Importing this imports no torch."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Sequence

from .. import __version__
from ..errors import SvdqError
from . import bench, env, explain, generate, inspect, quantize, verify

COMMANDS = (inspect, explain, verify, generate, quantize, bench, env)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: arguments without the program's name; None takes ``sys.argv``.

    Returns:
        Exit code: 0, or 1 after an error that was printed to stderr. Wrong usage exits with 2.
    """
    args = _parser().parse_args(argv)
    if getattr(args, "verbose", False):
        _log_to_stderr()
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Python flushes stdout once more at exit; a reader like `head` is gone by then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        known = _user_error(error)
        if known is None or getattr(args, "debug", False):
            raise
        print(f"error: {known}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="svdq-compile", description="Runs, checks and makes ModelOpt NVFP4 / SVDQuant checkpoints."
    )
    parser.add_argument("--version", action="version", version=f"svdq-compile {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.add_parser(subparsers)
    for command in _with_children(parser):
        # Without SUPPRESS a subcommand's default would undo the flag given before it.
        off = {"action": "store_true", "default": argparse.SUPPRESS}
        command.add_argument("-v", "--verbose", help="log what is being done", **off)
        command.add_argument("--debug", help="show the traceback of an error", **off)
    return parser


def _with_children(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from _with_children(child)


def _log_to_stderr() -> None:
    log = logging.getLogger("svdq_compile")
    log.setLevel(logging.INFO)
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        log.addHandler(handler)


def _user_error(error: BaseException) -> BaseException | None:
    """The error inside that the user can act upon; None for a bug."""
    # Dynamo wraps what a backend raises.
    error = getattr(error, "inner_exception", None) or error
    return error if isinstance(error, (SvdqError, OSError)) else None
