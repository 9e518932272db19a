"""Run ModelOpt's own NVFP4 fake-quantisation kernel in Triton's CPU interpreter.

Usage: ``TRITON_INTERPRET=1 python interpret_kernel.py cases.pt results.pt``, where ``cases.pt`` holds a list
of (x [M, K], amax scalar) and ``results.pt`` receives the list of the kernel's outputs.
"""

import sys

import torch
import triton
import triton.language as tl
from modelopt.torch.kernels.quantization.gemm.fp4_kernel_hopper import (
    _torch_dtype_to_tl,
    fp4_fake_quant_kernel,
)
from triton.runtime import interpreter

TORCH_DTYPE = {
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
}
BITS = {8: torch.uint8, 16: torch.int16, 32: torch.int32}


def convert_float(data, source, target, _rounding):
    """Round to nearest even, which the interpreter's own down-casts do not."""
    values = torch.from_numpy(data.copy().view(f"int{source.primitive_bitwidth}")).view(TORCH_DTYPE[source])
    bits = values.to(TORCH_DTYPE[target]).view(BITS[target.primitive_bitwidth])
    return bits.numpy().view(f"uint{target.primitive_bitwidth}")


def run(x, amax):
    # One wide program: the interpreter's cost is per program, and tiles do not enter the result.
    rows, tile = triton.next_power_of_2(x.shape[0]), 64
    y = torch.empty_like(x)
    grid = (triton.cdiv(x.shape[0], rows), triton.cdiv(x.shape[1], tile))
    fp4_fake_quant_kernel[grid](
        x,
        y,
        *x.shape,
        amax.float() / (6.0 * 448.0),
        *x.stride(),
        *y.stride(),
        BLOCK_SIZE=16,
        TILE_M=rows,
        TILE_N=tile,
        NUM_FP4_BLOCKS=tile // 16,
        OUT_DTYPE=_torch_dtype_to_tl(x.dtype),
    )
    return y


if __name__ == "__main__":
    interpreter._convert_float = convert_float
    torch.save([run(x, amax) for x, amax in torch.load(sys.argv[1])], sys.argv[2])
