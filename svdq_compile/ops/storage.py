"""What a quantised weight takes in memory: as the checkpoint packs it, or expanded to one e4m3 byte per element.

Expanded, an NVFP4 weight takes 8 bits per element instead of 4.5 and has given up its codes; ``fp8`` arithmetic then
has nothing left to unpack. Its operands are those it would make of the packed weight, bit for bit.

A model's storage is that of the linears that see every token. One that sees a vector per picture is a read of its
weight, and 4.5 bits are read sooner than 8: it stays packed.
"""

from __future__ import annotations

import dataclasses
import re

from ..errors import StorageError
from ..spec import STORAGES, Format, LinearSpec
from .reference import fp8_weight
from .weight import SVDQWeight

ONE_VECTOR = re.compile(r"(^|\.)(\w+_mod|\w*modulation\w*|norm\w*|ada_?(ln|LN|norm)\w*|time\w*)\.")
"""Modules of diffusers' transformers whose linears see a vector per picture, the time step's."""


def storage_of(name: str, storage: str) -> str:
    """The storage one linear gets in a model.

    Args:
        name: of the linear, such as ``transformer_blocks.0.img_mod.1``.
        storage: the model's.
    """
    return "packed" if ONE_VECTOR.search(name) else storage


def check_storage(storage: str) -> None:
    """Refuses what is none of :data:`svdq_compile.spec.STORAGES`.

    Raises:
        StorageError: no such storage.
    """
    if storage not in STORAGES:
        raise StorageError(f"storage={storage!r}", f"choose one of {', '.join(STORAGES)}")


def stored_spec(spec: LinearSpec, storage: str) -> LinearSpec:
    """The spec of a weight under a storage.

    Args:
        spec: the weight's spec in its checkpoint.
        storage: ``packed`` changes nothing; ``expanded`` makes NVFP4 and NVFP4_SVD FP8_SVD, and leaves FP8 alone.

    Raises:
        StorageError: no such storage.
    """
    check_storage(storage)
    if storage == "packed" or spec.format not in (Format.NVFP4, Format.NVFP4_SVD):
        return spec
    return dataclasses.replace(spec, format=Format.FP8_SVD)


def expand(weight: SVDQWeight) -> SVDQWeight:
    """An FP8_SVD weight made of an NVFP4 or NVFP4_SVD one; FP8 and FP8_SVD weights are returned as they are.

    ``qweight = e4m3(code * block scale / 8)``, ``weight_scale = 8 * weight_scale_2``, ``input_scale`` becomes
    ``6 * input_scale``. Smoothing vector and low-rank factors are shared; an empty low-rank pair is dropped.

    Args:
        weight: on any device, with any compute mode but those that need the codes.

    Raises:
        StorageError: the weight's compute mode needs the codes that would be given up.
    """
    spec = stored_spec(weight.spec, "expanded")
    if spec == weight.spec:
        return weight
    fingerprint = dataclasses.replace(weight.fingerprint, spec=spec)
    parts = weight.parts()
    parts["qweight"], parts["weight_scale"], parts["input_scale"] = fp8_weight(
        weight.qweight, weight.weight_scale, weight.weight_scale_2, weight.input_scale
    )
    return SVDQWeight({name: parts[name] for name in spec.components()}, fingerprint, weight.dtype)
