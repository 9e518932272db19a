"""What a checkpoint holds, decided from headers and config alone.

ModelOpt labels a whole file ``NVFP4_SVD`` even where single linears are plain NVFP4, so the format of each linear
follows from the keys it has; ``ignore`` and the other config entries are cross-checks that yield warnings.
"""

from __future__ import annotations

import collections
import dataclasses
import fnmatch
import os
from pathlib import Path

from ..errors import (
    ConfigError,
    DtypeError,
    GroupSizeError,
    LeftoverKeyError,
    LoraPairError,
    MissingKeyError,
    ShapeError,
    SwizzledScalesError,
    UnknownQuantAlgoError,
)
from ..spec import COMPONENT_OF_LEAF, GROUP_SIZE, MODEL_DTYPES, MODELOPT_LEAF, Format, LinearSpec
from .header import TensorInfo
from .source import CONFIG_NAME, Source, open_source

QUANT_ALGOS = ("NVFP4_SVD", "NVFP4", "FP8")
SWIZZLE_METADATA = "quantization_config"
"""ModelOpt writes this metadata entry only together with tiled block scales."""


@dataclasses.dataclass(frozen=True)
class Linear:
    """One linear of the checkpoint: its name, its spec, where its tensors lie, and why it has its format."""

    name: str
    spec: LinearSpec
    tensors: dict[str, TensorInfo]
    has_bias: bool
    why: str

    @property
    def keys(self) -> dict[str, str]:
        """Our component name -> the checkpoint's key, bias included."""
        return {part: f"{self.name}.{MODELOPT_LEAF.get(part, part)}" for part in self.tensors}

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Every tensor of a checkpoint, each exactly once: in a quantised linear or dense."""

    folder: Path
    config: dict
    dtype: str
    linears: dict[str, Linear]
    dense: dict[str, TensorInfo]
    warnings: tuple[str, ...]

    @property
    def quantization_config(self) -> dict | None:
        return self.config.get("quantization_config")

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.linears.values()) + sum(x.nbytes for x in self.dense.values())

    @property
    def model_config(self) -> dict:
        """The diffusers config without what only describes the checkpoint."""
        return {k: v for k, v in self.config.items() if k != "quantization_config"}


def read_manifest(path: str | os.PathLike[str], *, revision: str | None = None) -> Manifest:
    """The manifest of a checkpoint (see :func:`source.open_source` for what ``path`` may be).

    Raises:
        CheckpointError: any contradiction within the files; nothing is guessed or dropped.
    """
    return build_manifest(open_source(path, revision=revision))


def build_manifest(source: Source) -> Manifest:
    """Sorts a source's tensors into quantised linears and dense tensors, and checks that they fit together."""
    quantization = _check_config(source)
    _refuse_swizzled(source)
    tensors = source.tensors
    groups: dict[str, dict[str, TensorInfo]] = {}
    for key, info in tensors.items():
        module, _, leaf = key.rpartition(".")
        if leaf in COMPONENT_OF_LEAF or leaf == "bias":
            groups.setdefault(module, {})[COMPONENT_OF_LEAF.get(leaf, leaf)] = info
    quantised = {name: parts for name, parts in groups.items() if _is_quantised(parts)}
    taken = {f"{name}.{MODELOPT_LEAF.get(part, part)}" for name, parts in quantised.items() for part in parts}
    dense = {key: info for key, info in tensors.items() if key not in taken}
    dtype = _model_dtype(source, quantised, dense)
    if quantised and quantization is None:
        name = next(iter(quantised))
        raise ConfigError(
            "tensors are quantised but config.json has no quantization_config",
            file=source.folder / CONFIG_NAME,
            key=f"{name}.weight",
        )
    linears = {name: _linear(name, parts, quantization, dtype) for name, parts in quantised.items()}
    warnings = _cross_check(quantization, linears, dense)
    return Manifest(source.folder, source.config, dtype, linears, dense, warnings)


def _check_config(source: Source) -> dict | None:
    """The quantization_config if there is one that can be read."""
    file = source.folder / CONFIG_NAME
    quantization = source.config.get("quantization_config")
    if quantization is None:
        return None
    if not isinstance(quantization, dict):
        raise ConfigError("quantization_config is no object", file=file, found=type(quantization).__name__)
    method, algo = quantization.get("quant_method"), quantization.get("quant_algo")
    if method != "modelopt":
        raise UnknownQuantAlgoError("unknown quant_method", file=file, key="quant_method", found=method)
    if algo not in QUANT_ALGOS:
        raise UnknownQuantAlgoError("unknown quant_algo", file=file, key="quant_algo", found=algo)
    for name, part, entry in _quantizer_entries(quantization, file):
        bits, group = (8, None) if algo == "FP8" else (4, GROUP_SIZE)
        for key, needed in (("num_bits", bits), ("type", "float"), ("group_size", group)):
            if key in entry and entry[key] != needed:
                raise UnknownQuantAlgoError(
                    f"{algo} with another {key}",
                    file=file,
                    key=f"{name}.{part}.{key}",
                    found=entry[key],
                    needed=needed,
                )
    return quantization


