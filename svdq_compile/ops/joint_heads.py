"""``svdq::joint_heads``: queries, keys and values of two streams for one attention, as the passes put them into
compiled graphs.

It is each stream's q, k and v linears, RMSNorm of the heads of q and k, rotary embedding, and the concatenation of
the streams. Where the lowering has a kernel that does all that as it finishes the linears' product, neither the
product nor anything between is ever written.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch

from .linear import library, without_gradient
from .linear_group import linear_group

SCHEMA = (
    "joint_heads(Tensor[] x, Tensor?[] first, Tensor?[] second, Tensor?[] norms, Tensor[] freqs, int head_dim, "
    "float eps, str compute='auto') -> (Tensor, Tensor, Tensor)"
)

library.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))

MEMBERS = 3
"""Linears of a stream: q, k, v."""

PARTS = {
    "qweight": MEMBERS,
    "weight_scale": MEMBERS,
    "weight_scale_2": MEMBERS,
    "input_scale": 1,
    "pre_quant_scale": 1,
    "lora_down": 1,
    "lora_up": MEMBERS,
    "bias": MEMBERS,
}
"""What a stream's list holds, in this order: one per linear, or one that all share. What is absent is None."""

OWN = ("weight_scale_2", "lora_up")
"""Parts that ``svdq::linear_group`` gets as an empty list where no linear has them."""


def _check(condition: bool, message: str) -> None:
    torch._check(condition, lambda: f"svdq::joint_heads: {message}")


def group_arguments(stream: Sequence) -> list:
    """A stream's list as arguments of ``svdq::linear_group`` between ``x`` and ``compute``.

    Raises:
        RuntimeError: it has another length.
    """
    _check(len(stream) == sum(PARTS.values()), f"a stream has {len(stream)} tensors, needs {sum(PARTS.values())}")
    given, arguments = iter(stream), []
    for name, count in PARTS.items():
        values = list(itertools.islice(given, count))
        if name in OWN:
            values = [value for value in values if value is not None]
        arguments.append(values if count > 1 else values[0])
    return arguments


def stream_of(arguments: Mapping[str, object]) -> list:
    """The list that holds the arguments of a ``svdq::linear_group``, by name; undoes :func:`group_arguments`."""
    stream = []
    for name, count in PARTS.items():
        given = arguments[name]
        stream += [given] if count == 1 else given or [None] * count
    return stream


