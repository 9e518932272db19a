"""What passes on Inductor's graphs share: a cache key from our sources, and good manners towards other passes."""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch import fx

from .. import _compat
from ..ops.linear import linear

log = logging.getLogger(__name__)


class SourceKeyed(_compat.CustomGraphPass):
    """Runs behind AOTAutograd; its ``uuid`` makes compiled code depend on our sources.

    Inductor's caches know nothing of operators' and lowerings' code: without this key an edited kernel would be
    answered from the cache. The pass itself counts the operators that reached Inductor.

    Args:
        previous: the ``post_grad_custom_pre_pass`` the user had set; it runs first.
        expected: how many ``svdq::linear`` were inserted; equal ones may have been merged since.
    """

    def __init__(self, previous: Callable[[fx.Graph], None] | None, expected: int) -> None:
        self._previous = previous
        self._expected = expected

    def __call__(self, graph: fx.Graph) -> None:
        if self._previous is not None:
            self._previous(graph)
        found = len(graph.find_nodes(op="call_function", target=linear))
        log.debug("%d of %d svdq::linear reached Inductor", found, self._expected)

    def uuid(self) -> object:
        """Hash of our sources, joined with the previous pass's key; None (no caching) if that one has none."""
        if self._previous is None:
            return _compat.source_hash()
        theirs = self._previous.uuid() if hasattr(self._previous, "uuid") else None
        return None if theirs is None else (_compat.source_hash(), theirs)