def _quantizer_entries(quantization: dict, file: Path) -> list[tuple[str, str, dict]]:
    """(group name, "weights" or "input_activations", entry) of every config group."""
    groups = quantization.get("config_groups", {})
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise ConfigError("config_groups must map names to objects", file=file, key="config_groups")
    entries = []
    for name, group in groups.items():
        for part in ("weights", "input_activations"):
            entry = group.get(part, {})
            if not isinstance(entry, dict):
                raise ConfigError("a quantizer entry is no object", file=file, key=f"config_groups.{name}.{part}")
            entries.append((name, part, entry))
    return entries


def _group_flag(quantization: dict, key: str, default: object) -> object:
    for group in quantization.get("config_groups", {}).values():
        if key in group:
            return group[key]
    return default


def _is_dynamic(quantization: dict) -> bool:
    groups = quantization.get("config_groups", {}).values()
    return any(group.get("input_activations", {}).get("dynamic") is True for group in groups)


def _refuse_swizzled(source: Source) -> None:
    for header in source.headers:
        if SWIZZLE_METADATA in header.metadata:
            raise SwizzledScalesError(
                "the file was exported for another runtime's tiled block scales",
                file=header.file,
                key=f"__metadata__.{SWIZZLE_METADATA}",
                needed="row-major weight_scale",
            )


def _is_quantised(parts: dict[str, TensorInfo]) -> bool:
    """Any component only quantised linears have, or a weight no dense linear can have."""
    if any(part not in ("qweight", "bias") for part in parts):
        return True
    return "qweight" in parts and parts["qweight"].dtype not in (*MODEL_DTYPES, "F64")


def _model_dtype(source: Source, quantised: dict[str, dict[str, TensorInfo]], dense: dict[str, TensorInfo]) -> str:
    """The dtype the pipeline was exported in; a tensor of another float dtype was tampered with."""
    roles = [info for info in dense.values()]
    keys = list(dense)
    for name, parts in quantised.items():
        for part in ("pre_quant_scale", "lora_down", "lora_up", "bias"):
            if part in parts:
                roles.append(parts[part])
                keys.append(f"{name}.{MODELOPT_LEAF.get(part, part)}")
    counts = collections.Counter(info.dtype for info in roles if info.dtype in MODEL_DTYPES)
    if not roles:
        return "BF16"
    if not counts:
        raise DtypeError(
            "no tensor has a dtype models are exported in",
            file=roles[0].file,
            key=keys[0],
            found=roles[0].dtype,
            needed=" or ".join(MODEL_DTYPES),
        )
    dtype = counts.most_common(1)[0][0]
    for key, info in zip(keys, roles, strict=True):
        if info.dtype != dtype:
            raise DtypeError("not the model's dtype", file=info.file, key=key, found=info.dtype, needed=dtype)
    return dtype


def _linear(name: str, parts: dict[str, TensorInfo], quantization: dict, dtype: str) -> Linear:
    """Decides one linear's format and checks its tensors against the spec's rule."""
    some = next(iter(parts.values()))

    def require(part: str, error: type[MissingKeyError], why: str) -> TensorInfo:
        if part not in parts:
            raise error(f"{name}: {why}", file=some.file, key=f"{name}.{MODELOPT_LEAF[part]}", found="no such key")
        return parts[part]

    weight = require("qweight", MissingKeyError, "the weight is missing")
    fp8 = weight.dtype == "F8_E4M3"
    if not fp8 and weight.dtype != "U8":
        extra = sorted(MODELOPT_LEAF[p] for p in parts if p not in ("qweight", "bias"))
        raise DtypeError(
            f"{name}: {', '.join(extra) or 'a quantised weight'} beside a weight of this dtype",
            file=weight.file,
            key=f"{name}.weight",
            found=weight.dtype,
            needed="U8 (NVFP4) or F8_E4M3 (FP8)",
        )
    if len(weight.shape) != 2:
        raise ShapeError("a weight needs two dimensions", file=weight.file, key=f"{name}.weight", found=weight.shape)
    dynamic = _is_dynamic(quantization)
    require("weight_scale", MissingKeyError, "the weight's scale is missing")
    if not fp8:
        require("weight_scale_2", MissingKeyError, "the weight's tensor scale is missing")
    if not dynamic:
        require("input_scale", MissingKeyError, "the calibrated activation scale is missing")
    low_rank = {"lora_down", "lora_up"} & parts.keys()
    if len(low_rank) == 1 or (not low_rank and not fp8 and "pre_quant_scale" in parts):
        for part in ("lora_down", "lora_up"):
            require(part, LoraPairError, "the low-rank branch is incomplete")
    smoothed = _group_flag(quantization, "pre_quant_scale", True) is not False
    if low_rank and smoothed:
        require("pre_quant_scale", LoraPairError, "the smoothing of the low-rank branch is missing")
    spec, why = _spec(name, parts, dtype, dynamic)
    _check_components(name, spec, parts)
    return Linear(name, spec, parts, "bias" in parts, why)


