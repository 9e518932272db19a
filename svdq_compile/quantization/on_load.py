"""Quantising an unquantised checkpoint while it streams in, one linear at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch import nn

from ..checkpoint.manifest import Linear, Manifest
from ..errors import QuantizeError
from ..model.bind import Entry
from ..spec import Format, LinearSpec
from .data_free import quantize_weight
from .recipes import BLOCKS, Recipe


def quantize_entries(
    model: nn.Module, manifest: Manifest, entries: Iterator[Entry], recipe: Recipe
) -> tuple[Manifest, Iterator[Entry]]:
    """The manifest and tensors the checkpoint would have, had it been quantised without data.

    No more than one dense weight of a quantised linear is in memory at a time.

    Args:
        model: the model the checkpoint is for; its blocks say what is quantised.
        manifest: an unquantised checkpoint.
        entries: its tensors.
        recipe: NVFP4 or NVFP4_SVD, rank, and the blocks to keep. Nothing is skipped: without calibration, a
            low-rank branch costs no more for one linear than for another.

    Raises:
        QuantizeError: the checkpoint is quantised already, or a linear cannot be.
    """
    if manifest.linears:
        raise QuantizeError(f"{manifest.folder} is quantised already; load it without quantize=")
    if recipe.format is Format.FP8:
        raise QuantizeError("quantize= takes 'nvfp4' or 'nvfp4_svd'; FP8 needs calibration")
    blocks = getattr(model, BLOCKS, None)
    if blocks is None:
        raise QuantizeError(f"{type(model).__name__} has no {BLOCKS} to quantise")
    linears = {
        f"{BLOCKS}.{index}.{name}": _linear(f"{BLOCKS}.{index}.{name}", module, manifest, recipe)
        for index in recipe.quantized_blocks(len(blocks))
        for name, module in blocks[index].named_modules()
        if isinstance(module, nn.Linear)
    }
    taken = {f"{name}.{leaf}" for name in linears for leaf in ("weight", "bias")}
    dense = {key: info for key, info in manifest.dense.items() if key not in taken}
    quantised = dataclasses.replace(manifest, linears=linears, dense=dense)
    return quantised, _stream(entries, linears, recipe)


def _linear(name: str, module: nn.Linear, manifest: Manifest, recipe: Recipe) -> Linear:
    tensors = {
        part: manifest.dense[f"{name}.{leaf}"]
        for part, leaf in (("qweight", "weight"), ("bias", "bias"))
        if f"{name}.{leaf}" in manifest.dense
    }
    spec = LinearSpec(
        recipe.format,
        module.out_features,
        module.in_features,
        rank=recipe.rank if recipe.format is Format.NVFP4_SVD else 0,
        dtype=manifest.dtype,
        dynamic=True,
    )
    return Linear(name, spec, tensors, "bias" in tensors, "quantised while loading")


def _stream(entries: Iterator[Entry], linears: dict[str, Linear], recipe: Recipe) -> Iterator[Entry]:
    for key, part, tensor in entries:
        name, _, leaf = key.rpartition(".")
        if name not in linears or leaf not in ("weight", "bias"):
            yield key, part, tensor
        elif leaf == "bias":
            yield name, "bias", tensor
        else:
            spec, parts = quantize_weight(tensor, recipe.format, recipe.rank)
            if spec != linears[name].spec:
                raise QuantizeError(f"{name} is {spec.describe()}, the model has {linears[name].spec.describe()}")
            for component, value in parts.items():
                yield name, component, value
