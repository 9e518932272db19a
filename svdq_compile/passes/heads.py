"""Reads in Dynamo's graph what becomes of one linear of a group on its way to attention: heads, RMSNorm, rotation."""

from __future__ import annotations

import dataclasses
import operator

import torch
from torch import fx

from ..ops.joint_heads import MEMBERS, PARTS
from ..ops.linear_group import linear_group
from .base import calls, same_sizes, value_of
from .real_rope import MULTIPLY, UNSQUEEZE, VIEW_AS_COMPLEX, VIEW_AS_REAL

ADD = (operator.add, torch.add)
MEAN = (torch.mean,)
POW = (operator.pow, torch.pow)
RESHAPE = (torch.reshape, torch.flatten, torch.unflatten)
RESHAPE_METHODS = ("reshape", "flatten", "unflatten", "view")
RSQRT = (torch.rsqrt,)
CAST_METHODS = ("to", "type_as", "float", "half", "bfloat16", "type")


class OtherHeads(Exception):
    """What was read is no linear of a group, or something else happens to it; the message says what."""


@dataclasses.dataclass(eq=False)
class Heads:
    """Heads [B, S, H, head_dim] of one linear.

    Attributes:
        group: the ``svdq::linear_group`` they are part of.
        member: which of its linears.
        weight, eps: of the RMSNorm; eps is a number or a node, None without a norm.
        table: the complex node [S, head_dim/2] they are rotated by; None of heads that are not.
        nodes: all nodes from the group's result on, which nothing else may read.
        shared: nodes others may read as well.
    """

    group: fx.Node
    member: int
    weight: fx.Node | None
    eps: object
    table: fx.Node | None
    nodes: list[fx.Node]
    shared: list[fx.Node]


def read_heads(last: fx.Node) -> Heads:
    """The heads a node holds.

    Args:
        last: of a tensor [B, S, H, head_dim].

    Raises:
        OtherHeads: it holds something else.
    """
    reader = _Reader(last)
    weight = eps = table = None
    node = last
    if not calls(node, RESHAPE, *RESHAPE_METHODS):
        node, table = reader.rotation(node)
        node, weight, eps = reader.norm(node)
    group, member = reader.member(reader.reshaped(node, "heads", reader.sizes, reader.dtype))
    return Heads(group, member, weight, eps, table, reader.nodes, reader.shared)


