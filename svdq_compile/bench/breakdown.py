"""Where a large linear's time goes: its stages alone, next to the whole and to dense products."""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import gate, parts
from .layers import Layer
from .linear import operator, peer_candidate
from .measure import Bench, Candidate, time_all
from .peers import FP8_ROWWISE, peers
from .report import FAILED, OK, Row
from .roofs import Work
from .timing import describe


def measure(bench: Bench, layer: Layer, tokens: int) -> list[Row]:
    """Rows of one case: per mode the whole operator and its stages, then the dense products."""
    x = layer.activations(tokens)
    candidates = []
    for mode in dict.fromkeys(mode for mode, _ in bench.variants):
        storages = [storage for found, storage in bench.variants if found == mode]
        candidates += [operator(layer, x, mode, storage, "whole") for storage in storages]
        candidates += stages(layer, x, mode)
    candidates += [
        peer_candidate(peer, layer, tokens)
        for peer in peers(x, layer.dense, layer.bias)
        # The other one also quantises, and is no product alone.
        if peer.name != FP8_ROWWISE
    ]
    return time_all(bench, layer, tokens, "part", candidates)


def stages(layer: Layer, x: torch.Tensor, mode: str) -> list[Candidate]:
    """The stages of one mode, with the low-rank branch and without; put together each is checked like the operator."""
    rank = layer.packed.spec.rank
    tokens = x.shape[0]
    found = [_stage("expand", mode, lambda: parts.expand(layer.packed, mode), expand_work(layer, mode))]
    for low_rank in dict.fromkeys((rank > 0, False)):
        name = f"rank {rank if low_rank else 0}"

        def quantise(low_rank: bool = low_rank) -> parts.Operand:
            return parts.prepare(x, layer, mode, low_rank)

        found.append(_stage(f"activation {name}", mode, quantise, activation_work(layer, mode, tokens, low_rank)))
        found.append(_product(f"gemm {name}", layer, x, mode, low_rank, quantise))
    return found


def _stage(name: str, mode: str, run: Callable[[], object], work: Work) -> Candidate:
    return Candidate(name, run, work, mode)


def _product(name: str, layer: Layer, x: torch.Tensor, mode: str, low_rank: bool, quantise: Callable) -> Candidate:
    """The product on operands made beforehand, whose result is checked."""
    work = product_work(layer, mode, x.shape[0], low_rank)
    flops = 2.0 * x.shape[0] * layer.packed.shape[0] * layer.packed.shape[1]
    try:
        operand, matrix = quantise(), parts.expand(layer.packed, mode)
        gate.poison(x.shape[0], layer.packed.shape[0], x.device)
        y = parts.multiply(operand, matrix, layer, mode)
        verdict = gate.judge(y, x, layer.packed if low_rank else layer.residual, layer.bias, mode)
    except (ImportError, AttributeError, TypeError) as error:
        return Candidate(name, None, work, mode, note=f"these kernels are not as expected: {describe(error)}")
    except Exception as error:
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        return Candidate(name, None, work, mode, status=FAILED, note=describe(error))
    return Candidate(
        name,
        lambda: parts.multiply(operand, matrix, layer, mode),
        work,
        mode,
        flops=flops,
        status=OK if verdict.passed else FAILED,
        error=verdict.error,
        note=verdict.reason,
    )


def activation_work(layer: Layer, mode: str, tokens: int, low_rank: bool) -> Work:
    """Bytes of the activation kernel: x, s and L2 read, the operand, one scale per token if dynamic, and x @ L2.T.

    Its product with L2 rides on those and counts as well.
    """
    spec = layer.packed.spec
    k, r = spec.in_features, spec.rank if low_rank else 0
    scales = 4.0 * tokens if spec.dynamic and mode != "bf16" else 0.0
    made = tokens * k * parts.operand_dtype(mode).itemsize + scales + 4.0 * tokens * r
    return Work(bf16=2.0 * tokens * k * r, bytes=2.0 * tokens * k + 2.0 * k + 2.0 * r * k + made)


def expand_work(layer: Layer, mode: str) -> Work:
    """Bytes of expanding: codes and block scales read, the operand written."""
    weight = layer.packed
    read = weight.qweight.numel() + weight.weight_scale.numel()
    return Work(bytes=float(read + weight.numel() * parts.operand_dtype(mode).itemsize))


def product_work(layer: Layer, mode: str, tokens: int, low_rank: bool) -> Work:
    """The product of finished operands, the second low-rank product, bias and result."""
    n, k = layer.packed.shape
    r = layer.packed.spec.rank if low_rank else 0
    product, size = 2.0 * tokens * n * k, parts.operand_dtype(mode).itemsize
    fp8 = mode == "fp8"
    return Work(
        bf16=2.0 * tokens * n * r + (0.0 if fp8 else product),
        fp8=product if fp8 else 0.0,
        bytes=size * float(tokens * k + n * k) + 4.0 * tokens * r + 2.0 * n * r + 2.0 * n + 2.0 * tokens * n,
    )
