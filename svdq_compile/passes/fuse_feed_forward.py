"""Two quantised linears with GELU between them become ``svdq::feed_forward``.

Its lowering lets the first GEMM write the operand of the second, so that the hidden tensor is never in memory.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import fx

from ..ops.feed_forward import feed_forward
from ..ops.linear import linear
from .base import Report, graph_pass
from .purity import written_between

PARTS = slice(1, 9)
"""The arguments of ``svdq::linear`` that are its weight and bias."""

COMPUTE = 9
"""The argument of ``svdq::linear`` that is its mode."""


@graph_pass("GELU between two quantised linears: the first GEMM writes the second's operand")
def fuse_feed_forward(gm: fx.GraphModule) -> Report:
    """Rewrites a graph in which linears are ``svdq::linear`` already; what is left are linears behind a GELU.

    Args:
        gm: Dynamo's graph.
    """
    graph = gm.graph
    matched: list[str] = []
    left: list[tuple[str, str]] = []
    for down in graph.find_nodes(op="call_function", target=linear):
        gelu = behind_dropout(down.args[0])
        if gelu.op != "call_function" or gelu.target is not F.gelu:
            continue
        up = gelu.args[0] if gelu.args else gelu.kwargs["input"]
        reason = _declined(down, gelu, up)
        if reason:
            left.append((down.name, reason))
            continue
        with graph.inserting_before(down):
            arguments = (up.args[0], list(up.args[PARTS]), list(down.args[PARTS]), up.args[COMPUTE], down.args[COMPUTE])
            new = graph.call_function(feed_forward, arguments)
        new.meta = dict(down.meta)
        down.replace_all_uses_with(new)
        _erase_chain(graph, down, up)
        matched.append(new.name)
    return Report("fuse_feed_forward", tuple(matched), tuple(left))


def _declined(down: fx.Node, gelu: fx.Node, up: fx.Node) -> str | None:
    if gelu.kwargs.get("approximate", "none") != "tanh":
        return "GELU in its exact form"
    if up.op != "call_function" or up.target is not linear:
        return "what GELU is applied to is no quantised linear"
    node = down.args[0]
    while node is not up:
        if len(node.users) > 1:
            return f"{node.name} is used elsewhere too"
        node = node.args[0] if node.args else node.kwargs["input"]
    if len(up.users) > 1:
        return "the first linear's result is used elsewhere too"
    return "a tensor is written to between the linears" if written_between((up, down)) else None


def behind_dropout(node: fx.Node) -> fx.Node:
    """The node whose values a node has: a dropout that does not train passes them on."""
    while node.op == "call_function" and node.target is F.dropout:
        given = dict(zip(("input", "p", "training"), node.args, strict=False)) | node.kwargs
        if given.get("training", True) and given.get("p", 0.5):
            break
        node = given["input"]
    return node


def _erase_chain(graph: fx.Graph, last: fx.Node, first: fx.Node) -> None:
    while True:
        before = last.args[0] if last.args else last.kwargs["input"]
        graph.erase_node(last)
        if last is first:
            return
        last = before
