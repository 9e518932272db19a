"""Finding a checkpoint's files."""

import json
import shutil
from unittest import mock

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

import svdq_compile
from svdq_compile.checkpoint.source import INDEX_NAME, WEIGHTS_NAME, is_hub_id, open_source
from svdq_compile.errors import (
    CheckpointNotFoundError,
    ConfigError,
    MissingKeyError,
    ShardIndexError,
    UnsafeFileError,
    UnsafePathError,
)
from svdq_compile.testing.compare import differing


@pytest.fixture
def pipeline(tmp_path, checkpoint):
    """A pipeline folder with the checkpoint as its transformer."""
    folder = tmp_path / "pipeline"
    (folder / "vae").mkdir(parents=True)
    (folder / "vae" / "config.json").write_text("{}")
    (folder / "model_index.json").write_text('{"_class_name": "QwenImagePipeline"}')
    shutil.copytree(checkpoint, folder / "transformer")
    return folder


def test_every_way_to_name_a_checkpoint_gives_the_same_model(checkpoint, sharded, pipeline):
    model = svdq_compile.load_transformer(checkpoint)
    for path in (str(checkpoint), checkpoint / WEIGHTS_NAME, sharded, pipeline, pipeline / "transformer"):
        assert differing(model, svdq_compile.load_transformer(path)) == []


def test_one_shard_is_no_checkpoint(sharded, load_error):
    assert load_error(next(sharded.glob("*00001-of*")), (ConfigError, MissingKeyError)).key


def test_one_file_of_another_name_is_taken(checkpoint):
    (checkpoint / WEIGHTS_NAME).rename(checkpoint / "diffusion_pytorch_model.fp4.safetensors")
    assert len(open_source(checkpoint).tensors) == 169


def test_several_files_need_an_index(sharded, load_error):
    (sharded / INDEX_NAME).unlink()
    assert len(load_error(sharded, ShardIndexError).found) == 3


def test_pickle_is_refused_even_when_named(checkpoint, load_error):
    pickle = checkpoint / "model.bin"
    (checkpoint / WEIGHTS_NAME).rename(pickle)
    assert load_error(checkpoint, UnsafeFileError).found == ["model.bin"]
    error = load_error(pickle, UnsafeFileError)
    assert error.file == str(pickle)
    assert "pickle can run code" in error.hint


@pytest.mark.parametrize("name", ["config.json", "notes.txt", "weights"])
def test_another_file_than_the_weights(checkpoint, load_error, name):
    (checkpoint / name).touch()
    hint = load_error(checkpoint / name, UnsafeFileError).hint
    assert hint == "give a .safetensors file, or the folder that holds it and config.json"


@pytest.mark.parametrize(
    ("path", "may_be"),
    [
        ("owner/name", True),
        ("owner/name.v2-x_y", True),
        ("name", False),
        ("owner/", False),
        ("/name", False),
        ("./name", False),
        ("~/name", False),
        ("a/b/c", False),
        ("owner/name:fp4", False),
        ("", False),
    ],
)
def test_hub_ids(path, may_be):
    assert is_hub_id(path) == may_be


@pytest.mark.parametrize("outside", ["../{}", "{}/../{}", "sub/{}", "./{}"])
def test_a_shard_outside_the_folder_is_refused(sharded, load_error, outside):
    index = json.loads((sharded / INDEX_NAME).read_text())
    shard = sorted(set(index["weight_map"].values()))[0]
    path = outside.replace("{}", shard)
    # The file is really there, so only the rule keeps it from being read.
    (sharded / "sub").mkdir()
    shutil.copy(sharded / shard, sharded / "sub" / shard)
    shutil.copy(sharded / shard, sharded.parent / shard)
    index["weight_map"] = {k: path if v == shard else v for k, v in index["weight_map"].items()}
    (sharded / INDEX_NAME).write_text(json.dumps(index))
    error = load_error(sharded, UnsafePathError)
    assert (error.file, error.found) == (str(sharded / INDEX_NAME), path)


def test_a_shard_that_is_a_link_is_read(sharded):
    """The Hub's cache holds links."""
    shard = next(sharded.glob("*00002-of*"))
    blob = sharded.parent / "blob"
    shard.rename(blob)
    shard.symlink_to(blob)
    assert len(open_source(sharded).tensors) == 169


def test_no_config_is_a_config_error(checkpoint, load_error):
    (checkpoint / "config.json").unlink()
    assert load_error(checkpoint, ConfigError).file == str(checkpoint / "config.json")


def test_a_config_that_is_a_folder_is_a_config_error(checkpoint, load_error):
    (checkpoint / "config.json").unlink()
    (checkpoint / "config.json").mkdir()
    assert load_error(checkpoint, ConfigError).what == "no such file"


@pytest.mark.parametrize("path", ["nowhere", "./no/where", "/no/where", "a/b/c", "", "~/x", "../x", "x" * 5000, "a\0b"])
def test_a_path_that_is_nothing_is_not_asked_of_the_hub(monkeypatch, load_error, path):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    monkeypatch.chdir("/")
    error = load_error(path, (CheckpointNotFoundError, ConfigError))
    assert error.file is not None


@pytest.mark.parametrize("layout", ["pipeline", "transformer"])
def test_a_hub_id_is_fetched_at_its_revision(monkeypatch, pipeline, tmp_path, layout):
    """Of a pipeline's repository the transformer is fetched and nothing else; a bare transformer's as it is."""
    repository = pipeline if layout == "pipeline" else pipeline / "transformer"
    (pipeline / "vae").mkdir(exist_ok=True)
    (pipeline / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"big")
    calls, fetched = [], set()

    def snapshot_download(repo, *, revision, allow_patterns, ignore_patterns=None):
        calls.append((repo, revision))
        wanted = huggingface_hub.utils.filter_repo_objects(
            (str(f.relative_to(repository)) for f in repository.rglob("*") if f.is_file()),
            allow_patterns=allow_patterns,
            ignore_patterns=ignore_patterns,
        )
        for name in wanted:
            fetched.add(name)
            target = tmp_path / "cache" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repository / name, target)
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    model = svdq_compile.load_transformer("owner/name", revision="v1")
    assert set(calls) == {("owner/name", "v1")}
    assert not any("vae" in name for name in fetched)
    assert differing(model, svdq_compile.load_transformer(pipeline)) == []


@pytest.mark.parametrize(
    "error",
    [
        lambda: RepositoryNotFoundError("404 Client Error", response=mock.MagicMock()),
        lambda: HfHubHTTPError("500 Server Error", response=mock.MagicMock()),
        lambda: LocalEntryNotFoundError("offline"),
        lambda: ConnectionError("no network"),
    ],
)
def test_a_hub_id_that_cannot_be_had_is_not_found(monkeypatch, load_error, tmp_path, error):
    def snapshot_download(*_, **__):
        raise error()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    caught = load_error("owner/name", CheckpointNotFoundError)
    assert caught.file == "owner/name"
    assert type(error()).__name__ in caught.found


def test_an_ill_formed_hub_id_is_not_found(monkeypatch, load_error, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert "HFValidationError" in load_error("owner/na me", CheckpointNotFoundError).found
