"""`nemotron-v3 eval` as whole programs: several processes, a kill, Ctrl-C, tasks, a long text."""

import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemotron_v3.cli.main import main
from nemotron_v3.data.encode import Encoder
from nemotron_v3.data.options import Source
from nemotron_v3.data.pretrained import PretrainedTokenizer
from nemotron_v3.data.tokenize import cache_folder, open_store
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


def run_two(*arguments: object) -> subprocess.CompletedProcess:
    done = subprocess.run(
        command(*arguments, processes=2), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def run_one(*arguments: object) -> None:
    """In this process."""
    assert main(["eval", *map(str, arguments), "--device", "cpu"]) == 0


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
    run_one(folder, "--data", *data, "--window", 256, "--out", tmp_path / "one.json")
    asked = [folder, "--data", *data, "--window", 256, "--out", tmp_path / "two.json"]
    done = run_two(*asked)
    same(figures(tmp_path / "two.json"), figures(tmp_path / "one.json"))
    assert done.stdout.count("perplexity") == 3  # a table a source, of one process
    assert not folder_of(tmp_path / "two.json").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_program_that_was_ended_goes_on(folder, data, tmp_path, number):
    asked = [folder, "--data", *data, "--window", 16, "--out", tmp_path / "e.json"]
    run_one(*asked[:-1], tmp_path / "whole.json")
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
    # Another number of processes may go on.
    (run_two if number == signal.SIGKILL else run_one)(*asked, "--resume")
    same(figures(tmp_path / "e.json"), figures(tmp_path / "whole.json"))
    assert not lines.exists()


def wait_for(there, program: subprocess.Popen) -> None:
    for _ in range(600):
        if there():
            return
        assert program.poll() is None, "the program ended before it could be stopped"
        time.sleep(0.1)
    raise AssertionError("nothing was written")


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm_eval")
def test_two_processes_share_the_requests_of_tasks(tmp_path_factory, tmp_path, monkeypatch, capsys):
    import lm_eval.tasks

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = write_checkpoint(tmp_path_factory.mktemp("hf"))
    tasks = write_tasks(tmp_path, 7, ["e"])
    names = ["local_choices", "local_rolling", "local_answers"]
    asked = [folder, "--tasks", *names, "--include-path", tasks]
    run_one(*asked, "--out", tmp_path / "one.json")
    shown = capsys.readouterr().out
    assert all(f" {name} " in shown for name in names)
    run_two(*asked, "--out", tmp_path / "two.json")
    one, two = (Evaluation.read(tmp_path / f"{n}.json").checkpoints[0] for n in ("one", "two"))
    assert {t.task for t in one.tasks} == set(names)
    for mine, other in zip(two.tasks, one.tasks, strict=True):
        assert (mine.task, mine.name, mine.samples) == (other.task, other.name, other.samples)
        assert mine.value == pytest.approx(other.value, rel=1e-6)
    assert one.tokens_computed is not None and one.tokens_asked is not None
    assert one.tokens_computed < one.tokens_asked / 2
    # Listing the harness's own tasks takes ten seconds of a core.
    few = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", few)
    wrong = [folder, "--tasks", "local_choice", "--include-path", tasks]
    assert main(["eval", *map(str, wrong)]) == 2
    assert "the nearest are local_choices" in capsys.readouterr().err


LONG = """
import resource, sys, time
from pathlib import Path
from nemotron_v3.data.options import Source
from nemotron_v3.data.pretrained import PretrainedTokenizer
from nemotron_v3.evaluation import EvalOptions, score_texts
from tests.models import tiny_model

tokenizer, model = PretrainedTokenizer.load(sys.argv[1]), tiny_model("M-M", vocab_size=300).eval()
for path in sys.argv[2:]:  # the first one warms up
    started = time.process_time()
    (text,) = score_texts(model, tokenizer, EvalOptions(sources=(Source(path),), window=4096))
    seconds = time.process_time() - started
print(text.bytes, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def measured(folder: Path, warm: Path, text: Path) -> tuple[int, float, float]:
    """Bytes of a text, and what it takes: seconds of a core, and MiB at most."""
    done = subprocess.run(
        [sys.executable, "-c", LONG, *map(str, (folder, warm, text))],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    size, seconds, memory = done.stdout.split()
    return int(size), float(seconds), float(memory)


def test_a_text_of_a_megabyte_takes_linear_time_and_bounded_memory(folder, tmp_path):
    """With mamba layers alone: keys and values, which attention layers read all of, grow."""
    paths = [tmp_path / name for name in ("warm.txt", "quarter.txt", "whole.txt")]
    encoder = Encoder.of(PretrainedTokenizer.load(folder))
    for path, size in zip(paths, (2**14, 2**18, 2**20), strict=True):
        path.write_bytes((LINE.encode() * (size // 40))[: size - 1] + b"\n")
        # Tokens are made here, so that what follows is what scoring takes.
        open_store(Source(str(path)), encoder, 0, cache_folder())[0].close()
    quarter, whole = (measured(folder, paths[0], path) for path in paths[1:])
    assert (quarter[0], whole[0]) == (2**18, 2**20)
    # Four times the text; a quadratic cost would be 16. Beside other work caches make it dearer.
    assert whole[1] / quarter[1] < 2 * 4
    assert whole[2] - quarter[2] < 16
