"""LPIPS (Zhang et al., CVPR 2018), by its authors' package and weights, where both are on this machine."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

Metric = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def load_lpips() -> tuple[Metric | None, str]:
    """LPIPS 0.1 with AlexNet, or why there is none.

    The package brings its own linear layers; AlexNet's weights come from torchvision, which would download them. They
    are used only if torch's hub cache has them already.

    Returns:
        A function of two batches (n, 3, h, w) in [0, 1] on the CPU that gives (n,) distances in float64, and ``""``; or
        None and the reason.
    """
    try:
        import lpips
        from torchvision.models import AlexNet_Weights
    except ImportError as error:
        return None, f"no package {error.name!r}: pip install lpips"
    except RuntimeError as error:
        # What a torchvision raises that was built for another torch.
        return None, f"torchvision cannot be imported: {error}"
    weights = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(AlexNet_Weights.DEFAULT.url))
    if not os.path.isfile(weights):
        return None, f"no {weights}: download {AlexNet_Weights.DEFAULT.url}"
    net = lpips.LPIPS(net="alex", verbose=False).requires_grad_(False)

    def metric(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return net(images.float(), reference.float(), normalize=True).double().flatten()

    return metric, ""
