"""Fitting a checkpoint to a model: every tensor gets its place before the first byte is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from ..checkpoint.manifest import Linear, Manifest
from ..errors import LeftoverKeyError, MissingKeyError, ModelError, ShapeError, UnknownLinearError
from ..ops.modes import check_compute
from ..ops.storage import check_storage, expand, storage_of, stored_spec
from ..ops.weight import Fingerprint, SVDQWeight

Entry = tuple[str, str | None, torch.Tensor]
"""(module name, component name or ``bias``, tensor), or (key, None, tensor) for a dense tensor."""


@dataclasses.dataclass(frozen=True)
class Slot:
    """A parameter's or buffer's place in a model."""

    module: nn.Module
    name: str

    def get(self) -> torch.Tensor:
        return self._table()[self.name]

    def set(self, value: torch.Tensor) -> None:
        """Puts this very object there, without the conversions ``setattr`` would do."""
        self._table()[self.name] = value

    def _table(self) -> dict[str, torch.Tensor]:
        return self.module._parameters if self.name in self.module._parameters else self.module._buffers


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside what ``torch.compile(model)`` returned, or the model itself.

    Raises:
        ModelError: it is no module.
    """
    inner = getattr(model, "_orig_mod", model)
    if not isinstance(inner, nn.Module):
        raise ModelError(inner)
    return inner


def slots_of(model: nn.Module) -> dict[str, Slot]:
    """Every tensor a checkpoint of this model must hold, by key."""
    slots = {}
    for prefix, module in model.named_modules():
        names = [n for n, p in module._parameters.items() if p is not None]
        names += [
            n for n, b in module._buffers.items() if b is not None and n not in module._non_persistent_buffers_set
        ]
        slots.update({f"{prefix}.{name}" if prefix else name: Slot(module, name) for name in names})
    return slots


def check_fit(model: nn.Module, manifest: Manifest) -> dict[str, Slot]:
    """Matches a manifest with a model, tensor by tensor.

    Returns:
        key -> slot, for every tensor of the model.

    Raises:
        UnknownLinearError: the checkpoint quantises something that is no ``nn.Linear`` of the model.
        ShapeError: sizes differ.
        MissingKeyError: a tensor of the model is in no file.
        LeftoverKeyError: a tensor of the files is not in the model.
    """
    modules = dict(model.named_modules())
    slots = slots_of(model)
    for linear in manifest.linears.values():
        _check_linear(modules.get(linear.name), linear)
    for key, info in manifest.dense.items():
        if key not in slots:
            raise LeftoverKeyError(f"the model ({type(model).__name__}) has no such tensor", file=info.file, key=key)
        if tuple(slots[key].get().shape) != info.shape:
            raise ShapeError(
                "the model's tensor has another shape",
                file=info.file,
                key=key,
                found=list(info.shape),
                needed=list(slots[key].get().shape),
            )
    held = manifest.dense.keys() | {f"{n}.weight" for n in manifest.linears}
    held |= {f"{linear.name}.bias" for linear in manifest.linears.values() if linear.has_bias}
    missing = sorted(slots.keys() - held)
    if missing:
        raise MissingKeyError(
            f"{len(missing)} tensors of the model are in no file",
            file=manifest.folder,
            key=missing[0],
            found="no such key",
        )
    return slots


def _check_linear(module: nn.Module | None, linear: Linear) -> None:
    file = next(iter(linear.tensors.values())).file
    if not isinstance(module, nn.Linear):
        found = "no such module" if module is None else type(module).__name__
        raise UnknownLinearError(
            "the checkpoint quantises a layer the model does not have",
            file=file,
            key=linear.name,
            found=found,
            needed="nn.Linear",
            hint="an adapter wraps the layer: unload_lora_weights() first" if hasattr(module, "base_layer") else "",
        )
    sizes = (module.out_features, module.in_features)
    stored = (linear.spec.out_features, linear.spec.in_features)
    if sizes != stored:
        raise ShapeError(
            "the model's linear has another size",
            file=file,
            key=f"{linear.name}.weight",
            found=f"{stored[1]} -> {stored[0]}",
            needed=f"{sizes[1]} -> {sizes[0]}",
        )
    if linear.has_bias and module.bias is None:
        raise LeftoverKeyError("the model's linear has no bias", file=file, key=f"{linear.name}.bias")


def check_modes(manifest: Manifest, compute: str, storage: str) -> None:
    """Refuses, before a tensor is read, modes that a checkpoint's weights cannot have.

    Raises:
        OptionError: no such compute mode.
        StorageError: no such storage, or one that has not what the compute mode needs.
    """
    check_compute(compute)
    check_storage(storage)
    for linear in manifest.linears.values():
        Fingerprint(stored_spec(linear.spec, storage), compute)


def new_parameters(
    manifest: Manifest,
    slots: dict[str, Slot],
    entries: Iterable[Entry],
    compute: str,
    storage: str,
    dtype: torch.dtype | None,
) -> Iterator[tuple[Slot, torch.Tensor]]:
    """The parameters and buffers a checkpoint puts into a model, as its tensors come in; one for each slot.

    Args:
        manifest: what the entries are.
        slots: from :func:`check_fit`.
        entries: the checkpoint's tensors, on their target device.
        compute: compute mode of the quantised weights.
        storage: storage of the quantised weights (:func:`~svdq_compile.ops.storage.storage_of`); an expanded one exists
            packed only until it is complete.
        dtype: dtype of dense tensors and of what quantised weights pretend to have; None takes the slot's own.
    """
    waiting: dict[str, dict[str, torch.Tensor]] = {}
    for name, part, tensor in entries:
        if part is None or part == "bias":
            slot = slots[name if part is None else f"{name}.bias"]
            yield slot, _like(slot, tensor.to(dtype or slot.get().dtype))
            continue
        spec = manifest.linears[name].spec
        parts = waiting.setdefault(name, {})
        parts[part] = tensor
        if parts.keys() == spec.components().keys():
            slot = slots[f"{name}.weight"]
            weight = SVDQWeight(waiting.pop(name), Fingerprint(spec, compute), dtype or slot.get().dtype)
            yield slot, _like(slot, expand(weight) if storage_of(name, storage) == "expanded" else weight)


def parameters_of(model: nn.Module, slots: dict[str, Slot]) -> Iterator[tuple[Slot, torch.Tensor]]:
    """Another model's parameters and buffers, for the slots of one of the same architecture; memory is shared.

    Args:
        model: the model that has them.
        slots: the slots of the model they are for.

    Raises:
        MissingKeyError, LeftoverKeyError, ShapeError: the models differ.
    """
    given = slots_of(model)
    for error, keys in (
        (MissingKeyError, slots.keys() - given.keys()),
        (LeftoverKeyError, given.keys() - slots.keys()),
    ):
        if keys:
            raise error(f"the models differ: {len(keys)} tensors are in one of them only", key=min(keys))
    for key, slot in slots.items():
        value = given[key].get().detach()
        if value.shape != slot.get().shape:
            found, needed = list(value.shape), list(slot.get().shape)
            raise ShapeError("the models differ in a tensor's shape", key=key, found=found, needed=needed)
        yield slot, _like(slot, value.to(slot.get().device))


def _like(slot: Slot, tensor: torch.Tensor) -> torch.Tensor:
    """A parameter where the slot holds a parameter, else a plain tensor.

    A dense parameter keeps the old one's ``requires_grad``, which compiled code guards on.
    """
    if slot.name not in slot.module._parameters:
        return tensor
    wants_grad = slot.get().requires_grad and not isinstance(tensor, SVDQWeight)
    return nn.Parameter(tensor, requires_grad=wants_grad)
