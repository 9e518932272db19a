"""The tensor that stands where ``nn.Linear.weight`` stood.

Logically [out_features, in_features] in the model's dtype; physically the checkpoint's packed tensors. The module
stays an ``nn.Linear``: ``F.linear`` on it runs ``svdq::linear``, and anything that would need dense values raises.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import return_and_correct_aliasing

from ..dtypes import TORCH_DTYPES
from ..errors import DenseWeightError, FingerprintError, ShareError, StorageError
from ..spec import COMPONENTS, Format, LinearSpec
from . import modes
from .linear import linear

aten = torch.ops.aten

ROW_PARTS = {"qweight", "weight_scale", "lora_up"}
"""Components whose first dimension is out_features (a scalar weight_scale has none)."""

SHARED_PARTS = ("input_scale", "pre_quant_scale", "lora_down")
"""Components that turn an activation into an operand; linears in which they are equal can share that work."""


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """What a compiled graph may rely on about a weight; Dynamo guards on its equality.

    Args:
        spec: format, sizes and parts. Names nothing that differs between two blocks of the same recipe.
        compute: compute mode (:mod:`svdq_compile.ops.modes`).
        share: which linears of the model hold, byte for byte, the same :data:`SHARED_PARTS` as this one; their names
            relative to what they are part of, and the same in every block (``to_q+to_k+to_v``). Empty: none is known.
            Set by :func:`svdq_compile.model.share.mark_shared`, and lost by whatever could make it untrue.

    Raises:
        OptionError: an unknown compute mode.
        StorageError: a mode that needs the 4-bit codes, for an FP8_SVD weight.
    """

    spec: LinearSpec
    compute: str = "auto"
    share: str = ""

    def __post_init__(self) -> None:
        modes.check_compute(self.compute)
        if self.spec.format is Format.FP8_SVD and self.compute in modes.NEEDS_CODES:
            raise StorageError(
                f"compute={self.compute!r} needs the 4-bit codes, which a {self.spec.describe()} weight has given up"
            )

    def __deepcopy__(self, memo: dict) -> Fingerprint:
        return self


@functools.cache
def _the_only(fingerprint: Fingerprint) -> Fingerprint:
    """One object for equal ones: each call of a compiled block compares all of its weights'."""
    return fingerprint


