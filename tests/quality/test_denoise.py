"""Denoising runs: what is drawn, with whose transformer, and what is kept of it."""

import math

import numpy
import pytest
import torch
from PIL import Image
from torch import nn

import svdq_compile
from svdq_compile.errors import OptionError
from svdq_compile.quality.denoise import Denoising, DenoisingRun, pixels
from svdq_compile.quality.record import Call, recorded, spread

PLAN = Denoising(("a", "b"), (3, 4), steps=6, width=16, height=16, cfg=2.0, negative_prompt="n")


class Transformer(nn.Module):
    """Adds a constant."""

    dtype = torch.bfloat16

    def __init__(self, added):
        super().__init__()
        self.added = added

    def forward(self, *, x):
        if math.isnan(self.added):
            raise RuntimeError("broken")
        return (x + self.added,)


class Pipe:
    """A pipeline whose pictures are noise of the seed, moved by the transformer at every step, twice."""

    def __init__(self, added):
        self.transformer = Transformer(added)
        self.asked = []

    def __call__(self, *, prompt, generator, num_inference_steps, width, height, **options):
        self.asked.append((prompt, generator.initial_seed(), options))
        x = torch.rand(height, width, 3, generator=generator) / 2
        for _ in range(num_inference_steps):
            x = self.transformer(x=x)[0]
            x = self.transformer(x=x)[0]
        image = Image.fromarray((x.clamp(0, 1) * 255).round().byte().numpy())
        return type("Output", (), {"images": [image]})


def test_prompts_that_are_one_text_are_refused():
    """It would be drawn letter by letter."""
    with pytest.raises(OptionError, match="not the string 'a red seven': \\('a red seven',\\)"):
        Denoising(prompts=("a red seven"))
    assert Denoising(prompts=["a red seven"]).pictures == [("a red seven", 0)]


def test_the_same_transformer():
    pipe = Pipe(0.0)
    run = svdq_compile.DenoisingRun(pipe, PLAN)
    pictures = run.compare(pipe.transformer, "same")
    assert [(row.prompt, row.seed) for row in pictures.rows] == [("a", 3), ("a", 4), ("b", 3), ("b", 4)]
    assert {(row.psnr, row.ssim) for row in pictures.rows} == {(math.inf, 1.0)}
    assert (pictures.psnr, pictures.worst_psnr, pictures.ssim, pictures.worst_ssim) == (math.inf, math.inf, 1.0, 1.0)
    assert pictures.to_dict()["psnr"] is None
    assert (run.name, pictures.name) == ("BF16", "same")
    asked = [("a", 3), ("a", 4), ("b", 3), ("b", 4)] * 2
    assert pipe.asked == [(*which, {"negative_prompt": "n", "true_cfg_scale": 2.0}) for which in asked]


def test_another_transformer_takes_the_place_for_the_call_only():
    pipe = Pipe(0.0)
    own = pipe.transformer
    run = DenoisingRun(pipe, PLAN)
    # 12 calls lift every pixel by 0.1.
    pictures = run.compare(Transformer(0.1 / 12))
    assert pipe.transformer is own
    assert pictures.psnr == pytest.approx(20, abs=0.4)
    assert pictures.worst_psnr == min(row.psnr for row in pictures.rows) <= pictures.psnr
    assert pictures.worst_ssim == min(row.ssim for row in pictures.rows) <= pictures.ssim < 1
    with pytest.raises(RuntimeError, match="broken"):
        run.compare(Transformer(math.nan))
    assert pipe.transformer is own


def test_figures_are_those_of_the_pictures_that_are_kept():
    run = DenoisingRun(Pipe(0.0), PLAN)
    pictures = run.compare(Transformer(0.02))
    for row, x, y in zip(pictures.rows, pictures.images, run.images, strict=True):
        error = (numpy.asarray(x).astype(float) - numpy.asarray(y)) / 255
        assert row.psnr == pytest.approx(-10 * math.log10((error**2).mean()))


def test_pixels():
    image = Image.new("RGB", (3, 2), (255, 51, 0))
    assert pixels(image).shape == (1, 3, 2, 3)
    assert pixels(image)[0, :, 1, 2].tolist() == [1.0, 0.2, 0.0]


def test_lpips_where_there_is_one(monkeypatch):
    monkeypatch.setattr("svdq_compile.quality.denoise.load_lpips", lambda: (lambda x, y: (x - y).abs().max(), ""))
    run = DenoisingRun(Pipe(0.0), PLAN)
    assert run.lpips_missing == ""
    pictures = run.compare(Transformer(0.0))
    assert {row.lpips for row in pictures.rows} == {0.0}
    assert pictures.lpips == 0.0
    assert str(pictures.rows[0]).endswith("LPIPS 0.000")
    monkeypatch.setattr("svdq_compile.quality.denoise.load_lpips", lambda: (None, "why"))
    run = DenoisingRun(Pipe(0.0), PLAN)
    assert run.lpips_missing == "why"
    pictures = run.compare(Transformer(0.0))
    assert pictures.lpips is None
    assert "LPIPS" not in str(pictures.rows[0])


def test_calls_that_are_kept():
    pipe = Pipe(0.01)
    run = DenoisingRun(pipe, PLAN, kept_steps=3)
    # Of 6 steps the first, third and fifth; two calls each, for four pictures.
    assert len(run.calls) == 3 * 2 * 4
    first = run.calls[0].inputs["x"]
    for call, steps in zip(run.calls[:6], (0, 1, 4, 5, 8, 9), strict=True):
        assert torch.allclose(call.inputs["x"], first + 0.01 * steps)
        assert torch.equal(call.output, call.inputs["x"] + 0.01)
    assert not pipe.transformer._forward_hooks
    assert DenoisingRun(pipe, PLAN).calls == []


@pytest.mark.parametrize(
    ("calls", "steps", "kept", "expected"),
    [
        (8, 4, 2, [0, 1, 4, 5]),
        (4, 4, 2, [0, 2]),
        (6, 3, 10, [0, 1, 2, 3, 4, 5]),
        (20, 10, 4, [0, 1, 4, 5, 8, 9, 12, 13, 16, 17]),
    ],
)
def test_spread(calls, steps, kept, expected):
    assert [call.inputs for call in spread([Call(i, None) for i in range(calls)], steps, kept)] == expected


def test_no_hook_stays_behind():
    model = Transformer(math.nan)
    with pytest.raises(RuntimeError, match="broken"), recorded(model):
        model(x=torch.zeros(1))
    assert not model._forward_hooks
