"""Two streams' q, k and v linears, norms and rotations, concatenated for one attention, become ``svdq::joint_heads``.

Its lowering finishes each stream's product as heads in their places among the other stream's, so that nothing between
the linears and attention is ever written.
"""

from __future__ import annotations

import collections
import dataclasses
import operator

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from ..ops.cuda import capability, plan_call
from ..ops.joint_heads import MEMBERS, PARTS, stream_of
from ..ops.joint_heads import joint_heads as joint_heads_operator
from ..ops.linear_group import linear_group
from ..ops.plan import MANY, Plan, apart
from .base import Report, calls, graph_pass, insert, tokens_of, value_of
from .heads import Heads, OtherHeads, read_heads
from .purity import written_between
from .real_rope import real_form

CAT = (torch.cat, torch.concat, torch.concatenate)

GROUP = ("x", *PARTS, "compute")
"""Arguments of ``svdq::linear_group``."""


@dataclasses.dataclass(frozen=True)
class Joint:
    """Three concatenations of two streams' heads.

    Args:
        cats: of queries, keys and values.
        streams: the heads of q, k and v of each stream.
    """

    cats: tuple[fx.Node, ...]
    streams: tuple[tuple[Heads, ...], ...]

    @property
    def groups(self) -> list[dict[str, object]]:
        """Each stream's ``svdq::linear_group``: its arguments by name."""
        return [dict(zip(GROUP, heads[0].group.args, strict=True)) for heads in self.streams]

    @property
    def rotated(self) -> list[Heads]:
        """q and k of the first stream, then of the second."""
        return [heads for stream in self.streams for heads in stream[:2]]


@graph_pass("q, k and v of two streams, normalised, rotated and joined for attention, are finished by their GEMMs")
def joint_heads(gm: fx.GraphModule) -> Report:
    """Rewrites a graph in which q, k and v of each stream are one ``svdq::linear_group`` already.

    Left are concatenations of two tensors of heads in graphs that have such groups.

    Args:
        gm: Dynamo's graph.
    """
    matched: list[str] = []
    joints, left = _joints(gm.graph)
    order = {node: position for position, node in enumerate(gm.graph.nodes)} if joints else {}
    tables: dict[fx.Node, fx.Node] = {}
    for joint in joints:
        reason = _reason_against(joint, order) or _declined(joint)
        eps = None if reason else _common_eps(joint)
        if eps is None:
            left += [(cat.name, reason or "the norms' eps differ or are unknown") for cat in joint.cats]
        else:
            matched.append(_join(gm.graph, joint, order, eps, tables))
    return Report("joint_heads", tuple(matched), tuple(left))


def _joints(graph: fx.Graph) -> tuple[list[Joint], list[tuple[str, str]]]:
    """Concatenations that belong together, and why others do not."""
    found: dict[tuple[fx.Node, fx.Node], list[tuple[fx.Node, Heads, Heads]]] = collections.defaultdict(list)
    joints: list[Joint] = []
    left: list[tuple[str, str]] = []
    grouped = graph.find_nodes(op="call_function", target=linear_group)
    for cat in [node for node in graph.nodes if grouped and _concatenates_heads(node)]:
        heads = _heads(cat)
        if isinstance(heads, str):
            left.append((cat.name, heads))
        else:
            first, second = heads
            found[first.group, second.group].append((cat, first, second))
    for parts in found.values():
        parts.sort(key=lambda part: part[1].member)
        members = [(first.member, second.member) for _, first, second in parts]
        if members == [(index, index) for index in range(MEMBERS)]:
            cats, *streams = zip(*parts, strict=True)
            joints.append(Joint(cats, tuple(streams)))
        else:
            left += [(cat.name, "not each linear's heads are joined, and once, with the same's") for cat, *_ in parts]
    return joints, left


def _heads(cat: fx.Node) -> list[Heads] | str:
    """Both streams' heads, or why a concatenation is of something else."""
    try:
        return [read_heads(part) for part in cat.args[0]]
    except OtherHeads as error:
        return str(error)


def _concatenates_heads(node: fx.Node) -> bool:
    """Whether a node concatenates two tensors of four dimensions along the second."""
    given = dict(zip(("tensors", "dim"), node.args, strict=False)) | node.kwargs
    if not calls(node, CAT) or not node.args or given.get("dim", 0) not in (1, -3) or len(given) > 2:
        return False
    parts = node.args[0]
    values = [value_of(part) for part in parts] if isinstance(parts, (tuple, list)) else []
    return len(values) == 2 and all(isinstance(value, torch.Tensor) and value.dim() == 4 for value in values)


