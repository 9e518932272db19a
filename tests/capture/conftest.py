"""Captured models on the CPU, by graphs that re-execute; a pipeline's denoising loop anywhere."""

from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline

from svdq_compile.cuda_graphs.captured import install
from svdq_compile.testing.fake_graphs import FakeGraphs
from svdq_compile.testing.random_model import random_transformer


@pytest.fixture
def model():
    return random_transformer()


@pytest.fixture
def captured():
    """``captured(model, max_shapes=8, strict=True, **of_FakeGraphs) -> (handle, graphs)``; released at the end."""
    handles = []

    def make(model, max_shapes=8, strict=True, **options):
        graphs = FakeGraphs(model, **options)
        handles.append(install(model, max_shapes, strict, graphs))
        return handles[-1], graphs

    yield make
    for handle in handles:
        handle.release()


@pytest.fixture
def denoise():
    """``denoise(transformer, seed, steps, size, prompts)``: latents of ``QwenImagePipeline`` with guidance.

    ``size`` is height and width in pixels, ``prompts`` the tokens of the prompt and of the negative one, which are
    random. The transformer has 64 input channels, which the pipeline packs 2 x 2.

    Bits of a compiled one are the same from its second step on: code for the second prompt is code for any length and
    serves the first prompt too from then on, and Inductor times kernels of its own for each.
    """
    demo = Path(__file__).parents[2] / "examples" / "demo" / "pipeline"

    def run(transformer, seed, steps=20, size=(64, 96), prompts=(9, 4)):
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(demo, subfolder="scheduler")
        pipe = QwenImagePipeline(
            scheduler=scheduler, vae=None, text_encoder=None, tokenizer=None, transformer=transformer
        )
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(seed)
        given = {}
        for name, text in zip(("prompt", "negative_prompt"), prompts, strict=True):
            embeds = torch.randn(1, text, transformer.config.joint_attention_dim, generator=generator)
            given[f"{name}_embeds"] = embeds.to(transformer.device, transformer.dtype)
            given[f"{name}_embeds_mask"] = torch.ones(1, text, dtype=torch.long, device=transformer.device)
        return pipe(
            **given,
            true_cfg_scale=4.0,
            num_inference_steps=steps,
            height=size[0],
            width=size[1],
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
        ).images

    return run
