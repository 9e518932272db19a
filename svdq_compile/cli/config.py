"""Options of a command from a YAML file, checked by the same parser that reads them from the command line."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from ..errors import OptionError


class _OptionParser(argparse.ArgumentParser):
    """A parser that raises instead of leaving the process."""

    def error(self, message: str) -> NoReturn:
        raise OptionError(message)


def read_config(
    file: str | os.PathLike[str], add_options: Callable[[argparse.ArgumentParser], None]
) -> dict[str, object]:
    """The options a YAML file gives, converted like those of the command line.

    Args:
        file: a mapping from long option names, with dashes or underscores, to single values; ``true`` or ``false``
            for an option that takes none.
        add_options: adds the known options to a parser.

    Returns:
        Option name with underscores -> value, only for those the file gives.

    Raises:
        OptionError: not YAML, not a mapping, an unknown key or a value the option does not take.
        OSError: the file cannot be read.
    """
    import yaml

    parser = _OptionParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    add_options(parser)
    known = [action.dest for action in parser._actions]
    flags = [action.dest for action in parser._actions if action.nargs == 0]
    try:
        data = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise OptionError(f"{os.fspath(file)} is not YAML: {error}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise OptionError(f"{os.fspath(file)} is not a mapping from option names to values")
    words = []
    for key, value in data.items():
        name = str(key).replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise OptionError(f"{os.fspath(file)}: unknown key {str(key)!r}; {hint}")
        if not isinstance(value, (str, int, float)):
            raise OptionError(f"{os.fspath(file)}: {key} is {value!r}, needs a single value")
        option = f"--{name.replace('_', '-')}"
        if name in flags and isinstance(value, bool):
            words += [option] * value
        else:
            words.append(f"{option}={value}")
    try:
        return vars(parser.parse_args(words))
    except OptionError as error:
        raise OptionError(f"{os.fspath(file)}: {error}") from None
