"""Share keys are true: set only where bytes are equal, and lost where they might no longer be."""

import copy
import io
from pathlib import Path

import pytest
import torch
from torch import nn

import svdq_compile
from svdq_compile.errors import ShareError
from svdq_compile.model.load import quantised_linears, set_compute
from svdq_compile.model.share import examine, mark_shared
from svdq_compile.ops.storage import expand
from svdq_compile.testing.checkpoints import SMALL, write_checkpoint
from svdq_compile.testing.random_model import random_transformer
from svdq_compile.testing.weights import random_linear, share_activation

EXPORT = Path(__file__).parents[1] / "data" / "modelopt-two-blocks"
QKV, ADDED, MODULATION = "to_q+to_k+to_v", "add_q_proj+add_k_proj+add_v_proj", "img_mod.1+txt_mod.1"
ALL = {QKV, ADDED, "*." + MODULATION, ""}


def weights(model):
    return {name: module.weight for name, module in quantised_linears(model).items()}


def keys(model):
    return {weight.fingerprint.share for weight in weights(model).values()}


def assert_true(model):
    """No weight has a key that marking anew would not give it."""
    before = {name: weight.fingerprint.share for name, weight in weights(model).items()}
    fresh = {name: found.key for found in examine(weights(model)) for name in found.names if not found.reason}
    assert all(fresh.get(name) == share for name, share in before.items() if share)


@pytest.fixture
def trio():
    layers = nn.ModuleDict({name: random_linear(32, 48) for name in ("to_q", "to_k", "to_v")})
    share_activation(*layers.values())
    mark_shared(weights(layers))
    assert keys(layers) == {QKV}
    return layers


@pytest.mark.parametrize("storage", ["packed", "expanded"])
def test_a_real_export_shares(storage):
    model = svdq_compile.load_transformer(EXPORT, storage=storage, compute="fp8")
    assert keys(model) == ALL
    assert [found.reason for found in examine(weights(model))] == [""] * 6
    assert_true(model)


@pytest.mark.parametrize(
    ("recipe", "share", "expected"),
    [
        ("mixed", True, ALL),
        ("all", True, {QKV, ADDED, ""}),
        ("nvfp4", True, ALL),
        ("fp8", True, ALL),
        ("mixed", False, {""}),
        ("fp8", False, {""}),
    ],
)
def test_recipes(recipe, share, expected, tmp_path):
    options = {"config": SMALL | {"num_layers": 3}, "recipe": recipe, "rank": 8, "blocks_kept": 0, "share": share}
    loaded = svdq_compile.load_transformer(write_checkpoint(tmp_path, **options))
    assert keys(loaded) == expected == keys(random_transformer(**options))
    assert_true(loaded)


def test_quantised_while_loading_without_a_low_rank_branch_shares(tmp_path):
    from diffusers import QwenImageTransformer2DModel

    QwenImageTransformer2DModel(**SMALL).bfloat16().save_pretrained(tmp_path)
    options = {"blocks_kept": 1, "rank": 8}
    assert keys(svdq_compile.load_transformer(tmp_path, quantize="nvfp4", **options)) >= {QKV, ADDED}
    assert not keys(svdq_compile.load_transformer(tmp_path, quantize="nvfp4_svd", **options)) & {QKV, ADDED}


def test_modulations_of_unequal_blocks_share_inside_a_block_only():
    model = random_transformer(SMALL | {"num_layers": 3}, recipe="mixed", rank=8, blocks_kept=0)
    for name in ("img_mod", "txt_mod"):
        weight = getattr(model.transformer_blocks[1], name)[1].weight
        weight.input_scale = weight.input_scale * 2
    mark_shared(weights(model))
    assert keys(model) == {QKV, ADDED, MODULATION, ""}


def test_why_not(trio):
    trio["to_k"].weight.lora_down = trio["to_k"].weight.lora_down + 1
    (found,) = examine(weights(trio))
    assert found.reason == "to_k.lora_down differs"
    trio["to_v"].weight = nn.Parameter(torch.zeros(32, 48), requires_grad=False)
    assert examine(weights(trio))[0].reason == "to_v is not quantised"
    trio["to_v"] = random_linear(32, 48, rank=3)
    assert "rank 3" in examine(weights(trio))[0].reason
    mark_shared(weights(trio))
    assert keys(trio) == {""}
    (found,) = examine(weights(copy.deepcopy(trio).to("meta")))
    assert found.reason == "to_q has no data"
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        fake = nn.ModuleDict({name: random_linear(32, 48) for name in trio})
        mark_shared(weights(fake))
        (found,) = examine(weights(fake))
    assert found.reason == "to_q has no data"
    assert keys(fake) == {""}


