"""The contenders of a forward: which there are, what they are made of, and what they are checked against."""

import copy

import pytest
import torch
from torch import nn

from svdq_compile import options
from svdq_compile.bench import forward_gate, forward_models
from svdq_compile.bench import forward_plan as plans
from svdq_compile.bench.forward_models import Contender, build, contenders, make_inputs
from svdq_compile.model.resident import resident
from svdq_compile.ops.weight import SVDQWeight
from svdq_compile.testing.checkpoints import SMALL

CPU = torch.device("cpu")
PLAN = plans.ForwardPlan(sizes=((64, 48),), text=5, rank=8, blocks=2).on("cpu")
OURS = Contender("svdq", "fp8", "packed")


def weights(model):
    return [module.weight for module in model.modules() if isinstance(getattr(module, "weight", None), SVDQWeight)]


def inputs_of(model):
    return make_inputs(model, PLAN, (64, 48), 5, CPU)


def test_the_default_contenders():
    found = [contender.label for contender in contenders(plans.ForwardPlan())]
    assert found == [
        *("bf16", "torchao-fp8", "svdq nvfp4 packed", "svdq fp8 packed", "svdq fp8 expanded"),
        *("svdq bf16 packed", "svdq bf16 expanded"),
    ]


def test_variants_follow_the_plain_one(monkeypatch):
    monkeypatch.setattr(options, "OPTIONAL_PASSES", ("real_rope", "share"), raising=False)
    plan = plans.ForwardPlan(modes=("fp8",), storages=("packed",), peers=(), lora_cost=True, ablate=True)
    assert [contender.variant for contender in contenders(plan)] == ["", "rank 0", "no real_rope", "no share"]


def test_the_device_decides_model_and_attention():
    assert plans.ForwardPlan().on("cuda").model == plans.QWEN_IMAGE
    assert plans.ForwardPlan().on("cuda").attention == "_native_cudnn"
    assert (PLAN.model, PLAN.attention) == (plans.SMALL, "native")
    assert plans.ForwardPlan(model=plans.QWEN_IMAGE, attention="flash").on("cpu").attention == "flash"


def test_the_real_model_keeps_two_blocks_at_each_end():
    assert [plans.blocks_kept(blocks) for blocks in (60, 30, 8, 2)] == [2, 1, 0, 0]
    assert forward_models.config_of(plans.ForwardPlan().on("cuda"))["num_layers"] == 60


@pytest.mark.parametrize("storage", ["packed", "expanded"])
def test_without_low_rank_only_the_pair_is_missing(storage):
    plain = build(Contender("svdq", "fp8", storage), PLAN, CPU)
    bare = build(Contender("svdq", "fp8", storage, low_rank=False), PLAN, CPU)
    assert any("lora_down" in weight.parts() for weight in weights(plain))
    assert len(weights(plain)) == len(weights(bare)) == 28
    for with_pair, without in zip(weights(plain), weights(bare)):
        expected = {name for name in with_pair.parts() if not name.startswith("lora_")}
        assert without.parts().keys() == expected
        assert without.fingerprint.compute == "fp8"
        assert all(torch.equal(part, with_pair.parts()[name]) for name, part in without.parts().items())
    assert bare(**inputs_of(bare))[0].isfinite().all()


def test_bytes_are_the_resident_ones():
    for contender in (OURS, Contender("bf16")):
        model = build(contender, PLAN, CPU)
        assert forward_models.weight_bytes(model) == resident(model).nbytes


def test_bf16_is_dense():
    model = build(Contender("bf16"), PLAN, CPU)
    assert not weights(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(**inputs_of(model))[0].isfinite().all()


def test_sizes_become_tokens():
    model = build(Contender("bf16"), PLAN, CPU)
    inputs = inputs_of(model)
    assert inputs["hidden_states"].shape == (1, 12, 16)
    assert inputs["encoder_hidden_states"].shape == (1, 5, 32)


@pytest.mark.parametrize("make", [forward_gate.against_float64, forward_gate.against_eager])
@pytest.mark.parametrize("mode", ["fp8", "nvfp4", "bf16"])
def test_the_gate_passes_the_model_and_refuses_what_differs(monkeypatch, make, mode):
    # The blocks of a narrow model add little to what enters them.
    wide = SMALL | {"attention_head_dim": 128, "num_attention_heads": 4, "axes_dims_rope": [16, 56, 56]}
    monkeypatch.setitem(forward_models.CONFIGS, plans.SMALL, wide)
    model = build(Contender("svdq", mode, "packed"), PLAN, CPU)
    inputs = inputs_of(model)
    references = make(model, inputs)
    y = model(**inputs)[0]
    found = references.judge(y)
    assert found.passed, found.reason
    assert found.error < 0.03
    no_low_rank = copy.deepcopy(model)
    forward_models.drop_low_rank(no_low_rank)
    one_missing = y.clone()
    one_missing[0, -1] = float("nan")
    for wrong in (no_low_rank(**inputs)[0], y * 1.1, one_missing):
        verdict = references.judge(wrong)
        assert not verdict.passed
        assert verdict.reason


def test_a_model_is_unchanged_by_its_references():
    model = build(OURS, PLAN, CPU)
    inputs = inputs_of(model)
    before = model(**inputs)[0]
    references = forward_gate.against_float64(model, inputs)
    assert references.oracle.dtype == torch.float64
    assert references.low_precision.dtype == torch.bfloat16
    assert torch.equal(model(**inputs)[0], before)


def test_specified_linears_are_the_reference_in_bf16():
    layer = build(OURS, PLAN, CPU).transformer_blocks[0].img_mlp.net[2]
    x = torch.randn(40, layer.in_features).bfloat16()
    with forward_gate.SpecifiedLinears():
        y, dense = layer(x), nn.functional.linear(x, x)
    assert torch.equal(dense, nn.functional.linear(x, x))
    # The reference sums in float32 and rounds once; here each product is rounded.
    error = (y.float() - layer(x).float()).norm() / layer(x).float().norm()
    assert 0 < error < 0.01
