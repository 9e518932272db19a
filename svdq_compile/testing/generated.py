"""Reading the Python wrapper Inductor generates: its kernels, what it launches, and what Triton makes of them."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import operator
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from triton.compiler import CompiledKernel

from .fake_gpu import fake_gpu

EXTERNAL = ("extern_kernels.", "torch.ops.")
"""Beginnings of calls that launch what Inductor did not generate."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel Inductor generated.

    Args:
        name: its name in the wrapper, such as ``triton_poi_fused_gelu_0``.
        source: the module that defines it.
        launches: how often the wrapper launches it.
    """

    name: str
    source: str
    launches: int


def kernels(code: str) -> list[Kernel]:
    """The generated kernels of a wrapper, or of several one behind the other, in the order of their first launch.

    Args:
        code: as :func:`.fake_gpu.generated_code` and :func:`.fake_gpu.compile_on_fake_gpu` return it.
    """
    counts: dict[tuple[str, str], int] = {}
    for graph in _graphs(code):
        for name in _launched(graph, graph.functions["call"]):
            if name in graph.sources:
                key = (name, graph.sources[name])
                counts[key] = counts.get(key, 0) + 1
    return [Kernel(name, source, count) for (name, source), count in counts.items()]


def launches(code: str) -> list[str]:
    """What a wrapper launches, in order: generated kernels by name, ``extern_kernels.*`` and ``torch.ops.*`` calls.

    Operators that only make a view are left out, and so are copies between devices.

    Args:
        code: as for :func:`kernels`.
    """
    return [name for graph in _graphs(code) for name in _launched(graph, graph.functions["call"])]


def compile_kernel(source: str, name: str, capability: tuple[int, int] = (9, 0)) -> list[CompiledKernel]:
    """Compiles a generated Triton kernel to machine code with Inductor's options; there need not be such a GPU.

    Args:
        source: :attr:`Kernel.source`.
        name: :attr:`Kernel.name`.
        capability: the target; need not be what the kernel was generated for.

    Returns:
        One per configuration Inductor would try; ``asm["ptx"]`` and ``metadata.shared`` tell what became of it.

    Raises:
        ValueError: the source defines no such kernel, or the capability is unknown.
        triton.CompilationError: Triton refuses the kernel.
    """
    # The source names the device it was generated for.
    source = re.sub(r"\bDeviceProperties\(type='cuda'[^)]*\)", "DeviceProperties.create(TARGET)", source)
    with fake_gpu(capability), tempfile.TemporaryDirectory() as folder:
        # Triton reads a kernel's source from its file.
        file = Path(folder, "kernel.py")
        file.write_text(source)
        spec = importlib.util.spec_from_file_location("generated_kernel", file)
        module = importlib.util.module_from_spec(spec)
        module.TARGET = torch.device("cuda", 0)
        spec.loader.exec_module(module)
        kernel = getattr(module, name, None)
        if kernel is None:
            raise ValueError(f"the source defines no kernel {name!r}")
        return [kernel._precompile_config(config).kernel for config in kernel.configs]


@dataclasses.dataclass
class _Graph:
    """One wrapper: name -> source of its kernels, name -> definition of its functions."""

    sources: dict[str, str] = dataclasses.field(default_factory=dict)
    functions: dict[str, ast.FunctionDef] = dataclasses.field(default_factory=dict)


def _graphs(code: str) -> Iterator[_Graph]:
    graph = _Graph()
    for statement in ast.parse(code).body:
        if isinstance(statement, ast.Assign) and _called(statement.value).startswith("async_compile."):
            source = statement.value.args[1]
            graph.sources[statement.targets[0].id] = source.value if isinstance(source, ast.Constant) else ""
        members = statement.body if isinstance(statement, ast.ClassDef) else [statement]
        graph.functions.update({f.name: f for f in members if isinstance(f, ast.FunctionDef)})
        if "call" in graph.functions:
            yield graph
            graph = _Graph()


def _launched(graph: _Graph, function: ast.FunctionDef) -> Iterator[str]:
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    for call in sorted(calls, key=lambda node: (node.end_lineno, node.end_col_offset)):
        name = re.sub(r"^aten\.", "torch.ops.aten.", _called(call))
        partition = re.fullmatch(r"self\.partitions\[(\d+)\]", name)
        if partition:
            yield from _launched(graph, graph.functions[f"partition_{partition[1]}"])
        elif name.removesuffix(".run") in graph.sources:
            yield name.removesuffix(".run")
        elif name.startswith(EXTERNAL) and not _is_view(name):
            yield name


def _is_view(name: str) -> bool:
    try:
        return operator.attrgetter(name.removeprefix("torch."))(torch).is_view
    except AttributeError:
        return False


def _called(node: ast.expr) -> str:
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ""
