import gzip
import html
import json
import lzma
import math
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from nemotron_v3.checkpoint import from_pretrained
from nemotron_v3.data import Corpus as Library
from nemotron_v3.data import Tokenizer, standard_library, training_packs
from nemotron_v3.recipes import demo
from nemotron_v3.recipes.console import Story
from nemotron_v3.recipes.demo import PROMPT, Corpus, as_row, run_demo, seconds_left
from nemotron_v3.recipes.options import DemoOptions, ModelSizes
from nemotron_v3.recipes.plot import _smooth
from nemotron_v3.train.display import Display

SMALL = ModelSizes(
    pattern="ME*-",
    hidden_size=32,
    vocab_size=300,
    mamba_num_heads=2,
    mamba_head_dim=16,
    ssm_state_size=8,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    intermediate_size=32,
    n_routed_experts=4,
    moe_intermediate_size=16,
    moe_shared_expert_intermediate_size=16,
)
FILES = {"config.json", "model.safetensors", "tokenizer.json", "loss.png", "metrics.jsonl"}
FILES |= {"report.html", "samples.jsonl"}


@pytest.fixture(scope="module")
def corpus() -> Library:
    """A few small files of the library."""
    whole = standard_library()
    small = [
        sorted(part, key=lambda d: (len(d.text), d.path))[10:13]
        for part in (whole.train, whole.held_out)
    ]
    return Library(*map(tuple, small))


@pytest.fixture
def run(corpus, monkeypatch, tmp_path):
    """Run the demo on the small corpus; `run.told` is what it printed."""
    monkeypatch.setattr(demo, "standard_library", lambda: corpus)
    monkeypatch.setattr(demo, "SAMPLE_TOKENS", 5)
    told = Console(record=True, width=100, file=(tmp_path / "told").open("w"))

    def start(**options):
        options = {"out": tmp_path / "runs" / "demo", "steps": 3, "model": SMALL} | options
        return run_demo(DemoOptions(tokens_per_row=32, document_tokens=64, **options), Story(told))

    start.told = told.export_text
    start.out = tmp_path / "runs" / "demo"
    return start


def bits_alone(folder: Path, text: str) -> float:
    """Bits of a text, predicted from the separator before it up to the one that ends it."""
    model, tokenizer = from_pretrained(folder), Tokenizer.load(folder)
    ids = torch.tensor(tokenizer.encode_documents([text])[0])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    nats = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum")
    return nats.item() / math.log(2)


def test_it_leaves_a_whole_run_and_tells_bits_per_byte_of_the_held_out_bytes(run, corpus):
    result = run()
    assert {path.name for path in run.out.iterdir()} >= FILES
    held_out = "".join(d.text for d in corpus.held_out).encode()
    bits = sum(bits_alone(run.out, d.text) for d in corpus.held_out)
    ours, xz, gz = result.bits_per_byte.values()
    assert ours == pytest.approx(bits / len(held_out), rel=1e-5)
    assert gz == 8 * len(gzip.compress(held_out, 9)) / len(held_out)
    assert xz == 8 * len(lzma.compress(held_out, preset=9)) / len(held_out)
    told = run.told()
    assert all(f"{figure:.3f}" in told for figure in (ours, xz, gz))


def test_metrics_are_a_line_a_step_and_the_held_out_figures(run):
    result = run()
    *steps, last = map(json.loads, (run.out / "metrics.jsonl").read_text().splitlines())
    assert [line["loss"] for line in steps] == [step.loss for step in result.steps]
    assert [line["tokens"] for line in steps] == [64, 128, 192]
    assert last == {"held_out_bits_per_byte": result.bits_per_byte}


def test_it_ends_by_naming_its_page_which_has_the_figures_and_the_sample(run):
    result = run()
    told = "".join(run.told().split())  # lines are wrapped
    assert told.endswith(f"page{run.out}/report.html:therun'scurves,toopeninabrowser")
    text = (run.out / "report.html").read_text()
    assert "<h1>demo</h1>" in text and "Finished after step 3 of 3." in text
    assert "held out bits per byte" in text and html.escape(PROMPT) in text
    sample = json.loads((run.out / "samples.jsonl").read_text())
    assert sample == {"prompt": PROMPT, "text": result.text}


