"""Run kernels on saved tensors, in a process of its own so that Triton's CPU interpreter can be switched on.

Usage: ``[TRITON_INTERPRET=1] python apply_kernels.py cases.pt results.pt DEVICE [MAJOR]``, where ``cases.pt`` holds a
list of (name, args) and ``results.pt`` receives the list of results on the CPU. A name is a launcher of
``svdq_kernels``, ``linear_cuda``, or a device function of fp4.py, which is mapped over its one argument. On the CPU
launchers take the device for a GPU of compute capability MAJOR.0.
"""

import sys

import torch
import triton
import triton.language as tl
from svdq_kernels import dense, expand, fp4, heads
from svdq_kernels.activation import prepare
from svdq_kernels.dense import multiply
from svdq_kernels.expand import expand_nvfp4, expand_weights
from svdq_kernels.feed_forward import multiply_gelu_quantize
from svdq_kernels.gemv import multiply_few, pair_bits
from svdq_kernels.modulation import modulate
from svdq_kernels.projection import sum_partials
from svdq_kernels.residual import multiply_residual

from svdq_compile.ops import cuda
from svdq_compile.testing.tensors import move


def prepare_modulated(x, s, t, down, operand, *modulation):
    return prepare(x, s, t, down, operand, modulation=modulation)


def prepare_beside(x, s, t, down, operand, partials, h):
    return *prepare(x, s, t, down, operand, beside=(partials, h)), h


def multiply_gelu_quantize_beside(partials, h, *args):
    return *multiply_gelu_quantize(*args, beside=(partials, h)), h


def multiply_heads(first, second, out, eps):
    heads.multiply_heads(first, second, out, eps)
    return out


@triton.jit
def _pair_bits_kernel(words_ptr, out_ptr, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    for place in tl.static_range(4):
        bits = pair_bits(tl.load(words_ptr + offs), place, DTYPE)
        tl.store(out_ptr + place * BLOCK + offs, bits)


def pair_bits_of(words, dtype):
    out = torch.empty(4, words.numel(), dtype=torch.int32, device=words.device)
    names = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    _pair_bits_kernel[(1,)](words, out, BLOCK=words.numel(), DTYPE=names[dtype])
    return out


LAUNCHERS = {
    "prepare": prepare,
    "prepare_modulated": prepare_modulated,
    "prepare_beside": prepare_beside,
    "modulate": modulate,
    "multiply": multiply,
    "expand_nvfp4": expand_nvfp4,
    "expand_weights": expand_weights,
    "sum_partials": sum_partials,
    "multiply_few": multiply_few,
    "pair_bits": pair_bits_of,
    "multiply_gelu_quantize": multiply_gelu_quantize,
    "multiply_gelu_quantize_beside": multiply_gelu_quantize_beside,
    "multiply_heads": multiply_heads,
    "multiply_residual": multiply_residual,
    "linear_cuda": cuda.linear_cuda,
}
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


@triton.jit
def _load_pairs(pointers):
    return tl.load(pointers), tl.load(pointers + 1)


@triton.jit
def _look_up(low, high, selector):
    chosen = tl.zeros_like(low | selector)
    for i in tl.static_range(4):
        index = (selector >> (4 * i)) & 7
        chosen |= ((tl.where(index < 4, low, high) >> (8 * (index & 3))) & 0xFF) << (8 * i)
    return chosen


@triton.jit
def _scaled_pair(PAIR: tl.constexpr, scale):
    pair = tl.full(scale.shape, PAIR, tl.int32)
    low, high = pair.to(tl.int16).to(tl.float16, bitcast=True), (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    low, high = (low * scale).to(tl.int16, bitcast=True), (high * scale).to(tl.int16, bitcast=True)
    return (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)


@triton.jit
def _narrow_pairs(low, high):
    bits = tl.zeros_like(low)
    for i in tl.static_range(4):
        half = ((low if i < 2 else high) >> (16 * (i % 2))).to(tl.int16).to(tl.float16, bitcast=True)
        bits |= (half.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32) & 0xFF) << (8 * i)
    return bits


def pretend_to_be_a_gpu(major):
    """The CPU answers like a GPU; three multiprocessors, so that a program has several tiles."""
    # The interpreter knows no PTX.
    heads.load_pairs = _load_pairs
    expand.look_up, expand.scaled_pair, expand.narrow_pairs = _look_up, _scaled_pair, _narrow_pairs
    torch.cuda.get_device_capability = lambda device=None: (major, 0)
    cuda.capability = lambda device: (major, 0)
    dense.multiprocessors = lambda device: 3


def apply(name, args):
    return LAUNCHERS[name](*args) if name in LAUNCHERS else map_function(name, *args)


if __name__ == "__main__":
    cases, results, device, *major = sys.argv[1:]
    if device == "cpu":
        pretend_to_be_a_gpu(int(major[0]) if major else 9)
    torch.save([move(apply(name, move(args, device)), "cpu") for name, args in torch.load(cases)], results)
