"""generate on a small trained pipeline: the pictures stock diffusers draws, quantised, compiled."""

import json
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from diffusers import DiffusionPipeline, QwenImageTransformer2DModel
from PIL import Image

from svdq_compile import load_transformer, save_checkpoint
from svdq_compile.cli import generate, main
from svdq_compile.cuda_graphs.captured import Captured
from svdq_compile.testing.checkpoints import SMALL, example_inputs

DEMO = Path(__file__).parents[2] / "examples" / "demo" / "pipeline"
PROMPT = "a red three"
SMALLEST = ["--prompt", PROMPT, "--steps", "1", "--width", "64", "--height", "64", "--device", "cpu"]

pytestmark = pytest.mark.skipif(not DEMO.is_dir(), reason="needs the demo pipeline")


def pixels(file):
    return numpy.asarray(Image.open(file))


def own_transformer(folder, edit_index=None):
    """A pipeline folder with the demo's parts but without a transformer."""
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("transformer"))
    if edit_index is not None:
        index = folder / "model_index.json"
        index.write_text(json.dumps({**json.loads(index.read_text()), **edit_index}))
    return folder


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """A pipeline folder whose transformer is an NVFP4 checkpoint."""
    folder = own_transformer(tmp_path_factory.mktemp("quantised") / "pipeline")
    save_checkpoint(load_transformer(DEMO, quantize="nvfp4", blocks_kept=0), folder / "transformer")
    return folder


def draw(model, output, *more):
    assert main(["generate", "--model", str(model), "--output", str(output), *SMALLEST, *more]) == 0


def test_pictures_are_those_of_stock_diffusers(tmp_path, capsys):
    draw(DEMO, tmp_path / "new" / "x.png", "--count", "2", "--seed", "5", "--steps", "2", "--cfg", "3")
    files = sorted(file.name for file in (tmp_path / "new").iterdir())
    assert files == ["x-5.png", "x-6.png", "x.png"]
    out = capsys.readouterr().out
    assert [line.split()[:2] for line in out.splitlines()] == [
        ["seed", "5:"],
        ["seed", "6:"],
        ["contact", "sheet:"],
    ]
    assert " s  " in out.splitlines()[0]
    pipe = DiffusionPipeline.from_pretrained(DEMO, dtype=torch.bfloat16)
    sizes = {"width": 64, "height": 64, "num_inference_steps": 2}
    generator = torch.Generator().manual_seed(6)
    image = pipe(PROMPT, negative_prompt=" ", true_cfg_scale=3.0, generator=generator, **sizes).images[0]
    assert numpy.array_equal(pixels(tmp_path / "new" / "x-6.png"), numpy.asarray(image))
    sheet = pixels(tmp_path / "new" / "x.png")
    assert numpy.array_equal(sheet[:, 64:], numpy.asarray(image))
    assert numpy.array_equal(sheet[:, :64], pixels(tmp_path / "new" / "x-5.png"))


def test_a_quantised_pipeline_and_a_quantised_transformer(quantised, tmp_path):
    draw(DEMO, tmp_path)
    stock = pixels(tmp_path / "0.png")
    draw(quantised, tmp_path / "own.png")
    draw(DEMO, tmp_path / "given.png", "--transformer", str(quantised))
    own = pixels(tmp_path / "own.png")
    assert numpy.array_equal(own, pixels(tmp_path / "given.png"))
    assert not numpy.array_equal(own, stock)
    draw(quantised, tmp_path / "modelopt.png", "--compute", "modelopt")
    assert not numpy.array_equal(own, pixels(tmp_path / "modelopt.png"))
    draw(quantised, tmp_path / "dense.png", "--transformer", str(DEMO / "transformer"))
    assert numpy.array_equal(stock, pixels(tmp_path / "dense.png"))


def test_storage(quantised, tmp_path, capsys):
    """A quantised transformer's storage and bytes are printed; fp8 mode draws from either storage."""
    sizes = {}
    for storage in ("packed", "expanded"):
        draw(quantised, tmp_path / f"{storage}.png", "--compute", "fp8", "--storage", storage)
        first, second = capsys.readouterr().out.splitlines()
        assert first.startswith(f"transformer: {storage}, ")
        assert second.startswith("seed 0: ")
        sizes[storage] = float(first.split()[2])
        assert pixels(tmp_path / f"{storage}.png").std() > 0
    assert sizes["packed"] < sizes["expanded"]


