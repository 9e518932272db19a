"""quantize: options, the calibration loop, and the pipeline folders it writes."""

import argparse
import filecmp
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import QwenImageTransformer2DModel

import svdq_compile
from svdq_compile.cli import main, quantize
from svdq_compile.errors import OptionError
from svdq_compile.testing.checkpoints import SMALL

DEMO = Path(__file__).parents[2] / "examples" / "demo" / "pipeline"
OTHERS = ("model_index.json", "scheduler", "text_encoder", "tokenizer", "vae")

needs_demo = pytest.mark.skipif(not DEMO.is_dir(), reason="needs the demo pipeline")


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a red three\n\n  a blue zwölf  \na black one\n", encoding="utf-8")
    return file


def linears(folder):
    return {row["name"]: row for row in svdq_compile.inspect(folder).to_dict()["linears"]}


def blocks(rows):
    return {int(name.split(".")[1]) for name in rows}


def same_files(left, right):
    names = [file.relative_to(left) for file in left.rglob("*") if file.is_file()]
    return names and all(filecmp.cmp(left / name, right / name, shallow=False) for name in names)


def test_read_prompts(prompts):
    assert quantize.read_prompts(prompts, None) == ["a red three", "a blue zwölf", "a black one"]
    assert quantize.read_prompts(prompts, 2) == ["a red three", "a blue zwölf"]
    with pytest.raises(OptionError, match="holds 3 prompts, needs 4"):
        quantize.read_prompts(prompts, 4)
    prompts.write_text("\n \n")
    with pytest.raises(OptionError, match="holds 0 prompts, needs 1"):
        quantize.read_prompts(prompts, None)
    prompts.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(OptionError, match="is not UTF-8"):
        quantize.read_prompts(prompts, None)


def test_the_loop_runs_every_prompt_through_the_model_it_is_given():
    calls, original, copied = [], torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)

    class Pipe:
        transformer = original

        def set_progress_bar_config(self, disable):
            assert disable

        def __call__(self, **options):
            assert self.transformer is copied
            calls.append({**options, "generator": options["generator"].initial_seed()})
            if options["prompt"] == "bad":
                raise ValueError

    pipe = Pipe()
    args = argparse.Namespace(negative_prompt="n", cfg=3.0, steps=7, width=32, height=48, seed=10)
    quantize.calibration(pipe, ["one", "two"], args)(copied)
    assert pipe.transformer is original
    assert calls[1] == {
        "prompt": "two",
        "negative_prompt": "n",
        "true_cfg_scale": 3.0,
        "num_inference_steps": 7,
        "width": 32,
        "height": 48,
        "generator": 11,
        "output_type": "latent",
    }
    assert [call["prompt"] for call in calls] == ["one", "two"]
    with pytest.raises(ValueError):
        quantize.calibration(pipe, ["bad"], args)(copied)
    assert pipe.transformer is original


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data-free", "--format", "fp8"], "--data-free makes nvfp4 and nvfp4_svd, not fp8"),
        (["--data-free", "--format", "nvfp4", "--all-svd"], "--all-svd is for --format nvfp4_svd, not nvfp4"),
        (["--data-free", "--format", "nvfp4", "--rank", "16"], "--rank is for --format nvfp4_svd, not nvfp4"),
        (["--data-free", "--all-svd"], "--data-free gives every linear of the quantised blocks a low-rank branch"),
        (["--data-free"], "the folder is no pipeline"),
        (["--data-free", "--transformer-only"], "no such file"),
        (["--prompts", "none.txt"], "No such file or directory: 'none.txt'"),
    ],
)
def test_what_is_refused_leaves_nothing_behind(tmp_path, monkeypatch, words, message, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    if "fp8" in words:
        words = [*words, "--transformer-only"]
    assert main(["quantize", "model", "--output", "out", *words]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["--count", "1"],
        ["--steps", "30"],
        ["--width", "64"],
        ["--height", "64"],
        ["--cfg", "4"],
        ["--negative-prompt", " "],
        ["--seed", "0"],
        ["--dtype", "float16"],
    ],
    ids=lambda words: words[0],
)
def test_options_of_the_calibration_are_refused_without_one(tmp_path, words, capsys):
    """Given at all: their defaults too would do nothing."""
    out = tmp_path / "out"
    assert main(["quantize", "model", "--output", str(out), "--data-free", "--transformer-only", *words]) == 1
    assert f"{words[0]} is for calibration with --prompts, not for --data-free" in capsys.readouterr().err
    assert not out.exists()


