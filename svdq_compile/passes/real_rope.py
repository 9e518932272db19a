"""Complex rotary embeddings become real arithmetic.

    view_as_real(view_as_complex(r) * f)   ->   r * Re f + flip(r) * (-Im f, Im f)

with r [..., 2] the pairs (Re x, Im x) and flip their exchange. Inductor generates no code for complex numbers: each
such product is a call of four operators, through float32 tensors in memory. The real form is fused with what comes
before and behind. Products and sums are those of the complex product, so the results are equal in bits where the
compiler contracts no product and sum into one operation.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from ..ops.joint_heads import joint_heads
from .base import Report, calls, graph_pass, insert, value_of
from .purity import written_between

MULTIPLY = (operator.mul, torch.mul, torch.multiply, torch.ops.aten.mul.Tensor)
VIEW_AS_REAL = (torch.view_as_real, torch.ops.aten.view_as_real.default)
VIEW_AS_COMPLEX = (torch.view_as_complex, torch.ops.aten.view_as_complex.default)
UNSQUEEZE = (torch.unsqueeze, torch.ops.aten.unsqueeze.default)
COMPLEX = {torch.complex64: torch.float32, torch.complex128: torch.float64}
"""Complex dtype -> its parts' dtype."""


SETTINGS = {"realize_opcount_threshold": 64}
"""Norm and rotation are more operations than Inductor keeps in one expression by default. In one, they are a single
kernel, which writes to its place in the concatenation of text and image."""


@graph_pass("complex rotary embeddings become real arithmetic, which Inductor fuses", at_least=SETTINGS)
def real_rope(gm: fx.GraphModule) -> Report:
    """Rewrites ``view_as_real`` of a product of two complex tensors, one of which is ``view_as_complex`` of a real one.

    Args:
        gm: Dynamo's graph; functions, operators and methods of these names are recognised.
    """
    matched: list[str] = []
    left: list[tuple[str, str]] = []
    real_forms: dict[fx.Node, fx.Node] = {}
    for node in list(gm.graph.nodes):
        if not calls(node, VIEW_AS_REAL, "view_as_real") or all(user.target is joint_heads for user in node.users):
            continue
        product = node.all_input_nodes[0]
        reason = _reason_against(product, node)
        if reason is not None:
            left.append((node.name, reason))
            continue
        first, second = product.args
        if not calls(first, VIEW_AS_COMPLEX, "view_as_complex"):
            first, second = second, first
        pairs, factor = (real_form(gm.graph, part, real_forms) for part in (first, second))
        with gm.graph.inserting_before(node):
            new = _multiply(gm.graph, pairs, factor)
        node.replace_all_uses_with(new)
        matched.append(new.name)
        _erase_unused(gm.graph, node)
    return Report("real_rope", tuple(matched), tuple(left))


def _reason_against(product: fx.Node, view: fx.Node) -> str | None:
    """Why a ``view_as_real`` of a product is left as it is, or None."""
    if not calls(product, MULTIPLY, "mul") or product.kwargs or len(product.args) != 2:
        return "it reads no product of two complex tensors"
    if len(product.users) > 1:
        return "the complex product is used otherwise as well"
    if not any(calls(factor, VIEW_AS_COMPLEX, "view_as_complex") for factor in product.args):
        return "no factor is a view of a real tensor"
    for factor in product.args:
        value = value_of(factor)
        if not isinstance(value, torch.Tensor) or value.dtype not in COMPLEX:
            return f"a factor is {getattr(value, 'dtype', type(factor).__name__)}, not complex64 or complex128"
        if value.is_conj():
            return "a factor is a lazy conjugate, which has no real view"
    return "a tensor is written to between the product and its view" if written_between((product, view)) else None


def real_form(graph: fx.Graph, node: fx.Node, known: dict[fx.Node, fx.Node]) -> fx.Node:
    """The real tensor [..., 2] of the same memory as a complex one: what that is a view of, or a view of it.

    Args:
        graph: gets what is not there yet.
        node: of a complex tensor.
        known: real forms found so far, which this adds to.
    """
    if node in known:
        return known[node]
    if calls(node, VIEW_AS_COMPLEX, "view_as_complex"):
        return node.all_input_nodes[0]
    if calls(node, UNSQUEEZE, "unsqueeze") and len(node.args) == 2:
        base, dim = real_form(graph, node.args[0], known), node.args[1]
        with graph.inserting_after(node):
            known[node] = insert(graph, torch.unsqueeze, base, dim if dim >= 0 else dim - 1)
        return known[node]
    behind = node.next
    while behind.op == "placeholder":
        behind = behind.next
    with graph.inserting_before(behind):
        known[node] = insert(graph, torch.view_as_real, node)
    return known[node]


def _multiply(graph: fx.Graph, pairs: fx.Node, factor: fx.Node) -> fx.Node:
    """The product of complex numbers that are given as pairs in the last dimension."""
    cosine, sine = (insert(graph, torch.narrow, factor, -1, part, 1) for part in (0, 1))
    value = value_of(factor)
    with value.fake_mode:
        sign = insert(graph, torch.arange, -1, 2, 2, dtype=value.dtype, device=value.device)
    signed = insert(graph, torch.mul, sine, sign)
    exchanged = insert(graph, torch.flip, pairs, (-1,))
    return insert(
        graph, torch.add, insert(graph, torch.mul, pairs, cosine), insert(graph, torch.mul, exchanged, signed)
    )


def _erase_unused(graph: fx.Graph, node: fx.Node) -> None:
    """Removes a node nobody reads, and of what it reads the complex views and products nobody else reads."""
    ours = (*VIEW_AS_REAL, *VIEW_AS_COMPLEX, *MULTIPLY, *UNSQUEEZE)
    if node.users or not (node.op == "call_method" or node.target in ours):
        return
    if value_of(node) is None or not (value_of(node).dtype in COMPLEX or calls(node, VIEW_AS_REAL, "view_as_real")):
        return
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for read in inputs:
        _erase_unused(graph, read)
