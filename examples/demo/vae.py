"""The image side: a small AutoencoderKLQwenImage trained on coloured digits."""

from unittest import mock

import torch
import torch.nn.functional as F
from data import paint
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from loop import load_average, train

CHANNELS = 16
KL_WEIGHT = 1e-3


def build_vae(seed: int) -> AutoencoderKLQwenImage:
    """The untrained autoencoder: 8x smaller in space, 16 latent channels, single frames."""
    torch.manual_seed(seed)
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=CHANNELS,
        num_res_blocks=1,
        temperal_downsample=[False, False, False],
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
    )


def single_frame_convolution(self: QwenImageCausalConv3d, x: torch.Tensor) -> torch.Tensor:
    """What a causal 3D convolution computes for one frame: only the last tap in time meets a picture."""
    out = F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, self.stride[1:], self._padding[0])
    return out.unsqueeze(2)


def train_vae(vae: AutoencoderKLQwenImage, ink: torch.Tensor, colours: torch.Tensor, *, steps: int, batch: int) -> None:
    """Train the autoencoder on pictures painted from `ink` (10, n, 64, 64) in random colours."""
    flat = ink.flatten(0, 1)
    device = ink.device

    def loss_of_batch() -> torch.Tensor:
        rows = torch.randint(len(flat), (batch,), device=device)
        images = paint(flat[rows].float(), colours[torch.randint(len(colours), (batch,), device=device)])
        mean, log_variance = vae.quant_conv(vae.encoder(images)).chunk(2, dim=1)
        log_variance = log_variance.clamp(-30, 20)
        latents = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        # The decoder is called without its clamp, which would stop gradients at white and black.
        restored = vae.decoder(vae.post_quant_conv(latents))
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return F.l1_loss(restored, images) + F.mse_loss(restored, images) + KL_WEIGHT * kl

    with mock.patch.object(QwenImageCausalConv3d, "forward", single_frame_convolution):
        average = train(vae, loss_of_batch, steps=steps, peak=2e-3, weight_decay=0.01, label="autoencoder")
    load_average(vae, average)
    # Taps that never met a picture are noise: as zeros the file compresses.
    for module in vae.modules():
        if isinstance(module, QwenImageCausalConv3d):
            module.weight.data[:, :, :-1] = 0


@torch.no_grad()
def encode_table(vae: AutoencoderKLQwenImage, ink: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
    """Latents of every drawing in every colour, (colours, 10, n, 16, 8, 8), whitened channel by channel.

    The channel means and deviations go into the config, where the pipeline looks for them.
    """
    table = []
    for colour in colours:
        for drawings in ink.flatten(0, 1).split(500):
            images = paint(drawings.float(), colour.expand(len(drawings), 3))
            table.append(vae.encode(images).latent_dist.mode()[:, :, 0])
    latents = torch.cat(table)
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    # A channel that the KL term emptied stays near zero instead of growing to unit noise.
    std = std.clamp_min(0.25 * std.max())
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    latents = (latents - mean[:, None, None]) / std[:, None, None]
    return latents.view(len(colours), *ink.shape[:2], *latents.shape[1:])
