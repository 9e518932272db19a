"""verify: its numbers against ones computed by hand, and what it refuses."""

import copy
import json
import math

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from torch import nn

from svdq_compile import load_transformer
from svdq_compile.cli import main
from svdq_compile.errors import ConfigError, OptionError, ShapeError, UnknownLinearError
from svdq_compile.model.load import quantised_linears
from svdq_compile.ops.modes import FP8_MIN_TOKENS
from svdq_compile.ops.storage import storage_of
from svdq_compile.testing.checkpoints import SMALL
from svdq_compile.verification import random_inputs, verify


class Chain(nn.Module):
    """Two linears without bias, one after the other."""

    def __init__(self, middle=24):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(16, middle, bias=False)
        self.second = nn.Linear(middle, 8, bias=False)

    def forward(self, x):
        return (self.second(self.first(x)),)


def scaled(model, name, factor):
    """A copy in which one linear's weight is multiplied."""
    model = copy.deepcopy(model)
    model.get_submodule(name).weight.data *= factor
    return model


@pytest.fixture
def x():
    return {"x": torch.randn(5, 16, generator=torch.Generator().manual_seed(1))}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dense")
    QwenImageTransformer2DModel(**SMALL).to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_each_linear_gets_the_references_input(x):
    reference = Chain()
    result = verify(scaled(reference, "first", 1.5), reference, x)
    first, second = result.rows
    assert (first.name, second.name) == ("first", "second")
    assert first.error == pytest.approx(0.5, rel=1e-6)
    assert first.sqnr == pytest.approx(20 * math.log10(2), rel=1e-6)
    assert (second.error, second.sqnr) == (0.0, math.inf)
    assert result.model.error == pytest.approx(0.5, rel=1e-6)


def test_errors_add_up_over_calls_of_a_shared_linear():
    class Twice(nn.Module):
        def __init__(self, bias):
            super().__init__()
            self.linear = nn.Linear(1, 1)
            self.linear.weight.data.fill_(1)
            self.linear.bias.data.fill_(bias)

        def forward(self, x):
            return self.linear(x) + self.linear(3 * x)

    (row,) = verify(Twice(1.0), Twice(0.0), {"x": torch.ones(1, 1)}).rows
    # The outputs 1 and 3 are off by 1 each.
    assert row.error == pytest.approx(math.sqrt(2 / 10))


