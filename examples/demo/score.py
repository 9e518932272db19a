"""Score a demo pipeline: how often its pictures show the digit and the colour that the prompt asked for.

Needs scikit-learn: `pip install '.[train]'`.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from data import COLOURS, EMPTY_PROMPT, NUMBERS, colour_table, draw_digits, prompts, save_sheet
from diffusers import QwenImagePipeline
from sklearn.svm import SVC


class Reader:
    """Reads the colour and the digit of pictures (n, 3, 64, 64) in [0, 1]."""

    def __init__(self, per_digit: int = 200, seed: int = 1000) -> None:
        ink = draw_digits(per_digit, torch.Generator().manual_seed(seed)).flatten(0, 1)
        labels = torch.arange(10).repeat_interleave(per_digit)
        self.classifier = SVC().fit(self.features(ink), labels)

    @staticmethod
    def features(ink: torch.Tensor) -> torch.Tensor:
        """Ink at a quarter of the resolution, one row for each drawing."""
        return F.avg_pool2d(ink[:, None], 4).flatten(1)

    def read(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The index of the nearest colour and the digit, for every picture."""
        images = images.float().cpu()
        paper = images.amin(dim=1)
        strongest = paper.flatten(1).topk(200, largest=False).indices
        rgb = images.flatten(2).gather(2, strongest[:, None].expand(-1, 3, -1)).mean(dim=2)
        distance = torch.cdist(rgb, colour_table())
        colour = distance.argmin(dim=1)
        floor = colour_table().amin(dim=1)[colour][:, None, None]
        ink = ((1 - paper) / (1 - floor)).clamp(0, 1)
        return colour, torch.from_numpy(self.classifier.predict(self.features(ink)))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", type=Path, default=Path(__file__).parent / "pipeline")
    parser.add_argument("--rounds", type=int, default=1, help="pictures of each of the 60 prompts")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sheet", type=Path, help="also write the pictures into this PNG")
    return parser.parse_args()


def main() -> None:
    """Draw every colour and digit, read the pictures back, and print the shares that came out right."""
    args = parse_arguments()
    pipeline = QwenImagePipeline.from_pretrained(args.pipeline, torch_dtype=torch.bfloat16).to(args.device)
    named = prompts()[: len(COLOURS) * len(NUMBERS)]
    asked = torch.arange(len(named))
    drawn = []
    for first in range(args.seed, args.seed + args.rounds * len(named), len(named)):
        result = pipeline(
            named,
            negative_prompt=[EMPTY_PROMPT] * len(named),
            true_cfg_scale=args.cfg,
            height=64,
            width=64,
            num_inference_steps=args.steps,
            generator=[torch.Generator().manual_seed(first + index) for index in range(len(named))],
            output_type="pt",
        )
        drawn.append(result.images)
    images = torch.cat(drawn)
    colour, digit = Reader().read(images)
    asked = asked.repeat(args.rounds)
    right_colour, right_digit = colour == asked // len(NUMBERS), digit == asked % len(NUMBERS)
    print(f"pictures {len(images)}, right digit {right_digit.float().mean():.3f}", end=", ")
    print(f"right colour {right_colour.float().mean():.3f}")
    for index in torch.where(~(right_colour & right_digit))[0].tolist():
        read = f"{list(COLOURS)[colour[index]]} {NUMBERS[digit[index]]}"
        print(f"  seed {args.seed + index}: {named[index % len(named)]!r} reads as {read}")
    if args.sheet:
        save_sheet(images, len(NUMBERS), str(args.sheet))


if __name__ == "__main__":
    main()
