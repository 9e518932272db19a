"""Qwen-Image's RoPE tables, which are plain attributes: no ``.to`` moves them, no graph may copy them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import nn

TABLES = ("pos_freqs", "neg_freqs")


def rope_modules(model: nn.Module) -> list[nn.Module]:
    """A model's modules that hold RoPE tables (diffusers' ``QwenEmbedRope`` and ``QwenEmbedLayer3DRope``)."""
    return [m for m in model.modules() if all(isinstance(m.__dict__.get(name), torch.Tensor) for name in TABLES)]


def move_tables(model: nn.Module, device: torch.device | str) -> None:
    """Puts the RoPE tables on a device, and makes them follow the model from there on.

    A table that stays on the CPU is copied on each forward of a model that is compiled as a whole, and a copy from
    pageable memory cannot be captured. Values are never converted: ``.to(dtype)`` would drop their imaginary part.

    Args:
        model: a diffusers transformer; one without such tables is left alone.
        device: ``meta`` leaves the tables where they are, since their values are in no file.
    """
    for module in rope_modules(model):
        _move(module, torch.device(device))
        module._apply = functools.partial(_apply_and_follow, module)


def _move(module: nn.Module, device: torch.device) -> None:
    if device.type != "meta":
        for name in TABLES:
            setattr(module, name, getattr(module, name).to(device))


def _apply_and_follow(module: nn.Module, function, recurse: bool = True) -> nn.Module:
    """``Module._apply``, behind ``.to``, ``.cpu`` and ``.cuda``; a probe shows where the function moves tensors."""
    type(module)._apply(module, function, recurse)
    _move(module, function(torch.empty(0, device=module.pos_freqs.device)).device)
    return module


@contextlib.contextmanager
def kept_outputs(model: nn.Module | None) -> Iterator[list[torch.Tensor]]:
    """Inside, each RoPE module computes its output once per arguments and returns those very tensors again.

    diffusers keeps tables per image size in an LRU cache, which may drop one that a captured graph still reads. The
    arguments are sizes, so the output is constant.

    Args:
        model: a diffusers transformer; None, or one that has no such modules, keeps nothing.

    Yields:
        the tensors, for whoever needs them to live on.
    """
    kept: list[torch.Tensor] = []
    with contextlib.ExitStack() as stack:
        for module in [] if model is None else rope_modules(model):
            had = module.__dict__.get("forward")
            module.forward = _remembering(module.forward, kept)
            stack.callback(_restore_forward, module, had)
        yield kept


def _remembering(forward, kept: list[torch.Tensor]):
    outputs = {}

    def remembered(*args, **kwargs):
        key = repr((args, kwargs))
        if key not in outputs:
            outputs[key] = forward(*args, **kwargs)
            kept.extend(outputs[key])
        return outputs[key]

    return remembered


def _restore_forward(module: nn.Module, had) -> None:
    if had is None:
        del module.forward
    else:
        module.forward = had
