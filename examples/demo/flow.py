"""The denoiser: a small QwenImageTransformer2DModel trained with rectified flow."""

from unittest import mock

import torch
import torch.nn.functional as F
from data import NUMBERS, PHRASINGS
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from diffusers.models.transformers import transformer_qwenimage
from loop import load_average, train
from text import HIDDEN_SIZE
from torch import nn

EMPTY_SHARE = 0.1


def build_transformer(seed: int) -> QwenImageTransformer2DModel:
    """The untrained transformer: 8 blocks, 3 heads of 32, modulation and output starting at zero."""
    torch.manual_seed(seed)
    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=8,
        attention_head_dim=32,
        num_attention_heads=3,
        joint_attention_dim=HIDDEN_SIZE,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    zeroed = [model.norm_out.linear, model.proj_out]
    zeroed += [mod[1] for block in model.transformer_blocks for mod in (block.img_mod, block.txt_mod)]
    for linear in zeroed:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return model


def mask_without_lengths(embeds: torch.Tensor, mask: torch.Tensor) -> tuple[int, None, torch.Tensor]:
    """diffusers' `compute_text_seq_len_from_mask` less the lengths, which no CUDA graph can capture."""
    return embeds.shape[1], None, mask.bool()


def train_flow(
    model: QwenImageTransformer2DModel,
    latents: torch.Tensor,
    prompt_embeds: torch.Tensor,
    prompt_mask: torch.Tensor,
    *,
    steps: int,
    batch: int,
) -> None:
    """Train the transformer to predict noise - image along straight lines between the two.

    `latents` is (colours, 10, n, 16, 8, 8); the prompts are ordered as `data.prompts` orders them.
    """
    device = latents.device
    colours, digits, drawings, channels, height, width = latents.shape
    packed = QwenImagePipeline._pack_latents(latents, colours * digits * drawings, channels, height, width)
    packed = packed.view(colours * digits, drawings, *packed.shape[1:])
    named = len(PHRASINGS) * colours * len(NUMBERS)
    img_shapes = [[(1, height // 2, width // 2)]] * batch

    def loss_of_batch() -> torch.Tensor:
        prompt = torch.randint(named, (batch,), device=device)
        image = packed[prompt % (colours * digits), torch.randint(drawings, (batch,), device=device)].float()
        # Some prompts are emptied, which gives classifier-free guidance its unconditional side.
        prompt = torch.where(torch.rand(batch, device=device) < EMPTY_SHARE, named, prompt)
        noise = torch.randn_like(image)
        sigma = torch.rand(batch, device=device)
        noisy = torch.lerp(image, noise, sigma[:, None, None])
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            velocity = model(
                hidden_states=noisy,
                timestep=sigma,
                encoder_hidden_states=prompt_embeds[prompt],
                encoder_hidden_states_mask=prompt_mask[prompt],
                img_shapes=img_shapes,
                return_dict=False,
            )[0]
        return F.mse_loss(velocity.float(), noise - image)

    with mock.patch.object(transformer_qwenimage, "compute_text_seq_len_from_mask", mask_without_lengths):
        average = train(model, loss_of_batch, steps=steps, peak=1e-3, weight_decay=0.01, label="transformer")
    load_average(model, average)