def test_the_picture_is_a_png(run):
    run()
    assert (run.out / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_the_same_steps_and_seed_give_the_same_bytes_and_another_seed_does_not(run, tmp_path):
    first, again, other = (tmp_path / name for name in ("first", "again", "other"))
    texts = [run(out=out, seed=seed).text for out, seed in ((first, 3), (again, 3), (other, 4))]
    weights = [(out / "model.safetensors").read_bytes() for out in (first, again, other)]
    assert texts[0] == texts[1] and weights[0] == weights[1]
    assert weights[0] != weights[2]


def test_ctrl_c_keeps_the_finished_run_and_leaves_a_checkpoint_that_loads(run, monkeypatch):
    run()
    finished = (run.out / "model.safetensors").read_bytes()
    show = Display.step

    def press_in_step_two(self, step, *args):
        show(self, step, *args)
        if step.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Display, "step", press_in_step_two)
    with pytest.raises(KeyboardInterrupt, match="demo-interrupted"):
        run(steps=1000)
    assert (run.out / "model.safetensors").read_bytes() == finished
    kept = run.out.with_name("demo-interrupted")
    assert len((kept / "metrics.jsonl").read_text().splitlines()) == 2
    assert bits_alone(kept, "import os\n") > 0
    assert sorted(path.name for path in run.out.parent.iterdir()) == ["demo", "demo-interrupted"]


def test_a_failure_after_training_keeps_the_finished_run(run, monkeypatch):
    run()
    finished = (run.out / "model.safetensors").read_bytes()

    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(demo, "plot_loss", fail)
    with pytest.raises(ZeroDivisionError):
        run(seed=1)
    assert (run.out / "model.safetensors").read_bytes() == finished


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"minutes": -1.0}, "minutes is -1.0"),
        ({"rows": 0}, "rows is 0"),
    ],
)
def test_a_length_that_is_none_is_an_error_before_anything_is_written(run, options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)
    assert not run.out.exists()


def test_the_default_model_is_a_hybrid_of_two_to_five_million_parameters():
    from nemotron_v3.model.cost import parameters

    config = ModelSizes().config()
    assert set(config.layers_block_type) == {"mamba", "attention", "moe"}
    assert 2e6 < parameters(config).total < 5e6


def test_the_clock_leaves_time_for_what_comes_after_training(monkeypatch):
    monkeypatch.setattr(demo, "measuring_seconds", lambda model, packs: 20.0)
    text = SimpleNamespace(held_out=[])
    options = DemoOptions(minutes=3, model=SMALL)
    # Of 3 minutes 10 seconds are gone, and 20 and what always comes after are still needed.
    left = seconds_left(options, text, time.perf_counter() - 10)
    assert left == pytest.approx(180 - 10 - 20 - demo.AFTERWARDS_SECONDS, abs=1)
    too_late = DemoOptions(minutes=0.1, model=SMALL)
    assert seconds_left(too_late, text, time.perf_counter()) == 1.0
    assert seconds_left(DemoOptions(steps=8), text, 0.0) is None


def test_a_pack_is_a_row_whose_targets_are_the_packs():
    documents = [[0, *range(5, 5 + n), 0] for n in (3, 9, 1, 20)]
    for pack, _ in zip(training_packs(documents, 16, 8, seed=0), range(20), strict=False):
        row = as_row(pack)
        assert row.num_targets == pack.num_targets and row.cu_seqlens[-1] == 16
        assert torch.equal(row.layout().cu_seqlens, pack.layout.cu_seqlens)


def test_the_corpus_goes_on_where_it_was():
    options = DemoOptions(tokens_per_row=16, document_tokens=8, model=SMALL)
    documents = [[0, *range(5, 5 + n), 0] for n in (3, 9, 1, 20)]
    corpus = Corpus(documents, options, 300)
    rows = iter(corpus)
    taken = [[row.input_ids for row in next(rows)] for _ in range(3)]
    assert all(len(step) == 2 for step in taken)
    again = Corpus(documents, options, 300)
    again.load_state_dict({"packs": 4})
    assert all(map(torch.equal, [row.input_ids for row in next(iter(again))], taken[2]))
    assert corpus.state_dict() == {"packs": 6}


def test_a_run_by_the_clock_takes_no_step_after_its_time(run, monkeypatch):
    monkeypatch.setattr(demo, "AFTERWARDS_SECONDS", 0.0)
    steps = run(steps=None, minutes=0.05).steps
    assert steps and sum(step.seconds for step in steps[:-1]) < 3


def test_smoothing_starts_at_the_first_value_and_keeps_a_constant():
    assert _smooth([3.0, 3.0, 3.0]) == pytest.approx([3, 3, 3])
    assert _smooth([2.0, 4.0]) == pytest.approx([2, (0.95 * 0.05 * 2 + 0.05 * 4) / (1 - 0.95**2)])


@pytest.mark.integration
def test_a_short_run_on_the_whole_library_from_the_command_line(tmp_path):
    import subprocess
    import sys

    out = tmp_path / "demo"
    command = [sys.executable, "-m", "nemotron_v3.cli.main", "demo", "--steps", "4"]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    figures = figures["held_out_bits_per_byte"]
    assert figures["xz -9"] < figures["gzip -9"] < figures["this model"] < 8
    assert {path.name for path in out.iterdir()} >= FILES
