"""Linears that read one tensor and hold the same smoothing, scale and down-projection become ``svdq::linear_group``.

That they hold the same follows from the share keys in their weights' fingerprints, which Dynamo guards, and from where
the weights are in the model, which the compiled code fixes.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Hashable

import torch
from torch import fx

from .. import _compat
from ..ops.linear import linear
from ..ops.linear_group import linear_group
from ..ops.share import scope
from ..ops.weight import SVDQWeight
from ..spec import COMPONENTS
from .base import Report, graph_pass, insert, value_of
from .purity import identity, is_pure, written_between

MAX_MEMBERS = 4
"""Most linears of one group; what reads the same tensor beyond that makes further groups."""

OPERANDS = ("x", *COMPONENTS, "bias", "compute")
"""Arguments of ``svdq::linear``."""


@graph_pass("linears that read one tensor and share smoothing, scale and lora_down become one svdq::linear_group")
def share_inputs(gm: fx.GraphModule) -> Report:
    """Rewrites a graph in which linears are ``svdq::linear`` already; ``matched`` holds each group's names.

    Left are linears that read the same tensor as others and are in no group.

    Args:
        gm: Dynamo's graph.
    """
    matched: list[tuple[str, ...]] = []
    left: list[tuple[str, str]] = []
    readers: dict[Hashable, list[fx.Node]] = collections.defaultdict(list)
    for node in gm.graph.find_nodes(op="call_function", target=linear):
        readers[identity(node.args[0])].append(node)
    for nodes in readers.values():
        if len(nodes) == 1:
            continue
        groups: dict[Hashable, list[fx.Node]] = collections.defaultdict(list)
        for node in nodes:
            reason = _reason_against(node)
            if reason:
                left.append((node.name, reason))
            else:
                groups[_common(node)].append(node)
        for members in groups.values():
            for start in range(0, len(members), MAX_MEMBERS):
                chunk = members[start : start + MAX_MEMBERS]
                reason = _reason_against_all(gm.graph, chunk)
                if reason:
                    left += [(node.name, reason) for node in chunk]
                else:
                    matched.append(tuple(node.name for node in chunk))
                    _group(gm.graph, chunk)
    return Report("share_inputs", tuple(matched), tuple(left))


def _weight(node: fx.Node) -> fx.Node:
    """The node of the weight whose components a linear reads."""
    return node.args[1].args[0]


def _reason_against(node: fx.Node) -> str | None:
    fingerprint = value_of(_weight(node)).fingerprint
    if not fingerprint.share:
        return "its smoothing, scale or down-projection is its own"
    if _scope(node) is None:
        return "where its weight is in the model is unknown"
    return None


def _scope(node: fx.Node) -> tuple[str, ...] | None:
    path = _compat.module_path(_weight(node))
    return None if path is None else scope(value_of(_weight(node)).fingerprint.share, path[:-1])


def _common(node: fx.Node) -> Hashable:
    """What linears of one group have in common besides what they read."""
    weight: SVDQWeight = value_of(_weight(node))
    spec = dataclasses.replace(weight.spec, out_features=0)
    given = dict(zip(OPERANDS, node.args, strict=True))
    return weight.fingerprint.share, _scope(node), spec, given["compute"], given["bias"] is None, weight.device


def _reason_against_all(graph: fx.Graph, members: list[fx.Node]) -> str | None:
    if len(members) == 1:
        return f"no other linear of {value_of(_weight(members[0])).fingerprint.share} reads the same tensor"
    if len({_weight(node) for node in members}) < len(members):
        return "a weight is used twice"
    order = {node: position for position, node in enumerate(graph.nodes)}
    if any(order[operand] > order[members[0]] for node in members for operand in node.all_input_nodes[1:]):
        return "a bias is computed behind the first of them"
    if written_between([*members, *(node for member in members for node in _producers(member.args[0]))]):
        return "a tensor is written to between them"
    return None


def _producers(node: fx.Node) -> list[fx.Node]:
    """A node and the pure ones it comes from."""
    found = [node]
    if is_pure(node):
        for read in node.all_input_nodes:
            found += _producers(read) if is_pure(read) else []
    return found


def _group(graph: fx.Graph, members: list[fx.Node]) -> None:
    """Puts one operator and its slices in the place of linears."""
    given = [dict(zip(OPERANDS, node.args, strict=True)) for node in members]
    first = given[0]

    def each(name: str) -> list:
        values = [arguments[name] for arguments in given]
        return values if name == "bias" else [value for value in values if value is not None]

    with graph.inserting_before(members[0]):
        own = [each(name) for name in ("qweight", "weight_scale", "weight_scale_2")]
        shared = [first[name] for name in ("input_scale", "pre_quant_scale", "lora_down")]
        y = insert(graph, linear_group, first["x"], *own, *shared, each("lora_up"), each("bias"), first["compute"])
        start, slices = 0, []
        for node in members:
            size = value_of(_weight(node)).spec.out_features
            slices.append(insert(graph, torch.narrow, y, -1, start, size))
            start += size
    for node, part in zip(members, slices, strict=True):
        part.meta = dict(node.meta) | {"example_value": part.meta["example_value"]}
        x = node.args[0]
        node.replace_all_uses_with(part)
        graph.erase_node(node)
        _erase_unread(graph, x)


def _erase_unread(graph: fx.Graph, node: fx.Node) -> None:
    if is_pure(node) and not node.users:
        inputs = node.all_input_nodes
        graph.erase_node(node)
        for read in inputs:
            _erase_unread(graph, read)
