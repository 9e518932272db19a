"""The linears behind an attention of two streams, and the residuals they are added to, become ``svdq::joint_linear``.

Its lowering computes both in one launch: the few tiles of a short text fill multiprocessors that the image's last ones
leave idle.
"""

from __future__ import annotations

import collections
import operator

from torch import fx
from torch.fx.experimental.symbolic_shapes import guard_or_false

from ..ops.cuda import capability, plan_call
from ..ops.joint_linear import PARTS
from ..ops.joint_linear import joint_linear as joint_linear_operator
from ..ops.linear import linear
from ..ops.plan import MANY, Plan, in_turn
from .base import Report, calls, graph_pass, tokens_of, value_of
from .residual import OtherUse, Stream, join, read_gated, reason_against


class Linear(Stream):
    """A linear of one of the streams, and what its result is added to."""

    @property
    def parts(self) -> list[fx.Node | None]:
        """Components and bias."""
        return list(self.node.args[1 : 1 + PARTS])

    @property
    def compute(self) -> str:
        return self.node.args[1 + PARTS]


@graph_pass("linears of two streams behind one attention are computed in one launch, which finishes their residuals")
def joint_linear(gm: fx.GraphModule) -> Report:
    """Rewrites a graph in which linears are ``svdq::linear`` already; left are pairs behind one tensor's slices.

    Args:
        gm: Dynamo's graph.
    """
    matched: list[str] = []
    left: list[tuple[str, str]] = []
    for pair in _pairs(gm.graph):
        try:
            first, second = (Linear(node, read_gated(node)) for node in pair)
        except OtherUse as error:
            reason = str(error)
        else:
            order = {node: position for position, node in enumerate(gm.graph.nodes)}
            reason = _reason_against(first, second, order) or _declined(first, second)
        if reason:
            left += [(node.name, reason) for node in pair]
        else:
            matched.append(
                join(
                    gm.graph,
                    joint_linear_operator,
                    (first, second),
                    (first.parts, second.parts),
                    (first.compute,),
                    order,
                )
            )
    return Report("joint_linear", tuple(matched), tuple(left))


def _pairs(graph: fx.Graph) -> list[list[fx.Node]]:
    """Linears that read two slices of one tensor's tokens."""
    found: dict[fx.Node, list[fx.Node]] = collections.defaultdict(list)
    for node in graph.find_nodes(op="call_function", target=linear):
        whole = _sliced(node.args[0])
        if whole is not None:
            found[whole].append(node)
    return [nodes for nodes in found.values() if len(nodes) == 2]


def _sliced(x: fx.Node) -> fx.Node | None:
    """The tensor [B, S, K] of which x is a slice of tokens, or a copy of one; None of anything else."""
    while calls(x, (), "contiguous"):
        x = x.args[0]
    if not calls(x, (operator.getitem,)) or not isinstance(x.args[1], tuple):
        return None
    where = [index for position, index in enumerate(x.args[1]) if position != 1]
    tokens = x.args[1][1] if len(x.args[1]) > 1 else None
    return x.args[0] if isinstance(tokens, slice) and all(index == slice(None) for index in where) else None


def _reason_against(first: Linear, second: Linear, order: dict[fx.Node, int]) -> str | None:
    """Why the rewritten graph could compute something else, or None.

    Args:
        first, second: what is to be rewritten.
        order: position of each node in the graph.
    """
    streams = (first, second)
    y, z = (value_of(stream.gated.total) for stream in streams)
    if first.compute != second.compute:
        return f"the streams compute as {' and '.join(sorted((first.compute, second.compute)))}"
    if y.dtype is not z.dtype or y.shape[2] != z.shape[2] or not guard_or_false(y.shape[0] == z.shape[0]):
        return "the streams' results differ in dtype, batch or features"
    return reason_against(streams, order)


def _declined(first: Linear, second: Linear) -> str | None:
    """Why no kernel of ours computes both in one."""
    streams = (first, second)

    def reason(tokens: list[int]) -> str | None:
        plans = [_plan(stream, count) for stream, count in zip(streams, tokens, strict=True)]
        slower = [chosen.reason for chosen in plans if not chosen.fused]
        return slower[0] if slower else in_turn(plans, capability(value_of(first.x).device))

    # The guard on a symbolic size is for what depends on it.
    return reason([MANY, MANY]) or reason([tokens_of(value_of(stream.x)) for stream in streams])


def _plan(stream: Linear, tokens: int) -> Plan:
    qweight, _, _, input_scale, _, lora_down, *_ = map(value_of, stream.parts)
    return plan_call(value_of(stream.x), qweight, input_scale, lora_down, stream.compute, tokens)
