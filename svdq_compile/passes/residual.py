"""What becomes of a result in a transformer block: ``residual + gate * y``, read off the graph."""

from __future__ import annotations

import dataclasses
import operator

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.experimental.symbolic_shapes import guard_or_false

from .base import calls, value_of
from .fuse_feed_forward import behind_dropout

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
