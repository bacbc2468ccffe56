"""This package's models in lm-evaluation-harness, against the harness's own class."""

import contextlib
import subprocess
import sys

import pytest
import torch

from tests.evaluation.harness_tasks import write_checkpoint, write_tasks

pytest.importorskip("lm_eval")
pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]

TASKS = ["local_choices", "local_rolling", "local_answers"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, folder):
    return write_tasks(tmp_path_factory.mktemp("tasks"), 12, ["e", "\n\n"])


def run(model, tasks, names=TASKS, **options):
    """The figures by task and name, and every request's answers."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=tasks, include_defaults=False)
    found = simple_evaluate(
        model, tasks=names, task_manager=manager, bootstrap_iters=0, log_samples=True, **options
    )
    figures = {
        (task, name): value
        for task, values in found["results"].items()
        for name, value in values.items()
        if isinstance(value, float) and "stderr" not in name
    }
    answers = {task: [s["resps"] for s in samples] for task, samples in found["samples"].items()}
    return figures, answers


def ours(folder, **options):
    from nemotron_v3.evaluation.harness import NemotronV3LM

    return NemotronV3LM(folder, device="cpu", **options)


def theirs(folder, accelerated: bool):
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nemotron_v3 import hf

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if accelerated:
        hf.accelerate(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, device="cpu")


def assert_same(found, expected):
    figures, answers = found
    assert figures.keys() == expected[0].keys() and len(figures) > 0
    for key, value in expected[0].items():
        assert figures[key] == pytest.approx(value, rel=1e-5), key
    for task, samples in expected[1].items():
        for mine, other in zip(answers[task], samples, strict=True):
            for (a,), (b,) in zip(mine, other, strict=True):
                if isinstance(b, str):
                    assert a == b
                else:
                    assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.parametrize("chat", [False, True])
def test_plain_accelerated_and_native_models_give_the_same_figures(folder, tasks, chat):
    options = {}
    if chat:
        options = {"apply_chat_template": True, "system_instruction": "Be short."}
        options["fewshot_as_multiturn"] = True
    names = TASKS if not chat else ["local_choices", "local_answers"]
    plain = run(theirs(folder, False), tasks, names, **options)
    assert any(len(text) for ((text,),) in plain[1]["local_answers"])
    assert chat or len({text for ((text,),) in plain[1]["local_answers"]}) > 1
    assert_same(run(theirs(folder, True), tasks, names, **options), plain)
    assert_same(run(ours(folder), tasks, names, **options), plain)


def test_shared_prefixes_change_no_figure_and_save_two_thirds_of_a_5_shot_task(folder, tasks):
    shared, alone = ours(folder), ours(folder, share=False)
    assert_same(run(shared, tasks), run(alone, tasks))
    shared, alone = ours(folder, window=100, batch_size=3), ours(folder, share=False)
    assert_same(run(shared, tasks, TASKS[:1]), run(alone, tasks, TASKS[:1]))
    assert shared.asked == alone.asked == alone.computed
    assert shared.computed <= alone.computed / 3


def test_requests_that_were_answered_are_not_asked_again(folder, tasks, tmp_path, monkeypatch):
    from nemotron_v3.evaluation import Candidate, EvalOptions, TaskOptions, evaluate
    from nemotron_v3.evaluation import run as running
    from nemotron_v3.evaluation.forks import Forks
    from nemotron_v3.train.interrupts import Stopped

    asked = TaskOptions(("local_choices", "local_answers"), include_path=tasks, batch_size=4)
    options, passes = EvalOptions(tasks=asked, device="cpu"), []
    forward = Forks._pass
    monkeypatch.setattr(Forks, "_pass", lambda self, *a: passes.append(1) or forward(self, *a))
    whole = evaluate([Candidate(folder)], options).checkpoints[0]
    total = len(passes)
    passes.clear()
    out = tmp_path / "e.json"
    with monkeypatch.context() as patch:
        noted = contextlib.nullcontext(lambda: 15 if len(passes) > total // 2 else 0)
        patch.setattr(running, "noted_signals", lambda: noted)
        with pytest.raises(Stopped):
            evaluate([Candidate(folder)], options, out)
    passes.clear()
    again = evaluate([Candidate(folder)], options, out, resume=True).checkpoints[0]
    assert again.tasks == whole.tasks and again.seconds is None
    assert again.tokens_asked < whole.tokens_asked and len(passes) < total
    assert not out.with_name("e.json.partial").exists()


def test_the_harness_knows_this_class_by_name_and_its_own_still():
    script = (
        "from nemotron_v3.evaluation import harness; from lm_eval.api.registry import "
        "get_model; assert get_model('nemotron-v3') is harness.NemotronV3LM; get_model('dummy')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
