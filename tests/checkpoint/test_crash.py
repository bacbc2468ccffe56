"""Saves that are killed: at every file operation in turn, and at random moments.

A killed save runs in a fork, so that it dies as a process does: no handler runs, nothing is
flushed.
"""

import os
import random
import shutil
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch

from nemotron_v3.checkpoint import CheckpointError, from_pretrained, save_pretrained
from nemotron_v3.checkpoint.replace import replacing
from tests.checkpoint.files import contents
from tests.models import tiny_model

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

PATTERN = "ME-"
OPERATIONS = ("mkdir", "rename", "replace", "unlink", "link", "fsync", "rmdir", "open")


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """Two checkpoints to replace one another: their models, options, and files when whole."""
    root = tmp_path_factory.mktemp("sides")
    options = ({"max_shard_size": "70KB"}, {"max_shard_size": "60KB", "experts": "fused"})
    made = []
    for seed, option in enumerate(options):
        model = tiny_model(PATTERN, seed=seed, intermediate_size=40 + seed)
        save_pretrained(model, root / str(seed), **option)
        made.append((model, option, contents(root / str(seed))))
        assert 5 <= len(made[-1][2]) <= 8
    return made


def fork(action) -> int:
    """Run `action` in a child that ends there; its process id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            action()
        finally:
            os._exit(0)
    return child


def weights_of(directory: Path) -> dict[str, bytes]:
    return {n: raw for n, raw in contents(directory).items() if n.startswith(("model", "config"))}


def side_on(path: Path, sides) -> int:
    """Which side `path` loads as: wholly one of them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = from_pretrained(path)
    followed = any("was interrupted" in str(w.message) for w in caught)
    side = model.config.intermediate_size - 40
    for name, tensor in sides[side][0].state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    # A reader that knows nothing of interrupted saves finds the same, or no checkpoint at all.
    assert (path / "config.json").exists() != followed
    if not followed:
        assert weights_of(path) == sides[side][2]
    return side


def assert_clean(path: Path, sides, side: int) -> None:
    assert contents(path) == sides[side][2] | {"tokenizer.json": b"{}"}
    assert not list(path.glob(".*"))


@pytest.mark.filterwarnings("ignore:the last save to")
def test_killed_before_any_of_its_file_operations_it_leaves_the_old_or_the_new(
    tmp_path, sides, monkeypatch
):
    # Waiting for the disk matters to power cuts alone; the call still counts as an operation.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    model, option, _ = sides[1]
    old = tmp_path / "old"
    save_pretrained(sides[0][0], old, **sides[0][1])
    (old / "tokenizer.json").write_text("{}")
    seen = []
    for moment in range(1, 1000):
        path = tmp_path / str(moment)
        shutil.copytree(old, path)
        child = fork(lambda path=path, moment=moment: die_at(moment, path, model, option))
        finished = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        seen.append(side_on(path, sides))
        # The next save, of either side, finishes or removes what is left.
        after = moment % 2
        save_pretrained(sides[after][0], path, **sides[after][1])
        assert_clean(path, sides, after)
        shutil.rmtree(path)
        if finished:
            break
    assert finished and len(seen) > 40
    assert seen == sorted(seen) and set(seen) == {0, 1}


def die_at(moment: int, path: Path, model, option) -> None:
    count = [0]

    def counted(operation):
        def run(*args, **kwargs):
            count[0] += 1
            if count[0] == moment:
                os._exit(9)
            return operation(*args, **kwargs)

        return run

    for name in OPERATIONS:
        setattr(os, name, counted(getattr(os, name)))
    save_pretrained(model, path, **option)


@pytest.mark.filterwarnings("ignore:the last save to")
def test_killed_at_random_moments_it_leaves_the_old_or_the_new(tmp_path, sides):
    path = tmp_path / "checkpoint"
    started = time.monotonic()
    save_pretrained(sides[0][0], path, **sides[0][1])
    seconds = time.monotonic() - started
    (path / "tokenizer.json").write_text("{}")
    chance = random.Random(0)
    seen = []

    def save_for_ever(side):
        for k in range(10_000):
            model, option, _ = sides[(side + k) % 2]
            save_pretrained(model, path, **option)

    while len(seen) < 25 or (len(set(seen)) < 2 and len(seen) < 200):
        child = fork(lambda: save_for_ever(len(seen) % 2))
        time.sleep(chance.uniform(0, 3 * seconds))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        seen.append(side_on(path, sides))
        assert (path / "tokenizer.json").read_bytes() == b"{}"
    assert set(seen) == {0, 1}
    save_pretrained(sides[1][0], path, **sides[1][1])
    assert_clean(path, sides, 1)


def test_a_killed_first_save_leaves_nothing_that_loads(tmp_path, sides):
    model, option, _ = sides[1]
    path = tmp_path / "new"
    child = fork(lambda: die_at(8, path, model, option))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    with pytest.raises(CheckpointError, match=r"no config.json; the save that .*\.saving-"):
        from_pretrained(path)
    save_pretrained(model, path, **option)
    assert contents(path) == sides[1][2]


def test_where_links_cannot_be_made_files_are_copied(tmp_path, sides, monkeypatch):
    def refuse(source, target):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    for side in (0, 1):
        save_pretrained(sides[side][0], tmp_path, **sides[side][1])
        (tmp_path / "tokenizer.json").write_text("{}")
        assert_clean(tmp_path, sides, side)


def test_two_processes_cannot_save_to_one_directory_at_once(tmp_path, sides):
    model, option, whole = sides[0]
    save_pretrained(model, tmp_path, **option)

    def interrupted():
        with replacing(tmp_path):
            raise KeyboardInterrupt

    with replacing(tmp_path) as directory:
        (directory / "config.json").write_bytes(whole["config.json"])
        with pytest.raises(CheckpointError, match="another process is saving to"):
            save_pretrained(model, tmp_path, **option)
    save_pretrained(model, tmp_path, **option)
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert contents(tmp_path) == whole
