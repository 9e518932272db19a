"""Reductions over rows: what Inductor holds in registers instead of reading it twice.

A norm reads a row for its statistics and again for what follows. In between, Inductor keeps rows of up to 1024 elements
in registers; rows of a transformer's width fit too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from .. import _compat

LONGEST_ROW = 8192
"""Elements of a row that are held: 16 float32 a thread in a program of 16 warps."""


class RowsInRegisters:
    """Inductor's heuristics, or the user's own, but for the length of a row that is held.

    Args:
        choices: the heuristics in place.
    """

    def __init__(self, choices: object):
        self._choices = choices

    def __getattr__(self, name: str) -> object:
        return getattr(self._choices, name)

    def should_use_persistent_reduction(self, features, cooperative_reduction: bool) -> bool:
        """Whether a kernel holds its rows; arguments as Inductor's."""
        if self._choices.should_use_persistent_reduction(features, cooperative_reduction):
            return True
        if cooperative_reduction or not _compat.inductor_config.triton.persistent_reductions:
            return False
        hints = {features.reduction_hint(node) for node in features.reduction_nodes()}
        along_rows = hints == {_compat.ReductionHint.INNER}
        return along_rows and _compat.known_at_most(features.reduction_numel, LONGEST_ROW)


@contextlib.contextmanager
def rows_in_registers() -> Iterator[None]:
    """Kernels Inductor generates within the block hold rows of up to :data:`LONGEST_ROW` elements."""
    with _compat.V.set_choices_handler(RowsInRegisters(_compat.V.choices)):
        yield
