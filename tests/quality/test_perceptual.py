"""LPIPS through the package's own interface, and why there is none. The stand-ins have the signatures of lpips 0.1.4."""

import sys
import types

import pytest
import torch

from svdq_compile.quality.perceptual import load_lpips

FILE = "alexnet-owt-7be5be79.pth"


class LPIPS(torch.nn.Module):
    """A distance that is large only for inputs scaled as the real one needs them."""

    def __init__(self, pretrained=True, net="alex", version="0.1", lpips=True, spatial=False, pnet_rand=False,
                 pnet_tune=False, use_dropout=True, model_path=None, eval_mode=True, verbose=True):  # fmt: skip
        super().__init__()
        assert (pretrained, net, version, pnet_rand, verbose) == (True, "alex", "0.1", False, False)

    def forward(self, in0, in1, retPerLayer=False, normalize=False):
        assert in0.dtype == in1.dtype == torch.float32
        if normalize:
            in0, in1 = 2 * in0 - 1, 2 * in1 - 1
        return (in0 - in1).abs().mean(dim=(1, 2, 3), keepdim=True)


@pytest.fixture
def packages(monkeypatch):
    """Both packages, as far as they are used."""
    lpips, models = types.ModuleType("lpips"), types.ModuleType("torchvision.models")
    lpips.LPIPS = LPIPS
    default = types.SimpleNamespace(url=f"https://download.pytorch.org/models/{FILE}")
    models.AlexNet_Weights = types.SimpleNamespace(DEFAULT=default)
    for module in (lpips, types.ModuleType("torchvision"), models):
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


def test_distances(packages, hub):
    (hub / FILE).write_bytes(b"")
    metric, missing = load_lpips()
    assert missing == ""
    x = torch.full((2, 3, 16, 16), 0.5, dtype=torch.float64)
    y = x.clone()
    y[1] += 0.25
    assert metric(x, y).tolist() == [0.0, 0.5]
    assert metric(x, y).dtype == torch.float64


def test_weights_that_are_not_there_are_not_downloaded(packages, hub):
    metric, missing = load_lpips()
    assert metric is None
    assert missing == f"no {hub / FILE}: download https://download.pytorch.org/models/{FILE}"


def test_no_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    metric, missing = load_lpips()
    assert metric is None
    assert missing == "no package 'lpips': pip install lpips"


def test_a_package_that_does_not_load(packages, monkeypatch):
    class Broken(types.ModuleType):
        def __getattr__(self, name):
            raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setitem(sys.modules, "torchvision.models", Broken("torchvision.models"))
    assert load_lpips() == (None, "torchvision cannot be imported: operator torchvision::nms does not exist")
