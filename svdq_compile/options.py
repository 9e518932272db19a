"""Options of ``torch.compile(backend="svdq")``: ours, and Inductor's own passed through."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping

from . import _compat
from .errors import OptionError
from .ops.modes import COMPUTE_MODES
from .passes.pipeline import PASSES

OPTIONAL_PASSES = tuple(each.name for each in PASSES if each.optional)


@dataclasses.dataclass(frozen=True)
class Options:
    """What ``options={...}`` may say besides Inductor's own settings.

    Args:
        strict: raise where a quantised linear would be computed by anything slower than our kernels.
        compute: mode (:data:`svdq_compile.ops.modes.COMPUTE_MODES`) of the weights whose own is ``auto``.
        skip_passes: names of optional passes (:data:`svdq_compile.passes.pipeline.PASSES`) to leave out, separated by
            commas; to measure what each buys.
    """

    strict: bool = False
    compute: str = "auto"
    skip_passes: str = ""

    @property
    def skipped(self) -> frozenset[str]:
        """The names in ``skip_passes``."""
        return frozenset(filter(None, (name.strip() for name in self.skip_passes.split(","))))


def parse(mode: str | None, options: Mapping[str, object] | None) -> tuple[Options, dict[str, object]]:
    """Splits what the user gave into our options and Inductor's config patches.

    Args:
        mode: as in ``torch.compile``: None, ``default``, ``reduce-overhead``, ``max-autotune``, ...
        options: as in ``torch.compile``; names of :class:`Options` are ours, all others must be Inductor's.

    Raises:
        OptionError: an unknown mode or option, or a value of the wrong type; names the nearest valid ones.
    """
    patches: dict[str, object] = {}
    if mode is not None:
        modes = _compat.list_mode_options()
        if mode not in modes:
            raise OptionError(f"unknown mode {mode!r}{_nearest(mode, modes)}; known: {', '.join(sorted(modes))}")
        patches.update(modes[mode])
    ours: dict[str, object] = {}
    fields = {field.name: field for field in dataclasses.fields(Options)}
    known = _compat.inductor_config.get_config_copy()
    for given, value in (options or {}).items():
        name = given.replace("-", "_")
        if name in fields:
            if type(value) is not type(fields[name].default):
                raise OptionError(f"option {given!r} is {value!r}, needs a {type(fields[name].default).__name__}")
            if name == "compute" and value not in COMPUTE_MODES:
                raise OptionError(f"option compute={value!r}, needs one of {', '.join(COMPUTE_MODES)}")
            if name == "skip_passes":
                _check_passes(value)
            ours[name] = value
        elif name in known:
            if known[name] is not None and value is not None and type(value) is not type(known[name]):
                raise OptionError(f"option {given!r} is {value!r}, needs a {type(known[name]).__name__}")
            patches[name] = value
        else:
            raise OptionError(
                f"unknown option {given!r}{_nearest(name, (*fields, *known))}; "
                f"svdq's own: {', '.join(fields)}; all of torch._inductor.config's are accepted too"
            )
    return Options(**ours), patches


def _check_passes(value: str) -> None:
    for name in sorted(Options(skip_passes=value).skipped):
        if name not in OPTIONAL_PASSES:
            needed = any(name == each.name for each in PASSES)
            what = "which cannot be left out" if needed else f"which is no pass{_nearest(name, OPTIONAL_PASSES)}"
            raise OptionError(
                f"option skip_passes={value!r} names {name!r}, {what}; optional: {', '.join(OPTIONAL_PASSES)}"
            )


def _nearest(name: str, known) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    return f" (did you mean {near[0]!r}?)" if near else ""
