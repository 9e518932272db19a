"""``svdq_compile.quantize``: through ModelOpt's files to a new model, the old one untouched."""

import inspect
import textwrap

import pytest
import torch
from diffusers import QwenImageTransformer2DModel

import svdq_compile
from svdq_compile.errors import QuantizeError
from svdq_compile.model.load import quantised_linears
from svdq_compile.testing.checkpoints import SMALL, example_inputs
from svdq_compile.testing.compare import differing
from svdq_compile.testing.oracle import relative_error

pytest.importorskip("modelopt")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return QwenImageTransformer2DModel(**SMALL).bfloat16().eval()


def calibrate(transformer):
    transformer(**example_inputs(transformer))


@pytest.mark.parametrize("format", ["nvfp4_svd", "nvfp4", "fp8"])
def test_the_result_is_the_checkpoint_and_the_model_is_untouched(model, format, tmp_path):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    quantised = svdq_compile.quantize(model, calibrate, format=format, rank=8, blocks_kept=1, output=tmp_path)
    assert len(quantised_linears(quantised)) == 14
    assert not differing(quantised, svdq_compile.load_transformer(tmp_path))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    expected = model(**example_inputs(model))[0]
    assert 0 < relative_error(quantised(**example_inputs(quantised))[0], expected) < 0.2


def test_without_an_output_the_files_are_temporary(model):
    first, second = (svdq_compile.quantize(model, calibrate, rank=8, blocks_kept=1, seed=3) for _ in range(2))
    assert not differing(first, second)


def test_an_unknown_format_is_refused(model):
    with pytest.raises(QuantizeError, match="int4"):
        svdq_compile.quantize(model, calibrate, format="int4")


def test_an_unknown_compute_mode_is_refused_before_calibration(model):
    with pytest.raises(svdq_compile.errors.OptionError, match="fp4"):
        svdq_compile.quantize(model, lambda model: pytest.fail("calibrated"), compute="fp4")


def test_what_is_quantised_already_is_refused(model, tmp_path):
    quantised = svdq_compile.quantize(model, calibrate, format="nvfp4", blocks_kept=1)
    with pytest.raises(QuantizeError, match="is quantised already"):
        svdq_compile.quantize(quantised, calibrate, blocks_kept=1, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_loop_that_ignores_its_argument_is_refused(model, tmp_path):
    with pytest.raises(QuantizeError, match="needed: every call runs inputs through the model it is given"):
        svdq_compile.quantize(model, lambda _: calibrate(model), blocks_kept=1, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_documented_loop_gives_the_pipeline_its_transformer_back(model, monkeypatch):
    """The example as it stands, with a pipeline that runs its transformer."""
    calls = []

    class Pipe:
        transformer = model

        def __call__(self, prompt, **options):
            calls.append((prompt, self.transformer))
            if prompt == "broken":
                raise ZeroDivisionError

    text = inspect.getdoc(svdq_compile.quantize)
    example = textwrap.dedent(text[text.index("    def calibrate") : text.index("Args:")])
    pipe, copied, found = Pipe(), torch.nn.Linear(1, 1), []
    monkeypatch.setattr(svdq_compile, "quantize", lambda transformer, loop, output: found.append((transformer, loop)))
    exec(example, {"pipe": pipe, "prompts": ["one", "broken"], "svdq_compile": svdq_compile})
    ((given, loop),) = found
    with pytest.raises(ZeroDivisionError):
        loop(copied)
    assert given is pipe.transformer is model
    assert calls == [("one", copied), ("broken", copied)]
