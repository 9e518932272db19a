"""The feed-forward layers of two streams become ``svdq::joint_feed_forward``.

Its lowering computes the first linears of both in one launch, where a short stream costs next to nothing.
"""

from __future__ import annotations

import operator

from torch import fx

from ..ops.cuda import call_facts
from ..ops.feed_forward import feed_forward
from ..ops.joint_feed_forward import joint_feed_forward as joint_feed_forward_operator
from ..ops.plan import MANY, plan, separate
from ..spec import COMPONENTS
from .base import Report, graph_pass, insert, tokens_of, value_of
from .purity import mutates

LAYER = ("x", "up", "down", "compute_up", "compute_down")
"""Arguments of ``svdq::feed_forward``."""

PARTS = (*COMPONENTS, "bias")
"""What ``up`` and ``down`` hold."""


@graph_pass("the first GEMMs of two streams' feed-forward layers are one launch")
def joint_feed_forward(gm: fx.GraphModule) -> Report:
    """Rewrites a graph in which feed-forward layers are ``svdq::feed_forward`` already.

    Each is paired with the one behind it. Left are those that cannot be, but for the last.

    Args:
        gm: Dynamo's graph.
    """
    graph = gm.graph
    matched: list[str] = []
    left: list[tuple[str, str]] = []
    waiting: fx.Node | None = None
    for node in graph.find_nodes(op="call_function", target=feed_forward):
        if waiting is None:
            waiting = node
            continue
        between = _between(waiting, node)
        reason = _reason_against(waiting, node, between) or _declined(waiting, node)
        if reason:
            left.append((waiting.name, reason))
            waiting = node
        else:
            matched.append(_join(graph, waiting, node, between))
            waiting = None
    return Report("joint_feed_forward", tuple(matched), tuple(left))


def _between(first: fx.Node, second: fx.Node) -> list[fx.Node]:
    """The nodes behind the first and ahead of the second."""
    found = []
    node = first.next
    while node is not second:
        found.append(node)
        node = node.next
    return found


def _reason_against(first: fx.Node, second: fx.Node, between: list[fx.Node]) -> str | None:
    """Why the rewritten graph could compute something else, or None.

    Args:
        first, second: layers.
        between: the nodes between them.
    """
    if set(second.all_input_nodes) & {first, *_dependents(first, between)}:
        return f"{second.name} depends on it"
    if any(mutates(node) for node in between):
        return f"a tensor is written to ahead of {second.name}"
    if any(value_of(node).requires_grad for node in (first, second)):
        return "gradients flow through it, which the operator has none of"
    one, other = _given(first), _given(second)
    for name in ("compute_up", "compute_down"):
        if one[name] != other[name]:
            return f"it and {second.name} compute as {one[name]} and {other[name]}"
    x, y = value_of(one["x"]), value_of(other["x"])
    if (x.dtype, x.device) != (y.dtype, y.device):
        return f"{second.name} has another dtype or device"
    sizes = [
        (value_of(given["x"]).shape[-1], *(value_of(given[name][0]).shape[0] for name in ("up", "down")))
        for given in (one, other)
    ]
    return f"{second.name} has other sizes" if sizes[0] != sizes[1] else None


def _dependents(first: fx.Node, between: list[fx.Node]) -> list[fx.Node]:
    """Those of some nodes that need a first one."""
    found: dict[fx.Node, None] = {}
    for node in between:
        if any(read is first or read in found for read in node.all_input_nodes):
            found[node] = None
    return list(found)


def _given(layer: fx.Node) -> dict[str, object]:
    return dict(zip(LAYER, layer.args, strict=True))


def _declined(*layers: fx.Node) -> str | None:
    """Why no kernel of ours computes it in one."""

    def reason(tokens: list[int]) -> str | None:
        each = (_separate(_given(layer), count) for layer, count in zip(layers, tokens, strict=True))
        return next((why for why in each if why), None)

    # The guard on a symbolic size is for what depends on it.
    return reason([MANY] * len(layers)) or reason([tokens_of(value_of(layer.args[0])) for layer in layers])


def _separate(layer: dict[str, object], tokens: int) -> str | None:
    """Why a layer's linears are computed apart."""
    x = value_of(layer["x"])
    up, down = ({name: value_of(part) for name, part in zip(PARTS, layer[each], strict=True)} for each in LAYER[1:3])
    hidden = x.new_empty((*x.shape[:-1], up["qweight"].shape[0]))
    first, second = (
        call_facts(read, parts["qweight"], parts["input_scale"], parts["lora_down"], layer[mode], tokens)
        for read, parts, mode in ((x, up, "compute_up"), (hidden, down, "compute_down"))
    )
    return separate(plan(first), plan(second), second, down["input_scale"] is None)


def _join(graph: fx.Graph, first: fx.Node, second: fx.Node, between: list[fx.Node]) -> str:
    """Puts the operator in the place of the second layer, what needs the first behind it, and returns its name."""
    one, other = _given(first), _given(second)
    xs, weights = [one["x"], other["x"]], [given[name] for given in (one, other) for name in ("up", "down")]
    with graph.inserting_before(second):
        new = insert(graph, joint_feed_forward_operator, xs, *weights, one["compute_up"], one["compute_down"])
        results = [insert(graph, operator.getitem, new, index) for index in range(2)]
    last = second
    for node in _dependents(first, between):
        last.append(node)
        last = node
    for layer, result in zip((first, second), results, strict=True):
        result.meta = dict(layer.meta) | {"example_value": result.meta["example_value"]}
        layer.replace_all_uses_with(result)
        graph.erase_node(layer)
    return new.name
