"""A transformer block's ``residual + gate * y``, read off the graph, and what puts one operator in the place of two."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.experimental.symbolic_shapes import guard_or_false

from .base import calls, insert, value_of
from .fuse_feed_forward import behind_dropout
from .purity import written_between

ADD = (operator.add, torch.add)
MULTIPLY = (operator.mul, torch.mul)


class OtherUse(Exception):
    """A result that is used for something else; says for what."""


@dataclasses.dataclass(frozen=True)
class Gated:
    """``residual + gate * y``.

    Args:
        residual, gate: [B, S, N] and [B, 1, N], of y's dtype.
        nodes: from y to the sum; nothing else reads any but the last.
    """

    residual: fx.Node
    gate: fx.Node
    nodes: tuple[fx.Node, ...]

    @property
    def total(self) -> fx.Node:
        """The sum."""
        return self.nodes[-1]


@dataclasses.dataclass(frozen=True)
class Stream:
    """The node that computes y from its first argument in one of two streams, and what y is added to."""

    node: fx.Node
    gated: Gated

    @property
    def x(self) -> fx.Node:
        return self.node.args[0]

    @property
    def read(self) -> list[fx.Node]:
        """All that the sum is computed from."""
        return [*self.node.all_input_nodes, self.gated.gate, self.gated.residual]


def read_gated(y: fx.Node) -> Gated:
    """What y is added to.

    Args:
        y: [B, S, N].

    Raises:
        OtherUse: it is used in another way.
    """
    nodes = [y]
    user = _only_user(y)
    while calls(user, (F.dropout,)) and behind_dropout(user) is y:
        nodes.append(user)
        user = _only_user(user)
    gate = _other_operand(user, nodes[-1], MULTIPLY, "mul")
    if gate is None:
        raise OtherUse("its result is not multiplied with a gate")
    total = _only_user(user)
    residual = _other_operand(total, user, ADD, "add")
    if residual is None:
        raise OtherUse("its result is not added to a residual")
    _check_fit(*map(value_of, (y, gate, residual)))
    return Gated(residual, gate, (*nodes, user, total))


def _only_user(node: fx.Node) -> fx.Node:
    if len(node.users) != 1:
        raise OtherUse(f"{node.name} is read elsewhere too, or not at all")
    return next(iter(node.users))


def _other_operand(node: fx.Node, one: fx.Node, functions: tuple, method: str) -> fx.Node | None:
    """The operand of a commutative function that is not ``one``; None if there is none, or of another function."""
    if not calls(node, functions, method) or len(node.args) != 2 or node.kwargs:
        return None
    others = [each for each in node.args if each is not one]
    return others[0] if len(others) == 1 and isinstance(others[0], fx.Node) else None


def _check_fit(y: object, gate: object, residual: object) -> None:
    for name, value in (("gate", gate), ("residual", residual)):
        if not isinstance(value, torch.Tensor) or value.dtype is not y.dtype or value.dim() != 3:
            raise OtherUse(f"the {name} is no tensor of its dtype and dimensions")
    if y.dim() != 3:
        raise OtherUse("its result has not three dimensions")
    batch, tokens, n = y.shape
    for name, value, size in (("gate", gate, (batch, 1, n)), ("residual", residual, (batch, tokens, n))):
        if not all(guard_or_false(own == wanted) for own, wanted in zip(value.shape, size, strict=True)):
            raise OtherUse(f"the {name} has another shape")


def reason_against(streams: Sequence[Stream], order: dict[fx.Node, int]) -> str | None:
    """Why one operator in the place of two streams' sums could compute something else, or None.

    Args:
        streams: both.
        order: position of each node in the graph.
    """
    if any(value_of(stream.gated.total).requires_grad for stream in streams):
        return "gradients flow through it, which the operator has none of"
    if any(node in other.gated.nodes for one, other in (streams, streams[::-1]) for node in one.read):
        return "one stream's sum depends on the other's"
    ready = max((node for stream in streams for node in stream.read), key=order.get)
    if any(order[user] <= order[ready] for stream in streams for user in stream.gated.total.users):
        return "one stream's result is read before the other's can be computed"
    if written_between([ready, *(node for stream in streams for node in stream.gated.nodes)]):
        return "a tensor is written to between the two and their sums"
    return None


def join(
    graph: fx.Graph,
    target: object,
    streams: Sequence[Stream],
    parts: Sequence[list[fx.Node | None]],
    compute: Sequence[str],
    order: dict[fx.Node, int],
) -> str:
    """Puts an operator with two results behind all it reads, in the place of two streams' sums, and returns its name.

    Args:
        target: the operator; it takes what the streams read, ``parts``, residuals, gates and ``compute``.
        streams: both.
        parts: components and bias of each linear.
        compute: modes.
        order: position of each node in the graph.
    """
    arguments = (
        [stream.x for stream in streams],
        *parts,
        [stream.gated.residual for stream in streams],
        [stream.gated.gate for stream in streams],
        *compute,
    )
    placeholders = graph.find_nodes(op="placeholder")
    after = max((*placeholders, *(node for stream in streams for node in stream.read)), key=order.get)
    with graph.inserting_after(after):
        new = insert(graph, target, *arguments)
    with graph.inserting_before(new.next):
        results = [insert(graph, operator.getitem, new, index) for index in range(len(streams))]
    for stream, result in zip(streams, results, strict=True):
        total = stream.gated.total
        result.meta = dict(total.meta) | {"example_value": result.meta["example_value"]}
        total.replace_all_uses_with(result)
        for node in reversed(stream.gated.nodes):
            graph.erase_node(node)
    return new.name