KEEPS = {
    "deepcopy": copy.deepcopy,
    "dtype": lambda layers: layers.to(torch.float16),
    "compute": lambda layers: set_compute(layers, "bf16"),
    "clone": lambda layers: _each(layers, lambda w: w.clone()),
    "detach": lambda layers: _each(layers, lambda w: w.detach()),
    "device": lambda layers: layers.to("cpu"),
    "expand": lambda layers: _each(layers, expand),
    "rows": lambda layers: _each(layers, lambda w: w[8:24]),
    "pickle": lambda layers: _pickled(layers),
}

LOSES = {
    "empty_like": lambda layers: _each(layers, torch.empty_like),
    "columns": lambda layers: _each(layers, lambda w: w[:, 16:]),
    "to_empty": lambda layers: layers.to_empty(device="cpu"),
}


def _each(layers, function):
    for layer in layers.values():
        layer.weight = nn.Parameter(function(layer.weight), requires_grad=False)
    return layers


def _pickled(layers):
    buffer = io.BytesIO()
    torch.save(layers.state_dict(), buffer)
    buffer.seek(0)
    layers.load_state_dict(torch.load(buffer, weights_only=True), assign=True)
    return layers


@pytest.mark.parametrize("operation", KEEPS.values(), ids=KEEPS)
def test_what_changes_no_shared_byte_keeps_the_key(trio, operation):
    changed = operation(trio)
    assert keys(changed) == {QKV}
    assert_true(changed)


@pytest.mark.parametrize("operation", LOSES.values(), ids=LOSES)
def test_what_may_change_one_loses_the_key(trio, operation):
    assert keys(operation(trio)) == {""}


def test_copying_the_same_shared_parts_in_is_allowed(trio):
    other = copy.deepcopy(trio)
    other["to_q"].weight.qweight.zero_()
    trio["to_q"].weight.copy_(other["to_q"].weight)
    assert not trio["to_q"].weight.qweight.any()
    assert keys(trio) == {QKV}
    trio.load_state_dict(other.state_dict())
    assert_true(trio)


@pytest.mark.parametrize("part", ["input_scale", "pre_quant_scale", "lora_down"])
def test_copying_others_in_is_refused(trio, part):
    other = copy.deepcopy(trio["to_k"].weight)
    setattr(other, part, getattr(other, part) * 2)
    before = copy.deepcopy(trio["to_k"].weight)
    for target in (trio["to_k"].weight, trio["to_k"].weight.detach()):
        with pytest.raises(ShareError, match=f"another {part} into one of the weights to_q.*\n.*load_into"):
            target.copy_(other)
    assert torch.equal(trio["to_k"].weight.qweight, before.qweight)
    assert_true(trio)


def test_a_weight_without_a_key_takes_anything(trio):
    alone = random_linear(32, 48)
    alone.weight.copy_(trio["to_q"].weight)
    assert alone.weight.fingerprint.share == ""


def test_assigned_data_has_a_key_only_where_both_had(trio):
    alone = random_linear(32, 48)
    alone.weight.data = trio["to_q"].weight.data
    assert alone.weight.fingerprint.share == ""
    trio["to_k"].weight.data = random_linear(32, 48).weight.data
    assert trio["to_k"].weight.fingerprint.share == ""
    trio["to_v"].weight.data = trio["to_v"].weight.data.clone()
    assert trio["to_v"].weight.fingerprint.share == QKV


def test_loading_and_patching_bring_their_own_keys(tmp_path):
    config = SMALL | {"num_layers": 2}
    options = {"config": config, "recipe": "mixed", "rank": 8, "blocks_kept": 0}
    sharing = write_checkpoint(tmp_path / "sharing", **options)
    apart = write_checkpoint(tmp_path / "apart", share=False, **options)
    model = svdq_compile.load_transformer(sharing)
    with svdq_compile.patch(model, apart):
        assert keys(model) == {""}
        with svdq_compile.patch(model, svdq_compile.load_transformer(sharing)):
            assert keys(model) == ALL
            assert_true(model)
    assert keys(model) == ALL
    svdq_compile.load_into(model, apart)
    assert keys(model) == {""}


def test_offloading_keeps_keys(trio):
    """accelerate's hooks rebuild each parameter around every forward."""
    from accelerate import cpu_offload

    seen = []
    for layer in trio.values():
        cpu_offload(layer, execution_device=torch.device("cpu"))
        inner = layer._old_forward
        layer._old_forward = lambda x, layer=layer, inner=inner: (seen.append(layer.weight), inner(x))[1]
        layer(torch.randn(2, 48).bfloat16())
    assert [(weight.device.type, weight.fingerprint.share) for weight in seen] == [("cpu", QKV)] * 3