def validate(
    x: Sequence[torch.Tensor],
    first: Sequence[torch.Tensor | None],
    second: Sequence[torch.Tensor | None],
    norms: Sequence[torch.Tensor | None],
    freqs: Sequence[torch.Tensor],
    head_dim: int,
) -> None:
    """Lengths, shapes and dtypes that must agree; dynamic sizes are compared symbolically."""
    _check((len(x), len(norms), len(freqs)) == (2, 4, 2), "needs two streams, four norms and a table for each stream")
    _check(head_dim > 0 and head_dim % 2 == 0, f"head_dim {head_dim} is not even")
    _check(all(each.dim() == 3 for each in x), "a stream needs three dimensions")
    _check(x[0].dtype == x[1].dtype, f"the streams are {x[0].dtype} and {x[1].dtype}")
    _check(x[0].shape[0] == x[1].shape[0], "the streams' batch sizes differ")
    rows = [qweight.shape[0] for stream in (first, second) for qweight in stream[:MEMBERS]]
    _check(all(count == rows[0] for count in rows), f"out_features {rows} differ")
    _check(rows[0] % head_dim == 0, f"out_features {rows[0]} is no multiple of head_dim {head_dim}")
    for weight in norms:
        fits = weight is None or (tuple(weight.shape) == (head_dim,) and weight.dtype == x[0].dtype)
        _check(fits, "a norm's weight does not fit")
    for stream, table in zip(x, freqs, strict=True):
        _check(table.dtype == torch.float32, f"a rotary table is {table.dtype}, needs float32")
        _check(table.dim() == 3 and table.shape[2] == 2 and table.shape[1] == head_dim // 2, "a table does not fit")
        _check(table.shape[0] == stream.shape[1], "a rotary table has another length than its stream")


def joint_heads_reference(
    x: Sequence[torch.Tensor],
    first: Sequence[torch.Tensor | None],
    second: Sequence[torch.Tensor | None],
    norms: Sequence[torch.Tensor | None],
    freqs: Sequence[torch.Tensor],
    head_dim: int,
    eps: float,
    compute: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``cat(rotate(norm(linear(x_1))), rotate(norm(linear(x_2))))`` of queries and keys, ``cat(linear(x_1),
    linear(x_2))`` of values, step by step.

    ``norm(y) = y * rsqrt(mean(y**2) + eps) * weight`` per head, rounded to x.dtype ahead of the weight; ``rotate``
    takes neighbours as complex numbers and multiplies them with the table's.

    Args:
        x: two streams in the order of the result, [B, S_i, K_i] each, of one dtype.
        first, second: each stream's linears of q, k and v, tensors in the order of :data:`PARTS` as
            ``svdq::linear``'s; all have the same out_features.
        norms: weights [head_dim] in x.dtype of q and k of the first stream, then of the second; None multiplies with
            nothing.
        freqs: per stream float32 [S_i, head_dim/2, 2], (cos, sin).
        head_dim: values of a head.
        eps: added to the mean of squares.
        compute: as ``svdq::linear``'s.

    Returns:
        Queries, keys and values, x.dtype [B, S_1 + S_2, out_features/head_dim, head_dim], contiguous.

    Raises:
        RuntimeError: lengths, shapes or dtypes that do not fit together.
    """
    streams = [group_arguments(stream) for stream in (first, second)]
    validate(x, first, second, norms, freqs, head_dim)
    parts: list[list[torch.Tensor]] = []
    for each, stream, own, table in zip(x, streams, (norms[:2], norms[2:]), freqs, strict=True):
        y = linear_group(each, *stream, compute).unflatten(-1, (MEMBERS, -1, head_dim))
        *heads, values = y.unbind(-3)
        parts.append([_rotated(_normalised(y, eps, w), table) for y, w in zip(heads, own, strict=True)] + [values])
    queries, keys, values = (torch.cat(pair, dim=1).contiguous() for pair in zip(*parts, strict=True))
    return queries, keys, values


def _wide(y: torch.Tensor) -> torch.Tensor:
    return y.to(torch.promote_types(y.dtype, torch.float32))


def _normalised(y: torch.Tensor, eps: float, weight: torch.Tensor | None) -> torch.Tensor:
    normalised = (y * torch.rsqrt(_wide(y).pow(2).mean(-1, keepdim=True) + eps)).to(y.dtype)
    return normalised if weight is None else normalised * weight


def _rotated(y: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    real, imaginary = _wide(y).unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = table[:, None].unbind(-1)
    pairs = torch.stack((real * cosine - imaginary * sine, real * sine + imaginary * cosine), -1)
    return pairs.flatten(-2).to(y.dtype)


def _fake(x, first, second, norms, freqs, head_dim, eps, compute="auto"):
    streams = [group_arguments(stream) for stream in (first, second)]
    validate(x, first, second, norms, freqs, head_dim)
    for each, stream in zip(x, streams, strict=True):
        linear_group(each, *stream, compute)
    size = (x[0].shape[0], x[0].shape[1] + x[1].shape[1], first[0].shape[0] // head_dim, head_dim)
    return tuple(x[0].new_empty(size) for _ in range(MEMBERS))


library.impl("joint_heads", joint_heads_reference, "CompositeExplicitAutograd")
torch.library.register_fake("svdq::joint_heads", _fake, lib=library)
without_gradient("joint_heads")

joint_heads = torch.ops.svdq.joint_heads.default