class SVDQWeight(torch.Tensor):
    """A quantised weight: the components of :class:`~svdq_compile.spec.LinearSpec` behind a dense tensor's face.

    Args:
        components: our component name -> tensor, exactly those ``fingerprint.spec.components()`` names.
        fingerprint: spec and compute mode.
        dtype: the dtype the weight pretends to have; ``.to(dtype)`` changes it and leaves packed data alone.

    Raises:
        FingerprintError: a component is missing, left over, or of another shape or dtype than the spec says.
    """

    @staticmethod
    def __new__(
        cls,
        components: Mapping[str, torch.Tensor] | SVDQWeight,
        fingerprint: Fingerprint | None = None,
        dtype: torch.dtype | None = None,
        requires_grad: bool = False,
    ):
        # Offloading hooks rebuild a parameter as type(parameter)(value, requires_grad=...).
        if isinstance(components, SVDQWeight):
            components, fingerprint, dtype = components.parts(), components.fingerprint, components.dtype
        spec = fingerprint.spec
        return torch.Tensor._make_wrapper_subclass(
            cls,
            (spec.out_features, spec.in_features),
            dtype=dtype,
            device=components["qweight"].device,
            requires_grad=False,
        )

    def __init__(
        self,
        components: Mapping[str, torch.Tensor] | SVDQWeight,
        fingerprint: Fingerprint | None = None,
        dtype: torch.dtype | None = None,
        requires_grad: bool = False,
    ):
        if isinstance(components, SVDQWeight):
            self._is_param = True
            self._adopt(components)
            return
        check_components(components, fingerprint.spec)
        self.fingerprint = fingerprint
        for name in COMPONENTS:
            setattr(self, name, components.get(name))

    def _adopt(self, other: SVDQWeight) -> None:
        self.fingerprint = other.fingerprint
        for name in COMPONENTS:
            setattr(self, name, getattr(other, name))

    @property
    def fingerprint(self) -> Fingerprint:
        """What compiled graphs rely on about this weight."""
        return self._context[0]

    @fingerprint.setter
    def fingerprint(self, fingerprint: Fingerprint) -> None:
        rule = fingerprint.spec.components()
        self._names = [name for name in COMPONENTS if name in rule]
        self._context = _the_only(fingerprint), self.dtype

    @property
    def spec(self) -> LinearSpec:
        return self.fingerprint.spec

    def parts(self) -> dict[str, torch.Tensor]:
        """The stored tensors by our component name."""
        return {name: getattr(self, name) for name in COMPONENTS if getattr(self, name) is not None}

    def packed_nbytes(self) -> int:
        """Bytes the stored tensors take."""
        return sum(part.numel() * part.element_size() for part in self.parts().values())

    @property
    def operator_compute(self) -> str:
        """The compute mode ``svdq::linear`` is given.

        The fingerprint's own, which the operator resolves by its activation's device. ``auto`` of an FP8_SVD weight is
        resolved here, because the operator cannot tell it from an FP8 checkpoint's.
        """
        spec, compute = self.fingerprint.spec, self.fingerprint.compute
        return modes.resolve(compute, spec.format, self.device) if spec.format is Format.FP8_SVD else compute

    def with_compute(self, compute: str) -> SVDQWeight:
        """The same tensors under another compute mode; OptionError or StorageError if they cannot have it."""
        return SVDQWeight(self.parts(), dataclasses.replace(self.fingerprint, compute=compute), self.dtype)

    def with_share(self, share: str) -> SVDQWeight:
        """The same tensors under another share key; the caller knows that it is true."""
        return SVDQWeight(self.parts(), dataclasses.replace(self.fingerprint, share=share), self.dtype)

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Fingerprint, torch.dtype]]:
        return self._names, self._context

    @classmethod
    def __tensor_unflatten__(cls, inner, context, outer_size, outer_stride) -> SVDQWeight:
        return cls(inner, *context)

    def _stable_hash_for_caching(self) -> str:
        """What of this weight a compiled graph depends on; AOTAutograd's cache key."""
        return repr((self.fingerprint, self.dtype))

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"SVDQWeight({self.spec.describe()}, compute={self.fingerprint.compute}, device={self.device})"

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype | None = None) -> SVDQWeight:
        parts = {name: function(part) for name, part in self.parts().items()}
        return SVDQWeight(parts, self.fingerprint, dtype or self.dtype)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        handler = _FUNCTION_HANDLERS.get(func)
        if handler is not None:
            return handler(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        handler = _HANDLERS.get(func)
        if handler is None:
            weight = next((a for a in (*args, *(kwargs or {}).values()) if isinstance(a, cls)), None)
            raise DenseWeightError(str(func), weight.spec.describe() if weight is not None else "inside a list")
        return handler(func, args, kwargs or {})


def check_components(components: Mapping[str, torch.Tensor], spec: LinearSpec) -> None:
    """The manifest's rule, applied to tensors: exactly the spec's parts, each with its shape and dtype.

    Raises:
        FingerprintError: they do not fit.
    """
    rule = spec.components()
    present = {name for name, part in components.items() if part is not None}
    if present != rule.keys():
        raise FingerprintError(
            f"a {spec.describe()} weight needs {sorted(rule)}; missing {sorted(rule.keys() - present)}, "
            f"left over {sorted(present - rule.keys())}"
        )
    for name, needed in rule.items():
        part = components[name]
        if tuple(part.shape) != needed.shape or part.dtype != TORCH_DTYPES[needed.dtype]:
            raise FingerprintError(
                f"{name} of a {spec.describe()} weight is {part.dtype} {tuple(part.shape)}, "
                f"needs {TORCH_DTYPES[needed.dtype]} {needed.shape}"
            )


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    if not isinstance(weight, SVDQWeight) or isinstance(input, SVDQWeight) or isinstance(bias, SVDQWeight):
        culprit = next(a for a in (input, bias, weight) if isinstance(a, SVDQWeight))
        raise DenseWeightError("F.linear with a quantised weight as its input or bias", culprit.spec.describe())
    return linear(input, *(getattr(weight, name) for name in COMPONENTS), bias, weight.operator_compute)


def _set_data(weight: SVDQWeight, source: torch.Tensor) -> None:
    """``weight.data = source``, which offloading hooks move weights by: the components follow the face."""
    if not isinstance(source, SVDQWeight):
        raise DenseWeightError("assigning a dense tensor to .data", weight.spec.describe())
    kept = weight.fingerprint.share if weight.fingerprint.share == source.fingerprint.share else ""
    with torch._C.DisableTorchFunctionSubclass():
        torch.Tensor.data.__set__(weight, source)
    weight._adopt(source)
    weight.fingerprint = dataclasses.replace(weight.fingerprint, share=kept)


def _each(func, args, kwargs):
    return return_and_correct_aliasing(func, args, kwargs, args[0]._map(func))


def _copy_to(func, args, kwargs):
    """Moves between devices; a dtype request changes only what the weight pretends to be."""
    moves = {k: v for k, v in kwargs.items() if k in ("device", "non_blocking")}
    return args[0]._map(lambda part: part.to(copy=True, **moves), kwargs.get("dtype"))


def _copy_into(func, args, kwargs):
    target, source = args[:2]
    if not isinstance(target, SVDQWeight) or not isinstance(source, SVDQWeight):
        culprit = target if isinstance(target, SVDQWeight) else source
        hint = "load a checkpoint with load_into"
        raise DenseWeightError("copying between a dense and a quantised weight", culprit.spec.describe(), hint)
    if target.spec != source.spec:
        raise FingerprintError(f"cannot copy {source.spec.describe()} into {target.spec.describe()}")
    sources = source.parts()
    if target.fingerprint.share:
        _check_shared(target, sources)
    for name, part in target.parts().items():
        part.copy_(sources[name], *args[2:], **kwargs)
    return target


def _check_shared(target: SVDQWeight, sources: Mapping[str, torch.Tensor]) -> None:
    """Other linears, and aliases of the target, rely on its shared parts; ShareError if they would change."""
    for name in SHARED_PARTS:
        part = getattr(target, name)
        if part is not None and part.device.type != "meta" and not same_bytes(part, sources[name]).item():
            raise ShareError(name, target.fingerprint.share, target.spec.describe())


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Whether two tensors of one shape and dtype hold the same bytes: a bool scalar on a's device."""
    a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b.to(a.device)))
    return (a == b).all()


