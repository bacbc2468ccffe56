"""A run in one process: what it writes, how it goes on, and what it refuses."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from nemotron_v3 import from_pretrained
from nemotron_v3.data.options import Source
from nemotron_v3.data.pieces import PackedRow
from nemotron_v3.data.tokenizer import Tokenizer
from nemotron_v3.train import run
from nemotron_v3.train.build import build_model
from nemotron_v3.train.checkpoints import FOLDER, STATE, Checkpoints, saved_steps
from nemotron_v3.train.config_file import read_config
from nemotron_v3.train.display import Display
from nemotron_v3.train.interrupts import Stopped
from nemotron_v3.train.loop import NotFinite, Progress, validation_loss
from nemotron_v3.train.options import (
    LogOptions,
    MemoryOptions,
    ModelOptions,
    OptimizerOptions,
    SaveOptions,
    ScheduleOptions,
    TrainOptions,
    ValidationOptions,
)
from nemotron_v3.train.processes import World
from nemotron_v3.train.run import train
from tests.models import tiny_model
from tests.train.fakes import MadeUp, made_up_options

SILENT = {"make_data": MadeUp, "display": Display(Console(file=open(os.devnull, "w")))}  # noqa: SIM115

ALONE = World(0, 1, torch.device("cpu"))


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in lines(out) if "loss" in line}


def same_weights(first: Path, second: Path) -> bool:
    ours, theirs = (from_pretrained(path).state_dict() for path in (first, second))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


class Crash(Exception):
    pass


def crash_after(step: int):
    def crash(told) -> None:
        if told.step == step:
            raise Crash

    return crash


def test_a_run_learns_and_leaves_a_checkpoint_and_what_it_was_asked(options, base):
    asked = options()
    progress = train(asked, **SILENT)
    assert progress.step == 8 and progress.tokens == 8 * 4 * 30
    told = losses(asked.out)
    assert list(told) == list(range(1, 9)) and told[8] < 0.8 * told[1]
    assert read_config(asked.out / "train.toml", TrainOptions) == asked
    (about,) = json.loads((asked.out / "run.json").read_text())
    assert about["versions"]["torch"] == torch.__version__
    # Everything that generation needs.
    names = {path.name for path in asked.out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not same_weights(asked.out, base)


def test_the_last_saves_stay_and_the_best(options):
    held_out = ValidationOptions(sources=(Source("held out"),), every=2, rows=4)
    asked = options(save=SaveOptions(every=1, keep=2), validation=held_out)
    asked = replace(asked, optimizer=OptimizerOptions(learning_rate=3e-2))
    progress = train(asked, **SILENT)
    assert set(saved_steps(asked.out)) == {7, 8, progress.best_step}
    measured = {x["step"]: x["validation_loss"] for x in lines(asked.out) if "loss" not in x}
    assert list(measured) == [2, 4, 6, 8]
    assert min(measured, key=measured.get) == progress.best_step


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("crash", [1, 4])
def test_a_crashed_run_goes_on_to_the_bit(options, tmp_path, crash, background):
    whole = options(out=tmp_path / "whole")
    train(whole, **SILENT)
    asked = options(save=SaveOptions(every=3, background=background))
    with pytest.raises(Crash):
        train(asked, **SILENT, after_step=crash_after(crash))
    assert saved_steps(asked.out) == [3] * (crash > 3)
    assert train(asked, resume=True, **SILENT).step == 8
    assert losses(asked.out) == losses(whole.out)
    assert same_weights(asked.out, whole.out)
    assert len(json.loads((asked.out / "run.json").read_text())) == 2


@pytest.mark.parametrize(
    ("bf16_weights", "moments"),
    [
        ("stochastic", "float32"),
        ("master", "float32"),
        pytest.param("stochastic", "8bit", marks=pytest.mark.integration),
    ],
)
def test_bf16_weights_go_on_to_the_bit(options, tmp_path, base, bf16_weights, moments):
    if moments == "8bit":
        pytest.importorskip("torchao")
    optimizer = OptimizerOptions(learning_rate=1e-2, bf16_weights=bf16_weights, moments=moments)
    changes = {
        "model": ModelOptions(path=base, dtype="bfloat16", device="cpu"),
        "optimizer": optimizer,
        "schedule": ScheduleOptions(steps=5),
    }
    whole = options(out=tmp_path / "whole", **changes)
    train(whole, **SILENT)
    asked = options(**changes)
    with pytest.raises(Crash):
        train(asked, **SILENT, after_step=crash_after(3))
    assert saved_steps(asked.out) == [3]
    train(asked, resume=True, **SILENT)
    assert losses(asked.out) == losses(whole.out)
    assert same_weights(asked.out, whole.out)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(options, number):
    asked = options()

    def press(step) -> None:
        if step.step == 4:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(Stopped, match="saved after step 4") as stopped:
        train(asked, **SILENT, after_step=press)
    assert stopped.value.number == number and signal.getsignal(number) is before
    assert saved_steps(asked.out)[-1] == 4
    assert train(asked, resume=True, **SILENT).step == 8


def test_nan_stops_with_the_module_that_made_it_after_saving_what_was_good(options, monkeypatch):
    asked = options(save=SaveOptions(every=0))
    models = []

    def build(*args):
        models.append(build_model(*args)[0])
        return models[-1], models[-1]

    monkeypatch.setattr(run, "build_model", build)

    def spoil(step) -> None:
        if step.step == 3:
            layer = models[0].model.layers[2].mixer
            layer.v_proj.register_forward_hook(lambda m, args, out: out * float("nan"))

    with pytest.raises(NotFinite, match=r"step 4.*output of model\.layers\.2\.mixer\.v_proj"):
        train(asked, **SILENT, after_step=spoil)
    assert saved_steps(asked.out) == [3]
    assert train(asked, resume=True, **SILENT).step == 8


def test_nan_of_a_draw_is_found_again(options, monkeypatch):
    """Of dropout, say: the passes run again with the step's own draws."""
    models, draws = [], []

    def build(*args):
        models.append(build_model(*args)[0])
        return models[-1], models[-1]

    def draw(module, args, output):
        draws.append(torch.rand(()).item())
        return output * (float("nan") if draws[-1] == draws[0] else 1.0)

    monkeypatch.setattr(run, "build_model", build)

    def spoil(step) -> None:
        if step.step == 3:
            models[0].model.layers[2].mixer.v_proj.register_forward_hook(draw)

    with pytest.raises(NotFinite, match=r"output of model\.layers\.2\.mixer\.v_proj"):
        train(options(save=SaveOptions(every=0)), **SILENT, after_step=spoil)
    assert draws.count(draws[0]) == 2


