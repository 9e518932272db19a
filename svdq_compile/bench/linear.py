"""The operator as a whole, in every mode and storage, next to dense peers on the same activation."""

from __future__ import annotations

import torch

from ..ops import modes
from . import gate
from .layers import Layer, call
from .measure import Bench, Candidate, time_all
from .peers import BF16, FP8_GEMM, Peer, peers
from .report import FAILED, OK, Row
from .roofs import Work
from .timing import describe


def measure(bench: Bench, layer: Layer, tokens: int) -> list[Row]:
    """Rows of one case: the operator's variants, each checked before it is timed, then the peers."""
    x = layer.activations(tokens)
    candidates = [operator(layer, x, mode, storage) for mode, storage in bench.variants]
    candidates += [peer_candidate(peer, layer, tokens) for peer in peers(x, layer.dense, layer.bias)]
    return time_all(bench, layer, tokens, "linear", candidates)


def operator(layer: Layer, x: torch.Tensor, mode: str, storage: str, name: str = "svdq") -> Candidate:
    """``svdq::linear`` in one mode and storage; failed if it raises or its result is wrong."""
    tokens = x.shape[0]
    n, k = layer.packed.shape
    work, weight = Work(), None
    try:
        weight = layer.stored(storage)
        work = operator_work(layer, mode, storage, tokens)
        gate.poison(tokens, n, x.device)
        arithmetic = modes.arithmetic(mode, tokens, storage == "packed")
        verdict = gate.judge(call(x, weight, layer.bias, mode), x, weight, layer.bias, arithmetic)
    except Exception as error:
        _still_alive(x.device)
        verdict = gate.Verdict(False, reason=describe(error))
    return Candidate(
        name,
        lambda: call(x, weight, layer.bias, mode),
        work,
        mode,
        storage,
        flops=2.0 * tokens * n * k,
        status=OK if verdict.passed else FAILED,
        error=verdict.error,
        note=verdict.reason,
    )


def operator_work(layer: Layer, mode: str, storage: str, tokens: int) -> Work:
    """The least an operator must do: the product in its arithmetic, the low-rank pair in BF16.

    The 4-bit product counts as BF16, which is what computes it on a GPU without tensor cores for NVFP4.
    """
    weight = layer.stored(storage)
    n, k = weight.shape
    product = 2.0 * tokens * n * k
    low_rank = 2.0 * tokens * weight.spec.rank * (n + k)
    fp8 = modes.arithmetic(mode, tokens, storage == "packed") == "fp8"
    return Work(
        bf16=low_rank + (0.0 if fp8 else product),
        fp8=product if fp8 else 0.0,
        bytes=2.0 * tokens * (n + k) + weight.packed_nbytes() + 2.0 * n,
    )


def peer_candidate(peer: Peer, layer: Layer, tokens: int) -> Candidate:
    """A dense linear with the work its operands stand for."""
    n, k = layer.packed.shape
    product = 2.0 * tokens * n * k
    fp8 = peer.name != BF16
    x_bytes = 1.0 if peer.name == FP8_GEMM else 2.0
    work = Work(
        bf16=0.0 if fp8 else product,
        fp8=product if fp8 else 0.0,
        bytes=x_bytes * tokens * k + (1.0 if fp8 else 2.0) * n * k + 2.0 * tokens * n + 2.0 * n,
    )
    return Candidate(peer.name, peer.run, work, flops=product, note=peer.note)


def _still_alive(device: torch.device) -> None:
    """Raises where an error has left the device unusable, since every further result would be an error too."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