def _reason_against(joint: Joint, order: dict[fx.Node, int]) -> str | None:
    """Why the rewritten graph could compute something else, or None.

    Args:
        joint: what is to be rewritten.
        order: position of each node in the graph.
    """
    for queries, keys, values in joint.streams:
        if queries.table is None or keys.table is None or values.table is not None:
            return "not queries and keys alone are normalised and rotated"
        if queries.table is not keys.table:
            return "queries and keys are rotated by different tables"
    if any(value_of(cat).requires_grad for cat in joint.cats):
        return "gradients flow through it, which the operator has none of"
    modes = {group["compute"] for group in joint.groups}
    if len(modes) > 1:
        return f"the streams compute as {' and '.join(sorted(modes))}"
    nodes = {node for stream in joint.streams for heads in stream for node in heads.nodes}
    for node in nodes:
        if not node.users.keys() <= nodes.union(joint.cats):
            return f"{node.name} is read elsewhere too"
    first = min(order[cat] for cat in joint.cats)
    read = [node for heads in joint.rotated for node in (heads.weight, heads.table) if node is not None]
    if any(order[node] > first for node in read):
        return "a norm's weight or a table is computed behind the first concatenation"
    if written_between([*(heads.group for heads in joint.rotated), *joint.cats]):
        return "a tensor is written to between the linears and attention"
    return None


def _declined(joint: Joint) -> str | None:
    """Why no kernel of ours computes it in one."""
    value = value_of(joint.cats[0])

    def reason(tokens: list[int]) -> str | None:
        plans = [_plan(group, count) for group, count in zip(joint.groups, tokens, strict=True)]
        slower = [chosen.reason for chosen in plans if not chosen.fused]
        return slower[0] if slower else apart(plans, value.shape[-1], capability(value.device))

    # The guard on a symbolic size is for what depends on it.
    return reason([MANY, MANY]) or reason([tokens_of(value_of(group["x"])) for group in joint.groups])


def _plan(group: dict[str, object], tokens: int) -> Plan:
    """The plan of a group's linears."""
    x, lora_down, input_scale = (value_of(group[name]) for name in ("x", "lora_down", "input_scale"))
    return plan_call(x, value_of(group["qweight"][0]), input_scale, lora_down, group["compute"], tokens)


def _common_eps(joint: Joint) -> float | None:
    """The eps of all norms; Dynamo may have made it an input, whose value is then guarded."""
    found = set()
    for heads in joint.rotated:
        value = value_of(heads.eps) if isinstance(heads.eps, fx.Node) else heads.eps
        known = isinstance(value, (int, float, torch.SymFloat)) and not free_unbacked_symbols(value)
        found.add(float(value) if known else None)
    return found.pop() if len(found) == 1 else None


def _join(graph: fx.Graph, joint: Joint, order: dict[fx.Node, int], eps: float, tables: dict[fx.Node, fx.Node]) -> str:
    """Puts the operator in the place of concatenations, and returns its name."""
    groups = joint.groups
    weights = [heads.weight for heads in joint.rotated]
    freqs = [real_form(graph, queries.table, tables) for queries, *_ in joint.streams]
    streams = [stream_of(group) for group in groups]
    xs, mode = [group["x"] for group in groups], groups[0]["compute"]
    head_dim = value_of(joint.cats[0]).shape[-1]
    with graph.inserting_before(min(joint.cats, key=order.get)):
        new = insert(graph, joint_heads_operator, xs, *streams, weights, freqs, head_dim, eps, mode)
        results = [insert(graph, operator.getitem, new, index) for index in range(MEMBERS)]
    for cat, result in zip(joint.cats, results, strict=True):
        result.meta = dict(cat.meta) | {"example_value": result.meta["example_value"]}
        cat.replace_all_uses_with(result)
    heads = [heads for stream in joint.streams for heads in stream]
    ours = {node for each in heads for node in (*each.nodes, *each.shared)}.union(joint.cats)
    for node in sorted(ours, key=order.get, reverse=True):
        if node.op != "placeholder" and not node.users:
            graph.erase_node(node)
    return new.name
