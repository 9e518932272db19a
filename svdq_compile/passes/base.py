"""What passes share: a name, a report, a dump of what they did, and a place in the key of Inductor's caches."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import guard_or_false, statically_known_true

from .. import _compat
from ..ops.feed_forward import feed_forward
from ..ops.joint_feed_forward import joint_feed_forward
from ..ops.joint_heads import joint_heads
from ..ops.joint_linear import joint_linear
from ..ops.linear import linear
from ..ops.linear_group import linear_group
from ..ops.plan import GEMV_TOKENS, MANY

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Report:
    """What a pass did to one graph.

    Args:
        name: of the pass.
        matched: what it rewrote, one entry a place.
        left: (node, reason) of what looked like its business and was left.
    """

    name: str
    matched: tuple = ()
    left: tuple[tuple[str, str], ...] = ()

    def summary(self) -> str:
        """One line, and one per node that was left."""
        text = f"{self.name}: {len(self.matched)} rewritten, {len(self.left)} left"
        return text + "".join(f"\n  left {node}: {reason}" for node, reason in self.left)


@dataclasses.dataclass(frozen=True)
class GraphPass:
    """A rewrite of Dynamo's graph, to be called with the graph; a function decorated with :func:`graph_pass`.

    Placeholders stay as they are, so that Dynamo's own view of the graph stays valid. Every node added carries an
    ``example_value``, as Dynamo's nodes do.

    Args:
        name: what ``skip_passes`` and logs call it.
        does: one phrase for people.
        rewrite: works on the graph in place.
        optional: whether it may be left out, for measurements.
        at_least: Inductor's settings, numbers, that what it writes wants to be no smaller than this.
    """

    name: str
    does: str
    rewrite: Callable[..., Report]
    optional: bool = True
    at_least: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __call__(self, gm: fx.GraphModule, *settings: object) -> Report:
        """Rewrites a graph in place.

        Args:
            gm: the graph.
            settings: the pass's own.
        """
        before = gm.graph.python_code("self").src if log.isEnabledFor(logging.DEBUG) else ""
        report = self.rewrite(gm, *settings)
        gm.graph.lint()
        gm.recompile()
        if report.matched or report.left:
            log.debug("before %s:\n%s\nafter:\n%s\n%s", self.name, before, gm.code, report.summary())
        return report


def graph_pass(does: str, **options: object) -> Callable[[Callable[..., Report]], GraphPass]:
    """Makes a :class:`GraphPass` of a function, under the function's name; options are that class's."""
    return lambda rewrite: GraphPass(rewrite.__name__, does, rewrite, **options)


def value_of(node: object) -> object:
    """The fake value Dynamo gave a node, None if there is none."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def tokens_of(x: torch.Tensor) -> int:
    """As :attr:`.Facts.tokens`; which side of the line a symbolic size is on must hold for every later call."""
    return GEMV_TOKENS if guard_or_false(math.prod(x.shape[:-1]) <= GEMV_TOKENS) else MANY


def same_sizes(sizes: Sequence, expected: Sequence) -> bool:
    """Whether sizes are equal whatever the symbols in them are."""
    pairs = zip(sizes, expected, strict=False)
    return len(sizes) == len(expected) and all(statically_known_true(a == b) for a, b in pairs)


def calls(node: object, functions: Collection[Callable], *methods: str) -> bool:
    """Whether a node calls one of these functions or methods."""
    if not isinstance(node, fx.Node):
        return False
    return (node.op == "call_function" and node.target in functions) or (
        node.op == "call_method" and node.target in methods
    )


def insert(graph: fx.Graph, function: Callable, *args: object, **kwargs: object) -> fx.Node:
    """A call of a function at the graph's insertion point, with the value it has."""
    node = graph.call_function(function, args, kwargs)
    arguments, keywords = fx.node.map_arg((args, kwargs), value_of)
    node.meta["example_value"] = function(*arguments, **keywords)
    return node


class SourceKeyed(_compat.CustomGraphPass):
    """Runs behind AOTAutograd; its ``uuid`` makes compiled code depend on our sources and on the passes skipped.

    Inductor's caches know nothing of operators' and lowerings' code: without this key an edited kernel would be
    answered from the cache. The pass itself counts the operators that reached Inductor.

    Args:
        previous: the ``post_grad_custom_pre_pass`` the user had set; it runs first.
        expected: how many ``svdq::linear`` were inserted; passes and Inductor may have merged some since.
        skipped: names of the passes left out.
    """

    def __init__(
        self, previous: Callable[[fx.Graph], None] | None, expected: int, skipped: Collection[str] = ()
    ) -> None:
        self._previous = previous
        self._expected = expected
        self._skipped = tuple(sorted(skipped))

    def __call__(self, graph: fx.Graph) -> None:
        if self._previous is not None:
            self._previous(graph)
        ours = (linear, linear_group, feed_forward, joint_feed_forward, joint_heads, joint_linear)
        found = {op: len(graph.find_nodes(op="call_function", target=op)) for op in ours}
        log.debug("%d linears reached Inductor as %s", self._expected, found)

    def uuid(self) -> object:
        """Hash of our sources and the skipped passes, joined with the previous pass's key; None (no caching) if that
        one has none."""
        ours = (_compat.source_hash(), self._skipped)
        if self._previous is None:
            return ours
        theirs = self._previous.uuid() if hasattr(self._previous, "uuid") else None
        return None if theirs is None else (*ours, theirs)
