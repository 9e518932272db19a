"""Inductor's caches: a warm process compiles nothing, an edited source compiles again."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PROGRAM = """
import json, torch, svdq_compile
from torch._dynamo.utils import counters
from svdq_compile.testing.weights import random_linear
layer = torch.nn.Sequential(*(random_linear(48, 48, generator=torch.Generator().manual_seed(i)) for i in range(2)))
x = torch.randn(4, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
with torch.no_grad():
    y = torch.compile(layer, backend="svdq", fullgraph=True)(x)
    assert torch.equal(y, layer(x))
names = ("fxgraph_cache_hit", "fxgraph_cache_miss", "fxgraph_cache_bypass")
found = {name: counters["inductor"][name] for name in names}
found["autograd_hit"] = counters["aot_autograd"]["autograd_cache_hit"]
print(json.dumps(found | {"home": svdq_compile.__file__}))
"""


@pytest.fixture
def process(tmp_path):
    """Runs the program on a copy of the sources, with an Inductor cache of its own."""
    copy = tmp_path / "sources"
    shutil.copytree(ROOT / "svdq_compile", copy / "svdq_compile", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "triton_kernels" / "svdq_kernels", copy / "svdq_kernels")
    environment = os.environ | {
        "PYTHONPATH": str(copy),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }

    def run() -> dict:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout.strip().splitlines()[-1])
        assert Path(found.pop("home")).is_relative_to(copy)
        return found

    run.sources = copy
    return run


def compiled(found: dict) -> bool:
    """Whether Inductor generated code; a cache that was passed by counts as a failure of the test's setting."""
    assert found["fxgraph_cache_bypass"] == 0, found
    return found["fxgraph_cache_miss"] > 0


def test_warm_process_compiles_nothing_and_an_edited_source_does(process):
    assert compiled(process())
    warm = process()
    assert not compiled(warm)
    assert warm["autograd_hit"] == 1
    for edited in ("svdq_compile/ops/reference.py", "svdq_kernels/__init__.py"):
        with (process.sources / edited).open("a") as file:
            file.write("\n# Edited.\n")
        assert compiled(process()), f"an edit of {edited} was answered from the cache"
        assert not compiled(process())
