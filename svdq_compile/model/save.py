"""Writing a model back in ModelOpt's format."""

from __future__ import annotations

import fnmatch
import json
import os
import tempfile
from pathlib import Path

import torch
from torch import nn

from ..checkpoint.source import CONFIG_NAME, INDEX_NAME, SUBFOLDER, WEIGHTS_NAME
from ..dtypes import DTYPE_NAMES, TORCH_DTYPES
from ..errors import SaveError
from ..ops.weight import SVDQWeight
from ..spec import MODELOPT_LEAF, Format, LinearSpec
from .bind import slots_of, unwrap
from .load import CONFIG_ATTRIBUTE, quantised_linears

ALGO_OF_FORMAT = {Format.NVFP4_SVD: "NVFP4_SVD", Format.NVFP4: "NVFP4", Format.FP8: "FP8"}


def save_checkpoint(model: nn.Module, path: str | os.PathLike[str], *, max_shard_size: int | str = "10GB") -> Path:
    """Writes ``config.json`` and safetensors files that :func:`svdq_compile.load_transformer` reads.

    Packed tensors are written as they are, so a checkpoint that was loaded in its own dtype comes out with
    byte-identical tensors.

    Args:
        model: a model from ``load_transformer``, ``load_into`` or ``quantize``.
        path: folder to write; created if need be. In a pipeline folder, its transformer is replaced.
        max_shard_size: bytes, or text like ``"5GB"``.

    Returns:
        The folder that holds the files.

    Raises:
        SaveError: the model has no quantised linear, one of them is expanded, they cannot be in one checkpoint, an
            adapter is on the model, or a tensor would change by writing it. What was in the folder is still there.
    """
    import safetensors.torch
    from huggingface_hub import split_torch_state_dict_into_shards

    inner = unwrap(model)
    _refuse_adapters(inner, path)
    linears = quantised_linears(inner)
    if not linears:
        raise SaveError("the model has no quantised linear", file=path, found=type(inner).__name__)
    expanded = next((name for name, module in linears.items() if module.weight.spec.storage != "packed"), None)
    if expanded is not None:
        raise SaveError(
            "an expanded weight has given up the checkpoint's codes",
            file=path,
            key=f"{expanded}.weight",
            found=linears[expanded].weight.spec.format,
            hint="load the checkpoint with storage='packed' and save that",
        )
    specs = {name: module.weight.spec for name, module in linears.items()}
    _refuse_mixed(specs, path)
    folder = Path(path)
    if (folder / SUBFOLDER / CONFIG_NAME).is_file():
        folder = folder / SUBFOLDER
    # What the quantised weights were exported beside, whatever the model's other tensors were cast to.
    dtype = TORCH_DTYPES[next(iter(specs.values())).dtype]
    tensors = _tensors(inner, dtype, folder)
    folder.mkdir(parents=True, exist_ok=True)
    pattern = WEIGHTS_NAME.replace(".safetensors", "{suffix}.safetensors")
    split = split_torch_state_dict_into_shards(tensors, filename_pattern=pattern, max_shard_size=max_shard_size)
    # Written aside first: a save that fails half-way leaves the checkpoint that was there.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        aside = Path(scratch)
        for name, keys in split.filename_to_tensors.items():
            shard = _unshared({key: tensors[key].contiguous() for key in keys})
            safetensors.torch.save_file(shard, aside / name, metadata={"format": "pt"})
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            _write_json(aside / INDEX_NAME, index)
        _write_json(aside / CONFIG_NAME, _config(inner, specs))
        for stale in (*folder.glob("diffusion_pytorch_model*.safetensors"), folder / INDEX_NAME):
            stale.unlink(missing_ok=True)
        for written in aside.iterdir():
            written.replace(folder / written.name)
    return folder