def test_a_storage_that_has_not_what_the_mode_needs(quantised, tmp_path, capsys):
    words = ["--model", str(quantised), "--output", str(tmp_path), *SMALLEST]
    assert main(["generate", *words, "--compute", "modelopt", "--storage", "expanded"]) == 1
    assert "compute='modelopt' needs the 4-bit codes" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--compute", "fp8"], ["--storage", "expanded"]], ids=lambda words: words[0])
def test_what_is_for_quantised_linears_needs_some(quantised, tmp_path, words, capsys):
    """The model's own transformer counts, unless another is given."""
    for more, dense in (([str(DEMO)], DEMO), ([str(quantised), "--transformer", str(DEMO)], DEMO)):
        assert main(["generate", *SMALLEST, "--output", str(tmp_path / "out"), *words, "--model", *more]) == 1
        message = f"{' '.join(words)} is for quantised linears, and {dense} has none: give a quantised checkpoint"
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    draw(DEMO, tmp_path, *words, "--transformer", str(quantised))


def test_a_pipeline_that_needs_a_picture(tmp_path, capsys):
    folder = own_transformer(tmp_path / "pipeline", {"_class_name": "QwenImageImg2ImgPipeline"})
    words = ["--model", str(folder), "--transformer", str(DEMO), *SMALLEST]
    assert main(["generate", *words, "--output", str(tmp_path)]) == 1
    assert "QwenImageImg2ImgPipeline needs image; only prompts" in capsys.readouterr().err


def test_compile_whole_and_regional(monkeypatch, fresh_dynamo):
    seen = []

    def count(gm, example_inputs, mode=None):
        seen.append(mode)
        return gm.forward

    model = QwenImageTransformer2DModel(**SMALL).eval()
    pipe = type("Pipe", (), {"transformer": model})()
    words = ["--model", "m", "--prompt", "p"]
    args = generate_options(monkeypatch, *words, "--compile", "regional", "--mode", "max-autotune")
    args.backend = count
    generate.prepare(pipe, args)
    blocks = model.transformer_blocks
    assert model._compiled_call_impl is None
    assert all(block._compiled_call_impl is not None for block in blocks)
    inputs = example_inputs(model, dtype=torch.float32)
    model(**inputs)
    # Blocks of one kind share the code.
    assert seen == ["max-autotune"]
    for block in blocks:
        block._compiled_call_impl = None
    args = generate_options(monkeypatch, *words, "--compile", "whole")
    args.backend = count
    generate.prepare(pipe, args)
    assert model._compiled_call_impl is not None
    assert all(block._compiled_call_impl is None for block in blocks)


def test_capture_comes_last(monkeypatch, fresh_dynamo):
    model = QwenImageTransformer2DModel(**SMALL).eval()
    pipe = type("Pipe", (), {"transformer": model})()
    words = ["--model", "m", "--prompt", "p", "--compile", "whole", "--backend", "eager"]
    generate.prepare(pipe, generate_options(monkeypatch, *words))
    compiled = type(model._compiled_call_impl)
    generate.prepare(pipe, generate_options(monkeypatch, *words, "--capture"))
    handle = model._compiled_call_impl
    assert isinstance(handle, Captured)
    handle.release()
    assert type(model._compiled_call_impl) is compiled


def test_attention_backend(monkeypatch):
    model = QwenImageTransformer2DModel(**SMALL).eval()
    pipe = type("Pipe", (), {"transformer": model})()
    words = ["--model", "m", "--prompt", "p", "--attention"]
    generate.prepare(pipe, generate_options(monkeypatch, *words, "native"))
    assert {str(b.attn.processor._attention_backend.value) for b in model.transformer_blocks} == {"native"}
    with pytest.raises(generate.OptionError, match="--attention: "):
        generate.prepare(pipe, generate_options(monkeypatch, *words, "nativ"))


def generate_options(monkeypatch, *words):
    seen = []
    monkeypatch.setattr(generate, "run", lambda args: seen.append(generate.settings(args)) or 0)
    assert main(["generate", *words]) == 0
    return seen[0]
