"""verify --denoise on the demo pipeline: pictures, their figures, and linears on the inputs of a denoising run."""

import json
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from svdq_compile import load_transformer, save_checkpoint
from svdq_compile.cli import _parser, main, verify
from svdq_compile.model.resident import resident

DEMO = Path(__file__).parents[2] / "examples" / "demo" / "pipeline"
PROMPTS = ("a red three", "a blue seven on a white background")
DENOISE = ["--denoise", "--steps", "2", "--width", "64", "--height", "64", "--cfg", "2.5", "--device", "cpu"]

pytestmark = pytest.mark.skipif(not DEMO.is_dir(), reason="needs the demo pipeline")


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """A transformer folder, quantised without data."""
    folder = tmp_path_factory.mktemp("quantised") / "nvfp4"
    save_checkpoint(load_transformer(DEMO, quantize="nvfp4", blocks_kept=3), folder)
    return folder


def test_pictures(quantised, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{PROMPTS[1]}\n")
    words = ["verify", str(quantised), str(DEMO), "--against", str(DEMO), *DENOISE, "--seed", "0,5", "--json"]
    words += ["--prompt", PROMPTS[0], "--prompts", str(prompts), "--compute", "nvfp4,bf16"]
    assert main([*words, "--sheet", str(tmp_path / "new" / "sheet.png")]) == 0
    data = json.loads(capsys.readouterr().out)
    # 2 prompts with 2 seeds, 2 steps of 2 calls each.
    assert data["inputs"] == "16 forward passes of the reference's denoising"
    plan = data["denoising"]
    assert (plan["prompts"], plan["seeds"], plan["steps"], plan["cfg"]) == (list(PROMPTS), [0, 5], 2, 2.5)
    nvfp4, bf16, *same = data["comparisons"]
    for row in (nvfp4, bf16):
        pictures = row["denoising"]["pictures"]
        assert [(p["prompt"], p["seed"]) for p in pictures] == [(p, s) for p in PROMPTS for s in (0, 5)]
        assert all(15 < p["psnr"] < 60 and 0.5 < p["ssim"] < 1 for p in pictures)
        assert row["denoising"]["worst_psnr"] == min(p["psnr"] for p in pictures)
        assert row["model"]["sqnr"] > 5
    assert bf16["model"]["sqnr"] > nvfp4["model"]["sqnr"]
    for row in same:
        assert row["denoising"]["psnr"] is None
        assert row["denoising"]["ssim"] == 1
        assert row["model"]["error"] == 0
    with Image.open(tmp_path / "new" / "sheet.png") as sheet:
        assert sheet.width > 5 * 192
        assert sheet.height > 4 * 192


def test_text(quantised, capsys):
    words = ["verify", str(quantised), "--against", str(DEMO), *DENOISE, "--prompt", PROMPTS[0], "--brief"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "PSNR in dB, SSIM and LPIPS: mean and worst of 1 pictures"
    assert lines[2].split()[2:] == ["worst", "median", "best", "model", "PSNR", "worst", "SSIM", "worst", "LPIPS"]
    figures = lines[3].split()[2:]
    # One picture is the mean and the worst.
    assert (figures[4], figures[6]) == (figures[5], figures[7])


def test_why_there_is_no_lpips(quantised, capsys, monkeypatch):
    monkeypatch.setattr("svdq_compile.quality.denoise.load_lpips", lambda: (None, "no package"))
    words = ["verify", str(quantised), "--against", str(DEMO), *DENOISE, "--prompt", PROMPTS[0], "--brief"]
    assert main(words) == 0
    *_, row, reason = capsys.readouterr().out.splitlines()
    assert row.split()[-1] == "-"
    assert reason == "LPIPS: no package"


def test_a_pipeline_of_its_own(quantised, tmp_path, capsys):
    """The reference is --against, wherever the rest of the pipeline comes from, in the reference's dtype."""
    wide = tmp_path / "wide"
    load_transformer(DEMO, dtype=torch.float32).save_pretrained(wide)
    words = ["verify", str(quantised), "--against", str(wide), "--model", str(DEMO), *DENOISE, "--brief"]
    assert main([*words, "--prompt", PROMPTS[0], "--sheet", str(tmp_path / "sheet.png"), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["comparisons"]
    assert row["reference_resident"]["nbytes"] == 2 * resident(load_transformer(DEMO)).nbytes
    assert row["model"]["sqnr"] > 5
    assert numpy.asarray(Image.open(tmp_path / "sheet.png")).std() > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--denoise", "--prompt", "p", "--tokens", "64"], "--tokens is for random inputs, not for --denoise"),
        (["--seed", "0,1"], "--seed: random inputs have one; several are for --denoise, which is not given"),
        (["--denoise"], "--denoise needs a prompt"),
        (["--denoise", "--prompt", "p", "--sheet", "x.jpg"], "--sheet x.jpg is no PNG file"),
    ],
)
def test_what_contradicts_itself_is_refused_early(words, message, capsys):
    assert main(["verify", "nowhere", "--against", "nowhere", *words]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["--model", "m"],
        ["--prompt", "p"],
        ["--prompts", "p.txt"],
        ["--negative-prompt", " "],
        ["--steps", "50"],
        ["--width", "64"],
        ["--height", "64"],
        ["--cfg", "4"],
        ["--sheet", "x.png"],
    ],
    ids=lambda words: words[0],
)
def test_options_of_pictures_are_refused_without_them(words, capsys):
    """Given at all: their defaults too would do nothing."""
    assert main(["verify", "nowhere", "--against", "nowhere", *words]) == 1
    assert f"{words[0]} is for --denoise, which is not given" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--denoise"]], ids=["random", "denoise"])
def test_options_and_their_defaults(more):
    args = _parser().parse_args(["verify", "nowhere", "--against", "nowhere", *more])
    verify.complete(args)
    defaults = verify.DRAWING | verify.RANDOM
    assert {name: getattr(args, name) for name in defaults} == defaults
    assert args.denoise == bool(more)


@pytest.mark.parametrize("words", [["--compute", "fp8,int4"], ["--seed", "one"]])
def test_bad_values(words):
    with pytest.raises(SystemExit) as left:
        main(["verify", "nowhere", "--against", "nowhere", *words])
    assert left.value.code == 2
