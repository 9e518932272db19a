"""``F.linear`` on a quantised weight becomes ``svdq::linear`` on its components, in Dynamo's graph.

The weight's fingerprint is the only evidence used: no module names, which regional compilation makes relative, and
no values, which differ between the blocks that share the compiled graph.
"""

from __future__ import annotations

import dataclasses
import operator

import torch
from torch import fx

from .. import _compat
from ..errors import FingerprintError
from ..ops.linear import linear
from ..ops.weight import Fingerprint, SVDQWeight, check_components
from ..spec import COMPONENTS
from .base import Report, graph_pass, value_of


@dataclasses.dataclass(frozen=True)
class Match:
    """One linear the pass rewrote: its node, its name in what is compiled, what its weight is, where it runs, and its
    activation's dtype.
    """

    node: str
    layer: str
    fingerprint: Fingerprint
    device: torch.device
    dtype: torch.dtype


@graph_pass("F.linear on a quantised weight becomes svdq::linear", optional=False)
def insert_linear(gm: fx.GraphModule, compute: str = "auto") -> Report:
    """Rewrites every linear on a quantised weight; ``matched`` holds a :class:`Match` each.

    Args:
        gm: the graph.
        compute: mode of the weights whose own is ``auto``.

    Raises:
        StorageError: ``compute`` needs codes that a weight has given up.
        FingerprintError: a weight's components do not look the way its fingerprint says, or a quantised weight is
            used by something other than a linear.
    """
    matched: list[Match] = []
    left: list[tuple[str, str]] = []
    parts_of: dict[fx.Node, dict[str, fx.Node | None]] = {}
    for node in list(gm.graph.find_nodes(op="call_function", target=_compat.FUNCTIONAL_LINEAR)):
        x, weight, bias = _operands(node)
        value = value_of(weight)
        if not isinstance(value, SVDQWeight):
            left.append((node.name, "the weight is not quantised"))
            continue
        check_components(value.parts(), value.spec)
        if weight not in parts_of:
            parts_of[weight] = _read_components(gm.graph, weight, value)
        fingerprint, mode = value.fingerprint, value.operator_compute
        if compute != "auto" and fingerprint.compute == "auto":
            fingerprint, mode = dataclasses.replace(fingerprint, compute=compute), compute
        with gm.graph.inserting_before(node):
            components = (parts_of[weight][name] for name in COMPONENTS)
            new = gm.graph.call_function(linear, (x, *components, bias, mode))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
        # Before the module's names come the frame's locals and its variable, behind them the parameter's.
        layer = ".".join((_compat.module_path(weight) or ())[2:-1]) or new.name
        matched.append(Match(new.name, layer, fingerprint, value.device, value_of(x).dtype))
    _check_uses(gm.graph)
    return Report("insert_linear", tuple(matched), tuple(left))


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    names = ("input", "weight", "bias")
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    return given["input"], given["weight"], given.get("bias")


def _read_components(graph: fx.Graph, weight: fx.Node, value: SVDQWeight) -> dict[str, fx.Node | None]:
    """Attribute reads of the weight's components, right behind the weight; ``split_weights`` makes inputs of them."""
    nodes: dict[str, fx.Node | None] = dict.fromkeys(COMPONENTS)
    behind = weight.next
    while behind.op == "placeholder":
        behind = behind.next
    with graph.inserting_before(behind):
        for name, part in value.parts().items():
            nodes[name] = graph.call_function(getattr, (weight, name))
            nodes[name].meta["example_value"] = part
    return nodes


def _check_uses(graph: fx.Graph) -> None:
    """Every quantised weight is read by component only."""
    for node in graph.nodes:
        if not isinstance(value_of(node), SVDQWeight):
            continue
        for user in node.users:
            if user.op == "output" or user.target in (getattr, operator.getitem):
                continue
            raise FingerprintError(
                f"a quantised weight ({value_of(node).spec.describe()}) is used by {user.format_node()}, "
                "not by a linear.\n"
                "  hint:   use it as a layer; reading, merging or re-scaling it needs dense values"
            )
