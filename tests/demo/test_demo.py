"""The demo, small: real exports, a contact sheet, and SVDQuant ahead of NVFP4."""

import importlib.util
import json
import sys
from pathlib import Path

import diffusers
import pytest
import transformers
from PIL import Image

import svdq_compile

pytest.importorskip("modelopt")
pytest.importorskip("onnx")

RUN = Path(__file__).parents[2] / "examples" / "demo" / "run.py"
LIBRARIES = (diffusers, transformers)
"""Libraries that the demo silences."""


@pytest.fixture(scope="module")
def run():
    spec = importlib.util.spec_from_file_location("demo_run", RUN)
    module = importlib.util.module_from_spec(spec)
    # A dataclass looks its module up while it is being made.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def output(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    arguments = ["--output", str(folder), "--steps", "4", "--prompts", "2", "--device", "cpu", "--no-compile"]
    levels = [library.utils.logging.get_verbosity() for library in LIBRARIES]
    assert run.main(arguments) == 0
    for library, level in zip(LIBRARIES, levels):
        library.utils.logging.set_verbosity(level)
        library.utils.logging.enable_progress_bar()
    return folder


@pytest.mark.parametrize("algorithm", ["NVFP4", "NVFP4_SVD"])
def test_exports_are_pipelines_in_modelopt_format(output, algorithm):
    folder = output / algorithm.lower()
    found = svdq_compile.inspect(folder).to_dict()
    assert found["quant_algo"] == algorithm
    assert not found["warnings"]
    formats = {linear["format"] for linear in found["linears"]}
    assert formats == {"nvfp4"} | {algorithm.lower()}
    blocks = {int(linear["name"].split(".")[1]) for linear in found["linears"]}
    assert blocks == set(range(1, 7))
    for part in ("model_index.json", "scheduler", "text_encoder", "tokenizer", "vae"):
        assert (folder / part).exists()


def test_results(run, output):
    results = json.loads((output / "results.json").read_text())
    assert results["failures"] == []
    columns = {column["name"]: column for column in results["columns"]}
    assert tuple(columns) == run.COLUMNS
    bf16, nvfp4, svdquant, off = columns.values()
    assert bf16["error"] == 0
    assert bf16["psnr"] is None
    assert 0 < svdquant["error"] < nvfp4["error"] < off["error"]
    assert off["psnr"] < nvfp4["psnr"] < svdquant["psnr"]
    assert nvfp4["nbytes"] < svdquant["nbytes"] < bf16["nbytes"]
    assert svdquant["nbytes"] == off["nbytes"]


def test_contact_sheet(run, output):
    with Image.open(output / "contact_sheet.png") as sheet:
        assert sheet.width > len(run.COLUMNS) * run.SIZE
        assert sheet.height > 2 * run.SIZE
        assert len(sheet.getcolors(maxcolors=1 << 24)) > 100


def test_failures_name_what_is_wrong(run):
    def column(error, psnr):
        return run.Column("x", 1, 4.5, error, psnr, 0.0, None)

    bf16 = column(0.0, float("inf"))
    assert run.failures([bf16, column(0.2, 20), column(0.1, 25), column(1.0, 10)]) == []
    (same,) = run.failures([bf16, column(0.1, 20), column(0.1, 25), column(1.0, 10)])
    assert "not clearly below NVFP4's" in same
    (blurred,) = run.failures([bf16, column(0.2, 25), column(0.1, 20), column(1.0, 10)])
    assert "not above NVFP4's" in blurred
    assert len(run.failures([bf16, column(0.2, 20), column(0.1, 25), column(0.1, 25)])) == 2
    assert run.failures([bf16, column(0.2, 20), column(float("nan"), 25), column(1.0, 10)])
