"""Every private symbol of torch's compiler this package uses, and the torch versions it was written for."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import sympy
import torch
from torch._dynamo.source import AttrSource
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_mutation
from torch._inductor import config as inductor_config
from torch._inductor import ir, list_mode_options
from torch._inductor.compile_fx import compile_fx
from torch._inductor.cudagraph_trees import CUDAGraphTreeManager, reset_cudagraph_trees
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.lowering import fallback_handler, lowerings, register_lowering
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.select_algorithm import (
    ExternKernelChoice,
    SymbolicGridFn,
    TritonTemplate,
    autotune_select_algorithm,
)
from torch._inductor.virtualized import V
from torch.utils._sympy.functions import CeilDiv as ceildiv

from .errors import TorchVersionError

log = logging.getLogger(__name__)

OLDEST, NEWEST = (2, 11), (2, 15)
FUNCTIONAL_LINEAR = torch._C._nn.linear
"""What Dynamo leaves in its graph for ``F.linear``."""


@cache
def check_torch() -> None:
    """Refuses a torch that is too old; warns once about one nobody has tried.

    Raises:
        TorchVersionError: torch is older than 2.11.
    """
    version = tuple(int(part) for part in re.match(r"(\d+)\.(\d+)", torch.__version__).groups())
    window = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
    if version < OLDEST:
        raise TorchVersionError(f"backend 'svdq' found torch {torch.__version__}, needs {window}: upgrade torch")
    if version > NEWEST:
        log.warning("torch %s is newer than this release was tried with (%s)", torch.__version__, window)


@cache
def source_hash() -> str:
    """Hash of every source file of this package and of its kernels; Inductor's caches are keyed by it."""
    digest = hashlib.sha256(torch.__version__.encode())
    roots = [Path(__file__).parent]
    kernels = importlib.util.find_spec("svdq_kernels")
    if kernels is not None:
        roots.append(Path(kernels.origin).parent)
    for root in roots:
        for file in sorted((*root.rglob("*.py"), *root.rglob("*.jinja"))):
            digest.update(str(file.relative_to(root)).encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


GRAPHS_OF_A_BLOCK = 64
"""Graphs Dynamo may compile of one function. Its own limit of eight is soon met by a block's: quantised and unquantised
blocks are one function, each has a graph for one and one for any image size and prompt length, and some for few tokens.
"""


def allow_graphs_of_a_block() -> None:
    """Raises Dynamo's limit on the graphs of one function, unless somebody has set it."""
    if torch._dynamo.config.recompile_limit == 8:
        torch._dynamo.config.recompile_limit = GRAPHS_OF_A_BLOCK


def module_path(placeholder: torch.fx.Node) -> tuple[str, ...] | None:
    """Names on the way to the parameter a placeholder of Dynamo's graph always is, from the outermost; None if unknown.

    Dynamo fetches the placeholder's value from there at every call, so the path is a fact of the compiled code.
    """
    source = getattr(placeholder, "_dynamo_source", None)
    if placeholder.op != "placeholder" or source is None:
        return None
    # A method up to torch 2.11, a property since.
    text = source.name() if callable(source.name) else source.name
    between = ("_modules", "_parameters", "__dict__")
    return tuple(name for name in re.findall(r"\w+", text) if name not in between)


def attribute_source(placeholder: torch.fx.Node, name: str) -> AttrSource | None:
    """Where Dynamo would find an attribute of what a placeholder stands for; None if it does not say where that is."""
    source = getattr(placeholder, "_dynamo_source", None)
    return None if source is None else AttrSource(source, name)


def copy_node(graph: torch.fx.Graph, node: torch.fx.Node, copies: dict[torch.fx.Node, torch.fx.Node]) -> torch.fx.Node:
    """A copy of a node of Dynamo's in another graph; ``copies`` has those of its arguments."""
    new = graph.node_copy(node, copies.__getitem__)
    if hasattr(node, "_dynamo_source"):
        new._dynamo_source = node._dynamo_source
    return new


def with_graph(gm: torch.fx.GraphModule, graph: torch.fx.Graph) -> torch.fx.GraphModule:
    """Dynamo's module around another graph, with all that Dynamo has noted on it."""
    new = torch.fx.GraphModule(gm, graph)
    new.meta = gm.meta
    for name, value in vars(gm).items():
        new.__dict__.setdefault(name, value)
    return new


UNKNOWN_SIZE = 4096
"""Stands for a size nothing is known of."""


def size_hint(size: sympy.Expr | int) -> int:
    """A likely value of a size that need not be known; guards nothing."""
    return int(V.graph.sizevars.optimization_hint(size, fallback=UNKNOWN_SIZE))


def at_most(size: sympy.Expr | int, limit: int) -> bool:
    """Whether a size is at most a limit. A symbolic size gets a guard that keeps the answer true."""
    return bool(V.graph.sizevars.guard_or_false(sympy.Le(size, limit)))


def known_at_most(size: sympy.Expr | int, limit: int) -> bool:
    """Whether a size is at most a limit whatever the symbols in it are; guards nothing."""
    return bool(V.graph.sizevars.statically_known_leq(size, limit))


def tunes_gemms() -> bool:
    """Whether the user asked for GEMMs to be chosen by measurement (``mode="max-autotune"``)."""
    return inductor_config.max_autotune or inductor_config.max_autotune_gemm


def sdpa_priority() -> tuple[int, ...]:
    """In which order SDPA tries its backends (``sdpa_kernel(..., set_priority=True)``); empty where torch has none."""
    order = getattr(torch._C, "_get_sdp_priority_order", None)
    return () if order is None else tuple(order())


@contextlib.contextmanager
def cudagraph_tree_runs() -> Iterator[list[object]]:
    """Collects the calls Inductor's own CUDA graphs (``mode="reduce-overhead"``) serve meanwhile, in any thread."""
    runs: list[object] = []
    run = CUDAGraphTreeManager._run

    def watched(manager, new_inputs, function_id):
        runs.append(function_id)
        return run(manager, new_inputs, function_id)

    CUDAGraphTreeManager._run = watched
    try:
        yield runs
    finally:
        CUDAGraphTreeManager._run = run


def template_call(
    template: TritonTemplate,
    name: str,
    inputs: list[ir.TensorBox],
    layout: ir.Layout,
    configs: list[dict[str, object]],
    extern: ExternKernelChoice | None = None,
    extern_constants: dict[str, object] | None = None,
) -> ir.TensorBox:
    """The node of a template; with several configurations or an extern function, of the fastest.

    Args:
        configs: constants of the template, ``num_warps`` and ``num_stages`` among them.
        extern: a function on the same inputs, and its constants.
    """
    choices: list = []
    if extern is not None:
        extern.maybe_append_choice(choices, input_nodes=tuple(inputs), layout=layout, **(extern_constants or {}))
    for config in configs:
        error = template.maybe_append_choice(choices, input_nodes=tuple(inputs), layout=layout, **config)
        if error is not None and len(configs) == 1:
            raise error
    result = autotune_select_algorithm(name, choices, inputs, layout)
    # torch 2.11 returns the node, later versions the node and the choice.
    return result[0] if isinstance(result, tuple) else result


__all__ = [
    "FUNCTIONAL_LINEAR",
    "CustomGraphPass",
    "ExternKernelChoice",
    "ReductionHint",
    "SymbolicGridFn",
    "TritonTemplate",
    "V",
    "allow_graphs_of_a_block",
    "at_most",
    "attribute_source",
    "ceildiv",
    "check_torch",
    "compile_fx",
    "copy_node",
    "cudagraph_tree_runs",
    "fallback_handler",
    "inductor_config",
    "ir",
    "kernel_side_table",
    "known_at_most",
    "list_mode_options",
    "lowerings",
    "module_path",
    "register_lowering",
    "reset_cudagraph_trees",
    "sdpa_priority",
    "size_hint",
    "source_hash",
    "template_call",
    "triton_kernel_wrapper_mutation",
    "tunes_gemms",
    "with_graph",
]
