"""Everything besides its arguments that decides what a forward computes, as one comparable value.

A graph reads weights by address. Two calls may share one if every tensor of the model lies where it lay, with the
same shape, dtype and meaning, and if nothing Python decides by has changed. Contents may change: a replay reads them.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .refusal import Refused, hooks_of

INSTANCE_ATTRIBUTES = ("forward", "_compiled_call_impl", "processor", "training")
"""Entries of a module's ``__dict__`` that are replaced, not added, when its computation changes."""


class ModelState:
    """Watches a model for changes; a look at an unchanged one takes microseconds per hundred tensors.

    Args:
        model: the model, or what ``torch.compile(model)`` returned.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._scan()

    def _scan(self) -> None:
        self.modules = list(self._model.modules())
        self._dicts = [module.__dict__ for module in self.modules]
        self._sizes = list(map(len, self._dicts))
        self._has_hooks = any("_hf_hook" in d or "peft_config" in d for d in self._dicts)
        self._hooks = [hooks for m in self.modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._registries = [m._diffusers_hook.hooks for m in self.modules if hasattr(m, "_diffusers_hook")]
        self._children = [(m._modules, list(m._modules.values())) for m in self.modules if m._modules]
        self._tensor_dicts = [d for m in self.modules for d in (m._parameters, m._buffers) if d]
        self._attributes = [
            (d, name) for d in self._dicts for name, value in d.items() if isinstance(value, torch.Tensor)
        ]

    def device(self) -> torch.device:
        """The device of the model's first tensor; the CPU if it has none."""
        tensors = (t for d in self._tensor_dicts for t in d.values() if t is not None)
        return next((t.device for t in tensors), torch.device("cpu"))

    def check_devices(self) -> None:
        """Refuses a model that is spread over devices.

        Raises:
            Refused: its tensors are on several.
        """
        devices = {t.device for d in self._tensor_dicts for t in d.values() if t is not None}
        if len(devices) > 1:
            raise Refused(f"the model's tensors are on several devices: {', '.join(sorted(map(str, devices)))}")

    def key(self) -> Hashable:
        """What the model computes with.

        Raises:
            Refused: something of the model runs Python on every call.
        """
        if list(map(len, self._dicts)) != self._sizes or any(list(d.values()) != was for d, was in self._children):
            self._scan()
        if self._has_hooks or any(self._hooks) or any(self._registries):
            reason = hooks_of(self.modules)
            if reason is not None:
                raise Refused(reason)
        parts: list[Hashable] = [d.get(name) for d in self._dicts for name in INSTANCE_ATTRIBUTES]
        for tensors in self._tensor_dicts:
            for tensor in tensors.values():
                _describe(tensor, parts)
        for attributes, name in self._attributes:
            _describe(attributes.get(name), parts)
        for attributes in self._dicts:
            processor = attributes.get("processor")
            if processor is not None:
                parts.append(getattr(processor, "_attention_backend", None))
        return tuple(parts)


def _describe(tensor: torch.Tensor | None, parts: list[Hashable]) -> None:
    if type(tensor) in (torch.Tensor, nn.Parameter):
        parts += (tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.stride())
    elif tensor is None:
        parts.append(None)
    elif is_traceable_wrapper_subclass(tensor):
        names, context = tensor.__tensor_flatten__()
        parts.append(context)
        for name in names:
            _describe(getattr(tensor, name), parts)
    else:
        raise Refused(f"a weight is a {type(tensor).__name__}, whose storage cannot be watched")


def environment(device: torch.device) -> Hashable:
    """Global settings of torch and diffusers that choose kernels."""
    matmul, backends = torch.backends.cuda.matmul, torch.backends.cuda
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    return (
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type),
        torch.are_deterministic_algorithms_enabled(),
        matmul.fp32_precision,
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_reduced_precision_reduction,
        backends.flash_sdp_enabled(),
        backends.mem_efficient_sdp_enabled(),
        backends.math_sdp_enabled(),
        backends.cudnn_sdp_enabled(),
        dispatch and dispatch._AttentionBackendRegistry.get_active_backend()[0],
    )
