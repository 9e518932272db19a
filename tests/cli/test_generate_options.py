"""generate's options: the YAML file, the command line over it, and what is refused before loading."""

from pathlib import Path

import pytest
from PIL import Image

from svdq_compile.cli import generate, main
from svdq_compile.cli.config import read_config

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"


@pytest.fixture
def options(monkeypatch):
    """Parses a command line of generate and gives the settings it would run with."""

    def parse(*words):
        seen = []
        monkeypatch.setattr(generate, "run", lambda args: seen.append(generate.settings(args)) or 0)
        assert main(["generate", *map(str, words)]) == 0
        return seen[0]

    return parse


@pytest.fixture
def config(tmp_path):
    def write(text):
        file = tmp_path / "config.yaml"
        file.write_text(text)
        return file

    return write


def test_every_option_has_a_default_and_the_reverse():
    import argparse

    parser = argparse.ArgumentParser(add_help=False)
    generate.add_options(parser)
    assert {action.dest for action in parser._actions} == generate.DEFAULTS.keys()


def test_defaults(options):
    found = vars(options("--model", "m", "--prompt", "p"))
    assert found == {**generate.DEFAULTS, "model": "m", "prompt": "p"}


def test_yaml_over_defaults_and_command_line_over_yaml(options, config):
    file = config(
        "model: m\nprompt: '--a'\nnegative-prompt: n\ntransformer: t\nsteps: 7\ncfg: 3\nseed: 5\ncompile: none\n"
    )
    found = options(file, "--seed", 9, "--compile", "whole", "--cfg", "4.0")
    assert (found.model, found.prompt, found.negative_prompt, found.transformer) == ("m", "--a", "n", "t")
    assert (found.steps, found.seed, found.compile, found.cfg) == (7, 9, "whole", 4.0)
    assert found.dtype == "bfloat16"
    found = options("--seed", 9, file)
    assert (found.seed, found.cfg) == (9, 3.0)
    assert isinstance(found.cfg, float)


def test_capture(options, config):
    words = "--model", "m", "--prompt", "p"
    assert options(*words, "--capture").capture is True
    assert options(config("capture: true\n"), *words).capture is True
    assert options(config("capture: false\n"), *words).capture is False


def test_keys_take_dashes_and_underscores(config):
    for key in ("negative-prompt", "negative_prompt"):
        assert read_config(config(f"{key}: ' '\n"), generate.add_options) == {"negative_prompt": " "}
    assert read_config(config("# nothing\n"), generate.add_options) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step: 3\n", "unknown key 'step'; did you mean 'steps'?"),
        ("negative-promt: x\n", "unknown key 'negative-promt'; did you mean 'negative_prompt'?"),
        ("zzz: 3\n", "unknown key 'zzz'; known: model, transformer, prompt"),
        ("config: other.yaml\n", "unknown key 'config'"),
        ("steps: many\n", "argument --steps: 'many' is no whole number"),
        ("steps: 0\n", "argument --steps: 0 is not 1 or more"),
        ("compile: all\n", "argument --compile: invalid choice: 'all'"),
        ("prompt: [a, b]\n", "prompt is ['a', 'b'], needs a single value"),
        ("prompt:\n", "prompt is None, needs a single value"),
        ("capture: 7\n", "argument --capture: ignored explicit argument '7'"),
        ("- model\n", "is not a mapping"),
        ("model: [\n", "is not YAML"),
    ],
)
def test_bad_files_are_named_and_refused(config, text, message, capsys):
    file = config(text)
    assert main(["generate", str(file), "--model", "m", "--prompt", "p"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {file}")
    assert message in error


def test_a_missing_file(tmp_path, capsys):
    assert main(["generate", str(tmp_path / "none.yaml")]) == 1
    assert "No such file" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "missing"), [(["--prompt", "p"], "model"), (["--model", "m"], "prompt")])
def test_model_and_prompt_are_needed(words, missing, capsys):
    assert main(["generate", *words]) == 1
    assert f"there is no {missing}: give --{missing}" in capsys.readouterr().err


def test_abbreviations_are_refused():
    with pytest.raises(SystemExit) as left:
        main(["generate", "--mod", "m", "--prompt", "p"])
    assert left.value.code == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "no/such/folder"], "no such folder, and not a Hub id"),
        (["--model", "."], "the folder is no pipeline"),
        (["--model", "m/m", "--compile", "regional", "--backend", "svqd"], "did you mean 'svdq'?"),
        (
            ["--model", "m/m", "--mode", "max-autotune"],
            "--mode max-autotune is for --compile regional or whole, not none",
        ),
        (
            ["--model", "m/m", "--backend", "inductor"],
            "--backend inductor is for --compile regional or whole, not none",
        ),
        (["--model", "m/m", "--device", "abacus"], "--device abacus: "),
        (["--model", "m/m", "--output", "o.jpg"], "--output o.jpg: pictures are PNG files; give a folder or NAME.png"),
        (["--model", "m/m", "--compare", "bf16", "--output", "a/o.TIFF"], "--output a/o.TIFF: pictures are PNG files"),
    ],
)
def test_what_cannot_run_is_refused_early(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "--prompt", "p", *words]) == 1
    assert message in capsys.readouterr().err


def test_a_mode_in_a_file_needs_compilation_too(config, capsys):
    file = config("model: m/m\nprompt: p\ncompile: regional\nmode: max-autotune\n")
    assert main(["generate", str(file), "--compile", "none", "--compare", "bf16"]) == 1
    assert "--mode max-autotune is for --compile regional or whole" in capsys.readouterr().err
    # The default mode asks for nothing: with it the file's can be taken back.
    assert main(["generate", str(file), "--compile", "none", "--mode", "default", "--device", "abacus"]) == 1
    assert "--device abacus" in capsys.readouterr().err


def test_a_hub_id_that_cannot_be_reached(monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["generate", "--model", "nobody/no-such-pipeline", "--prompt", "p"]) == 1
    assert "not a local folder, and the Hub does not give it" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["bf16", "nvfp4", "nvfp4_svd"])
def test_example_configs(options, name):
    command = (CONFIGS / f"{name}.yaml").read_text().splitlines()[1]
    assert command.startswith(f"#   svdq-compile generate examples/configs/{name}.yaml ")
    found = options(CONFIGS / f"{name}.yaml", "--prompt", "p")
    assert (found.model, found.width, found.height) == ("Qwen/Qwen-Image", 1328, 1328)
    assert (found.steps, found.cfg, found.negative_prompt, found.output) == (50, 4.0, " ", f"{name}.png")
    quantised = name != "bf16"
    assert (found.transformer is not None) == quantised
    assert found.compile == ("regional" if quantised else "none")


def test_contact_sheet():
    colours = ["red", "lime", "blue", "black", "yellow"]
    sheet = generate.contact_sheet([Image.new("RGB", (4, 2), colour) for colour in colours])
    assert sheet.size == (12, 4)
    corners = [sheet.getpixel((x, y)) for y in (0, 3) for x in (0, 4, 8)]
    assert corners == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0), (255, 255, 0), (255, 255, 255)]