def test_a_validation_that_fails_leaves_the_model_training():
    model = tiny_model("-").train()
    model.register_forward_hook(lambda *_: 1 / 0)
    rows = [[PackedRow(torch.arange(5), torch.arange(5), [0, 5], [(0, 0)])]]
    with pytest.raises(ZeroDivisionError):
        validation_loss(model, rows, 1, ALONE)
    assert model.training


def test_accumulation_over_uneven_parts_is_one_large_batch(options, tmp_path):
    told = {}
    for rows in (1, 3, 4):
        asked = options(out=tmp_path / f"{rows}", memory=MemoryOptions(rows_per_pass=rows))
        train(replace(asked, schedule=ScheduleOptions(steps=1)), **SILENT)
        (told[rows],) = lines(asked.out)[:1]
    for rows in (1, 3):
        for name in ("loss", "gradient_norm"):
            assert told[rows][name] == pytest.approx(told[4][name], rel=1e-6)


def test_recomputing_blocks_changes_nothing(options, tmp_path):
    told = []
    for every, room in ((0, None), (1, None), (2, None), ("auto", None), ("auto", 1e-3)):
        memory = MemoryOptions(checkpoint_every=every, device_gib=room)
        asked = options(out=tmp_path / f"{every}{room}", memory=memory)
        train(replace(asked, schedule=ScheduleOptions(steps=3)), **SILENT)
        told.append(losses(asked.out))
    assert all(each == told[0] for each in told)


