"""What lies beside the weights goes where the model goes."""

import json
import os
import warnings

import pytest

from nemotron_v3.checkpoint import CheckpointError, convert, from_pretrained, save_pretrained
from nemotron_v3.checkpoint.side_files import SIDE_FILES
from tests.models import tiny_model

CONFIG = "generation_config.json"
MORE = "additional_chat_templates/tool_use.jinja"


@pytest.fixture
def came(tmp_path):
    """A checkpoint with all that goes along, and code, which does not; the files' bytes."""
    folder = tmp_path / "came"
    save_pretrained(tiny_model("M"), folder)
    (folder / MORE).parent.mkdir()
    files = {name: f"content of {name}\n\xff".encode("latin-1") for name in (*SIDE_FILES, MORE)}
    files[CONFIG] = b'{"eos_token_id":\t[2, 11]}'
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
    (folder / "modeling.py").write_text("raise SystemExit")
    return folder, files


def beside(folder):
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {n: r for n, r in found.items() if n not in ("config.json", "model.safetensors")}


def test_a_copy_has_every_file_to_the_byte(came, tmp_path):
    folder, files = came
    model = from_pretrained(folder)
    for path in folder.rglob("*.json"):
        path.unlink()  # what came with the model stays with it
    save_pretrained(model, tmp_path / "copy")
    assert beside(tmp_path / "copy") == files
    again = from_pretrained(tmp_path / "copy")
    assert again.generation_config == {"eos_token_id": [2, 11]}
    convert(tmp_path / "copy", tmp_path / "converted")
    assert beside(tmp_path / "converted") == files


def test_what_stands_there_is_not_replaced_without_a_word(came, tmp_path):
    folder, files = came
    model = from_pretrained(folder)
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "tokenizer.json").write_text("mine")
    with pytest.warns(UserWarning, match="has tokenizer.json with other content"):
        save_pretrained(model, tmp_path / "copy")
    assert beside(tmp_path / "copy") == files | {"tokenizer.json": b"mine"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_pretrained(model, folder)
    assert {n: r for n, r in beside(folder).items() if n != "modeling.py"} == files


def test_a_changed_generation_config_is_written(came, tmp_path):
    folder, files = came
    model = from_pretrained(folder)
    model.generation_config["temperature"] = 0.5
    save_pretrained(model, folder)
    assert json.loads((folder / CONFIG).read_text()) == {
        "eos_token_id": [2, 11],
        "temperature": 0.5,
    }
    model.generation_config = None
    save_pretrained(model, tmp_path / "without")
    assert not (tmp_path / "without" / CONFIG).exists()
    model.generation_config = {"eos_token_id": {1}}
    with pytest.raises(CheckpointError, match="cannot be written as JSON"):
        save_pretrained(model, tmp_path / "never")
    assert not (tmp_path / "never").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", [CONFIG, "tokenizer.json", MORE])
def test_files_that_are_none_are_refused(came, name):
    folder, _ = came
    os.unlink(folder / name)
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match="is a named pipe"):
        from_pretrained(folder)
    os.unlink(folder / name)
    (folder / name).symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="is a device"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    "raw", [b"[]", b"{", b"\xff", b"[" * 10**5, b'{"a": ' + b"1" * 5000 + b"}"]
)
def test_a_generation_config_that_is_none(came, raw):
    folder, _ = came
    (folder / CONFIG).write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        from_pretrained(folder)
