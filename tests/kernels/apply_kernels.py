"""Run kernels on saved tensors, in a process of its own so that Triton's CPU interpreter can be switched on.

Usage: ``[TRITON_INTERPRET=1] python apply_kernels.py cases.pt results.pt DEVICE``, where ``cases.pt`` holds a
list of (name, args) and ``results.pt`` receives the list of results on the CPU. A name is a launcher,
``linear_cuda``, or a device function of fp4.py, which is mapped over its one argument.
"""

import sys

import torch
import triton
import triton.language as tl
from svdq_kernels import fp4
from svdq_kernels.activation import quantize_nvfp4
from svdq_kernels.expand import expand_nvfp4

from svdq_compile.ops import cuda

RESULT_DTYPE = {"encode_e2m1": torch.uint8, "magnitude_bits": torch.int32}


@triton.jit
def _map_kernel(in_ptr, out_ptr, size, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = FUNCTION(tl.load(in_ptr + offs, mask=offs < size, other=0))
    tl.store(out_ptr + offs, values, mask=offs < size)


def map_function(name, values):
    out = torch.empty_like(values, dtype=RESULT_DTYPE.get(name, torch.float32))
    block = 1024
    _map_kernel[(triton.cdiv(values.numel(), block),)](
        values, out, values.numel(), FUNCTION=getattr(fp4, name), BLOCK=block
    )
    return out


def linear_interpreted(*args):
    """linear_cuda with cuBLAS' part done on the CPU; a 16-bit product is exact in float32."""
    cuda.matmul_float32 = lambda a, b: a.float() @ b.float().t()
    torch.cuda.get_device_capability = lambda device: (9, 0)
    return cuda.linear_cuda(*args)


def move(value, device):
    """A tensor, or a tuple of some, on another device, with its strides and offset."""
    if isinstance(value, torch.Tensor):
        storage = value.new_empty(0).set_(value.untyped_storage())
        return storage.to(device).as_strided(value.shape, value.stride(), value.storage_offset())
    return tuple(move(v, device) for v in value) if isinstance(value, tuple) else value


def apply(name, args):
    if name == "linear_cuda":
        return linear_interpreted(*args)
    launchers = {"quantize_nvfp4": quantize_nvfp4, "expand_nvfp4": expand_nvfp4}
    return launchers[name](*args) if name in launchers else map_function(name, *args)


if __name__ == "__main__":
    cases, results, device = sys.argv[1:]
    torch.save([move(apply(name, move(args, device)), "cpu") for name, args in torch.load(cases)], results)
