"""Seeded mutations of small checkpoints, with what a loader must make of each.

Every edit of the catalogue (``edits_*.py``) says which errors it may cause and whether the checkpoint may
still load. An edit nobody could detect, such as a flipped code bit, is not in the catalogue.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import CheckpointError
from .checkpoints import write_checkpoint
from .memory_checkpoints import Contents, Files, read_contents, render


class Stage(enum.IntEnum):
    """When an edit is applied: a later one never repairs what an earlier one broke."""

    NEUTRAL = 0
    CONTENTS = 1
    INDEX = 2
    HEADER = 3
    BYTES = 4
    FILES = 5


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What loading may do after an edit: raise one of ``errors``; with ``may_load``, load the same values."""

    errors: tuple[type[CheckpointError], ...] = ()
    may_load: bool = False


NEUTRAL = Outcome(may_load=True)


def fails(*errors: type[CheckpointError]) -> Outcome:
    """Loading must raise one of these."""
    return Outcome(errors)


def either(*errors: type[CheckpointError]) -> Outcome:
    """Loading may raise one of these, or give the same values."""
    return Outcome(errors, may_load=True)


@dataclasses.dataclass(frozen=True)
class Edit:
    """One entry of the catalogue.

    Args:
        name: what it does.
        stage: when it is applied; up to INDEX, edits get a ``Contents``, the others ``Files``.
        apply: changes its argument in place; returns the outcome, or None if it does not apply here.
        group: edits of one group are never combined, because two of them could cancel.
    """

    name: str
    stage: Stage
    apply: Callable[[Contents, random.Random], Outcome | None] | Callable[[Files, random.Random], Outcome | None]
    group: str


_catalogue: dict[str, Edit] = {}


def edit(stage: Stage, group: str = "") -> Callable:
    """Enters a function under its own name; of header edits and of byte edits one is applied at most."""

    def enter(function: Callable) -> Callable:
        name = function.__name__
        alone = stage.name if stage in (Stage.HEADER, Stage.BYTES) else name
        _catalogue[name] = Edit(name, stage, function, group or alone)
        return function

    return enter


def catalogue() -> dict[str, Edit]:
    """Every edit by name."""
    from . import edits_config, edits_files, edits_header, edits_neutral, edits_tensors  # noqa: F401

    return dict(_catalogue)


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One mutated checkpoint.

    Args:
        seed: reproduces it.
        base: the checkpoint it started from, arguments of ``write_checkpoint``.
        edits: names of the edits, in the order they were applied.
        files: the folder.
        outcomes: per edit.
    """

    seed: int
    base: str
    edits: tuple[str, ...]
    files: Files
    outcomes: tuple[Outcome, ...]

    @property
    def must_load(self) -> bool:
        return all(outcome == NEUTRAL for outcome in self.outcomes)

    @property
    def may_load(self) -> bool:
        return all(outcome.may_load for outcome in self.outcomes)

    @property
    def errors(self) -> tuple[type[CheckpointError], ...]:
        """Error classes loading may raise; after several edits, whichever is found first."""
        return self.outcomes[0].errors if len(self.outcomes) == 1 else (CheckpointError,)

    def write(self, folder: Path) -> Path:
        """Writes the files into an existing folder."""
        for name, data in self.files.items():
            (folder / name).write_bytes(data)
        return folder

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.base}, {' + '.join(self.edits)}"


BASES = {
    "mixed": {"recipe": "mixed"},
    "mixed in 3 shards": {"recipe": "mixed", "shards": 3},
    "all, F16": {"recipe": "all", "dtype": "F16"},
    "nvfp4, F32, 2 shards": {"recipe": "nvfp4", "dtype": "F32", "shards": 2},
    "fp8": {"recipe": "fp8"},
}
"""The valid checkpoints mutations start from: name -> arguments of ``write_checkpoint``."""


@functools.cache
def base_contents(name: str) -> Contents:
    """The parsed checkpoint of :data:`BASES`; copy it before changing it."""
    with tempfile.TemporaryDirectory() as folder:
        return read_contents(write_checkpoint(Path(folder), **BASES[name]))


def mutation(seed: int) -> Mutation:
    """The mutation of a seed: one to three edits, half of the time one.

    Consecutive seeds go through the whole catalogue: as many seeds as it has edits apply each at least once.
    """
    edits = list(catalogue().values())
    rng = random.Random(seed)
    while True:
        base = rng.choice(list(BASES))
        chosen = [edits[seed % len(edits)]]
        for extra in rng.sample(edits, rng.choice((0, 0, 1, 2))):
            if extra.group not in {e.group for e in chosen}:
                chosen.append(extra)
        chosen.sort(key=lambda e: e.stage)
        applied = _apply(base_contents(base).copy(), chosen, rng)
        if applied is not None:
            files, outcomes = applied
            return Mutation(seed, base, tuple(e.name for e in chosen), files, outcomes)


def mutations(first: int = 0) -> Iterator[Mutation]:
    """Endless mutations, from a seed on."""
    seed = first
    while True:
        yield mutation(seed)
        seed += 1


def _apply(contents: Contents, edits: list[Edit], rng: random.Random) -> tuple[Files, tuple[Outcome, ...]] | None:
    outcomes = [e.apply(contents, rng) for e in edits if e.stage <= Stage.INDEX]
    if None in outcomes:
        return None
    files = render(contents)
    outcomes += [e.apply(files, rng) for e in edits if e.stage > Stage.INDEX]
    return None if None in outcomes else (files, tuple(outcomes))
