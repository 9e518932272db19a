"""``svdq::linear_group``: linears that share their activation's side, as the passes put them into compiled graphs.

The members read one x and hold the same ``pre_quant_scale``, ``input_scale`` and ``lora_down``; each has a weight,
scales, ``lora_up`` and bias of its own. Lowered, they are one activation kernel and one GEMM whose rank stays R.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .linear import library, linear, without_gradient

SCHEMA = (
    "linear_group(Tensor x, Tensor[] qweight, Tensor[] weight_scale, Tensor[] weight_scale_2, Tensor? input_scale, "
    "Tensor? pre_quant_scale, Tensor? lora_down, Tensor[] lora_up, Tensor?[] bias, str compute='auto') -> Tensor"
)

library.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))


def members_of(qweight: Sequence, weight_scale: Sequence, weight_scale_2: Sequence, lora_up: Sequence, bias: Sequence):
    """Per member (qweight, weight_scale, weight_scale_2, lora_up, bias), None for what no member has.

    Raises:
        RuntimeError: there is no member, or a list has another length.
    """
    count = len(qweight)
    lists = {"weight_scale": weight_scale, "weight_scale_2": weight_scale_2, "lora_up": lora_up, "bias": bias}
    torch._check(count > 0, lambda: "svdq::linear_group: there is no member")
    for name, given in lists.items():
        may_be_empty = name in ("weight_scale_2", "lora_up")
        torch._check(
            len(given) == count or (may_be_empty and not given),
            lambda name=name, given=given: f"svdq::linear_group: {len(given)} of {name} for {count} members",
        )
    absent = [None] * count
    return list(zip(qweight, weight_scale, weight_scale_2 or absent, lora_up or absent, bias, strict=True))


def linear_group_reference(
    x: torch.Tensor,
    qweight: Sequence[torch.Tensor],
    weight_scale: Sequence[torch.Tensor],
    weight_scale_2: Sequence[torch.Tensor],
    input_scale: torch.Tensor | None,
    pre_quant_scale: torch.Tensor | None,
    lora_down: torch.Tensor | None,
    lora_up: Sequence[torch.Tensor],
    bias: Sequence[torch.Tensor | None],
    compute: str = "auto",
) -> torch.Tensor:
    """``svdq::linear`` of each member, side by side.

    Args:
        x, input_scale, pre_quant_scale, lora_down, compute: as ``svdq::linear``'s.
        qweight, weight_scale, bias: as ``svdq::linear``'s, one per member.
        weight_scale_2: one per member, or none for FP8.
        lora_up: one per member, or none without a low-rank branch.

    Returns:
        x.dtype [..., sum of the members' N], contiguous.

    Raises:
        RuntimeError: shapes, dtypes or lengths that do not fit together.
    """
    shared = (input_scale, pre_quant_scale, lora_down)
    members = members_of(qweight, weight_scale, weight_scale_2, lora_up, bias)
    return torch.cat([linear(x, *own, *shared, up, b, compute) for *own, up, b in members], -1)


def _cuda(
    x,
    qweight,
    weight_scale,
    weight_scale_2,
    input_scale,
    pre_quant_scale,
    lora_down,
    lora_up,
    bias,
    compute="auto",
):
    from .cuda import Member, linears_cuda

    members = [Member(*own) for own in members_of(qweight, weight_scale, weight_scale_2, lora_up, bias)]
    with torch.autocast("cuda", enabled=False):
        return torch.cat(linears_cuda(x, members, input_scale, pre_quant_scale, lora_down, compute), -1)


library.impl("linear_group", linear_group_reference, "CompositeExplicitAutograd")
library.impl("linear_group", _cuda, "CUDA")
torch.library.register_fake("svdq::linear_group", linear_group_reference, lib=library)
without_gradient("linear_group")

linear_group = torch.ops.svdq.linear_group.default
