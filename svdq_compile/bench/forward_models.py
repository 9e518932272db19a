"""The contenders of ``bench forward``: how each one's model is made and compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import options
from ..ops import modes
from ..ops.weight import SVDQWeight
from ..spec import Format
from ..testing.checkpoints import QWEN_IMAGE, SMALL, example_inputs
from ..testing.random_model import dense_transformer, random_transformer
from . import forward_plan
from .forward_plan import PIXELS_PER_TOKEN, ForwardPlan, blocks_kept

CONFIGS = {forward_plan.QWEN_IMAGE: QWEN_IMAGE, forward_plan.SMALL: SMALL}
OURS = "svdq"


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to compute the transformer.

    Args:
        name: ``svdq``, or a peer's.
        mode: compute mode of ours.
        storage: weight storage of ours.
        low_rank: False leaves the low-rank branches of ours out.
        skipped: graph pass of ours that is switched off.
    """

    name: str
    mode: str = ""
    storage: str = ""
    low_rank: bool = True
    skipped: str = ""

    @property
    def ours(self) -> bool:
        return self.name == OURS

    @property
    def plain(self) -> Contender:
        """The same with nothing left out or switched off."""
        return dataclasses.replace(self, low_rank=True, skipped="")

    @property
    def label(self) -> str:
        """Name, mode, storage and variant."""
        return " ".join(part for part in (self.name, self.mode, self.storage, self.variant) if part)

    @property
    def variant(self) -> str:
        """What distinguishes it from the plain one; empty for that."""
        return f"no {self.skipped}" if self.skipped else "" if self.low_rank else "rank 0"


def contenders(plan: ForwardPlan) -> list[Contender]:
    """Everything a plan compares, peers first; ``nvfp4 expanded``, which has no codes, is left out."""
    ours = [
        Contender(OURS, mode, storage)
        for mode in plan.modes
        for storage in plan.storages
        if storage != "expanded" or mode not in modes.NEEDS_CODES
    ]
    found = [Contender(name) for name in plan.peers]
    for contender in ours:
        found.append(contender)
        if plan.lora_cost and plan.rank:
            found.append(dataclasses.replace(contender, low_rank=False))
        if plan.ablate:
            found += [dataclasses.replace(contender, skipped=name) for name in pass_names()]
    return found


def pass_names() -> tuple[str, ...]:
    """The graph passes that ``options={"skip_passes": ...}`` can switch off."""
    return options.OPTIONAL_PASSES


def config_of(plan: ForwardPlan, blocks: int | None = None) -> dict[str, Any]:
    """Arguments of the transformer's class.

    Args:
        plan: one made for a device (:meth:`ForwardPlan.on`).
        blocks: instead of the plan's number.
    """
    config = CONFIGS[plan.model]
    return config | {"num_layers": blocks or plan.blocks or config["num_layers"]}


def build(contender: Contender, plan: ForwardPlan, device: torch.device, blocks: int | None = None) -> nn.Module:
    """A contender's model with random weights, not compiled.

    Args:
        contender: what to build.
        plan: one made for a device.
        device: where.
        blocks: instead of the plan's number.

    Raises:
        ImportError: the contender's library is not installed.
    """
    config = config_of(plan, blocks)
    if contender.ours:
        count = config["num_layers"]
        # Two blocks stand for all: they are quantised ones.
        kept = blocks_kept(count) if blocks is None else 0
        made = {"rank": plan.rank, "blocks_kept": kept, "compute": contender.mode, "storage": contender.storage}
        model = random_transformer(config, device=device, **made)
        if not contender.low_rank:
            drop_low_rank(model)
    else:
        quantize = _torchao_fp8 if contender.name == forward_plan.FP8 else None
        model = dense_transformer(config, device=device)
        if quantize is not None:
            quantize(model)
    model.set_attention_backend(plan.attention)
    return model


def drop_low_rank(model: nn.Module) -> None:
    """Leaves every low-rank branch of a model out; smoothing stays."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, SVDQWeight) or not weight.spec.has_low_rank:
            continue
        format = Format.FP8_SVD if weight.spec.storage == "expanded" else Format.NVFP4
        spec = dataclasses.replace(weight.spec, format=format, rank=0)
        parts = {name: part for name, part in weight.parts().items() if name in spec.components()}
        bare = SVDQWeight(parts, dataclasses.replace(weight.fingerprint, spec=spec), weight.dtype)
        module.weight = nn.Parameter(bare, requires_grad=False)


def _torchao_fp8(model: nn.Module) -> None:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    # By default it changes Inductor's settings for the whole process, which every later contender would inherit.
    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    quantize_(model.transformer_blocks, config)


def compile_model(model: nn.Module, contender: Contender, plan: ForwardPlan) -> nn.Module:
    """Compiles a model, block by block in place or as a whole; what is returned is called."""
    how: dict[str, Any] = {"fullgraph": True}
    if contender.ours:
        how["backend"] = "svdq"
        if contender.skipped:
            how["options"] = {"skip_passes": contender.skipped}
    if plan.whole:
        return torch.compile(model, **how)
    model.compile_repeated_blocks(**how)
    return model


def make_inputs(model: nn.Module, plan: ForwardPlan, size: tuple[int, int], text: int, device) -> dict[str, Any]:
    """Arguments of one forward.

    Args:
        model: whose channel counts they have.
        plan: gives the batch.
        size: (height, width) in pixels.
        text: prompt tokens.
        device: where.
    """
    height, width = (side // PIXELS_PER_TOKEN for side in size)
    return example_inputs(model, batch=plan.batch, height=height, width=width, text=text, device=device)


def forward_of(model: nn.Module, inputs: dict[str, Any]) -> Callable[[], torch.Tensor]:
    """A callable that runs one forward."""
    return lambda: model(**inputs)[0]


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, of tensors in tensors too."""
    return sum(_bytes(tensor) for tensor in (*model.parameters(), *model.buffers()))


def _bytes(tensor: torch.Tensor) -> int:
    if not is_traceable_wrapper_subclass(tensor):
        return tensor.numel() * tensor.element_size()
    return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
