"""The diffusers model a checkpoint's config describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..checkpoint.manifest import Manifest
from ..checkpoint.source import CONFIG_NAME
from ..errors import ConfigError, ShapeError


def build_model(manifest: Manifest) -> nn.Module:
    """The diffusers model a checkpoint's config describes, its parameters on ``meta``.

    Raises:
        ConfigError: the class is not in diffusers, or it refuses the config.
    """
    import diffusers
    from accelerate import init_empty_weights

    file = manifest.folder / CONFIG_NAME
    name = manifest.config.get("_class_name")
    model_class = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(model_class, type) and issubclass(model_class, diffusers.ModelMixin)):
        raise ConfigError("no such model in diffusers", file=file, key="_class_name", found=name)
    _check_sizes(manifest, manifest.config)
    try:
        with init_empty_weights():
            model = model_class.from_config(manifest.model_config)
    except Exception as error:
        raise ConfigError(f"{name} refuses the config", file=file, found=f"{type(error).__name__}: {error}") from error
    # Again with the class's defaults in the place of entries that config.json leaves out.
    _check_sizes(manifest, model.config)
    return model


def _check_sizes(manifest: Manifest, config: Mapping[str, Any]) -> None:
    """Sizes that cost time or memory to try, or that no tensor's shape depends on.

    The number of blocks must be that of the tensors, and the rotary axes must split a head as large as the tensors
    say.
    """
    file = manifest.folder / CONFIG_NAME
    names = [*manifest.dense, *manifest.linears]
    for key, value in config.items():
        if key.startswith("num_") and key.endswith("layers") and isinstance(value, int) and value > len(names):
            raise ConfigError("more layers than tensors", file=file, key=key, found=value, needed=f"<= {len(names)}")
    blocks = {name.split(".")[1] for name in names if name.startswith("transformer_blocks.")}
    if blocks and config.get("num_layers", len(blocks)) != len(blocks):
        raise ConfigError(
            "num_layers does not match the tensors",
            file=file,
            key="num_layers",
            found=config["num_layers"],
            needed=len(blocks),
        )
    if "axes_dims_rope" not in config or "attention_head_dim" not in config:
        return
    axes, head = config["axes_dims_rope"], config["attention_head_dim"]
    ok = isinstance(axes, (list, tuple)) and all(type(axis) is int and axis > 0 and axis % 2 == 0 for axis in axes)
    if not ok or sum(axes) != head:
        raise ConfigError(
            "the rotary axes are not even numbers that add up to the head size",
            file=file,
            key="axes_dims_rope",
            found=axes,
            needed=head,
        )
    norm = manifest.dense.get("transformer_blocks.0.attn.norm_q.weight")
    if norm is not None and norm.shape != (head,):
        raise ShapeError(
            "the head size does not match the tensors",
            file=norm.file,
            key="transformer_blocks.0.attn.norm_q.weight",
            found=list(norm.shape),
            needed=[head],
        )