def test_tensorboard_has_the_numbers_of_metrics(options):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    asked = options(schedule=ScheduleOptions(steps=3), log=LogOptions(tensorboard=True))
    train(asked, **SILENT)
    events = EventAccumulator(str(asked.out / "tensorboard")).Reload()
    told = {event.step: event.value for event in events.Scalars("loss")}
    assert told == pytest.approx(losses(asked.out), rel=1e-6)
    assert "experts/entropy" in events.Tags()["scalars"]


def test_another_model_or_a_folder_in_use_is_refused_and_nothing_changes(options, base, tmp_path):
    asked = options()
    train(asked, **SILENT)
    before = {path: path.read_bytes() for path in asked.out.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="--resume goes on with it"):
        train(asked, **SILENT)
    other = replace(asked, model=ModelOptions(path=base, dtype="bfloat16", device="cpu"))
    with pytest.raises(ValueError, match="is of another run: the weights' dtype was torch.float32"):
        train(other, resume=True, **SILENT)
    assert {p: p.read_bytes() for p in asked.out.rglob("*") if p.is_file()} == before
    with pytest.raises(ValueError, match="no run to resume"):
        train(options(out=tmp_path / "nothing"), resume=True, **SILENT)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    with pytest.raises(ValueError, match="something else"):
        train(options(out=tmp_path / "home"), **SILENT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": ScheduleOptions(steps=8, minutes=1)}, "give one"),
        ({"schedule": ScheduleOptions()}, "has no end"),
        ({"schedule": ScheduleOptions(steps=50), "data": made_up_options(epochs=1.0)}, "ends aft"),
        ({"model": ModelOptions()}, "there is no model"),
        ({"optimizer": OptimizerOptions(learning_rate=0.0)}, "learning_rate is 0.0"),
        ({"model": ModelOptions(path="x", device="cuda:7")}, "x does not exist|nothing can be"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(options, changes, message):
    asked = options(**changes)
    with pytest.raises(ValueError, match=message):
        train(asked, **SILENT)
    assert not asked.out.exists()


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("told", [OSError(28, "No space left on device"), None])
def test_a_full_disk_leaves_the_saves_before(options, monkeypatch, told, background):
    """However the library tells of it: the system's error, or its writer's of archives."""
    asked = options(save=SaveOptions(every=2, background=background))
    write = torch.save

    def full(*args, **kwargs):
        if saved_steps(asked.out) == [2]:
            raise told or RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos")
        return write(*args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left") as refused:
        train(asked, **SILENT)
    assert refused.value.filename
    assert saved_steps(asked.out) == [2]
    assert [path.name for path in (asked.out / FOLDER).iterdir()] == ["step-00000002"]


class HeldOutBeyond(MadeUp):
    """Rows whose held-out part has a token that a model of 300 tokens lacks."""

    def __init__(self, options, *rest):
        super().__init__(options, *rest)
        if options.sources[0].path == "held out":
            self.largest_token = 300


def test_a_held_out_token_that_the_model_lacks_is_refused_before_anything_is_written(options):
    asked = options(validation=ValidationOptions(sources=(Source("held out"),)))
    with pytest.raises(ValueError, match="gives token 300, and the model has 300"):
        train(asked, **SILENT | {"make_data": HeldOutBeyond})
    assert not asked.out.exists()


def test_the_checkpoint_has_the_tokenizer_and_template_that_it_was_trained_with(
    options, base, tmp_path
):
    given = tmp_path / "tokenizer"
    given.mkdir()
    Tokenizer.train(["other words than those of the base"] * 3, 270).save(given)
    template = tmp_path / "mine.jinja"
    template.write_text("{{ messages[0].content }}")
    model = ModelOptions(path=base, tokenizer=given, device="cpu")
    data = made_up_options(chat_template=str(template))
    asked = options(model=model, data=data, schedule=ScheduleOptions(steps=1))
    train(asked, **SILENT)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (asked.out / name).read_bytes() == (given / name).read_bytes()
    assert (asked.out / "chat_template.jinja").read_text() == template.read_text()
    assert (base / "tokenizer.json").read_bytes() != (given / "tokenizer.json").read_bytes()


def test_a_template_takes_the_place_of_all_that_the_checkpoint_had(options, base, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(base, own)
    (own / "chat_template.jinja").write_text("old")
    (own / "additional_chat_templates").mkdir()
    (own / "additional_chat_templates" / "tool_use.jinja").write_text("old, with tools")
    (own / "generation_config.json").write_text('{"eos_token_id": [0]}')
    model = ModelOptions(path=own, device="cpu")
    asked = options(
        model=model,
        data=made_up_options(chat_template="{{ messages[0].content }}"),
        schedule=ScheduleOptions(steps=1),
    )
    train(asked, **SILENT)
    assert (asked.out / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    assert not (asked.out / "additional_chat_templates").exists()
    assert from_pretrained(asked.out).generation_config == {"eos_token_id": [0]}
    assert (asked.out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("what", ["write", "rename"])
def test_a_step_whose_save_failed_can_be_saved_again(tmp_path, monkeypatch, what, background):
    model = tiny_model("-")
    optimizer = torch.optim.AdamW(model.parameters())
    saves = Checkpoints(tmp_path, model, optimizer, ALONE, SaveOptions(background=background), {})

    rename = Path.rename

    def full(file, *args):
        """Of `torch.save`, or of `Path.rename` of the whole folder."""
        if what == "rename" and not file.name.startswith(".saving-"):
            return rename(file, *args)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patches:
        patches.setattr(*((torch, "save") if what == "write" else (Path, "rename")), full)
        with pytest.raises(OSError, match="No space left"):
            saves.save(Progress(step=5))
            saves.finish()
    assert [*(tmp_path / FOLDER).iterdir()] == []
    saves.save(Progress(step=5))
    saves.finish()
    assert saved_steps(tmp_path) == [5]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_what_a_run_that_goes_on_asks_of_its_optimiser_counts(options, monkeypatch, kind):
    begun = options(schedule=ScheduleOptions(steps=2), optimizer=OptimizerOptions(kind=kind))
    train(begun, **SILENT)
    other = OptimizerOptions(
        kind=kind, weight_decay=0.3, betas=(0.5, 0.6), eps=1e-3, momentum=0.7, learning_rate=0.05
    )
    seen = []
    go = run._Run.go

    def look(self, *args):
        seen.extend(self.trainer.optimizer.param_groups)
        return go(self, *args)

    monkeypatch.setattr(run._Run, "go", look)
    train(replace(begun, optimizer=other, schedule=ScheduleOptions(steps=3)), resume=True, **SILENT)
    assert {group["weight_decay"] for group in seen} == {0.3, 0.0}
    assert all(group["betas"] == (0.5, 0.6) and group["eps"] == 1e-3 for group in seen)
    assert all(group["initial_lr"] == 0.05 for group in seen)
    assert {group.get("momentum") for group in seen} == {0.7 if kind == "muon" else None}


def test_a_best_loss_is_not_compared_with_that_of_other_held_out_rows(options):
    def asked(steps: int, seed: int):
        held_out = ValidationOptions(sources=(Source("held out"),), every=1, rows=4)
        data = made_up_options(seed=seed)
        return options(schedule=ScheduleOptions(steps=steps), validation=held_out, data=data)

    train(asked(2, 0), **SILENT)
    state = asked(2, 0).out / FOLDER / "step-00000002" / STATE
    told = json.loads(state.read_text())
    told["progress"] |= {"best_loss": 0.0, "best_step": 1}
    state.write_text(json.dumps(told))
    assert train(asked(3, 0), resume=True, **SILENT).best_step == 1
    assert train(asked(4, 1), resume=True, **SILENT).best_step == 4
