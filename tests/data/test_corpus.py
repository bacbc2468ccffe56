from pathlib import Path

import pytest

from nemotron_v3.data.corpus import HELD_OUT_EVERY, is_held_out, standard_library


def write(root: Path, files: dict[str, bytes]) -> None:
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)


def one_of_each() -> tuple[str, str]:
    """A path that is held out and one that is trained on."""
    names = [f"module_{i}.py" for i in range(200)]
    return next(filter(is_held_out, names)), next(n for n in names if not is_held_out(n))


def test_files_are_split_by_path_and_kept_byte_for_byte(tmp_path):
    held_out, train = one_of_each()
    write(tmp_path, {held_out: b"x = 1\r\n", train: "y = 'é'\n".encode(), "notes.txt": b"no"})
    corpus = standard_library(tmp_path)
    assert [(d.path, d.text) for d in corpus.held_out] == [(held_out, "x = 1\r\n")]
    assert [(d.path, d.text) for d in corpus.train] == [(train, "y = 'é'\n")]


def test_tests_installed_packages_empty_and_undecodable_files_are_left_out(tmp_path):
    held_out, train = one_of_each()
    write(
        tmp_path,
        {
            held_out: b"x\n",
            train: b"y\n",
            f"test/{train}": b"no\n",
            f"site-packages/numpy/{train}": b"no\n",
            f"a/__pycache__/{train}": b"no\n",
            f"idlelib/{held_out}": b"no\n",
            f"lib2to3/{train}": b"no\n",
            f"latin/{train}": b"caf\xe9\n",
            f"empty/{train}": b"",
        },
    )
    corpus = standard_library(tmp_path)
    assert {d.path for d in (*corpus.train, *corpus.held_out)} == {held_out, train}


def test_a_folder_with_nothing_to_hold_out_is_an_error(tmp_path):
    _, train = one_of_each()
    write(tmp_path, {train: b"y\n"})
    with pytest.raises(ValueError, match="1 .py files to train on and 0 to hold out"):
        standard_library(tmp_path)


def test_about_one_path_in_twenty_is_held_out():
    share = sum(is_held_out(f"package/module_{i}.py") for i in range(20_000)) / 20_000
    assert share == pytest.approx(1 / HELD_OUT_EVERY, rel=0.1)


def test_this_pythons_library_has_documents_of_both_kinds_sorted_and_apart():
    corpus = standard_library()
    train = [d.path for d in corpus.train]
    held_out = [d.path for d in corpus.held_out]
    assert "json/decoder.py" in train + held_out
    assert train == sorted(train) and held_out == sorted(held_out)
    assert not set(train) & set(held_out)
    assert standard_library() == corpus
