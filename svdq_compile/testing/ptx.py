"""Triton kernels compiled for a GPU that need not be there, and what the machine code uses."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

SHARED_MEMORY_BYTES = {(8, 0): 163 << 10, (9, 0): 227 << 10, (10, 0): 227 << 10, (12, 0): 99 << 10}
"""Most shared memory a program may have, by compute capability (CUDA C++ Programming Guide)."""

CUOBJDUMP = Path(triton.backends.__file__).parent / "nvidia" / "bin" / "cuobjdump"
"""NVIDIA's disassembler where Triton's wheel brings it."""


def compile_for(
    capability: tuple[int, int],
    kernel: triton.JITFunction,
    signature: Mapping[str, str],
    constexprs: Mapping[str, object],
    num_warps: int = 4,
    num_stages: int = 3,
    *,
    aligned: Collection[str] = (),
) -> CompiledKernel:
    """Compiles a ``triton.jit`` function to machine code; ``asm["ptx"]``, ``asm["cubin"]`` and ``metadata`` tell more.

    Args:
        capability: compute capability of the target, as ``torch.cuda.get_device_capability`` gives it.
        kernel: the function.
        signature: argument -> Triton type, such as ``*bf16`` or ``i32``. Pointers count as 16-byte aligned, as a
            launch finds those of fresh tensors.
        constexprs: argument -> value; arguments in neither mapping are None.
        num_warps: warps of a program.
        num_stages: depth of software pipelines.
        aligned: integer arguments a launch would find divisible by 16.

    Raises:
        triton.CompilationError: Triton refuses the kernel.
    """
    names = kernel.arg_names
    types = {name: signature.get(name, "constexpr") for name in names}
    constants = {name: constexprs.get(name) for name in names if name not in signature}
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if types[name][0] == "*" or (name in aligned and name in signature)
    }
    return triton.compile(
        ASTSource(kernel, types, constants, divisible),
        target=GPUTarget("cuda", 10 * capability[0] + capability[1], 32),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )


def spills(compiled: CompiledKernel) -> int:
    """Bytes of stack and local memory a thread uses: 0 where every value stays in registers.

    Raises:
        FileNotFoundError: Triton has no :data:`CUOBJDUMP`.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        command = [str(CUOBJDUMP), "--dump-resource-usage", str(cubin)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"(?:STACK|LOCAL):(\d+)", usage)
    if not found:
        raise ValueError(f"cuobjdump tells no resource usage: {usage!r}")
    return sum(map(int, found))
