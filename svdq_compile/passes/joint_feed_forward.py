"""The feed-forward layers of two streams, and the residuals they are added to, become ``svdq::joint_feed_forward``.

Its lowering computes the second linears of both streams in one launch, where a short stream costs next to nothing.
"""

from __future__ import annotations

from torch import fx
from torch.fx.experimental.symbolic_shapes import guard_or_false

from ..ops.cuda import call_facts
from ..ops.feed_forward import feed_forward
from ..ops.joint_feed_forward import joint_feed_forward as joint_feed_forward_operator
from ..ops.plan import MANY, plan, separate
from ..spec import COMPONENTS
from .base import Report, graph_pass, tokens_of, value_of
from .residual import OtherUse, Stream, join, read_gated, reason_against

PARTS = (*COMPONENTS, "bias")
"""What a layer's lists hold."""


class Layer(Stream):
    """A feed-forward layer of one of the streams, and what its result is added to."""

    @property
    def linears(self) -> tuple[list[fx.Node | None], ...]:
        """Components and bias of both."""
        return tuple(self.node.args[1:3])

    @property
    def compute(self) -> tuple[str, ...]:
        """Of both."""
        return tuple(self.node.args[3:])

    @property
    def sizes(self) -> list[int]:
        """Features of x, of what is between the linears, and of the result."""
        return [value_of(self.x).shape[-1], *(value_of(parts[0]).shape[0] for parts in self.linears)]


@graph_pass("the second linears of two streams' feed-forward layers are one launch, which finishes their residuals")
def joint_feed_forward(gm: fx.GraphModule) -> Report:
    """Rewrites a graph in which feed-forward layers are ``svdq::feed_forward`` already.

    Each is paired with the one behind it. Left are those that cannot be, but for the last.

    Args:
        gm: Dynamo's graph.
    """
    matched: list[str] = []
    left: list[tuple[str, str]] = []
    waiting: fx.Node | None = None
    for node in gm.graph.find_nodes(op="call_function", target=feed_forward):
        if waiting is None:
            waiting = node
            continue
        try:
            first, second = (Layer(each, read_gated(each)) for each in (waiting, node))
        except OtherUse as error:
            reason = str(error)
        else:
            order = {each: position for position, each in enumerate(gm.graph.nodes)}
            reason = _reason_against(first, second, order) or _declined(first, second)
        if reason:
            left.append((waiting.name, reason))
            waiting = node
        else:
            matched.append(
                join(
                    gm.graph,
                    joint_feed_forward_operator,
                    (first, second),
                    (*first.linears, *second.linears),
                    first.compute,
                    order,
                )
            )
            waiting = None
    return Report("joint_feed_forward", tuple(matched), tuple(left))


def _reason_against(first: Layer, second: Layer, order: dict[fx.Node, int]) -> str | None:
    """Why the rewritten graph could compute something else, or None.

    Args:
        first, second: what is to be rewritten.
        order: position of each node in the graph.
    """
    streams = (first, second)
    if first.compute != second.compute:
        return f"{second.node.name} computes as {second.compute}, it as {first.compute}"
    x, y = (value_of(stream.x) for stream in streams)
    same_kind = (x.dtype, x.device) == (y.dtype, y.device)
    if not same_kind or first.sizes != second.sizes or not guard_or_false(x.shape[0] == y.shape[0]):
        return f"{second.node.name} has another dtype, device, batch or features"
    return reason_against(streams, order)


def _declined(*streams: Layer) -> str | None:
    """Why no kernel of ours computes them in one."""

    def reason(tokens: list[int]) -> str | None:
        each = [_separate(stream, count) for stream, count in zip(streams, tokens, strict=True)]
        return next((why for why in each if why), None)

    # The guard on a symbolic size is for what depends on it.
    return reason([MANY] * len(streams)) or reason([tokens_of(value_of(stream.x)) for stream in streams])


def _separate(stream: Layer, tokens: int) -> str | None:
    """Why a layer's linears are computed apart."""
    x = value_of(stream.x)
    up, down = (dict(zip(PARTS, map(value_of, parts), strict=True)) for parts in stream.linears)
    hidden = x.new_empty((*x.shape[:-1], up["qweight"].shape[0]))
    first, second = (
        call_facts(read, parts["qweight"], parts["input_scale"], parts["lora_down"], mode, tokens)
        for read, parts, mode in zip((x, hidden), (up, down), stream.compute, strict=True)
    )
    return separate(plan(first), plan(second), second, down["input_scale"] is None)
