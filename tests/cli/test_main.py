"""The command itself: exit codes, messages instead of tracebacks, global flags, and what it imports."""

import logging
import os
import re
import subprocess
import sys

import pytest
import torch

import svdq_compile
from svdq_compile import cli
from svdq_compile.errors import CheckpointNotFoundError, StrictError
from svdq_compile.testing.checkpoints import write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def package_log():
    log = logging.getLogger("svdq_compile")
    level, handlers = log.level, list(log.handlers)
    yield log
    log.setLevel(level)
    log.handlers[:] = handlers


def test_version(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"svdq-compile {svdq_compile.__version__}\n"


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["insepct", "x"],
        ["inspect"],
        ["explain", "x", "--compute", "fast"],
        ["explain", "x", "--storage", "dense"],
        ["verify", "x"],
        ["verify", "x", "--against", "y", "--tokens", "0"],
        ["generate", "--count", "none"],
        ["generate", "--compile", "all"],
        ["quantize", "x", "--output", "y"],
        ["quantize", "x", "--output", "y", "--data-free", "--prompts", "z"],
        ["quantize", "x", "--output", "y", "--data-free", "--format", "int4"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(words, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(words)
    assert left.value.code == 2
    assert "usage: svdq-compile" in capsys.readouterr().err


@pytest.mark.parametrize("command", [module.__name__.rpartition(".")[2] for module in cli.COMMANDS])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([command, "--help"])
    assert left.value.code == 0
    assert f"svdq-compile {command}:" in re.sub(r"\s+", " ", capsys.readouterr().out)


def test_a_users_error_is_a_message(tmp_path, capsys):
    assert cli.main(["inspect", str(tmp_path / "nothing")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: no such file or folder")
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("before", [True, False])
def test_debug_raises_it(tmp_path, before):
    words = ["inspect", str(tmp_path / "nothing")]
    with pytest.raises(CheckpointNotFoundError):
        cli.main(["--debug", *words] if before else [*words, "--debug"])


def test_a_bug_is_never_hidden(monkeypatch):
    def run(args):
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli.env, "run", run)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["env"])


def test_what_a_backend_raises_is_found_inside_dynamos_error(monkeypatch, capsys, fresh_dynamo):
    def backend(gm, example_inputs):
        raise StrictError("strict: 1 linear would take a slower path")

    def run(args):
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(1))

    monkeypatch.setattr(cli.env, "run", run)
    assert cli.main(["env"]) == 1
    assert capsys.readouterr().err == "error: strict: 1 linear would take a slower path\n"


def test_interrupt(monkeypatch, capsys):
    def run(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.env, "run", run)
    assert cli.main(["env"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("before", [True, False])
def test_verbose_logs_at_info(checkpoint, package_log, before):
    package_log.setLevel(logging.NOTSET)
    words = ["inspect", str(checkpoint)]
    assert cli.main(words) == 0
    assert package_log.level == logging.NOTSET
    assert cli.main(["-v", *words] if before else [*words, "-v"]) == 0
    assert package_log.level == logging.INFO
    assert package_log.handlers


def test_inspect_imports_no_torch(checkpoint):
    code = "import sys; from svdq_compile.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", str(checkpoint)], capture_output=True, text=True, check=True
    )
    assert "NVFP4_SVD" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"


def test_python_m_and_a_reader_that_goes_away(checkpoint):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "svdq_compile", "inspect", str(checkpoint)]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"{svdq_compile.inspect(checkpoint)}\n"
