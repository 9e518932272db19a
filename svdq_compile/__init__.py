"""Runs 4-bit SVDQuant diffusion transformers from plain PyTorch.

Importing this package pulls in neither Dynamo nor Inductor, Triton, diffusers or ModelOpt; names load on first use.
"""

import importlib

__version__ = "0.1.0"

_HOME = {
    "load_transformer": "model.load",
    "load_checkpoint": "model.load",
    "load_into": "model.load",
    "set_compute": "model.load",
    "save_checkpoint": "model.save",
    "patch": "model.patch",
    "capture": "cuda_graphs.captured",
    "verify": "verification",
    "Denoising": "quality.denoise",
    "DenoisingRun": "quality.denoise",
    "quantize": "quantization.api",
    "inspect": "inspection",
    "explain": "explanation",
    "svdq": "backend",
    "SVDQWeight": "ops.weight",
    "SvdqError": "errors",
    "CheckpointError": "errors",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
