"""Worker processes: the same results as without them, errors with their words, no orphans."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

from nemotron_v3.data import read
from nemotron_v3.data.workers import run_in_order
from tests.data.samples import TEMPLATE, chat, packed, write_jsonl
from tests.data.tasks import dies, third_fails

pytestmark = pytest.mark.integration

ORPHANS = """
import os, sys, time
from nemotron_v3.data.workers import run_in_order

def work(item):
    print(os.getpid(), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    list(run_in_order(work, range(2), 2))
"""
UNGUARDED = """
from nemotron_v3.data.workers import run_in_order
print(list(run_in_order(abs, [-1], 1)))
"""


def test_results_come_in_order():
    assert list(run_in_order(partial(pow, 2), range(50), 2)) == [2**n for n in range(50)]


def test_an_error_has_its_message_and_comes_in_its_turn():
    results = run_in_order(third_fails, range(50), 2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="item 3 is no good"):
        next(results)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_process_that_is_killed_is_told():
    with pytest.raises(RuntimeError, match="ended without a word: it may have run out of memory"):
        list(run_in_order(dies, range(4), 2))


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    # One that has ended and that nobody has asked about is dead too.
    with open(f"/proc/{process}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")
def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    (tmp_path / "main.py").write_text(ORPHANS)
    parent = subprocess.Popen([sys.executable, tmp_path / "main.py"], stdout=subprocess.PIPE)
    workers = [int(parent.stdout.readline()) for _ in range(2)]
    assert all(map(is_alive, workers))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    end = time.monotonic() + 10
    while any(map(is_alive, workers)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(is_alive, workers))


def test_a_program_without_a_guard_is_told_of_it(tmp_path):
    (tmp_path / "main.py").write_text(UNGUARDED)
    done = subprocess.run([sys.executable, tmp_path / "main.py"], capture_output=True, text=True)
    assert done.returncode != 0 and "__name__ == '__main__'" in done.stderr


def test_tokens_are_the_same_with_any_number_of_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "UNIT_BYTES", 2**13)  # of which the units tell the workers
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("".join(f"{n} line\n" for n in range(1000)))
    write_jsonl(folder / "b.jsonl", [{"text": f"document {n}" * (n % 9)} for n in range(1000)])
    write_jsonl(folder / "c.jsonl", [chat(f"why {n}?", "so") for n in range(50)])
    with (folder / "b.jsonl").open("a") as file:
        file.write("broken\n")
    found = []
    for workers in (0, 1, 2):
        cache = tmp_path / str(workers)
        with packed(
            cache, folder, workers=workers, chat_template=TEMPLATE, tokens_per_row=256
        ) as data:
            rows = [[r.input_ids.tolist(), r.labels.tolist()] for step in data for r in step]
            found.append((json.dumps(data.state_dict()), str(data.report()), rows))
    assert found[0] == found[1] == found[2]


def test_a_worker_starts_without_torch():
    # The package's own `__init__` is left out: it may import what it likes.
    script = """
import sys, types
package = types.ModuleType("nemotron_v3")
package.__path__ = [sys.argv[1]]
sys.modules["nemotron_v3"] = package
import nemotron_v3.data.options, nemotron_v3.data.units, nemotron_v3.data.workers
print("torch" in sys.modules)
"""
    root = os.path.dirname(os.path.dirname(read.__file__))
    done = subprocess.run(
        [sys.executable, "-c", script, root], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
