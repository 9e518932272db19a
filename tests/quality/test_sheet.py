"""Contact sheets hold the pictures pixel by pixel, and text where it belongs."""

import types

import numpy
import pytest
from PIL import Image

from svdq_compile.quality.denoise import Picture, Pictures
from svdq_compile.quality.sheet import BACKGROUND, compared_sheet, contact_sheet


def noise(seed, size=(24, 16)):
    values = numpy.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=numpy.uint8)
    return Image.fromarray(values)


def places(sheet, image, scale=1):
    """Upper left corners at which a picture stands in a sheet."""
    enlarged = numpy.asarray(image).repeat(scale, axis=0).repeat(scale, axis=1)
    whole = numpy.asarray(sheet)
    height, width = enlarged.shape[:2]
    windows = numpy.lib.stride_tricks.sliding_window_view(whole[..., 0], (height, width))
    rows = numpy.nonzero((windows == enlarged[..., 0]).all(axis=(2, 3)))
    return [(int(x), int(y)) for y, x in zip(*rows)]


def inked(sheet, left, top, right, bottom):
    return (numpy.asarray(sheet)[top:bottom, left:right] != BACKGROUND).any()


@pytest.mark.parametrize("scale", [1, 3])
def test_rows_and_columns(scale):
    columns = [[noise(10 * x + y) for y in range(3)] for x in range(2)]
    sheet = contact_sheet(columns, ["a", "b"], ["", "", ""], scale=scale)
    found = [[places(sheet, image, scale) for image in column] for column in columns]
    corners = [[corner for (corner,) in column] for column in found]
    for x in range(2):
        assert len({left for left, _ in corners[x]}) == 1
        tops = [top for _, top in corners[x]]
        assert tops[1] - tops[0] == tops[2] - tops[1] > 16 * scale
    assert [top for _, top in corners[0]] == [top for _, top in corners[1]]
    assert corners[1][0][0] - corners[0][0][0] > 24 * scale


def test_texts():
    column = [noise(0, (200, 50)), noise(1, (200, 50))]
    plain = contact_sheet([column], [""], ["", ""])
    sheet = contact_sheet([column], ["heading"], ["first", ""], [["", "caption"]])
    ((left, top),), ((_, lower),) = (places(sheet, image) for image in column)
    assert inked(sheet, left, 0, left + 200, top)
    assert inked(sheet, 0, top, left, top + 50)
    assert not inked(sheet, 0, lower, left, lower + 50)
    assert not inked(sheet, left, top + 50, left + 200, lower)
    assert inked(sheet, left, lower + 50, left + 200, sheet.height)
    ((left, top),) = places(plain, column[0])
    assert not inked(plain, 0, 0, plain.width, top)
    assert sheet.height > plain.height


def test_texts_wider_than_pictures_widen_columns():
    narrow = contact_sheet([[noise(0)]], [""], [""])
    wide = contact_sheet([[noise(0)]], [""], [""], [["a caption of many words"]])
    assert wide.width > narrow.width + 100
    ((left, _),) = places(wide, noise(0))
    assert left > 50


def test_long_labels_are_broken_into_lines():
    short = contact_sheet([[noise(0)]], [""], ["x" * 36])
    long = contact_sheet([[noise(0)]], [""], [" ".join(["x" * 36] * 4)])
    assert long.width == short.width


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="pictures of one size"):
        contact_sheet([[noise(0)], [noise(1, (8, 8))]], ["", ""], [""])
    for headings, labels, captions in ([""], ["", ""], None), ([], [""], None), ([""], [""], [[]]):
        with pytest.raises(ValueError):
            contact_sheet([[noise(0)]], headings, labels, captions)


@pytest.mark.parametrize(
    ("pictures", "labels"),
    [
        ([("p", 0), ("q", 0)], ["p", "q"]),
        ([("p", 0), ("p", 1)], ["seed 0", "seed 1"]),
        ([("p", 0), ("p", 1), ("q", 0), ("q", 1)], ["p, seed 0", "p, seed 1", "q, seed 0", "q, seed 1"]),
    ],
)
def test_a_run_and_another(pictures, labels, monkeypatch):
    from svdq_compile.quality import sheet
    from svdq_compile.quality.denoise import Denoising

    seen = []
    monkeypatch.setattr(sheet, "contact_sheet", lambda *args, **kwargs: seen.append((args, kwargs)))
    plan = Denoising(tuple(dict.fromkeys(p for p, _ in pictures)), tuple(dict.fromkeys(s for _, s in pictures)))
    images = [noise(i, (64, 64)) for i in range(len(pictures))]
    rows = tuple(Picture(*which, 20.0, 0.5, None) for which in pictures)
    run = types.SimpleNamespace(plan=plan, images=images, name="BF16")
    compared_sheet(run, [Pictures("fp8", rows, 0.0, tuple(images))])
    ((columns, headings, found, captions), options) = seen[0]
    assert (columns, headings, found) == ([images, tuple(images)], ["BF16", "fp8"], labels)
    assert captions == [[""] * len(labels), ["PSNR 20.00 dB  SSIM 0.500"] * len(labels)]
    assert options == {"scale": 3}