class _Reader:
    """Goes from a node towards what it is computed from, and keeps the nodes it passes."""

    def __init__(self, last: fx.Node) -> None:
        value = value_of(last)
        if not all(isinstance(size, int) for size in value.shape[2:]):
            raise OtherHeads("how many heads there are is unknown")
        self.sizes: tuple[int | torch.SymInt, ...] = tuple(value.shape)
        self.dtype: torch.dtype = value.dtype
        self.nodes: list[fx.Node] = []
        self.shared: list[fx.Node] = []

    @property
    def head_dim(self) -> int:
        return self.sizes[-1]

    def rotation(self, node: fx.Node) -> tuple[fx.Node, fx.Node]:
        """What a complex product rotates, and the table."""
        pairs_of = (*self.sizes[:-1], self.head_dim // 2, 2)
        what = "rotation"
        node = self.cast(node, what, self.dtype)
        node = self.reshaped(node, what, self.sizes, torch.float32)
        product = self.passed(node, what, VIEW_AS_REAL, "view_as_real")
        first, second = self.operands(product, what, MULTIPLY, "mul")
        if not calls(first, VIEW_AS_COMPLEX, "view_as_complex"):
            first, second = second, first
        pairs = self.passed(first, what, VIEW_AS_COMPLEX, "view_as_complex")
        node = self.reshaped(pairs, what, pairs_of, torch.float32)
        return self.cast(node, what, torch.float32), self.table(second)

    def table(self, node: object) -> fx.Node:
        """The table behind its ``unsqueeze``, which the rotations of queries and keys may share."""
        if not calls(node, UNSQUEEZE, "unsqueeze") or not node.args or not _is_tensor(node.args[0]):
            raise OtherHeads("the rotary table is no table of positions")
        table, value = node.args[0], value_of(node.args[0])
        if value.dtype is not torch.complex64 or value.is_conj():
            raise OtherHeads(f"the rotary table is {value.dtype}, not plain complex64")
        _, tokens, _, _ = self.sizes
        if not (
            same_sizes(value.shape, (tokens, self.head_dim // 2)) and same_sizes(value_of(node).shape[:2], (tokens, 1))
        ):
            raise OtherHeads("the rotary table is no table of positions")
        self.shared.append(node)
        return table

    def norm(self, node: fx.Node) -> tuple[fx.Node, fx.Node | None, object]:
        """What RMSNorm is computed of, its weight and its eps."""
        what, weight = "norm", None
        if calls(node, MULTIPLY, "mul"):
            node, weight = self.operands(node, what, MULTIPLY, "mul")
            if calls(weight, (), *CAST_METHODS):
                node, weight = weight, node
            if not _is_tensor(weight) or not same_sizes(value_of(weight).shape, (self.head_dim,)):
                raise OtherHeads("the norm's weight has another shape")
            if value_of(weight).dtype is not self.dtype:
                raise OtherHeads(f"the norm's weight is {value_of(weight).dtype}, its input {self.dtype}")
        product = self.cast(node, what, self.dtype)
        heads, factor = self.operands(product, what, MULTIPLY, "mul")
        if calls(heads, RSQRT, "rsqrt"):
            heads, factor = factor, heads
        variance, eps = self.operands(self.passed(factor, what, RSQRT, "rsqrt"), what, ADD, "add")
        if not calls(variance, MEAN, "mean"):
            variance, eps = eps, variance
        squares = self.mean(variance, what)
        wide, exponent = self.operands(squares, what, POW, "pow")
        if exponent != 2:
            raise OtherHeads(f"{what}: the mean of a power of {exponent}")
        if self.cast(wide, what, torch.float32) is not heads:
            raise OtherHeads(f"{what}: it multiplies something else than it takes the mean of")
        if isinstance(eps, fx.Node):
            self.shared.append(eps)
        return heads, weight, eps

    def mean(self, node: fx.Node, what: str) -> fx.Node:
        """What the mean over the last dimension is taken of."""
        squares = self.passed(node, what, MEAN, "mean")
        given = dict(zip(("input", "dim", "keepdim"), node.args, strict=False)) | node.kwargs
        over, kept = given.pop("dim", None), given.pop("keepdim", False)
        if over not in (-1, [-1], (-1,)) or not kept or len(given) > 1:
            raise OtherHeads(f"{what}: another mean than that of a head")
        return squares

    def member(self, node: object) -> tuple[fx.Node, int]:
        """The group and the linear of it that a slice is."""
        group = node.args[0] if calls(node, (torch.narrow,)) else None
        grouped = calls(group, (linear_group,)) and len(group.args) == len(PARTS) + 2
        if not grouped or len(group.args[1]) != MEMBERS:
            raise OtherHeads(f"they are of no group of {MEMBERS} quantised linears")
        features = self.sizes[2] * self.head_dim
        rows = [value_of(qweight).shape[0] for qweight in group.args[1]]
        if any(n != features for n in rows) or node.kwargs:
            raise OtherHeads("the linears of the group differ in size")
        if value_of(group).dim() != 3 or not same_sizes(value_of(group).shape[:2], self.sizes[:2]):
            raise OtherHeads("the group's sequences are other ones than attention's")
        places = [(-1, index * features, features) for index in range(MEMBERS)]
        if node.args[1:] not in places:
            raise OtherHeads("they are no linear of the group")
        self.nodes += [node, group]
        return group, places.index(node.args[1:])

    def cast(self, node: object, what: str, dtype: torch.dtype) -> fx.Node:
        """What is cast to a dtype."""
        before = self.passed(node, what, (), *CAST_METHODS)
        if value_of(node).dtype is not dtype or value_of(node).device != value_of(before).device:
            raise OtherHeads(f"{what}: not computed in float32 and rounded to {self.dtype}")
        return before

    def reshaped(self, node: object, what: str, sizes: tuple, dtype: torch.dtype) -> fx.Node:
        """What is seen as a tensor of other sizes."""
        before = self.passed(node, what, RESHAPE, *RESHAPE_METHODS)
        if not (same_sizes(value_of(node).shape, sizes) and value_of(node).dtype is value_of(before).dtype is dtype):
            raise OtherHeads(f"{what}: other sizes or another dtype than expected, at {node.name}")
        return before

    def operands(self, node: object, what: str, functions: tuple, method: str) -> tuple:
        """Both operands of a function of two."""
        self.pass_by(node, what, functions, method)
        if len(node.args) != 2 or node.kwargs:
            raise OtherHeads(f"{what}: other arguments than expected, at {node.name}")
        return node.args

    def passed(self, node: object, what: str, functions: tuple, *methods: str) -> fx.Node:
        """What a call of one of these is given first."""
        self.pass_by(node, what, functions, *methods)
        if not node.args or not _is_tensor(node.args[0]):
            raise OtherHeads(f"{what}: other arguments than expected, at {node.name}")
        return node.args[0]

    def pass_by(self, node: object, what: str, functions: tuple, *methods: str) -> None:
        """Keeps a node that must be a call of one of these."""
        if not calls(node, functions, *methods) or not _is_tensor(node):
            raise OtherHeads(f"{what}: not as diffusers computes it, at {node}")
        self.nodes.append(node)


def _is_tensor(node: object) -> bool:
    return isinstance(value_of(node), torch.Tensor)
