"""``storage="expanded"`` on the way from files to models, and on the way back."""

import logging

import pytest
import torch
from diffusers import QwenImageTransformer2DModel

import svdq_compile
from svdq_compile.errors import SaveError, StorageError
from svdq_compile.model.load import quantised_linears
from svdq_compile.model.resident import resident
from svdq_compile.ops.modes import FP8_MIN_TOKENS
from svdq_compile.ops.storage import expand, storage_of
from svdq_compile.testing.checkpoints import SMALL, example_inputs, write_checkpoint
from svdq_compile.testing.compare import differing
from svdq_compile.testing.oracle import assert_bits_equal


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """NVFP4_SVD and NVFP4 linears."""
    return write_checkpoint(tmp_path_factory.mktemp("mixed"), config=SMALL, recipe="mixed", blocks_kept=1)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return QwenImageTransformer2DModel(**SMALL).bfloat16().eval()


def run(model, **sizes):
    return model(**example_inputs(model, **sizes))[0]


def assert_alike(left, right):
    """The same bits from two models in ``fp8`` mode, with enough tokens of both streams for it to quantise."""
    sizes = {"height": FP8_MIN_TOKENS, "width": 1, "text": FP8_MIN_TOKENS}
    assert_bits_equal(run(left, **sizes), run(right, **sizes))


def test_loading_expanded_is_loading_and_expanding(folder):
    packed = svdq_compile.load_transformer(folder)
    expanded = svdq_compile.load_transformer(folder, storage="expanded")
    for name, module in quantised_linears(packed).items():
        if "_mod." not in name:
            module.weight = torch.nn.Parameter(expand(module.weight), requires_grad=False)
    assert differing(packed, expanded) == []


def test_what_sees_one_vector_a_picture_stays_packed(folder):
    linears = quantised_linears(svdq_compile.load_transformer(folder, storage="expanded"))
    packed = {name for name, module in linears.items() if module.weight.spec.storage == "packed"}
    assert packed
    assert packed == {name for name in linears if name.endswith((".img_mod.1", ".txt_mod.1"))} < linears.keys()


@pytest.mark.parametrize(
    ("name", "stays"),
    [
        ("transformer_blocks.0.img_mod.1", True),
        ("double_stream_modulation_img.linear", True),
        ("transformer_blocks.7.norm1_context.linear", True),
        ("norm_out.linear", True),
        ("adaln_single.linear", True),
        ("blocks.3.adaLN_modulation.1", True),
        ("adapter.proj", False),
        ("time_text_embed.timestep_embedder.linear_1", True),
        ("transformer_blocks.0.attn.to_q", False),
        ("transformer_blocks.0.img_mlp.net.0.proj", False),
        ("proj_out", False),
    ],
)
def test_by_their_names(name, stays):
    assert storage_of(name, "packed") == "packed"
    assert storage_of(name, "expanded") == ("packed" if stays else "expanded")


def test_fp8_mode_is_the_same_from_either_storage(folder):
    packed = svdq_compile.load_transformer(folder, compute="fp8")
    expanded = svdq_compile.load_transformer(folder, compute="fp8", storage="expanded")
    assert_alike(expanded, packed)


def test_bytes(folder):
    packed = resident(svdq_compile.load_transformer(folder))
    expanded = resident(svdq_compile.load_transformer(folder, storage="expanded"))
    assert (packed.storage, expanded.storage) == ("packed", "expanded")
    assert packed.nbytes == svdq_compile.inspect(folder).manifest.nbytes
    assert packed.nbytes - packed.quantised_nbytes == expanded.nbytes - expanded.quantised_nbytes
    assert expanded.quantised_nbytes > packed.quantised_nbytes
    assert str(expanded).startswith("expanded, 0.")


def test_what_became_resident_is_logged(folder, caplog):
    with caplog.at_level(logging.INFO, logger="svdq_compile"):
        model = svdq_compile.load_transformer(folder, storage="expanded")
    assert f"{folder}: {resident(model)}" in caplog.text


