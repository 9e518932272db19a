"""What may be moved or merged in Dynamo's graph, which allows mutation."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Hashable, Iterable

import torch
import torch.nn.functional as F
from torch import fx

PURE = (F.silu, torch.chunk, operator.getitem, torch.ops.aten.silu.default)
"""Functions whose results are equal where their arguments are, as long as nothing in between mutates a tensor."""

PURE_METHODS = ("chunk",)

MUTATING = (
    operator.setitem,
    *(getattr(operator, n) for n in dir(operator) if n.startswith("i") and f"__{n}__" in dir(operator)),
)


def mutates(node: fx.Node) -> bool:
    """Whether a node may write to a tensor that exists already; unknown operations may."""
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    if node.op == "call_method":
        return node.target.startswith(("__i", "__set")) or (
            node.target.endswith("_") and not node.target.endswith("__")
        )
    if node.op != "call_function":
        return True
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    if isinstance(node.target, torch._ops.OpOverloadPacket):
        return any(getattr(node.target, name)._schema.is_mutable for name in node.target.overloads())
    if isinstance(node.target, torch._ops.HigherOrderOperator) or node.target in MUTATING:
        return True
    name = getattr(node.target, "__name__", "_")
    return (name.endswith("_") and not name.endswith("__")) or "out" in node.kwargs or _in_place(node)


def written_between(nodes: Iterable[fx.Node]) -> bool:
    """Whether a tensor may be written to from the first of a graph's nodes to the last, these included.

    What reads memory may not move past such a write; which tensors share memory is not known here.
    """
    nodes = sorted(nodes)
    node, behind = nodes[0], nodes[-1].next
    while node is not behind:
        if mutates(node):
            return True
        node = node.next
    return False


def identity(value: object) -> Hashable:
    """Equal for arguments that are equal, and for nodes that compute the same by pure functions."""
    if isinstance(value, fx.Node):
        if not is_pure(value):
            return value
        return value.target, identity(value.args), identity(tuple(sorted(value.kwargs.items())))
    if isinstance(value, (tuple, list)):
        return tuple(identity(each) for each in value)
    if isinstance(value, slice):
        return "slice", identity((value.start, value.stop, value.step))
    return type(value), value


def is_pure(node: fx.Node) -> bool:
    """Whether a node computes one of the functions that may be merged."""
    if node.op == "call_method":
        return node.target in PURE_METHODS
    return node.op == "call_function" and node.target in PURE and not _in_place(node)


def _in_place(node: fx.Node) -> bool:
    """Whether a function was asked to write to its argument."""
    position = _inplace_position(node.target)
    if position is None:
        return False
    return bool(node.args[position] if len(node.args) > position else node.kwargs.get("inplace", False))


@functools.cache
def _inplace_position(function: object) -> int | None:
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None
    return names.index("inplace") if "inplace" in names else None
