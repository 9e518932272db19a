"""Why a forward cannot be replayed: whatever Python decides, or moves, on each call."""

from __future__ import annotations

import torch
from torch import nn


class Refused(Exception):
    """This call runs uncaptured; the text says why."""


def offload_of(modules: list[nn.Module]) -> str | None:
    """What moves a model's weights between devices during its forward, or None."""
    for module in modules:
        hook = getattr(module, "_hf_hook", None)
        if hook is not None:
            return f"accelerate's {type(hook).__name__} on {type(module).__name__}"
        for name in _diffusers_hooks(module):
            if "offload" in name:
                return f"diffusers' hook {name!r} on {type(module).__name__}"
    return None


def hooks_of(modules: list[nn.Module]) -> str | None:
    """What runs Python on each forward that a replay would leave out, or None."""
    offload = offload_of(modules)
    if offload is not None:
        return f"weights are offloaded: {offload}"
    for module in modules:
        for name in _diffusers_hooks(module):
            return f"diffusers' hook {name!r} on {type(module).__name__} decides on each call what to compute"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{type(module).__name__} has forward hooks, which a replay would not call"
    if any(module.__dict__.get("peft_config") for module in modules):
        return "PEFT adapters: their scales are Python numbers, which a graph would freeze"
    return None


def _diffusers_hooks(module: nn.Module) -> list[str]:
    registry = getattr(module, "_diffusers_hook", None)
    return [] if registry is None else list(registry.hooks)


def check_call(device: torch.device) -> None:
    """Refuses a call whose surroundings a replay would not obey.

    Raises:
        Refused: the model is not on a GPU, gradients are on, autocast caches casts, a dispatch mode watches, or a
            capture is under way.
    """
    if torch.is_grad_enabled():
        raise Refused("gradients are on; call under torch.no_grad() or torch.inference_mode()")
    if torch.is_autocast_enabled(device.type) and torch.is_autocast_cache_enabled():
        raise Refused("autocast keeps casts of weights; use torch.autocast(..., cache_enabled=False)")
    if torch._C._len_torch_dispatch_stack():
        raise Refused("a TorchDispatchMode is active, which would not see a replay's operators")
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise Refused("the current stream is being captured already")