def test_table_is_worst_first(x):
    reference = Chain()
    result = verify(scaled(scaled(reference, "first", 1.1), "second", 0.5), reference, x)
    lines = str(result).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["whole", "second", "first", "model:", "reference:"]
    assert lines[2].split()[1:] == ["dense", "5.000e-01", "6.02"]
    same = verify(reference, reference, x)
    assert str(same).splitlines()[-3:] == [
        "2 more without any difference",
        "model: dense, 0.0 MB",
        "reference: dense, 0.0 MB",
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_layers_come_first_and_json_stays_valid(x, value):
    reference = Chain()
    broken = scaled(reference, "first", 2.0)
    broken.second.weight.data[0, 0] = value
    result = verify(broken, reference, x)
    assert [row.name for row in result.worst_first] == ["second", "first"]
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert data["linears"][1] == {"name": "second", "format": "dense", "error": None, "sqnr": None}
    assert "second" in str(result)


def test_an_output_of_zeros(x):
    result = verify(Chain(), scaled(Chain(), "first", 0.0), x)
    assert result.rows[0].error == math.inf
    assert result.rows[1].error == 0.0


def test_layers_are_chosen_by_glob(x):
    reference = Chain()
    assert [row.name for row in verify(reference, reference, x, layers="s*").rows] == ["second"]
    with pytest.raises(OptionError, match="no linear of Chain matches 'third'"):
        verify(reference, reference, x, layers="third")


def test_models_that_do_not_fit(x):
    with pytest.raises(ShapeError, match="16 -> 24"):
        verify(Chain(32), Chain(24), x)
    other = Chain()
    other.extra = nn.Linear(2, 2)
    with pytest.raises(UnknownLinearError, match="the reference has no such linear"):
        verify(other, Chain(), x)
    with pytest.raises(UnknownLinearError, match="the model has no such linear"):
        verify(Chain(), other, x)


def test_no_hook_stays_behind():
    reference = Chain()
    with pytest.raises(RuntimeError):
        verify(reference, reference, {"x": torch.ones(5, 7)})
    assert not reference.first._forward_hooks


def test_linears_that_did_not_run_are_named(x, caplog):
    reference = Chain()
    reference.idle = nn.Linear(2, 2)
    result = verify(reference, reference, x)
    assert [row.name for row in result.rows] == ["first", "second"]
    assert "1 linears did not run on these inputs, idle first" in caplog.text


def test_quantised_model(dense):
    reference = load_transformer(dense)
    model = load_transformer(dense, quantize="nvfp4", blocks_kept=1)
    result = verify(model, reference, random_inputs(reference, tokens=6, seed=3))
    quantised = [row for row in result.rows if row.name.startswith("transformer_blocks.1.")]
    assert {row.format for row in quantised} == {"nvfp4"}
    assert len(quantised) == 14
    for row in quantised:
        assert 0.05 < row.error < 0.25, row
        assert row.sqnr == pytest.approx(-20 * math.log10(row.error))
    others = [row for row in result.rows if row not in quantised]
    assert {(row.format, row.error) for row in others} == {("dense", 0.0)}
    assert 0 < result.model.error < 0.5


def test_random_inputs(dense):
    model = load_transformer(dense)
    inputs = random_inputs(model, tokens=12, seed=1)
    assert inputs["img_shapes"] == [[(1, 3, 4)]]
    assert inputs["hidden_states"].shape == (1, 12, SMALL["in_channels"])
    assert inputs["encoder_hidden_states"].shape == (1, 12, SMALL["joint_attention_dim"])
    assert inputs["hidden_states"].dtype == torch.bfloat16
    again, other = random_inputs(model, tokens=12, seed=1), random_inputs(model, tokens=12, seed=2)
    assert torch.equal(inputs["hidden_states"], again["hidden_states"])
    assert not torch.equal(inputs["hidden_states"], other["hidden_states"])
    with pytest.raises(ConfigError, match="found:  Chain"):
        random_inputs(Chain())


@pytest.mark.parametrize("variant", [{"use_additional_t_cond": True, "use_layer3d_rope": True}, {"zero_cond_t": True}])
def test_random_inputs_run_every_variant(variant):
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(**{**SMALL, **variant, "num_layers": 1})
    assert verify(model, model, random_inputs(model, tokens=4)).model.error == 0.0


@pytest.fixture(scope="module")
def quantised(dense, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised") / "new"
    words = [str(dense), "--output", str(folder), "--data-free", "--format", "nvfp4", "--blocks-kept", "1"]
    assert main(["quantize", *words, "--transformer-only", "--device", "cpu"]) == 0
    return folder


def test_command(dense, quantised, capsys):
    words = ["verify", str(quantised), "--against", str(dense), "--device", "cpu", "--tokens", "4"]
    results = {}
    for name, more in {"": [], "seed": ["--seed", "1"], "modelopt": ["--compute", "modelopt"]}.items():
        assert main([*words, "--json", "--layers", "transformer_blocks.1.*", *more]) == 0
        data = json.loads(capsys.readouterr().out)
        assert data["inputs"] == "random numbers"
        assert "denoising" not in data
        (results[name],) = data["comparisons"]
        assert len(results[name]["linears"]) == 14
        assert all(0.05 < row["error"] < 0.25 for row in results[name]["linears"])
    assert results[""]["linears"] != results["seed"]["linears"]
    assert results[""]["linears"] != results["modelopt"]["linears"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "34 more without any difference" in out
    assert "model: packed, " in out
    assert "reference: dense, " in out


def test_several_checkpoints_in_several_modes(dense, quantised, capsys):
    """Modes share the tensors of a checkpoint and give what they give alone; the summary has a line for each."""
    # With fewer tokens fp8 computes as bf16 does.
    words = ["verify", str(quantised), "--against", str(dense), "--device", "cpu", "--json", "--brief"]
    words += ["--tokens", str(max(32, FP8_MIN_TOKENS))]
    alone = {}
    for mode in ("nvfp4", "fp8", "bf16"):
        assert main([*words, "--compute", mode]) == 0
        (alone[mode],) = json.loads(capsys.readouterr().out)["comparisons"]
        assert "linears" not in alone[mode]
    assert len({row["model"]["sqnr"] for row in alone.values()}) == 3
    words.insert(2, str(dense))
    assert main([*words, "--compute", "nvfp4,fp8,bf16"]) == 0
    found = json.loads(capsys.readouterr().out)["comparisons"]
    assert [row["checkpoint"] for row in found] == [str(quantised)] * 3 + [str(dense)] * 3
    assert found[:3] == list(alone.values())
    assert {row["model"]["error"] for row in found[3:]} == {0.0}
    words.remove("--json")
    assert main([*words, "--compute", "nvfp4,bf16"]) == 0
    heading, *lines = capsys.readouterr().out.splitlines()[1:]
    assert heading.split() == ["checkpoint", "compute", "worst", "median", "best", "model"]
    assert [line.split()[:2] for line in lines] == [
        [path, mode] for path in map(str, (quantised, dense)) for mode in ("nvfp4", "bf16")
    ]
    summary = alone["nvfp4"]["summaries"][0]
    shown = [summary["worst"], summary["median"], summary["best"], alone["nvfp4"]["model"]["sqnr"]]
    assert lines[0].split()[2:] == [f"{value:.2f}" for value in shown]


def test_a_mode_a_storage_cannot_have(dense, quantised, capsys):
    words = ["verify", str(quantised), "--against", str(dense), "--device", "cpu", "--tokens", "4", "--brief"]
    words += ["--storage", "expanded"]
    assert main([*words, "--compute", "fp8,modelopt"]) == 0
    fp8, skipped = capsys.readouterr().out.splitlines()[-2:]
    assert fp8.split()[1] == "fp8"
    assert skipped.split()[1:3] == ["modelopt", "skipped:"]
    assert "needs the 4-bit codes" in skipped
    assert main([*words, "--compute", "modelopt"]) == 1
    assert "needs the 4-bit codes" in capsys.readouterr().err


def test_summaries(x):
    reference = Chain()
    changed = scaled(scaled(reference, "first", 1.1), "second", 0.5)
    (everything, *each) = verify(changed, reference, x).summaries
    assert (everything.name, everything.count) == ("all", 2)
    assert everything.worst == pytest.approx(20 * math.log10(2))
    assert everything.best == pytest.approx(20)
    assert everything.median == pytest.approx((everything.worst + everything.best) / 2)
    assert [row.name for row in each] == ["first", "second"]
    changed.first.weight.data[0, 0] = math.nan
    assert verify(changed, reference, x).summaries[0].worst == -math.inf


def test_summaries_of_blocks(dense):
    reference = load_transformer(dense)
    model = load_transformer(dense, quantize="nvfp4", blocks_kept=1)
    result = verify(model, reference, random_inputs(reference, tokens=4))
    everything, *each = result.summaries
    assert everything.count == 14
    assert {row.count for row in each} == {1}
    assert "transformer_blocks.*.img_mlp.net.0.proj" in {row.name for row in each}
    assert everything.worst == min(row.worst for row in each)


def test_squares_of_several_calls_add_up():
    class Bias(nn.Module):
        def __init__(self, bias):
            super().__init__()
            self.linear = nn.Linear(1, 1)
            self.linear.weight.data.fill_(1)
            self.linear.bias.data.fill_(bias)

        def forward(self, x):
            return (self.linear(x),)

    calls = [{"x": torch.full((1, 1), value)} for value in (1.0, 3.0)]
    result = verify(Bias(1.0), Bias(0.0), calls)
    for row in (*result.rows, result.model):
        # Outputs 1 and 3, both off by 1.
        assert row.error == pytest.approx(math.sqrt(2 / 10))
        assert row.sqnr == pytest.approx(10 * math.log10(10 / 2))
    with pytest.raises(OptionError, match="there are no inputs"):
        verify(Bias(1.0), Bias(0.0), [])


def test_storage_and_bytes(dense):
    reference = load_transformer(dense)
    inputs = random_inputs(reference, tokens=6)
    sizes = {}
    for storage in ("packed", "expanded"):
        model = load_transformer(dense, quantize="nvfp4", blocks_kept=1, storage=storage)
        result = verify(model, reference, inputs)
        assert result.to_dict()["resident"]["storage"] == storage
        sizes[storage] = result.resident
    assert result.reference_resident.nbytes == sum(p.nbytes for p in reference.parameters())
    dense_nbytes = {size.nbytes - size.quantised_nbytes for size in sizes.values()}
    assert len(dense_nbytes) == 1
    # 4 bits a code and 8 bits a scale of 16 codes, against 8 bits an element; the scalars count for little.
    elements = {name: module.weight.numel() for name, module in quantised_linears(model).items()}
    packed = sum(count for name, count in elements.items() if storage_of(name, "expanded") == "packed")
    expected = (16 / 9 * (sum(elements.values()) - packed) + packed) / sum(elements.values())
    assert 1.5 < expected < 1.6
    ratio = sizes["expanded"].quantised_nbytes / sizes["packed"].quantised_nbytes
    assert ratio == pytest.approx(expected, rel=1e-2)


def test_command_against_another_dtype(dense, tmp_path, capsys):
    wide = tmp_path / "wide"
    load_transformer(dense, dtype=torch.float32).save_pretrained(wide)
    assert main(["verify", str(dense), "--against", str(wide), "--device", "cpu", "--tokens", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["comparisons"][0]["model"]["error"] == 0.0
