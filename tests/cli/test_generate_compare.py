"""generate --compare: a sheet of checkpoints and compute modes next to the pipeline's own transformer."""

import argparse
import math
import re
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from svdq_compile import load_transformer, save_checkpoint
from svdq_compile.cli import compare, main
from svdq_compile.cli.common import short_name
from svdq_compile.cli.compare import Candidate, parse_candidate

DEMO = Path(__file__).parents[2] / "examples" / "demo" / "pipeline"
SMALLEST = ["--prompt", "a red three", "--steps", "2", "--width", "64", "--height", "64", "--cfg", "2.5"]

pytestmark = pytest.mark.skipif(not DEMO.is_dir(), reason="needs the demo pipeline")


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """A pipeline folder whose transformer is an NVFP4 checkpoint."""
    folder = tmp_path_factory.mktemp("quantised") / "small"
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("transformer"))
    save_checkpoint(load_transformer(DEMO, quantize="nvfp4", blocks_kept=3), folder / "transformer")
    return folder


def generate(*words):
    return main(["generate", "--model", str(DEMO), *SMALLEST, "--device", "cpu", *map(str, words)])


def pictures_in(sheet, columns, rows):
    """The pictures of a sheet, column by column, from where their size of 192 and the first row's heading put them."""
    whole = numpy.asarray(Image.open(sheet).convert("RGB"))
    background = whole[-1, -1]
    filled = (whole != background).any(axis=2)
    # Pictures have white corners; labels and headings do not fill whole lines of 192.
    lines = numpy.lib.stride_tricks.sliding_window_view(filled, 192, axis=1).all(axis=2)
    starts = [y for y in range(1, len(lines)) if lines[y].any() and not lines[y - 1].any()]
    assert len(starts) == rows
    lefts = numpy.nonzero(lines[starts[0]])[0]
    assert len(lefts) == columns
    return [[whole[y : y + 192, x : x + 192][::3, ::3] for y in starts] for x in lefts]


def test_sheet_and_figures(quantised, tmp_path, capsys):
    assert generate("--output", tmp_path / "own") == 0
    for mode in ("nvfp4", "bf16"):
        words = ["--transformer", quantised, "--compute", mode, "--count", 2, "--seed", 0]
        assert generate(*words, "--output", tmp_path / mode) == 0
    capsys.readouterr()
    words = ["--transformer", quantised, "--compare", "nvfp4,bf16", "--count", 2]
    assert generate(*words, "--output", tmp_path / "new" / "sheet.png") == 0
    drawn = pictures_in(tmp_path / "new" / "sheet.png", columns=3, rows=2)
    own, nvfp4, bf16 = drawn
    assert numpy.array_equal(own[0], numpy.asarray(Image.open(tmp_path / "own" / "0.png")))
    for mode, column in (("nvfp4", nvfp4), ("bf16", bf16)):
        for seed in range(2):
            assert numpy.array_equal(column[seed], numpy.asarray(Image.open(tmp_path / mode / f"{seed}.png")))
    lines = capsys.readouterr().out.splitlines()
    for mode, column in (("nvfp4", nvfp4), ("bf16", bf16)):
        for seed in range(2):
            error = (column[seed].astype(float) - own[seed]) / 255
            psnr = -10 * math.log10((error**2).mean())
            (line,) = [line for line in lines if line.startswith(f"{mode}, seed {seed}: ")]
            assert f"PSNR {psnr:.2f} dB  SSIM 0." in line


def test_several_checkpoints(quantised, tmp_path, capsys):
    """A checkpoint keeps its tensors over its modes; the pipeline's own one is the reference to the bit."""
    items = f"{quantised}:fp8,{quantised / 'transformer'}:nvfp4,{DEMO}"
    assert generate("--compare", items, "--output", tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split(", seed ")[0] for line in lines if ", seed " in line]
    assert names == ["small: fp8", "small: nvfp4", "pipeline: auto"]
    assert "pipeline: auto, seed 0: PSNR inf dB  SSIM 1.000" in lines
    assert (tmp_path / compare.SHEET).is_file()


