"""LayerNorm and modulation in front of quantised linears become ``svdq::modulated_norm``.

    layer_norm(x) * (1 + scale) + shift

Its lowering computes mean and deviation of each token, and activation kernels do the rest as they read x.
"""

from __future__ import annotations

import dataclasses
import operator

import torch
import torch.nn.functional as F
from torch import fx

from ..ops.feed_forward import feed_forward
from ..ops.joint_feed_forward import joint_feed_forward
from ..ops.joint_heads import joint_heads
from ..ops.linear import linear
from ..ops.linear_group import linear_group
from ..ops.modulated_norm import modulated_norm
from .base import Report, graph_pass, same_sizes, value_of
from .purity import written_between

READERS = (linear, linear_group, feed_forward, joint_feed_forward, joint_heads)
"""Operators whose activation kernel may normalise what it reads."""

OF_STREAMS = (joint_feed_forward, joint_heads)
"""Those that read several activations."""

ADD = (operator.add, torch.add)
MULTIPLY = (operator.mul, torch.mul)


@dataclasses.dataclass(frozen=True)
class Modulated:
    """``layer_norm(x) * (1 + scale) + shift``.

    Args:
        x: [..., K].
        scale, shift: what modulates it.
        eps: of the LayerNorm.
        nodes: those that read x, scale and shift; the last one is the sum.
    """

    x: fx.Node
    scale: fx.Node
    shift: fx.Node
    eps: float
    nodes: tuple[fx.Node, ...]


@graph_pass("LayerNorm and modulation are left to the activation kernels that read them")
def modulate(gm: fx.GraphModule) -> Report:
    """Rewrites a graph in which linears are operators already.

    Args:
        gm: Dynamo's graph.
    """
    matched: list[str] = []
    left: list[tuple[str, str]] = []
    readers = [node for target in READERS for node in gm.graph.find_nodes(op="call_function", target=target)]
    inputs = {x for node in readers for x in (node.args[0] if node.target in OF_STREAMS else node.args[:1])}
    for node in [node for node in gm.graph.nodes if node in inputs]:
        found = _modulated(node)
        if found is None:
            continue
        reason = _reason_against(found)
        if reason:
            left.append((node.name, reason))
            continue
        with gm.graph.inserting_before(node):
            new = gm.graph.call_function(modulated_norm, (found.x, found.scale, found.shift, found.eps))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        _erase_unused(gm.graph, node)
        matched.append(new.name)
    return Report("modulate", tuple(matched), tuple(left))


def _modulated(node: fx.Node) -> Modulated | None:
    """What a node is the sum of; None of anything but a modulated LayerNorm."""
    for product, shift in _operands(node, ADD):
        for norm, gain in _operands(product, MULTIPLY):
            for one, scale in _operands(gain, ADD):
                x, eps = _normalised(norm)
                if one == 1 and _are_tensors(x, scale, shift):
                    return Modulated(x, scale, shift, eps, (norm, gain, node))
    return None


def _reason_against(found: Modulated) -> str | None:
    """Why a modulated LayerNorm is left as it is, or None."""
    if any(user.target not in READERS for user in found.nodes[-1].users):
        return "something else reads it too"
    x, scale, shift, total = map(value_of, (found.x, found.scale, found.shift, found.nodes[-1]))
    if len({x.dtype, scale.dtype, shift.dtype, total.dtype}) > 1:
        return "x, scale, shift and the sum differ in dtype"
    if x.dtype is torch.float64:
        return "float64, which the operator computes in float32"
    if not same_sizes(total.shape, x.shape):
        return "scale or shift make the sum larger than x"
    if not all(same_sizes(part.shape[-1:], x.shape[-1:]) for part in (scale, shift)):
        return "scale or shift is not of one value a feature"
    return "a tensor is written to between the norm and the sum" if written_between(found.nodes) else None


def _operands(node: object, functions: tuple) -> list[tuple]:
    """The two operands of a commutative function in either order; empty if the node is no such call."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or node.target not in functions:
        return []
    if len(node.args) != 2 or node.kwargs:
        return []
    return [node.args, node.args[::-1]]


def _normalised(node: object) -> tuple[fx.Node | None, float]:
    """x and eps of a LayerNorm over the last dimension that has no weights; None of anything else."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or node.target is not F.layer_norm:
        return None, 0.0
    names = ("input", "normalized_shape", "weight", "bias", "eps")
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    plain = given.get("weight") is None and given.get("bias") is None and len(given["normalized_shape"]) == 1
    return (given["input"], given.get("eps", 1e-5)) if plain else (None, 0.0)


def _are_tensors(*nodes: object) -> bool:
    return all(isinstance(value_of(node), torch.Tensor) for node in nodes)


def _erase_unused(graph: fx.Graph, node: fx.Node) -> None:
    """Removes the replaced sum and what only it read."""
    if node.users or node.op != "call_function" or node.target not in (*ADD, *MULTIPLY, F.layer_norm):
        return
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for read in inputs:
        _erase_unused(graph, read)
