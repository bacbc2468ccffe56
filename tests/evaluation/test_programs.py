"""`nemotron-v3 eval` as whole programs: several processes, a kill, Ctrl-C, tasks, a long text."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemotron_v3.evaluation import Evaluation
from nemotron_v3.evaluation.journal import folder_of
from tests.cli.checkpoint import write_chat_checkpoint
from tests.evaluation.harness_tasks import write_checkpoint, write_tasks

pytestmark = pytest.mark.integration

LINE = "say what you mean and mean what you say, né\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_chat_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NEMOTRON_V3_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def data(tmp_path) -> list[str]:
    """Short documents, and two that go through several windows."""
    with (tmp_path / "a.jsonl").open("w") as file:
        for number in range(40):
            file.write(json.dumps({"text": LINE * (1 + number % 7)}) + "\n")
    for name, lines in (("b.txt", 60), ("c.txt", 200)):
        (tmp_path / name).write_text(LINE * lines)
    return [str(tmp_path / name) for name in ("a.jsonl", "b.txt", "c.txt")]


def command(*arguments: object, processes: int = 1) -> list[str]:
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    return [*launcher, "nemotron_v3", "eval", *map(str, arguments), "--device", "cpu"]


def run(*arguments: object, processes: int = 1) -> subprocess.CompletedProcess:
    done = subprocess.run(
        command(*arguments, processes=processes), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def figures(path: Path) -> list:
    """The figures of each document, and their sums."""
    found = Evaluation.read(path).checkpoints[0]
    return [
        [*text.per_document.nats, text.nats, text.tokens, text.bytes, *text.per_place.nats]
        for text in found.texts
    ]


def same(found: list, expected: list) -> None:
    for mine, other in zip(found, expected, strict=True):
        assert mine == pytest.approx(other, rel=1e-6)


def test_several_processes_share_the_documents_and_one_writes(folder, data, tmp_path):
    run(folder, "--data", *data, "--window", 256, "--out", tmp_path / "one.json")
    asked = [folder, "--data", *data, "--window", 256, "--out", tmp_path / "two.json"]
    done = run(*asked, processes=2)
    same(figures(tmp_path / "two.json"), figures(tmp_path / "one.json"))
    assert done.stdout.count("perplexity") == 3  # a table a source, of one process
    assert not folder_of(tmp_path / "two.json").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_program_that_was_ended_goes_on(folder, data, tmp_path, number):
    asked = [folder, "--data", *data, "--window", 16, "--out", tmp_path / "e.json"]
    run(*asked[:-1], tmp_path / "whole.json")
    with subprocess.Popen(command(*asked), stderr=subprocess.PIPE, text=True) as program:
        lines = folder_of(tmp_path / "e.json") / "0-0.rank-0.jsonl"
        wait_for(lambda: lines.exists() and lines.read_bytes().count(b"\n") > 5, program)
        program.send_signal(number)
        err = program.communicate(timeout=60)[1]
    if number == signal.SIGINT:
        assert program.returncode == 130
        assert "interrupted: what was measured is in" in err and "--resume goes on" in err
    else:
        assert program.returncode == -number
    assert not (tmp_path / "e.json").exists()
    before = lines.stat().st_mtime_ns
    run(*asked, "--resume", processes=2)  # another number of processes may go on
    same(figures(tmp_path / "e.json"), figures(tmp_path / "whole.json"))
    assert before and not lines.exists()


def wait_for(there, program: subprocess.Popen) -> None:
    for _ in range(600):
        if there():
            return
        assert program.poll() is None, "the program ended before it could be stopped"
        time.sleep(0.1)
    raise AssertionError("nothing was written")


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm_eval")
def test_tasks_side_by_side_in_one_process_and_in_two(tmp_path_factory, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = write_checkpoint(tmp_path_factory.mktemp("hf"))
    tasks = write_tasks(tmp_path, 5, ["e"])
    names = ["local_choices", "local_rolling", "local_answers"]
    asked = [folder, "--tasks", *names, "--include-path", tasks]
    done = run(*asked, "--out", tmp_path / "one.json")
    run(*asked, "--out", tmp_path / "two.json", processes=2)
    one, two = (Evaluation.read(tmp_path / f"{n}.json").checkpoints[0] for n in ("one", "two"))
    assert {t.task for t in one.tasks} == set(names)
    for mine, other in zip(two.tasks, one.tasks, strict=True):
        assert (mine.task, mine.name, mine.samples) == (other.task, other.name, other.samples)
        assert mine.value == pytest.approx(other.value, rel=1e-6)
    assert all(f" {name} " in done.stdout for name in names)
    assert one.tokens_computed is not None and one.tokens_asked is not None
    assert one.tokens_computed < one.tokens_asked / 2
    missing = subprocess.run(
        command(folder, "--tasks", "local_choice", "--include-path", tasks),
        capture_output=True,
        text=True,
    )
    assert missing.returncode == 2 and "the nearest are local_choices" in missing.stderr


LONG = """
import resource, sys, time
from pathlib import Path
from nemotron_v3.data.options import Source
from nemotron_v3.evaluation import EvalOptions, score_texts
from tests.data.samples import byte_tokenizer
from tests.models import tiny_model

model = tiny_model(sys.argv[2], vocab_size=300).eval()
options = lambda path: EvalOptions(sources=(Source(path),), window=4096)
score_texts(model, byte_tokenizer(), options(sys.argv[3]), cache=Path(sys.argv[4]))  # warm
started = time.process_time()
(text,) = score_texts(model, byte_tokenizer(), options(sys.argv[1]), cache=Path(sys.argv[4]))
seconds = time.process_time() - started
print(text.tokens, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def measured(tmp_path: Path, size: int, pattern: str) -> tuple[int, float, float]:
    """Tokens, seconds of a core and MiB at most, of a text of so many bytes."""
    for name, count in (("warm.txt", 2**14), (f"{size}.txt", size)):
        (tmp_path / name).write_bytes((LINE.encode() * (count // 40))[: count - 1] + b"\n")
    paths = [str(tmp_path / f"{size}.txt"), pattern, str(tmp_path / "warm.txt")]
    done = subprocess.run(
        [sys.executable, "-c", LONG, *paths, str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    tokens, seconds, memory = done.stdout.split()
    return int(tokens), float(seconds), float(memory)


def test_a_text_of_a_megabyte_takes_linear_time_and_bounded_memory(tmp_path):
    """Of mamba layers alone: keys and values, which attention layers read all of, grow."""
    quarter, whole = (measured(tmp_path, size, "M-M") for size in (2**18, 2**20))
    assert (quarter[0], whole[0]) == (2**18, 2**20)
    assert whole[1] / quarter[1] < 1.25 * 4
    # Tokens of the text itself, and what reading its first mebibyte takes.
    assert whole[2] - quarter[2] < 96