def _refuse_adapters(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """PEFT wraps a linear in a layer of its own, and so renames the tensors; a checkpoint has no such names."""
    wrapped = next((name for name, module in model.named_modules() if hasattr(module, "base_layer")), None)
    adapters = getattr(model, "peft_config", None)
    if wrapped is None and not adapters:
        return
    raise SaveError(
        "the model carries an adapter, which ModelOpt's format has no place for",
        file=path,
        key=wrapped,
        found=f"PEFT adapters {', '.join(adapters)}" if adapters else "a layer around the model's own (base_layer)",
        hint="unload the adapters first: pipe.unload_lora_weights()",
    )


def _refuse_mixed(specs: dict[str, LinearSpec], path: str | os.PathLike[str]) -> None:
    """A checkpoint has one dtype, and one flag for all its activation scales."""
    kinds = {name: f"{x.dtype}, activation scale {'per token' if x.dynamic else 'stored'}" for name, x in specs.items()}
    first = next(iter(kinds))
    for name, kind in kinds.items():
        if kind != kinds[first]:
            raise SaveError(
                "quantised linears that cannot be in one checkpoint",
                file=path,
                key=f"{name}.weight",
                found=kind,
                needed=f"{kinds[first]}, as {first} has it",
                hint="give the model the weights of one checkpoint only (load_into)",
            )


def _tensors(model: nn.Module, dtype: torch.dtype, folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for key, slot in slots_of(model).items():
        value = slot.get().detach()
        if isinstance(value, SVDQWeight):
            module = key.removesuffix(".weight")
            tensors.update({f"{module}.{MODELOPT_LEAF[name]}": part for name, part in value.parts().items()})
            continue
        stored = value.to(dtype)
        if not torch.equal(stored.to(value.dtype), value):
            raise SaveError(
                "a tensor would change by writing it in the checkpoint's dtype",
                file=folder,
                key=key,
                found=DTYPE_NAMES.get(value.dtype, value.dtype),
                needed=DTYPE_NAMES[dtype],
            )
        tensors[key] = stored
    return tensors


def _unshared(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors, those copied whose memory another one has; safetensors refuses to write one twice."""
    seen: set[int] = set()
    result = {}
    for key, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        result[key] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return result


def _config(model: nn.Module, specs: dict[str, LinearSpec]) -> dict:
    config = {k: v for k, v in dict(getattr(model, "config", {})).items() if k != "quantization_config"}
    config["_class_name"] = type(model).__name__
    own = quantization_config(
        specs, [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in specs]
    )
    # The weights may have been replaced since the stored one was read.
    stored = getattr(model, CONFIG_ATTRIBUTE, None)
    config["quantization_config"] = stored if stored and _agrees(stored, own, specs) else own
    return config


def _agrees(stored: dict, own: dict, specs: dict[str, LinearSpec]) -> bool:
    """Whether a quantization_config that was read says of these linears what their own one says."""
    linears = [*specs, *own["ignore"]]
    if _statements(stored, linears) != _statements(own, linears):
        return False
    ranks = {spec.rank for spec in specs.values() if spec.format is Format.NVFP4_SVD}
    # Of several ranks it can name no more than one.
    return len(ranks) != 1 or _group_entry(stored, "lora_rank", *ranks) == next(iter(ranks))


def _statements(config: dict, linears: list[str]) -> tuple:
    """What a reader takes from a quantization_config: algorithm, activation scales, smoothing, what is left out."""
    dynamic = any(g.get("input_activations", {}).get("dynamic") is True for g in _groups(config))
    smooth = _group_entry(config, "pre_quant_scale", True) is not False
    ignore = config.get("ignore")
    globs = [glob for glob in ignore if isinstance(glob, str)] if isinstance(ignore, list) else []
    left_out = {name for name in linears if any(fnmatch.fnmatchcase(name, glob) for glob in globs)}
    return config["quant_algo"], dynamic, smooth, left_out


def _groups(config: dict) -> list[dict]:
    return list(config.get("config_groups", {}).values())


def _group_entry(config: dict, key: str, default: object) -> object:
    return next((group[key] for group in _groups(config) if key in group), default)


def quantization_config(specs: dict[str, LinearSpec], dense: list[str]) -> dict:
    """The ``quantization_config`` ModelOpt would write for these linears.

    Args:
        specs: the quantised linears by name.
        dense: names of the linears that stay as they are.
    """
    formats = {spec.format for spec in specs.values()}
    main = next(f for f in ALGO_OF_FORMAT if f in formats)
    some = next(spec for spec in specs.values() if spec.format is main)
    quantizer = {"num_bits": 8 if main is Format.FP8 else 4, "type": "float"}
    if main is not Format.FP8:
        quantizer["group_size"] = some.group_size
    group = {
        "input_activations": {"dynamic": some.dynamic, **quantizer},
        "weights": {"dynamic": False, **quantizer},
        "targets": ["Linear"],
    }
    if main is Format.NVFP4_SVD:
        # Read as a promise about every low-rank linear.
        smooth = all(spec.smooth for spec in specs.values() if spec.format is main)
        group |= {"has_zero_point": False, "pre_quant_scale": smooth, "lora_rank": some.rank}
    return {
        "config_groups": {"group_0": group},
        "ignore": sorted(dense),
        "quant_algo": ALGO_OF_FORMAT[main],
        "producer": {"name": "svdq_compile"},
        "quant_method": "modelopt",
    }


def _write_json(file: Path, value: dict) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True, default=list) + "\n", encoding="utf-8")
