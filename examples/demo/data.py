"""Coloured handwritten digits: scikit-learn's 8x8 scans drawn at 64x64 on white."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from sklearn.datasets import load_digits
from sklearn.model_selection import cross_val_predict
from sklearn.svm import SVC

SIZE = 64
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {
    "red": (218, 36, 42),
    "orange": (246, 138, 20),
    "green": (28, 150, 66),
    "blue": (30, 92, 208),
    "purple": (134, 48, 176),
    "black": (24, 24, 28),
}
PHRASINGS = ("a {colour} {number} on a white background", "a {colour} {number}")
EMPTY_PROMPT = " "
HOLES = ((1,), (0,), (0,), (0,), (0, 1), (0,), (1,), (0,), (2,), (1,))


def prompts() -> list[str]:
    """Every prompt, ordered by phrasing, then colour, then digit; the empty prompt comes last."""
    named = [
        phrasing.format(colour=colour, number=number)
        for phrasing in PHRASINGS
        for colour in COLOURS
        for number in NUMBERS
    ]
    return [*named, EMPTY_PROMPT]


def colour_table() -> torch.Tensor:
    """RGB in [0, 1] of every colour, shape (colours, 3)."""
    return torch.tensor(list(COLOURS.values()), dtype=torch.float32) / 255


def enlarge(scans: torch.Tensor, transforms: torch.Tensor) -> torch.Tensor:
    """Ink coverage in [0, 1] of 8x8 scans drawn at 64x64 through 2x3 affine transforms."""
    grid = F.affine_grid(transforms, [len(scans), 1, SIZE, SIZE], align_corners=False)
    ink = F.grid_sample(scans[:, None], grid, mode="bicubic", padding_mode="zeros", align_corners=False)
    # Unsharp masking and a steep curve turn the blur of an eightfold enlargement into pen strokes.
    sharp = 2 * ink - F.avg_pool2d(ink, 15, stride=1, padding=7)
    edge = ((sharp[:, 0] - 0.4) / 0.3).clamp(0, 1)
    return edge * edge * (3 - 2 * edge)


def is_legible(ink: np.ndarray, digit: int) -> bool:
    """Whether a drawing is one connected stroke with as many holes as its digit has."""
    background, regions = ndimage.label(ink < 0.5)
    areas = ndimage.sum_labels(ink < 0.5, background, range(1, regions + 1))
    strokes = ndimage.label(ink >= 0.5, structure=np.ones((3, 3)))[1]
    return strokes == 1 and int((areas >= 6).sum()) - 1 in HOLES[digit]


def load_scans() -> tuple[torch.Tensor, torch.Tensor]:
    """The 8x8 scans in [0, 1] that an SVM reads rightly and whose holes are open, and their digits."""
    pixels, digits = load_digits(return_X_y=True)
    scans = torch.from_numpy((pixels / 16).reshape(-1, 8, 8).astype(np.float32))
    upright = 1.3 * torch.eye(2, 3).expand(len(scans), 2, 3)
    drawn = enlarge(scans, upright).numpy()
    legible = cross_val_predict(SVC(), pixels, digits, cv=5) == digits
    legible &= np.array([is_legible(ink, digit) for ink, digit in zip(drawn, digits, strict=True)])
    return scans[legible], torch.from_numpy(digits[legible])


def draw_digits(per_digit: int, generator: torch.Generator) -> torch.Tensor:
    """Ink of shape (10, per_digit, 64, 64): scans picked at random, slightly turned, scaled and moved."""
    scans, digits = load_scans()
    pools = [torch.where(digits == digit)[0] for digit in range(10)]
    picks = [pool[torch.randint(len(pool), (per_digit,), generator=generator)] for pool in pools]
    count = 10 * per_digit

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    angle, zoom = uniform(-0.1, 0.1), uniform(1.2, 1.4)
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    rows = torch.stack([cos, -sin, uniform(-0.08, 0.08), sin, cos, uniform(-0.08, 0.08)], dim=1)
    return enlarge(scans[torch.cat(picks)], rows.view(count, 2, 3)).view(10, per_digit, SIZE, SIZE)


def paint(ink: torch.Tensor, rgb: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] as the VAE takes them, (n, 3, 1, 64, 64), from ink (n, 64, 64) and colours."""
    image = 1 - ink[:, None] * (1 - rgb[:, :, None, None])
    return (image * 2 - 1).unsqueeze(2)


def save_sheet(images: torch.Tensor, columns: int, path: str, scale: int = 2) -> None:
    """Write images (n, 3, h, w) in [0, 1] as one PNG grid, enlarged by whole pixels."""
    padded = F.pad(images.float().cpu(), (2, 2, 2, 2), value=0.8)
    rows = [torch.cat(list(row), dim=2) for row in padded.split(columns)]
    rows[-1] = F.pad(rows[-1], (0, rows[0].shape[2] - rows[-1].shape[2]), value=0.8)
    grid = (torch.cat(rows, dim=1).permute(1, 2, 0).clamp(0, 1) * 255).round().byte().numpy()
    sheet = Image.fromarray(grid)
    sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST).save(path)