def test_compiled(quantised, tmp_path, capsys, fresh_dynamo):
    """Every mode is compiled anew; the pictures are the eager ones."""
    words = ["--transformer", quantised, "--compare", "nvfp4,bf16", "--steps", 1]
    assert generate(*words, "--output", tmp_path / "eager.png") == 0
    assert generate(*words, "--output", tmp_path / "compiled.png", "--compile", "regional", "--backend", "eager") == 0
    eager, compiled = (pictures_in(tmp_path / f"{name}.png", 3, 1) for name in ("eager", "compiled"))
    for x, y in zip(eager, compiled, strict=True):
        assert numpy.array_equal(x[0], y[0])


def test_transformers_are_loaded_once_and_one_at_a_time(quantised, monkeypatch):
    loaded, prepared = [], []

    def load(path, device, dtype, *, compute, storage):
        assert pipe.transformer is None
        loaded.append((path, compute))
        return load_transformer(path, device, dtype, compute=compute, storage=storage)

    monkeypatch.setattr("svdq_compile.model.load.load_transformer", load)
    pipe = type("Pipe", (), {"transformer": None, "device": torch.device("cpu")})()
    options = type("Options", (), {"compile": "none", "dtype": "bfloat16", "storage": "packed"})()
    asked = [Candidate(str(quantised), "fp8"), Candidate(str(quantised), "bf16"), Candidate(str(DEMO), "auto")]
    modes = []
    for candidate in compare.loaded(pipe, options, asked, lambda pipe, options: prepared.append(pipe.transformer)):
        weight = pipe.transformer.transformer_blocks[3].attn.to_q.weight
        modes.append((candidate.compute, getattr(weight, "fingerprint", None) and weight.fingerprint.compute))
    assert loaded == [(str(quantised), "fp8"), (str(DEMO), "auto")]
    assert len(prepared) == 2
    assert modes == [("fp8", "fp8"), ("bf16", "bf16"), ("auto", None)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("fp8", Candidate(None, "fp8")),
        ("folder", Candidate("folder", None)),
        ("a/folder:bf16", Candidate("a/folder", "bf16")),
        ("C:\\folder", Candidate("C:\\folder", None)),
        ("./fp8", Candidate("./fp8", None)),
        ("owner/name:modelopt", Candidate("owner/name", "modelopt")),
    ],
)
def test_what_may_be_compared(text, found):
    assert parse_candidate(text) == found


def test_refusals(quantised, capsys):
    assert generate("--compare", "nvfp4") == 1
    assert "--compare nvfp4 is a mode of --transformer, which is not given" in capsys.readouterr().err
    words = ["--model", quantised, "--transformer", quantised, "--compare", "nvfp4"]
    assert generate(*words) == 1
    assert "--compare needs an unquantised pipeline" in capsys.readouterr().err


@pytest.mark.parametrize("item", ["fp4", "no/such/folder", "no/such/folder:fp8", "./fp8", "owner/name:fp4", ":fp8"])
def test_what_is_no_mode_and_no_checkpoint_is_refused_early(tmp_path, monkeypatch, item, capsys):
    """Before the pipeline, which would be refused too, is looked at."""
    monkeypatch.chdir(tmp_path)
    assert generate("--model", "nowhere", "--transformer", DEMO, "--compare", f"nvfp4,{item}") == 1
    error = capsys.readouterr().err
    assert f"--compare {item}: neither a compute mode (auto, nvfp4, fp8, bf16, modelopt) nor a checkpoint" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--transformer", DEMO, "--compare", f"{DEMO}:fp8,{DEMO}"], "--transformer .* does nothing"),
        (["--transformer", DEMO, "--compute", "bf16", "--compare", f"nvfp4,{DEMO}:fp8"], "--compute bf16 does nothing"),
    ],
)
def test_options_that_no_item_takes_are_refused_early(words, message, capsys):
    assert generate("--model", "nowhere", *words) == 1
    assert re.search(message, capsys.readouterr().err)


def test_what_may_be_on_the_hub_is_not_refused():
    asked = [Candidate("owner/name", None), Candidate("owner/name", "fp8")]
    options = argparse.Namespace(compare=asked, transformer=None, compute="bf16")
    assert compare.resolve(options) == [Candidate("owner/name", "bf16"), Candidate("owner/name", "fp8")]


@pytest.mark.parametrize(
    ("checkpoint", "name"),
    [("a/b", "b"), ("a/b/transformer", "b"), ("transformer", "transformer"), ("owner/name", "name"), ("x.st", "x.st")],
)
def test_short_names(checkpoint, name):
    assert short_name(checkpoint) == name
