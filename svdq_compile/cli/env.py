"""svdq-compile env: versions, GPUs and whether torch finds the backend; for bug reports."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import platform
import shutil
import subprocess

from .. import __version__
from .common import add_json, show

PACKAGES = ("torch", "triton", "diffusers", "transformers", "nvidia-modelopt", "safetensors")


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One CUDA device: name, compute capability like ``9.0``, and memory in bytes."""

    name: str
    capability: str
    memory: int


@dataclasses.dataclass(frozen=True)
class Environment:
    """What a bug report needs.

    Args:
        versions: package -> version, None where it is not installed.
        python: Python's version.
        os: operating system and machine.
        torch_window: oldest and newest torch this release was made for, or why that is unknown.
        backend: whether ``torch.compile(backend="svdq")`` would find the backend.
        gpus: the CUDA devices torch sees.
        driver: version of NVIDIA's driver, if there is one.
    """

    versions: dict[str, str | None]
    python: str
    os: str
    torch_window: str
    backend: bool
    gpus: tuple[Gpu, ...]
    driver: str | None

    def to_dict(self) -> dict:
        """Plain data for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        rows = [(name, version or "not installed") for name, version in self.versions.items()]
        rows += [("python", self.python), ("os", self.os), ("supported torch", self.torch_window)]
        rows.append(("svdq backend", "found" if self.backend else "not found: install the package with pip"))
        rows += [
            (f"gpu {i}", f"{gpu.name}, compute capability {gpu.capability}, {gpu.memory / 2**30:.1f} GiB")
            for i, gpu in enumerate(self.gpus)
        ]
        if not self.gpus:
            rows.append(("gpu", "none that torch can use"))
        rows.append(("driver", self.driver or "none"))
        return "\n".join(f"{name:16} {value}" for name, value in rows)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds this subcommand."""
    parser = subparsers.add_parser("env", help="versions, GPUs and the backend", description=__doc__)
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the environment."""
    return show(collect(), args.json)


def collect() -> Environment:
    """Looks at this machine; never raises because something is missing or broken."""
    versions = {"svdq_compile": __version__} | {name: _version(name) for name in PACKAGES}
    return Environment(
        versions=versions,
        python=platform.python_version(),
        os=platform.platform(),
        torch_window=_torch_window(),
        backend=bool(importlib.metadata.entry_points(group="torch_dynamo_backends", name="svdq")),
        gpus=_gpus(),
        driver=_driver(),
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch_window() -> str:
    try:
        from .._compat import NEWEST, OLDEST
    except Exception as error:
        return f"unknown ({type(error).__name__}: {error})"
    return " to ".join(f"{major}.{minor}" for major, minor in (OLDEST, NEWEST))


def _gpus() -> tuple[Gpu, ...]:
    try:
        import torch

        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    except Exception:
        return ()
    return tuple(Gpu(p.name, f"{p.major}.{p.minor}", p.total_memory) for p in found)


def _driver() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.split()), None)
