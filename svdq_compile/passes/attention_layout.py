"""Copies that only lay out attention's operands are dropped.

Attention kernels read heads by their strides. Without the copy, what makes queries, keys and values writes them to
their place among text and image tokens, and the result comes back in the layout the next linear reads.
"""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import fx

from .base import Report, calls, graph_pass, value_of
from .purity import written_between

aten = torch.ops.aten

ATTENTION = (
    F.scaled_dot_product_attention,
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_cudnn_attention,
    aten._scaled_dot_product_efficient_attention,
)
"""Functions whose kernels read heads by their strides."""

OPERANDS = ("query", "key", "value")

LAID_OUT_ANEW = (F.linear, torch.matmul, torch.bmm, operator.matmul)
"""Functions whose result's strides are the same whatever their operands' are."""

OPERATORS = (torch._ops.OperatorBase, torch._ops.OpOverloadPacket)
"""Their kernels may rely on strides."""

STRIDED = (torch.as_strided, torch.view_as_complex)
STRIDED_METHODS = ("view", "view_as", "as_strided", "stride")
"""What fails for some strides, or tells them."""


@graph_pass("copies in front of attention are dropped, since its kernels read strided heads")
def attention_layout(gm: fx.GraphModule) -> Report:
    """Removes ``contiguous()`` of a transposed tensor where attention alone reads it.

    Attention's result is laid out as the query: the query's copy is left where that may matter.

    Args:
        gm: Dynamo's graph.
    """
    matched: list[str] = []
    left: list[tuple[str, str]] = []
    for attention in [node for node in gm.graph.nodes if _attends(node)]:
        given = _operands(attention)
        for copy in {given[name]: None for name in OPERANDS}:
            if copy.op != "call_method" or copy.target != "contiguous":
                continue
            reason = _reason_against(copy)
            if reason:
                left.append((copy.name, reason))
                continue
            copy.replace_all_uses_with(copy.args[0])
            gm.graph.erase_node(copy)
            matched.append(copy.name)
    return Report("attention_layout", tuple(matched), tuple(left))


def _attends(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "overloadpacket", node.target) in ATTENTION


def _operands(attention: fx.Node) -> dict[str, object]:
    return dict(zip(OPERANDS, attention.args, strict=False)) | attention.kwargs


def _reads_strides(attention: fx.Node) -> fx.Node | None:
    """The first node found that may depend on the strides of an attention's result, None if there is none."""
    seen, reached = set(), [attention]
    while reached:
        for user in reached.pop().users:
            if user in seen or calls(user, LAID_OUT_ANEW, "contiguous", "matmul"):
                continue
            operator_call = isinstance(user.target, OPERATORS) and not _attends(user)
            if operator_call or user.op in ("output", "call_module") or calls(user, STRIDED, *STRIDED_METHODS):
                return user
            seen.add(user)
            reached.append(user)
    return None


def _reason_against(copy: fx.Node) -> str | None:
    if len(copy.args) > 1 or copy.kwargs:
        return "it asks for another memory format"
    if not all(map(_attends, copy.users)):
        return "something else reads it too"
    value = value_of(copy.args[0])
    if not isinstance(value, torch.Tensor) or value.stride(-1) != 1:
        return "a head's values are not next to each other"
    if written_between((copy, *copy.users)):
        return "a tensor is written to between it and attention"
    for attention in copy.users:
        reader = _reads_strides(attention) if _operands(attention)["query"] is copy else None
        if reader is not None:
            return f"the result is laid out as the query, and {reader.name} may depend on that"
    return None
