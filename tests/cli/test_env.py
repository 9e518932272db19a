"""env: what it reports here, and on machines with a GPU, without torch or with missing packages."""

import json
import os
import sys
import types

import torch

from svdq_compile import __version__, _compat
from svdq_compile.cli import env, main


def public(version):
    """Without the build's name, which a CUDA wheel's metadata leaves out."""
    return version.partition("+")[0]


def test_json(capsys):
    assert main(["env", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert public(data["versions"]["torch"]) == public(torch.__version__)
    assert data["versions"]["svdq_compile"] == __version__
    assert data["backend"] is True
    assert data["torch_window"] == "{}.{} to {}.{}".format(*_compat.OLDEST, *_compat.NEWEST)
    assert len(data["gpus"]) == torch.cuda.device_count()


def test_text(monkeypatch, capsys):
    monkeypatch.setattr(env, "PACKAGES", ("torch", "no-such-package"))
    assert main(["env"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert public(lines["torch"]) == public(torch.__version__)
    assert lines["no-such-package"] == "not installed"


def test_gpus_and_driver(monkeypatch, tmp_path):
    props = types.SimpleNamespace(name="NVIDIA B200", major=10, minor=0, total_memory=192 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: props)
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 580.65.06\necho 580.65.06\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = env.collect()
    assert found.gpus == (env.Gpu("NVIDIA B200", "10.0", 192 * 2**30),)
    assert found.driver == "580.65.06"
    assert "NVIDIA B200, compute capability 10.0, 192.0 GiB" in str(found)
    program.write_text("#!/bin/sh\nexit 9\n")
    assert env.collect().driver is None


def test_a_broken_torch_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "svdq_compile._compat", None)
    monkeypatch.setitem(sys.modules, "torch", None)
    found = env.collect()
    assert found.torch_window.startswith("unknown (ModuleNotFoundError")
    assert found.gpus == ()


def test_a_backend_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **_: ())
    assert "not found: install the package" in str(env.collect())
