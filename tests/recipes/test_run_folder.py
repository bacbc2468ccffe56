import contextlib
from pathlib import Path

import pytest

from nemotron_v3.checkpoint.errors import CheckpointError
from nemotron_v3.checkpoint.replace import whole_copy
from nemotron_v3.cli.report import Report
from nemotron_v3.recipes.run_folder import CHECKPOINT, METRICS, atomic_run_folder, interrupted


def write_run(folder: Path, text: str) -> None:
    for name in (METRICS, *CHECKPOINT):
        (folder / name).write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.fixture
def out(tmp_path) -> Path:
    """Where an earlier run lies."""
    out = tmp_path / "runs" / "demo"
    out.mkdir(parents=True)
    write_run(out, "earlier")
    return out


def test_a_whole_run_replaces_the_earlier_one(out):
    with atomic_run_folder(out) as folder:
        write_run(folder, "new")
        assert set(contents(out).values()) == {"earlier"}
    assert set(contents(out).values()) == {"new"}
    assert list(out.parent.iterdir()) == [out]


def test_the_first_run_makes_the_folders_above_it(tmp_path):
    out = tmp_path / "a" / "b"
    with atomic_run_folder(out) as folder:
        write_run(folder, "new")
    assert set(contents(out).values()) == {"new"}


def test_a_failed_run_leaves_the_earlier_one_and_nothing_else(out):
    with pytest.raises(ZeroDivisionError), atomic_run_folder(out) as folder:
        write_run(folder, "new")
        raise ZeroDivisionError
    assert set(contents(out).values()) == {"earlier"}
    assert list(out.parent.iterdir()) == [out]


def test_an_interrupted_run_with_a_checkpoint_is_kept_beside_the_earlier_one(out):
    kept = pytest.raises(KeyboardInterrupt, match="demo-interrupted")
    with kept, atomic_run_folder(out) as folder:
        write_run(folder, "new")
        raise KeyboardInterrupt
    assert set(contents(out).values()) == {"earlier"}
    assert set(contents(interrupted(out)).values()) == {"new"}
    assert sorted(out.parent.iterdir()) == [out, interrupted(out)]


def test_an_interrupted_run_without_a_checkpoint_leaves_nothing(out):
    with pytest.raises(KeyboardInterrupt), atomic_run_folder(out) as folder:
        (folder / METRICS).write_text("")
        raise KeyboardInterrupt
    assert list(out.parent.iterdir()) == [out]


def test_a_run_that_a_kill_moved_aside_comes_back_for_writers_and_readers(out, capsys):
    aside = out.with_name(f".{out.name}.01234567.old")

    def kill() -> None:
        out.rename(aside)

    kill()
    with pytest.raises(ZeroDivisionError), atomic_run_folder(out):
        raise ZeroDivisionError
    assert set(contents(out).values()) == {"earlier"}
    kill()
    with contextlib.suppress(CheckpointError):
        whole_copy(out)
    assert set(contents(out).values()) == {"earlier"}
    kill()
    Report((out,)).run()
    assert set(contents(out).values()) >= {"earlier"} and not aside.exists()


def test_a_rename_that_fails_puts_the_earlier_run_back(out, monkeypatch):
    rename = Path.rename

    def fail(self, target):
        if Path(target) == out and set(contents(self).values()) == {"new"}:
            raise PermissionError("no")
        return rename(self, target)

    with pytest.raises(PermissionError), atomic_run_folder(out) as folder:
        write_run(folder, "new")
        monkeypatch.setattr(Path, "rename", fail)
    assert set(contents(out).values()) == {"earlier"}


@pytest.mark.parametrize("place", [lambda out: out, interrupted])
def test_a_folder_that_no_run_wrote_is_never_replaced(tmp_path, place):
    out = tmp_path / "home"
    place(out).mkdir()
    (place(out) / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds something else"), atomic_run_folder(out):
        pytest.fail("the run began")
    assert contents(place(out)) == {"thesis.tex": "years of work"}


def test_an_empty_folder_may_be_replaced(tmp_path):
    with atomic_run_folder(tmp_path / "out") as folder:
        write_run(folder, "first")
    empty = tmp_path / "empty"
    empty.mkdir()
    with atomic_run_folder(empty) as folder:
        write_run(folder, "new")
    assert set(contents(empty).values()) == {"new"}