def _empty_like(func, args, kwargs):
    moves = {"device": kwargs["device"]} if kwargs.get("device") is not None else {}
    return args[0]._map(lambda part: torch.empty_like(part, **moves), kwargs.get("dtype")).with_share("")


def _is_pinned(func, args, kwargs):
    return all(part.is_pinned(*args[1:], **kwargs) for part in args[0].parts().values())


def _pin(func, args, kwargs):
    return args[0]._map(lambda part: part.pin_memory(*args[1:], **kwargs))


def _record_stream(func, args, kwargs):
    for part in args[0].parts().values():
        part.record_stream(*args[1:])


def _slice(func, args, kwargs):
    weight, dim, start, end, step = (*args, *(0, None, None, 1)[len(args) - 1 :])
    size = weight.shape[dim]
    start, end, step = slice(start, end, step).indices(size)
    return take(weight, dim % 2, start, max(start, end), step)


def _split(func, args, kwargs):
    weight, size, dim = (*args, *(0,)[len(args) - 2 :])
    total = weight.shape[dim]
    return [take(weight, dim % 2, begin, min(begin + size, total)) for begin in range(0, total, size)]


def _split_with_sizes(func, args, kwargs):
    weight, sizes, dim = (*args, *(0,)[len(args) - 2 :])
    begins = [sum(sizes[:i]) for i in range(len(sizes))]
    return [take(weight, dim % 2, begin, begin + size) for begin, size in zip(begins, sizes, strict=True)]


def take(weight: SVDQWeight, dim: int, start: int, end: int, step: int = 1) -> SVDQWeight:
    """Rows (dim 0, out_features) or columns (dim 1, in_features) of every component at once.

    Rows of the result compute rows of the output; products of column slices sum to the whole product, up to the
    bias, when ``input_scale`` is static. Components are views. Rows keep the share key, columns lose it: those of
    another linear may be cut elsewhere.

    Raises:
        DenseWeightError: columns that do not fall on block boundaries, or a stride along them.
    """
    spec, share = weight.spec, weight.fingerprint.share
    if dim == 0:
        rows = slice(start, end, step)
        parts = {k: v[rows] if k in ROW_PARTS and v.dim() else v for k, v in weight.parts().items()}
        spec = dataclasses.replace(spec, out_features=len(range(start, end, step)))
    else:
        group = spec.group_size if weight.qweight.dtype == torch.uint8 else 1
        if step != 1 or start % group or end % group:
            raise DenseWeightError(
                f"slicing columns {start}:{end}:{step}",
                spec.describe(),
                f"columns can be cut at multiples of {group}, where block scales begin",
            )
        per = {
            "qweight": spec.in_features // max(1, weight.qweight.shape[1]) if spec.in_features else 1,
            "weight_scale": spec.group_size,
            "pre_quant_scale": 1,
            "lora_down": 1,
        }
        parts = {
            k: v[..., start // per[k] : end // per[k]] if k in per and v.dim() else v for k, v in weight.parts().items()
        }
        spec, share = dataclasses.replace(spec, in_features=end - start), ""
    return SVDQWeight(parts, dataclasses.replace(weight.fingerprint, spec=spec, share=share), weight.dtype)


_FUNCTION_HANDLERS = {
    torch.nn.functional.linear: _linear,
    torch.Tensor.data.__set__: _set_data,
    # A wrapper has no storage of its own; hooks tell tensors apart by this.
    torch.Tensor.data_ptr: lambda weight: weight.qweight.data_ptr(),
}

_HANDLERS = {
    aten.detach.default: _each,
    aten.alias.default: _each,
    aten.clone.default: lambda func, args, kwargs: args[0]._map(torch.clone),
    aten.lift_fresh.default: _each,
    aten._to_copy.default: _copy_to,
    aten.copy_.default: _copy_into,
    aten.empty_like.default: _empty_like,
    aten.is_pinned.default: _is_pinned,
    aten._pin_memory.default: _pin,
    aten.record_stream.default: _record_stream,
    aten.slice.Tensor: _slice,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split_with_sizes,
}

torch.serialization.add_safe_globals([SVDQWeight, Fingerprint, LinearSpec, Format])
