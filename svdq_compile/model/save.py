"""Writing a model back in ModelOpt's format."""

from __future__ import annotations

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
        SaveError: the model has no quantised linear, one of them is expanded, or a tensor would change by writing it.
    """
    import safetensors.torch
    from huggingface_hub import split_torch_state_dict_into_shards

    inner = unwrap(model)
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
    folder = Path(path)
    if (folder / SUBFOLDER / CONFIG_NAME).is_file():
        folder = folder / SUBFOLDER
    tensors = _tensors(inner, _checkpoint_dtype(inner), folder)
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
        _write_json(aside / CONFIG_NAME, _config(inner, linears))
        for stale in (*folder.glob("diffusion_pytorch_model*.safetensors"), folder / INDEX_NAME):
            stale.unlink(missing_ok=True)
        for written in aside.iterdir():
            written.replace(folder / written.name)
    return folder


def _checkpoint_dtype(model: nn.Module) -> torch.dtype:
    """The dtype the quantised weights were exported beside, whatever the model's other tensors were cast to."""
    weights = (slot.get() for slot in slots_of(model).values())
    return TORCH_DTYPES[next(value.spec.dtype for value in weights if isinstance(value, SVDQWeight))]


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


def _config(model: nn.Module, linears: dict[str, nn.Linear]) -> dict:
    config = {k: v for k, v in dict(getattr(model, "config", {})).items() if k != "quantization_config"}
    config["_class_name"] = type(model).__name__
    stored = getattr(model, CONFIG_ATTRIBUTE, None)
    config["quantization_config"] = stored or quantization_config(
        {name: module.weight.spec for name, module in linears.items()},
        [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in linears],
    )
    return config


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
        group |= {"has_zero_point": False, "pre_quant_scale": some.smooth, "lora_rank": some.rank}
    return {
        "config_groups": {"group_0": group},
        "ignore": sorted(dense),
        "quant_algo": ALGO_OF_FORMAT[main],
        "producer": {"name": "svdq_compile"},
        "quant_method": "modelopt",
    }


def _write_json(file: Path, value: dict) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True, default=list) + "\n", encoding="utf-8")
