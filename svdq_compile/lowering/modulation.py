"""What activation kernels read in place of a modulated norm's result; as :mod:`svdq_kernels.modulation`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from .._compat import ir
from . import launch
from .call import Call
from .modulated_norm import Parts, parts_of

Tensor = ir.TensorBox


@dataclasses.dataclass(frozen=True)
class Modulation:
    """Of one linear's activation.

    Args:
        x: [M, K], what is normalised and modulated.
        arguments: the activation kernel's, by its parameters' names.
        down: L2 as it multiplies x, or None.
        config: the activation kernel's constants, whose slices of K the sums are of.
    """

    x: Tensor
    arguments: dict[str, Tensor | None]
    down: Tensor | None
    config: dict[str, int]


NONE: dict[str, Tensor | None] = dict.fromkeys(("mean_ptr", "deviation_ptr", "gain_ptr", "shift_ptr", "sums_ptr"))
"""What the activation kernel takes of an x that is read as it is."""


def modulations(calls: Sequence[Call], operand: str) -> list[Modulation | None]:
    """Those of one or two linears, made by one launch; None where an activation is no modulated norm's result.

    Args:
        operand: one of :data:`svdq_kernels.operand.OPERANDS`. A scale per token is found of x_hat itself.
    """
    from svdq_kernels.activation import TOKEN_RANGE

    scaled = operand in TOKEN_RANGE
    parts = [None if scaled and call.dynamic else parts_of(call.x) for call in calls]
    found = [(call, each) for call, each in zip(calls, parts, strict=True) if each is not None]
    made = dict(zip((call for call, _ in found), _launched(found, operand), strict=True))
    return [made.get(call) for call in calls]


def _launched(found: Sequence[tuple[Call, Parts]], operand: str) -> list[Modulation]:
    from svdq_kernels import activation
    from svdq_kernels import modulation as kernels

    streams, results, rows = [], [], []
    for call, parts in found:
        x = launch.contiguous_rows(launch.reshape(parts.x, [call.tokens, call.in_features]))
        gain, shift = (launch.contiguous(each) for each in (parts.scale, parts.shift))
        known = bool(parts.moments)
        if not known:
            parts.moments.extend(launch.empty([call.tokens], torch.float32, call.device) for _ in range(2))
        mean, deviation = parts.moments
        config = activation.configuration(call.hint, call.in_features, call.rank, operand, True)
        columns = config["SPLIT_K"]
        size = [call.rank, call.in_features]
        down = launch.empty(size, call.dtype, call.device) if call.rank else None
        of_sums = [-(-call.in_features // columns), 2, call.rank]
        sums = launch.empty(of_sums, torch.float32, call.device) if call.rank else None
        rows.append(0 if known else call.tokens)
        streams.append(
            {
                "x": None if known else x,
                "s": None if call.pre_quant_scale is None else launch.contiguous(call.pre_quant_scale),
                "gain": gain,
                "shift": shift,
                "down": launch.contiguous(call.lora_down) if call.rank else None,
                "mean": None if known else mean,
                "deviation": None if known else deviation,
                "modulated": down,
                "sums": sums,
                "k": call.in_features,
                "stride": x.get_stride()[0],
                "rank": call.rank,
                "eps": parts.eps,
                "slice": columns,
            }
        )
        own = {"mean_ptr": mean, "deviation_ptr": deviation, "gain_ptr": gain, "shift_ptr": shift, "sums_ptr": sums}
        results.append(Modulation(x, own, down, config))
    programs = kernels.programs(streams, rows)
    if programs != 0:
        constants = kernels.configuration(max(call.in_features for call, _ in found))
        warps = constants.pop("num_warps")
        given = kernels.arguments(streams, rows[0]) | constants
        launch.launch(kernels._modulation_kernel, [programs, 1, 1], given, warps)
    return results
