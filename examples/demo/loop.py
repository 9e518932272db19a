"""The optimiser loop that both trainings share."""

import math
from collections.abc import Callable

import torch
from torch import nn
from tqdm import tqdm

Loss = Callable[[], torch.Tensor]


def one_cycle(step: int, steps: int, peak: float) -> float:
    """The learning rate at a step: a short rise, then half a cosine down to a hundredth of the peak."""
    warmup = max(1, min(500, steps // 10))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(
    module: nn.Module, loss_of_batch: Loss, *, steps: int, peak: float, weight_decay: float, label: str
) -> list[torch.Tensor]:
    """Train `module` in place with AdamW and return the moving average of its parameters.

    `loss_of_batch` draws a batch and returns its loss. On a GPU one whole step is captured as a CUDA graph.
    """
    parameters = list(module.parameters())
    device = parameters[0].device
    on_gpu = device.type == "cuda"
    rate = torch.tensor(0.0, device=device)
    optimizer = torch.optim.AdamW(
        parameters, lr=rate, betas=(0.9, 0.98), weight_decay=weight_decay, capturable=on_gpu, foreach=on_gpu
    )
    average = [parameter.detach().clone() for parameter in parameters]
    decay = 1 - 10 / max(steps, 100)
    shown = torch.zeros((), device=device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of_batch()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - decay)
            shown.lerp_(loss.detach().float(), 0.02)

    replay = capture(step) if on_gpu else step
    with tqdm(total=steps, desc=label, mininterval=2) as progress:
        for index in range(steps):
            rate.fill_(one_cycle(index, steps, peak))
            replay()
            progress.update()
            if index % 500 == 499 or index == steps - 1:
                progress.set_postfix(loss=f"{shown.item():.4f}")
    return average


def capture(step: Callable[[], None]) -> Callable[[], None]:
    """The step as one CUDA graph: models this small spend their time on kernel launches otherwise."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@torch.no_grad()
def load_average(module: nn.Module, average: list[torch.Tensor]) -> None:
    """Put averaged parameters into the module."""
    for parameter, value in zip(module.parameters(), average, strict=True):
        parameter.copy_(value)
