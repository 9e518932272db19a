"""Copies that only lay out attention's operands are dropped.

Attention kernels read heads by their strides. Without the copy, what makes queries, keys and values writes them to
their place among text and image tokens, and the result comes back in the layout the next linear reads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx

from .base import Report, graph_pass, value_of
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


@graph_pass("copies in front of attention are dropped, since its kernels read strided heads")
def attention_layout(gm: fx.GraphModule) -> Report:
    """Removes ``contiguous()`` of a transposed tensor where attention alone reads it.

    Args:
        gm: Dynamo's graph.
    """
    matched: list[str] = []
    left: list[tuple[str, str]] = []
    for attention in [node for node in gm.graph.nodes if _attends(node)]:
        given = dict(zip(OPERANDS, attention.args, strict=False)) | attention.kwargs
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


def _reason_against(copy: fx.Node) -> str | None:
    if len(copy.args) > 1 or copy.kwargs:
        return "it asks for another memory format"
    if not all(map(_attends, copy.users)):
        return "something else reads it too"
    value = value_of(copy.args[0])
    if not isinstance(value, torch.Tensor) or value.stride(-1) != 1:
        return "a head's values are not next to each other"
    return "a tensor is written to between it and attention" if written_between((copy, *copy.users)) else None
