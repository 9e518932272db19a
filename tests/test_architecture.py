"""The house's own rules: who may import whom, what importing costs, and where files lie."""

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "svdq_compile").rglob("*.py"))
KERNELS = sorted((ROOT / "triton_kernels").rglob("*.py"))

LAYERS = {
    "checkpoint": {"spec", "errors", "dtypes", "checkpoint"},
    "ops": {"spec", "errors", "dtypes", "ops", "svdq_kernels"},
    "passes": {"spec", "errors", "_compat", "ops", "passes"},
    "lowering": {"spec", "errors", "dtypes", "_compat", "ops", "lowering", "svdq_kernels"},
    "model": {"spec", "errors", "dtypes", "checkpoint", "ops", "model", "quantization"},
    "cuda_graphs": {"errors", "_compat", "model", "cuda_graphs"},
    "quantization": {"spec", "errors", "dtypes", "checkpoint", "ops", "model", "quantization"},
    "spec": set(),
    "errors": set(),
    "dtypes": set(),
}
"""Package or module -> what of ours it may import."""


def imports(file: Path) -> set[str]:
    """Top-level names of ours that a file imports: a sub-package or module of svdq_compile, or svdq_kernels."""
    relative = file.relative_to(ROOT).with_suffix("").parts
    package = list(relative[:-1])
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module.split(".") if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "svdq_kernels":
                found.add("svdq_kernels")
            elif parts[0] == "svdq_compile" and len(parts) > 1:
                found.add(parts[1])
    return found


def layer_of(file: Path) -> str:
    return file.relative_to(ROOT / "svdq_compile").with_suffix("").parts[0]


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(ROOT)))
def test_import_arrows(file):
    layer = layer_of(file)
    found = imports(file)
    assert "backend" not in found, "nothing imports backend"
    if layer in LAYERS:
        assert found <= LAYERS[layer], f"{layer} must not import {sorted(found - LAYERS[layer])}"


def test_the_arrow_test_sees_imports():
    found = imports(ROOT / "svdq_compile" / "passes" / "insert_linear.py")
    assert {"ops", "_compat", "spec"} <= found


@pytest.mark.parametrize("file", KERNELS, ids=lambda f: str(f.relative_to(ROOT)))
def test_kernels_import_torch_and_triton_only(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        else:
            continue
        assert {n.split(".")[0] for n in names} <= {"__future__", "torch", "triton"}, names


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(ROOT)))
def test_private_torch_symbols_live_in_one_module(file):
    if file.name in ("_compat.py", "fake_gpu.py"):
        return
    for node in ast.walk(ast.parse(file.read_text())):
        module = node.module if isinstance(node, ast.ImportFrom) and not node.level else ""
        assert not (module or "").startswith("torch._inductor"), module
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("torch._inductor") for alias in node.names)


def test_files_stay_small():
    sizes = sorted(len(f.read_text().splitlines()) for f in (*SOURCES, *KERNELS))
    assert sizes[-1] <= 600
    assert sizes[len(sizes) // 2] <= 200


def test_the_kernels_folder_is_no_package():
    """``triton_kernels`` is another project's import name."""
    assert not (ROOT / "triton_kernels" / "__init__.py").exists()


def in_fresh_process(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT / "tests"
    ).stdout.strip()


def test_importing_the_package_is_cheap():
    code = "import svdq_compile, sys; print(*(m for m in sys.modules))"
    modules = set(in_fresh_process(code).split())
    for heavy in (
        "torch",
        "torch._dynamo",
        "torch._inductor",
        "diffusers",
        "modelopt",
        "triton",
        "transformers",
    ):
        assert heavy not in modules


def test_using_weights_needs_no_compiler():
    code = "import svdq_compile.ops.weight, sys; print(*(m for m in sys.modules))"
    modules = set(in_fresh_process(code).split())
    assert not modules & {"torch._inductor.compile_fx", "diffusers", "modelopt"}


def test_every_public_name_resolves():
    import svdq_compile

    for name in svdq_compile.__all__:
        assert getattr(svdq_compile, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = svdq_compile.nonsense


def test_the_backend_is_found_by_its_string_alone():
    """The first thing a fresh process does is a compilation; no import of ours comes before."""
    code = (
        "import torch; m = torch.nn.Linear(4, 4); x = torch.ones(2, 4);"
        "print(torch.allclose(torch.compile(m, backend='svdq', fullgraph=True)(x), m(x)))"
    )
    assert in_fresh_process(code) == "True"
    entries = importlib.metadata.entry_points(group="torch_dynamo_backends")
    assert {e.value for e in entries if e.name == "svdq"} == {"svdq_compile.backend:svdq"}