def test_options_of_the_calibration_and_their_defaults(monkeypatch):
    seen = []
    monkeypatch.setattr(quantize, "run", lambda args: seen.append(args) or 0)
    words = ["quantize", "model", "--output", "out", "--prompts", "prompts.txt", "--steps", "7", "--dtype", "float32"]
    assert main(words) == 0
    quantize.complete(seen[0])
    found = {name: getattr(seen[0], name) for name in quantize.CALIBRATION}
    assert found == {**quantize.CALIBRATION, "steps": 7, "dtype": "float32"}


def test_an_existing_transformer_is_never_overwritten(tmp_path, capsys):
    (tmp_path / "transformer").mkdir()
    assert main(["quantize", "model", "--output", str(tmp_path), "--data-free"]) == 1
    assert "exists; remove it or choose another --output" in capsys.readouterr().err


def test_an_output_inside_the_source_is_refused(tmp_path, capsys):
    (tmp_path / "model_index.json").write_text("{}")
    assert main(["quantize", str(tmp_path), "--output", str(tmp_path / "out"), "--data-free"]) == 1
    assert "lies inside" in capsys.readouterr().err


def test_data_free_transformer_alone(tmp_path, capsys):
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(**{**SMALL, "num_layers": 4})
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    words = ["quantize", str(tmp_path / "model"), "--data-free", "--transformer-only", "--device", "cpu"]
    assert main([*words, "--output", str(tmp_path / "out"), "--rank", "4", "--blocks-kept", "1"]) == 0
    assert capsys.readouterr().out == f"written: {tmp_path / 'out' / 'transformer'}\n"
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["transformer"]
    rows = linears(tmp_path / "out")
    assert blocks(rows) == {1, 2}
    assert {(row["format"], row["rank"]) for row in rows.values()} == {("nvfp4_svd", 4)}
    assert svdq_compile.load_transformer(tmp_path / "out").dtype == torch.bfloat16
    assert main([*words, "--output", str(tmp_path / "kept"), "--blocks-kept", "2"]) == 1
    assert "leaves none of 4" in capsys.readouterr().err


@needs_demo
def test_data_free_pipeline(tmp_path, prompts, capsys):
    out = tmp_path / "out"
    words = [
        "--output",
        str(out),
        "--data-free",
        "--format",
        "nvfp4",
        "--blocks-kept",
        "3",
        "--device",
        "cpu",
    ]
    assert main(["quantize", str(DEMO), *words]) == 0
    assert sorted(entry.name for entry in out.iterdir()) == sorted([*OTHERS, "transformer"])
    assert filecmp.cmp(out / "model_index.json", DEMO / "model_index.json", shallow=False)
    assert all(same_files(DEMO / name, out / name) for name in OTHERS if (DEMO / name).is_dir())
    assert {row["format"] for row in linears(out).values()} == {"nvfp4"}
    assert blocks(linears(out)) == {3, 4}
    again = ["quantize", str(out), "--output", str(tmp_path / "again"), "--device", "cpu"]
    assert main([*again, "--data-free"]) == 1
    assert main([*again, "--prompts", str(prompts)]) == 1
    assert capsys.readouterr().err.count("is quantised already") == 2


@needs_demo
def test_calibrated_pipeline(tmp_path, prompts):
    pytest.importorskip("modelopt")
    out = tmp_path / "out"
    words = ["--prompts", str(prompts), "--count", "1", "--steps", "1", "--width", "32", "--height", "32"]
    words += ["--rank", "4", "--all-svd", "--blocks-kept", "3", "--cfg", "1", "--device", "cpu"]
    assert main(["quantize", str(DEMO), "--output", str(out), *words]) == 0
    rows = linears(out)
    assert blocks(rows) == {3, 4}
    assert {(r["format"], r["rank"], r["smooth"], r["dynamic"]) for r in rows.values()} == {
        ("nvfp4_svd", 4, True, False)
    }
    assert sorted(entry.name for entry in out.iterdir()) == sorted([*OTHERS, "transformer"])


def test_the_rest_of_a_pipeline(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    for name in (
        "model_index.json",
        "vae/config.json",
        "transformer/config.json",
        ".cache/x",
        ".gitattributes",
    ):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    out.mkdir()
    quantize.copy_rest(source, out)
    files = sorted(str(file.relative_to(out)) for file in out.rglob("*") if file.is_file())
    assert files == ["model_index.json", "vae/config.json"]
    shutil.rmtree(source)
    assert (out / "vae" / "config.json").read_text() == "vae/config.json"
