"""Evaluations of checkpoints on files, whole, interrupted, and gone on with."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from nemotron_v3.checkpoint import from_pretrained
from nemotron_v3.data.options import Source
from nemotron_v3.data.pretrained import PretrainedTokenizer
from nemotron_v3.evaluation import Candidate, EvalOptions, Evaluation, evaluate, score_texts
from nemotron_v3.evaluation import run as running
from nemotron_v3.evaluation.journal import folder_of
from nemotron_v3.train.interrupts import Stopped
from tests.cli.checkpoint import write_chat_checkpoint

TEXTS = ["say what you mean", "x", "and mean what you say " * 9, "né 日本", "you mean what " * 6]
LONG = "one line of a longer text, né\n" * 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_chat_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NEMOTRON_V3_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def options(tmp_path):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.txt").write_text(LONG)
    sources = tuple(Source(str(tmp_path / name)) for name in ("a.jsonl", "b.txt"))
    return EvalOptions(sources=sources, window=64, device="cpu")


def alone(folder, text: str) -> tuple[float, int]:
    """Minus the log-probability of a text with the tokens around it, and how many they are."""
    model = from_pretrained(folder, device="cpu")
    tokenizer = PretrainedTokenizer.load(folder)
    ids = torch.tensor([*tokenizer.encode(text), tokenizer.eos_token_id])
    with torch.no_grad():
        return -float(model.score(ids).double().sum()), len(ids) - 1


def test_every_document_has_the_score_of_its_whole_text(folder, options):
    found = evaluate([Candidate(folder)], options)
    (checkpoint,) = found.checkpoints
    lines, long = checkpoint.texts
    expected = [alone(folder, text) for text in TEXTS]
    assert lines.per_document.nats == pytest.approx([nats for nats, _ in expected], rel=1e-6)
    assert lines.per_document.tokens == [count for _, count in expected]
    assert lines.per_document.bytes == [len(text.encode()) for text in TEXTS]
    nats, count = alone(folder, LONG)
    assert (long.documents, long.tokens, long.bytes) == (1, count, len(LONG.encode()))
    assert long.perplexity == pytest.approx(math.exp(nats / count), rel=1e-6)
    assert long.bits_per_byte == pytest.approx(nats / math.log(2) / long.bytes, rel=1e-6)
    assert sum(long.per_place.tokens) == count
    assert sum(long.per_place.nats) == pytest.approx(long.nats)
    assert (lines.first_unscored, lines.left_out, lines.bad) == (0, 0, [])


def test_a_model_in_memory_gives_the_same(folder, options, tmp_path):
    model, tokenizer = from_pretrained(folder, device="cpu"), PretrainedTokenizer.load(folder)
    (checkpoint,) = evaluate([Candidate(folder)], options).checkpoints
    assert score_texts(model, tokenizer, options, cache=tmp_path / "other") == checkpoint.texts


def test_checkpoints_and_an_adapter_side_by_side(folder, options, tmp_path):
    model = from_pretrained(folder, device="cpu")
    name = next(n for n, _ in model.named_parameters() if n.endswith("q_proj.weight"))
    weight, module = model.get_parameter(name), name.removeprefix("model.").removesuffix(".weight")
    a, b = torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)
    stem = f"base_model.model.backbone.{module}"
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    tensors = {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [module]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    found = evaluate([Candidate(folder), Candidate(folder, adapter)], options)
    plain, adapted = found.checkpoints
    assert plain.adapter is None and adapted.adapter == str(adapter)
    assert plain.name != adapted.name
    with torch.no_grad():
        weight += 2 * b @ a
        ids = torch.tensor([*PretrainedTokenizer.load(folder).encode(TEXTS[0]), 1])
        expected = -float(model.score(ids).double().sum())
    assert adapted.texts[0].per_document.nats[0] == pytest.approx(expected, rel=1e-5)
    assert plain.texts[0].per_document.nats[0] != pytest.approx(expected, rel=1e-3)


def stopping(monkeypatch, after: int) -> list[int]:
    """Let a signal seem to come behind so many passes; they are counted in what comes back."""
    passes = []
    forward = running.Scorer._pass

    def counted(self, *args):
        passes.append(1)
        return forward(self, *args)

    class Noted:
        def __enter__(self):
            return lambda: 15 if len(passes) >= after else 0

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(running.Scorer, "_pass", counted)
    monkeypatch.setattr(running, "noted_signals", Noted)
    return passes


@pytest.mark.parametrize("after", [2, 5])
def test_an_interrupted_one_goes_on_and_gives_the_same(
    folder, options, tmp_path, monkeypatch, after
):
    out = tmp_path / "e.json"
    with monkeypatch.context() as patch:
        total = stopping(patch, 1000)
        whole = evaluate([Candidate(folder)], options)
    with monkeypatch.context() as patch:
        stopping(patch, after)
        with pytest.raises(Stopped, match="--resume goes on") as stopped:
            evaluate([Candidate(folder)], options, out)
    assert stopped.value.number == 15 and not out.exists()
    with monkeypatch.context() as patch:
        passes = stopping(patch, 1000)
        found = evaluate([Candidate(folder)], options, out, resume=True)
    assert len(total) == 8 and len(passes) == 8 - after  # none is done again
    assert found.checkpoints[0].texts == whole.checkpoints[0].texts
    assert Evaluation.read(out).checkpoints == found.checkpoints
    assert not folder_of(out).exists()


def test_a_checkpoint_that_is_complete_is_not_loaded_again(folder, options, tmp_path, monkeypatch):
    out, two = tmp_path / "e.json", [Candidate(folder), Candidate(folder)]
    with monkeypatch.context() as patch:
        stopping(patch, 10)  # of 8 passes each
        with pytest.raises(Stopped):
            evaluate(two, options, out)
    loaded = []
    load = running.from_pretrained
    monkeypatch.setattr(running, "from_pretrained", lambda *a: loaded.append(1) or load(*a))
    first, second = evaluate(two, options, out, resume=True).checkpoints
    assert len(loaded) == 1 and first.texts == second.texts
    assert first.seconds is not None and second.seconds is None


def test_a_kill_within_a_line_costs_that_line_alone(folder, options, tmp_path, monkeypatch):
    whole, out = evaluate([Candidate(folder)], options), tmp_path / "e.json"
    with monkeypatch.context() as patch:
        stopping(patch, 2)
        with pytest.raises(Stopped):
            evaluate([Candidate(folder)], options, out)
    (lines,) = folder_of(out).glob("0-0.rank-*.jsonl")
    lines.write_bytes(lines.read_bytes()[:-9])
    with monkeypatch.context() as patch:
        stopping(patch, 2)
        with pytest.raises(Stopped):
            evaluate([Candidate(folder)], options, out, resume=True)
    found = evaluate([Candidate(folder)], options, out, resume=True)
    assert found.checkpoints[0].texts == whole.checkpoints[0].texts


def test_only_the_same_evaluation_is_gone_on_with(folder, options, tmp_path, monkeypatch):
    out = tmp_path / "e.json"
    with pytest.raises(ValueError, match="nothing to go on with"):
        evaluate([Candidate(folder)], options, out, resume=True)
    with monkeypatch.context() as patch:
        stopping(patch, 1)
        with pytest.raises(Stopped):
            evaluate([Candidate(folder)], options, out)
    with pytest.raises(ValueError, match="go on with --resume, or delete"):
        evaluate([Candidate(folder)], options, out)
    (tmp_path / "b.txt").write_text(LONG + "more")
    with pytest.raises(ValueError, match="their tokens: was"):
        evaluate([Candidate(folder)], options, out, resume=True)


def test_what_cannot_be_is_refused_before_a_model_is_loaded(folder, options, tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(running, "from_pretrained", never)
    with pytest.raises(ValueError, match="nothing to measure"):
        EvalOptions()
    with pytest.raises(ValueError, match="does not exist"):
        evaluate([Candidate(folder)], EvalOptions(sources=(Source(str(tmp_path / "no.txt")),)))
    with pytest.raises(ValueError, match="no-such"):
        evaluate([Candidate(folder), Candidate(tmp_path / "no-such")], options)
    with pytest.raises(ValueError, match="no folder of an adapter"):
        evaluate([Candidate(folder, tmp_path / "none")], options)
    (tmp_path / "e.json").write_text("")
    with pytest.raises(ValueError, match="exists: give another name, or overwrite"):
        evaluate([Candidate(folder)], options, tmp_path / "e.json")
    with pytest.raises(ValueError, match="is no folder: make it"):
        evaluate([Candidate(folder)], options, tmp_path / "none" / "e.json")


def test_a_first_token_that_nothing_predicts_is_told(folder, options, tmp_path):
    from tests.data.samples import byte_tokenizer

    model = from_pretrained(folder, device="cpu")
    bare = score_texts(model, byte_tokenizer(), options, cache=tmp_path / "c")
    assert [text.first_unscored for text in bare] == [len(TEXTS), 1]
    told = EvalOptions(sources=options.sources, window=64, bos=True)
    with_bos = score_texts(model, byte_tokenizer(), told, cache=tmp_path / "c")
    assert [text.first_unscored for text in with_bos] == [0, 0]
    assert with_bos[0].tokens == bare[0].tokens + len(TEXTS)


def test_scores_that_are_not_finite_reach_the_file(folder, options, tmp_path):
    model = from_pretrained(folder, device="cpu")
    with torch.no_grad():
        model.model.norm_f.weight[0] = math.nan
    (text, _) = score_texts(model, PretrainedTokenizer.load(folder), options)
    assert math.isnan(text.perplexity) and text.to_dict()["tokens"] == text.tokens
