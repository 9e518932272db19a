"""Every private symbol of torch's compiler this package uses, and the torch versions it was written for."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import re
from functools import cache
from pathlib import Path

import torch
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx
from torch._inductor.cudagraph_trees import reset_cudagraph_trees
from torch._inductor.custom_graph_pass import CustomGraphPass

from .errors import TorchVersionError

log = logging.getLogger(__name__)

OLDEST, NEWEST = (2, 11), (2, 15)
FUNCTIONAL_LINEAR = torch._C._nn.linear
"""What Dynamo leaves in its graph for ``F.linear``."""


@cache
def check_torch() -> None:
    """Refuses a torch that is too old; warns once about one nobody has tried.

    Raises:
        TorchVersionError: torch is older than 2.11.
    """
    version = tuple(int(part) for part in re.match(r"(\d+)\.(\d+)", torch.__version__).groups())
    window = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
    if version < OLDEST:
        raise TorchVersionError(f"backend 'svdq' found torch {torch.__version__}, needs {window}: upgrade torch")
    if version > NEWEST:
        log.warning("torch %s is newer than this release was tried with (%s)", torch.__version__, window)


@cache
def source_hash() -> str:
    """Hash of every source file of this package and of its kernels; Inductor's caches are keyed by it."""
    digest = hashlib.sha256(torch.__version__.encode())
    roots = [Path(__file__).parent]
    kernels = importlib.util.find_spec("svdq_kernels")
    if kernels is not None:
        roots.append(Path(kernels.origin).parent)
    for root in roots:
        for file in sorted((*root.rglob("*.py"), *root.rglob("*.jinja"))):
            digest.update(str(file.relative_to(root)).encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


__all__ = [
    "FUNCTIONAL_LINEAR",
    "CustomGraphPass",
    "check_torch",
    "compile_fx",
    "inductor_config",
    "list_mode_options",
    "reset_cudagraph_trees",
    "source_hash",
]