def _spec(name: str, parts: dict[str, TensorInfo], dtype: str, dynamic: bool) -> tuple[LinearSpec, str]:
    weight = parts["qweight"]
    if weight.dtype == "F8_E4M3":
        return LinearSpec(Format.FP8, *weight.shape, dtype=dtype, dynamic=dynamic), "weight is F8_E4M3"
    out_features, in_features = weight.shape[0], weight.shape[1] * 2
    if in_features % GROUP_SIZE:
        raise GroupSizeError(
            f"{name}: in_features does not divide into blocks",
            file=weight.file,
            key=f"{name}.weight",
            found=in_features,
            needed=f"a multiple of {GROUP_SIZE}",
        )
    spec = LinearSpec(
        Format.NVFP4,
        out_features,
        in_features,
        dtype=dtype,
        smooth="pre_quant_scale" in parts,
        dynamic=dynamic,
    )
    if "lora_down" not in parts:
        return spec, "weight is U8, no svdquant_lora_a"
    down = parts["lora_down"]
    if len(down.shape) != 2:
        key = f"{name}.svdquant_lora_a"
        raise ShapeError("a LoRA factor needs two dimensions", file=down.file, key=key, found=down.shape)
    spec = dataclasses.replace(spec, format=Format.NVFP4_SVD, rank=down.shape[0])
    return spec, f"weight is U8, svdquant_lora_a has rank {spec.rank}"


def _check_components(name: str, spec: LinearSpec, parts: dict[str, TensorInfo]) -> None:
    rule = spec.components()
    for part, info in parts.items():
        key = f"{name}.{MODELOPT_LEAF.get(part, part)}"
        if part == "bias":
            needed_shape, needed_dtype = (spec.out_features,), spec.dtype
        elif part in rule:
            needed_shape, needed_dtype = rule[part].shape, rule[part].dtype
        else:
            raise LeftoverKeyError(
                f"{name}: a {spec.format} linear has no such tensor",
                file=info.file,
                key=key,
                needed=sorted(rule),
            )
        if info.dtype != needed_dtype:
            raise DtypeError(f"{name}: wrong dtype", file=info.file, key=key, found=info.dtype, needed=needed_dtype)
        if info.shape != needed_shape:
            raise ShapeError(
                f"{name}: wrong shape for {spec.describe()}",
                file=info.file,
                key=key,
                found=list(info.shape),
                needed=list(needed_shape),
            )


def _cross_check(
    quantization: dict | None, linears: dict[str, Linear], dense: dict[str, TensorInfo]
) -> tuple[str, ...]:
    """What the config says against what the keys say; the keys win."""
    if quantization is None:
        return ()
    warnings = []
    ignore = quantization.get("ignore", [])
    patterns = [p for p in ignore if isinstance(p, str)] if isinstance(ignore, list) else []
    ignored = sorted(n for n in linears if any(fnmatch.fnmatchcase(n, p) for p in patterns))
    if ignored:
        warnings.append(
            f"{len(ignored)} quantised linears are listed in ignore, first {ignored[0]}; they stay quantised"
        )
    ranks = sorted({x.spec.rank for x in linears.values() if x.spec.format is Format.NVFP4_SVD})
    declared = _group_flag(quantization, "lora_rank", None)
    if ranks and declared is not None and ranks != [declared]:
        warnings.append(f"config says lora_rank {declared}, the tensors have {ranks}; the tensors count")
    formats = {x.spec.format for x in linears.values()}
    algo = quantization["quant_algo"]
    expected = {"NVFP4_SVD": {Format.NVFP4_SVD, Format.NVFP4}, "NVFP4": {Format.NVFP4}, "FP8": {Format.FP8}}[algo]
    if not formats <= expected:
        found = ", ".join(sorted(str(f) for f in formats - expected))
        warnings.append(f"config says {algo}, but some linears are {found}; each linear counts as what it is")
    if algo == "NVFP4_SVD" and Format.NVFP4_SVD not in formats:
        warnings.append("config says NVFP4_SVD, but no linear has a low-rank branch")
    if _group_flag(quantization, "pre_quant_scale", True) is False and any(x.spec.smooth for x in linears.values()):
        warnings.append("config says pre_quant_scale false, but some linears have one; they are smoothed")
    mixed = _mixed_roles(linears)
    if mixed:
        warnings.append(f"the same layer has different formats in different blocks: {', '.join(mixed)}")
    return tuple(warnings)


def _mixed_roles(linears: dict[str, Linear]) -> list[str]:
    """Layers (names with the block number blanked) that are low-rank in some blocks and plain in others."""
    formats = collections.defaultdict(set)
    for name, linear in linears.items():
        role = ".".join("*" if part.isdigit() and i == 1 else part for i, part in enumerate(name.split(".")))
        formats[role].add(linear.spec.format)
    return sorted(role for role, found in formats.items() if len(found) > 1)
