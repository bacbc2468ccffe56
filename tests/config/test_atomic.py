import os
import shutil
import signal
import warnings
from pathlib import Path

import pytest

from nemotron_v3.config.atomic import atomic_file, atomic_folder, settle

OPERATIONS = ("mkdir", "rename", "replace", "unlink", "fsync", "rmdir", "open")


def write_file(path: Path, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text)


def write_folder(path: Path, text: str) -> None:
    with atomic_folder(path) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "a").write_text(text)
        (temporary / "inner" / "b").write_text(text)


def texts(path: Path) -> set[str]:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return {p.read_text() for p in files}


WRITERS = pytest.mark.parametrize("write", [write_file, write_folder])


@WRITERS
def test_what_stood_there_is_replaced_and_nothing_else_is_left(tmp_path, write):
    for text in ("first", "second"):
        write(tmp_path / "x", text)
        assert texts(tmp_path / "x") == {text}
        assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("atomic", [atomic_file, atomic_folder])
def test_an_error_leaves_what_stood_there(tmp_path, atomic):
    write = write_file if atomic is atomic_file else write_folder
    write(tmp_path / "x", "first")
    with pytest.raises(ZeroDivisionError), atomic(tmp_path / "x") as temporary:
        place = temporary if atomic is atomic_file else temporary / "a"
        place.write_text("second")
        raise ZeroDivisionError
    assert texts(tmp_path / "x") == {"first"}
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_folder_is_not_replaced_by_a_file(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(ValueError, match="x is no regular file"), atomic_file(tmp_path / "x"):
        pytest.fail("it began")


def test_a_rename_that_fails_puts_the_folder_back(tmp_path, monkeypatch):
    write_folder(tmp_path / "x", "first")
    rename = Path.rename

    def fail(self, target):
        if self.name.endswith(".tmp") and (self / "a").read_text() == "second":
            raise PermissionError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(PermissionError):
        write_folder(tmp_path / "x", "second")
    assert texts(tmp_path / "x") == {"first"}
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def killed_at(count: int, action) -> bool:
    """Run `action` in a fork that kills itself at its file operation `count`; whether it did."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        child = os.fork()
    if child == 0:
        left = [count]

        def counted(operation):
            def run(*args, **kwargs):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return operation(*args, **kwargs)

            return run

        for name in OPERATIONS:
            setattr(os, name, counted(getattr(os, name)))
        try:
            action()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@WRITERS
def test_a_kill_at_any_operation_leaves_one_side_whole(tmp_path, write):
    count, seen = 0, set()
    while True:
        place = tmp_path / str(count) / "x"
        place.parent.mkdir()
        write(place, "first")
        killed = killed_at(count, lambda place=place: write(place, "second"))
        # Between the two renames of a folder nothing stands there; the old one is put back.
        before = texts(place) if place.exists() else {"first"}
        assert before in ({"first"}, {"second"})
        left = tmp_path / f"{count} written again" / "x"
        shutil.copytree(place.parent, left.parent)
        settle(place)
        assert texts(place) == before
        write(left, "third")
        assert texts(left) == {"third"}
        for parent in (place.parent, left.parent):
            assert [p.name for p in parent.iterdir()] == ["x"]
        seen |= before
        if not killed:
            break
        count += 1
    assert count > 3 and seen == {"first", "second"}


def test_a_name_that_looks_like_a_pattern_is_settled_by_itself(tmp_path):
    for name in ("[ab]", "a"):
        (tmp_path / f".{name}.01234567.tmp").write_text("left")
    settle(tmp_path / "[ab]")
    assert [p.name for p in tmp_path.iterdir()] == [".a.01234567.tmp"]


@WRITERS
def test_what_a_living_writer_writes_is_left_alone(tmp_path, write):
    """By one that writes the same place, by one that settles it, and by its own end."""
    place = tmp_path / "x"
    atomic = atomic_file if write is write_file else atomic_folder
    with atomic(place) as mine:
        (mine if write is write_file else mine / "a").write_text("mine")
        with atomic(place) as other:
            assert other != mine
            (other if write is write_file else other / "a").write_text("other")
            settle(place)
        assert texts(place) == {"other"}
        settle(place)
    assert texts(place) == {"mine"}
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_file_that_a_writer_left_is_written_over_from_its_beginning(tmp_path):
    left = tmp_path / ".x.00000000.tmp"
    left.write_text("a long text that was left")
    with atomic_file(tmp_path / "x") as path, path.open("a") as file:
        file.write("new")
    assert (tmp_path / "x").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_model_is_saved_into_a_folder_that_is_being_filled(tmp_path):
    """Both lock the folder: a run that is put in its place whole saves its checkpoint in it."""
    from nemotron_v3 import from_pretrained, save_pretrained
    from tests.models import tiny_model

    with atomic_folder(tmp_path / "run") as folder:
        save_pretrained(tiny_model("M"), folder)
    assert from_pretrained(tmp_path / "run").config.num_hidden_layers == 1
