"""Quantised weights enter a compiled graph as their components.

Dynamo's graph takes a weight as one input. AOTAutograd takes it apart at every call, in Python and by checks this
weight never fails (before torch 2.13 that is most of a block's time on the CPU). So AOTAutograd is given a copy of the
graph whose inputs are the components, and the arguments of a call are taken apart by plain attribute reads.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

from torch import fx

from .. import _compat
from ..ops.weight import SVDQWeight
from .base import value_of

Reader = Callable[[SVDQWeight], tuple]


def split_weights(
    gm: fx.GraphModule, inputs: Sequence[object]
) -> tuple[fx.GraphModule, list[object], tuple[Reader | None, ...]]:
    """Replaces every input that is a quantised weight of which components are read and nothing else.

    Args:
        gm: Dynamo's graph behind all passes. It stays as it is: Dynamo finds the arguments of a call by its inputs.
        inputs: its example inputs.

    Returns:
        The graph to compile, its example inputs, and for each input of gm what reads the new ones from it; None for one
        that stays.
    """
    graph, copies = fx.Graph(), {}
    flat: list[object] = []
    readers: list[Reader | None] = []
    values = iter(inputs)
    for node in gm.graph.nodes:
        names = _components_read(node)
        if names:
            value = next(values)
            flat += (getattr(value, name) for name in names)
            readers.append(_reader(names))
            parts = {name: _component(graph, node, name) for name in names}
            copies |= {user: parts[user.args[1]] for user in node.users}
        elif node not in copies:
            copies[node] = _compat.copy_node(graph, node, copies)
            if node.op == "placeholder":
                flat.append(next(values))
                readers.append(None)
    graph.lint()
    return _compat.with_graph(gm, graph), flat, tuple(readers)


def splitting(compiled: Callable, readers: Sequence[Reader | None]) -> Callable:
    """What :func:`split_weights`'s graph was compiled to, to be called with the arguments of Dynamo's graph."""
    if not any(readers):
        return compiled

    def call(*arguments: object) -> object:
        flat: list[object] = []
        for argument, read in zip(arguments, readers, strict=True):
            if read is None:
                flat.append(argument)
            else:
                flat += read(argument)
        return compiled(*flat)

    return call


def _components_read(node: fx.Node) -> list[str]:
    """Names of the components read of a quantised weight; empty for anything else, and if it is used as a whole."""
    weight = node.op == "placeholder" and isinstance(value_of(node), SVDQWeight)
    if not weight or any(user.target is not getattr for user in node.users):
        return []
    return list(dict.fromkeys(user.args[1] for user in node.users))


def _component(graph: fx.Graph, weight: fx.Node, name: str) -> fx.Node:
    """An input of a graph in place of a weight's component."""
    new = graph.placeholder(f"{weight.name}_{name}")
    # What of the weight's says that it is a parameter, which lies still, holds for its components.
    new.meta = weight.meta | {"example_value": getattr(value_of(weight), name)}
    new._dynamo_source = _compat.attribute_source(weight, name)
    return new


def _reader(names: Sequence[str]) -> Reader:
    if len(names) == 1:
        return lambda weight: (getattr(weight, names[0]),)
    return operator.attrgetter(*names)
