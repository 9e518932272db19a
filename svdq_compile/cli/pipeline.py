"""Stock diffusers pipelines, with a transformer that diffusers alone cannot load."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.manifest import read_manifest
from ..checkpoint.source import CONFIG_NAME, SUBFOLDER, is_hub_id, read_json
from ..errors import CheckpointNotFoundError, OptionError

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

PIPELINE_INDEX = "model_index.json"
PICTURES = ("image", "control_image")
"""Arguments of a pipeline's ``__call__`` that a prompt cannot stand for."""


def load_pipeline(
    model: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    transformer: str | None = None,
    compute: str = "auto",
    storage: str = "packed",
) -> DiffusionPipeline:
    """The pipeline of a folder or Hub id, ready to run.

    Args:
        model: pipeline folder or Hub id.
        device: where all of it goes.
        dtype: dtype of everything that is not packed.
        transformer: checkpoint to take instead of the pipeline's own transformer, which is then not read.
        compute: compute mode of quantised linears.
        storage: storage of quantised linears.

    Raises:
        CheckpointError: there is no such pipeline, or a checkpoint cannot be used.
        OptionError: the pipeline needs more than a prompt, or has no quantised linear for the mode or the storage.
    """
    from diffusers import DiffusionPipeline

    from ..model.load import load_transformer

    check_pipeline(model)
    if transformer is None and is_quantised(model):
        transformer = model
    _check_modes(model, transformer, compute, storage)
    given = {}
    if transformer is not None:
        given["transformer"] = load_transformer(transformer, device, dtype, compute=compute, storage=storage)
    pipe = _fetch(model, lambda: DiffusionPipeline.from_pretrained(model, dtype=dtype, **given)).to(device)
    needed = [name for name in PICTURES if name in inspect.signature(pipe.__call__).parameters]
    if needed:
        raise OptionError(f"{type(pipe).__name__} needs {' and '.join(needed)}; only prompts can be given here")
    return pipe


def check_pipeline(model: str) -> None:
    """Refuses a local path that is no pipeline folder.

    Raises:
        CheckpointNotFoundError: no such folder, or it has no ``model_index.json``.
    """
    if Path(model).is_dir():
        if not (Path(model) / PIPELINE_INDEX).is_file():
            raise CheckpointNotFoundError(
                "the folder is no pipeline", file=model, needed=PIPELINE_INDEX, hint="give a pipeline folder"
            )
    elif not is_hub_id(model):
        raise CheckpointNotFoundError(
            "no such folder, and not a Hub id", file=model, hint="give a pipeline folder or a Hub id"
        )


def is_quantised(model: str) -> bool:
    """Whether the own transformer of a pipeline folder or Hub id is a ModelOpt checkpoint."""
    file = Path(model) / SUBFOLDER / CONFIG_NAME
    if not Path(model).is_dir():
        from huggingface_hub import hf_hub_download

        file = Path(_fetch(model, lambda: hf_hub_download(model, CONFIG_NAME, subfolder=SUBFOLDER)))
    if not file.is_file():
        return False
    quantization = read_json(file).get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == "modelopt"


def pipeline_folder(model: str) -> Path:
    """A pipeline's files on disk: the folder itself, or the Hub's in the local cache.

    Raises:
        CheckpointNotFoundError: there is no such pipeline.
    """
    from diffusers import DiffusionPipeline

    check_pipeline(model)
    if Path(model).is_dir():
        return Path(model)
    return Path(_fetch(model, lambda: DiffusionPipeline.download(model)))


def _check_modes(model: str, transformer: str | None, compute: str, storage: str) -> None:
    """Refuses a compute mode or a storage where no quantised linear would have it."""
    asked = [("compute", compute)] if compute != "auto" else []
    asked += [("storage", storage)] if storage != "packed" else []
    if asked and (transformer is None or not read_manifest(transformer).linears):
        option, value = asked[0]
        raise OptionError(
            f"--{option} {value} is for quantised linears, and {transformer or model} has none: "
            "give a quantised checkpoint with --transformer"
        )


def _fetch(model: str, load: Callable[[], Any]) -> Any:
    """What ``load`` returns, with the Hub's many errors as one."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return load()
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise CheckpointNotFoundError(
            "not a local folder, and the Hub does not give it",
            file=os.fspath(model),
            found=f"{type(error).__name__}: {error}",
            hint="give a pipeline folder or a Hub id",
        ) from error
