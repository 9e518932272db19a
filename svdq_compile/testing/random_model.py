"""A Qwen-Image with random quantised weights, made where it is to run: the real size without a file or a download."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..dtypes import DTYPE_NAMES
from ..model.rope import move_tables
from ..model.share import mark_shared
from ..ops.storage import expand, storage_of
from ..ops.weight import Fingerprint, SVDQWeight
from .checkpoints import SMALL
from .plans import Planned, plan_checkpoint, random_tensor


def random_transformer(
    config: Mapping[str, Any] = SMALL,
    *,
    recipe: str = "mixed",
    rank: int | Callable[[str], int] = 32,
    blocks_kept: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    device: torch.device | str = "cpu",
    compute: str = "auto",
    storage: str = "packed",
    share: bool = True,
) -> nn.Module:
    """The transformer that loading :func:`~svdq_compile.testing.checkpoints.write_checkpoint`'s files would give.

    Memory use is that of the model and one tensor.

    Args:
        config: arguments of ``QwenImageTransformer2DModel``.
        recipe: a key of :data:`~svdq_compile.testing.plans.RECIPES`.
        rank: R of the low-rank branch, for all linears or as a function of a linear's name.
        blocks_kept: blocks at each end that stay unquantised.
        dtype: the model's dtype.
        seed: of the contents, which differ between kinds of devices.
        device: where everything is made.
        compute: compute mode.
        storage: ``packed`` or ``expanded``, as :func:`~svdq_compile.ops.storage.storage_of` applies it.
        share: as in :func:`~svdq_compile.testing.checkpoints.write_checkpoint`.
    """
    model = _empty(config)
    plan = plan_checkpoint(
        config, recipe=recipe, rank=rank, blocks_kept=blocks_kept, dtype=DTYPE_NAMES[dtype], share=share
    )
    linears: dict[str, list[Planned]] = {}
    for tensor in plan:
        owner, _, leaf = tensor.key.rpartition(".")
        if tensor.spec is not None and tensor.role != "bias":
            linears.setdefault(owner, []).append(tensor)
        else:
            value = random_tensor(tensor, seed, device)
            setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    for owner, tensors in linears.items():
        parts = {tensor.role: random_tensor(tensor, seed, device) for tensor in tensors}
        weight = SVDQWeight(parts, Fingerprint(tensors[0].spec, compute), dtype)
        weight = expand(weight) if storage_of(owner, storage) == "expanded" else weight
        model.get_submodule(owner).weight = nn.Parameter(weight, requires_grad=False)
    mark_shared({owner: model.get_submodule(owner).weight for owner in linears})
    move_tables(model, device)
    return model.eval()


def dense_transformer(
    config: Mapping[str, Any] = SMALL,
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """The same model without quantised weights; arguments as :func:`random_transformer`'s."""
    model = _empty(config)
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        tensor = Planned(name, DTYPE_NAMES[dtype], tuple(parameter.shape), "dense", name)
        made = nn.Parameter(random_tensor(tensor, seed, device), requires_grad=False)
        setattr(model.get_submodule(owner), leaf, made)
    move_tables(model, device)
    return model.eval()


def _empty(config: Mapping[str, Any]) -> nn.Module:
    from accelerate import init_empty_weights
    from diffusers import QwenImageTransformer2DModel

    with init_empty_weights():
        return QwenImageTransformer2DModel.from_config(dict(config))
