"""The context manager lends weights and gives back the very objects it found."""

import copy
import threading

import pytest
import torch

import svdq_compile
from svdq_compile.errors import CheckpointError, OptionError
from svdq_compile.model.bind import slots_of
from svdq_compile.ops.weight import SVDQWeight
from svdq_compile.testing.checkpoints import SMALL, example_inputs, write_checkpoint
from svdq_compile.testing.graphs import RecordingBackend
from svdq_compile.testing.oracle import assert_bits_equal


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two checkpoints of different recipes for the same architecture."""
    paths = []
    for name, recipe, seed in (("svd", "mixed", 1), ("plain", "nvfp4", 2)):
        paths.append(tmp_path_factory.mktemp(name))
        write_checkpoint(paths[-1], config=SMALL, recipe=recipe, blocks_kept=1, seed=seed)
    return paths


@pytest.fixture
def model():
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(0)
    return QwenImageTransformer2DModel(**SMALL).bfloat16().eval()


def objects(model):
    return {key: slot.get() for key, slot in slots_of(model).items()}


def assert_same_objects(model, before):
    now = objects(model)
    assert now.keys() == before.keys()
    assert all(now[key] is before[key] for key in before)


def run(model):
    return model(**example_inputs(model))[0]


def test_inside_the_checkpoint_counts_and_outside_the_model(model, folders):
    before, own = objects(model), run(model)
    expected = run(svdq_compile.load_transformer(folders[0]))
    with svdq_compile.patch(model, folders[0]) as patched:
        assert patched is model
        assert sum(isinstance(v, SVDQWeight) for v in objects(model).values()) == 14
        assert_bits_equal(run(model), expected)
    assert_same_objects(model, before)
    assert_bits_equal(run(model), own)


def test_restored_after_an_exception(model, folders):
    before = objects(model)
    with pytest.raises(ZeroDivisionError), svdq_compile.patch(model, folders[0]):
        _ = 1 / 0
    assert_same_objects(model, before)


def test_nested(model, folders):
    before = objects(model)
    first, second = (run(svdq_compile.load_transformer(folder)) for folder in folders)
    with svdq_compile.patch(model, folders[0]):
        inner = objects(model)
        with svdq_compile.patch(model, folders[1]):
            assert_bits_equal(run(model), second)
        assert_same_objects(model, inner)
        assert_bits_equal(run(model), first)
    assert_same_objects(model, before)


def test_left_in_the_order_of_entry(model, folders):
    """The patch entered last counts until it is left; then what it covered shows only if it is still there."""
    before = objects(model)
    outer, inner = svdq_compile.patch(model, folders[0]), svdq_compile.patch(model, folders[1])
    outer.__enter__()
    inner.__enter__()
    during = objects(model)
    outer.__exit__(None, None, None)
    assert_same_objects(model, during)
    inner.__exit__(None, None, None)
    assert_same_objects(model, before)


def test_two_threads(model, folders):
    """Patches of one model entered and left concurrently: whatever the order, the model gets its own back."""
    before = objects(model)
    loaded = [svdq_compile.load_checkpoint(folder) for folder in folders]
    barrier, failures = threading.Barrier(4), []

    def work(checkpoint):
        try:
            barrier.wait()
            for _ in range(20):
                with svdq_compile.patch(model, checkpoint):
                    assert isinstance(objects(model)["transformer_blocks.1.attn.to_q.weight"], SVDQWeight)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(loaded[i % 2],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert_same_objects(model, before)


def test_two_models_at_once(model, folders):
    twin = copy.deepcopy(model)
    before = objects(twin)
    with svdq_compile.patch(model, folders[0]):
        assert_same_objects(twin, before)


def test_a_bad_checkpoint_leaves_the_model_alone(model, folders, tmp_path):
    before = objects(model)
    other = SMALL | {"num_attention_heads": 4}
    write_checkpoint(tmp_path, config=other, recipe="mixed", blocks_kept=1)
    with pytest.raises(CheckpointError), svdq_compile.patch(model, tmp_path):
        pytest.fail("the block must not run")
    assert_same_objects(model, before)
    with svdq_compile.patch(model, folders[0]):
        pass
    assert_same_objects(model, before)


def test_a_loaded_transformer_lends_its_weights(model, folders):
    """The memory is shared, and the compute mode is the lender's."""
    before = objects(model)
    lender = svdq_compile.load_transformer(folders[0], compute="modelopt")
    with svdq_compile.patch(model, lender):
        assert_bits_equal(run(model), run(lender))
        key = "transformer_blocks.1.attn.to_q.weight"
        assert objects(model)[key].qweight.data_ptr() == objects(lender)[key].qweight.data_ptr()
    assert_same_objects(model, before)


def test_an_unknown_compute_mode_is_refused_at_once(model, folders):
    before = objects(model)
    with pytest.raises(OptionError, match="choose one of"), svdq_compile.patch(model, folders[0], compute="fast"):
        pytest.fail("the block must not run")
    assert_same_objects(model, before)


def test_a_transformer_of_another_architecture_is_refused(model, tmp_path):
    before = objects(model)
    for change in ({"num_layers": 4}, {"num_layers": 2}, {"joint_attention_dim": 48}):
        write_checkpoint(tmp_path / str(change), config=SMALL | change, recipe="nvfp4", blocks_kept=0)
        lender = svdq_compile.load_transformer(tmp_path / str(change))
        with pytest.raises(CheckpointError, match="the models differ"), svdq_compile.patch(model, lender):
            pytest.fail("the block must not run")
    assert_same_objects(model, before)


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_code_notices_and_toggles_without_recompiling(model, folders):
    """One graph for the dense block, one for the quantised one, however often the patch comes and goes."""
    plain = copy.deepcopy(model)
    loaded = svdq_compile.load_checkpoint(folders[0])
    own, lent = run(plain), run(svdq_compile.load_into(plain, loaded))
    recorder = RecordingBackend(lower=False)
    model.compile_repeated_blocks(backend=recorder, fullgraph=True)
    for _ in range(3):
        assert_bits_equal(run(model), own)
        with svdq_compile.patch(model, loaded):
            assert_bits_equal(run(model), lent)
    assert sorted(len(report.matched) for report in recorder.reports) == [0, 14]


def test_a_whole_compiled_model_can_be_patched(model, folders):
    compiled = torch.compile(model, backend="eager")
    expected = run(svdq_compile.load_transformer(folders[0]))
    before = objects(model)
    with svdq_compile.patch(compiled, folders[0]) as patched:
        assert patched is compiled
        assert_bits_equal(run(compiled), expected)
    assert_same_objects(model, before)