def test_load_into(model, folder):
    expected = svdq_compile.load_transformer(folder, storage="expanded")
    for source in (folder, svdq_compile.load_checkpoint(folder)):
        assert differing(svdq_compile.load_into(model, source, storage="expanded"), expected) == []


def test_patch(model, folder):
    before = run(model)
    expected = run(svdq_compile.load_transformer(folder, storage="expanded"))
    for source in (folder, svdq_compile.load_checkpoint(folder)):
        with svdq_compile.patch(model, source, storage="expanded"):
            assert resident(model).storage == "expanded"
            assert_bits_equal(run(model), expected)
    lender = svdq_compile.load_transformer(folder, storage="expanded")
    with svdq_compile.patch(model, lender):
        assert_bits_equal(run(model), expected)
    assert_bits_equal(run(model), before)


@pytest.mark.parametrize("compute", ["nvfp4", "modelopt"])
def test_a_mode_that_needs_the_codes_is_refused_at_once(model, folder, compute):
    before = dict(model.named_parameters())
    how = {"compute": compute, "storage": "expanded"}
    message = f"compute='{compute}' needs the 4-bit codes"
    with pytest.raises(StorageError, match=message):
        svdq_compile.load_transformer(folder, **how)
    with pytest.raises(StorageError, match=message):
        svdq_compile.load_into(model, folder, **how)
    with pytest.raises(StorageError, match=message), svdq_compile.patch(model, folder, **how):
        pytest.fail("the block must not run")
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def test_switching_to_such_a_mode_changes_no_linear(folder, tmp_path):
    """Even where the first linears of a model could be switched."""
    fp8 = write_checkpoint(tmp_path, config=SMALL, recipe="fp8", blocks_kept=1)
    model = svdq_compile.load_transformer(fp8)
    *_, last = quantised_linears(svdq_compile.load_transformer(folder, storage="expanded")).values()
    (*_, name) = quantised_linears(model)
    model.get_submodule(name).weight = last.weight
    with pytest.raises(StorageError):
        svdq_compile.set_compute(model, "nvfp4")
    assert {module.weight.fingerprint.compute for module in quantised_linears(model).values()} == {"auto"}


def test_an_unknown_storage_is_refused(model, folder):
    for call in (svdq_compile.load_transformer, lambda path, **how: svdq_compile.load_into(model, path, **how)):
        with pytest.raises(StorageError, match="choose one of packed, expanded"):
            call(folder, storage="dense")


def test_an_fp8_checkpoint_is_what_it_is(tmp_path):
    folder = write_checkpoint(tmp_path, config=SMALL, recipe="fp8", blocks_kept=1)
    packed, expanded = (
        svdq_compile.load_transformer(folder, compute="nvfp4", storage=s) for s in ("packed", "expanded")
    )
    assert differing(packed, expanded) == []
    assert resident(expanded).storage == "packed"


def test_an_expanded_model_is_not_written(folder, tmp_path):
    model = svdq_compile.load_transformer(folder, storage="expanded")
    with pytest.raises(SaveError, match="storage='packed'") as caught:
        svdq_compile.save_checkpoint(model, tmp_path / "out")
    assert (caught.value.found, caught.value.key.rpartition(".")[2]) == ("fp8_svd", "weight")
    assert not (tmp_path / "out").exists()


def test_quantising_while_loading(tmp_path):
    torch.manual_seed(0)
    QwenImageTransformer2DModel(**SMALL).bfloat16().save_pretrained(tmp_path)
    how = {"quantize": "nvfp4_svd", "rank": 8, "blocks_kept": 1, "compute": "fp8"}
    packed, expanded = (svdq_compile.load_transformer(tmp_path, **how, storage=s) for s in ("packed", "expanded"))
    assert resident(expanded).storage == "expanded"
    assert_alike(expanded, packed)
