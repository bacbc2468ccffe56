"""A model that was trained stops where its tokenizer says, and chats as it was trained."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from nemotron_v3 import from_pretrained
from nemotron_v3.chat import ChatTemplate
from nemotron_v3.cli.train import _write_on
from nemotron_v3.config import NemotronV3Config
from nemotron_v3.data.options import DataOptions, Source
from nemotron_v3.data.pretrained import PretrainedTokenizer
from nemotron_v3.data.tokenizer import Tokenizer
from nemotron_v3.generation import GenerationOptions
from nemotron_v3.train.build import read_model_config
from nemotron_v3.train.display import Display
from nemotron_v3.train.ends import settle_ends
from nemotron_v3.train.options import LogOptions, ModelOptions, ScheduleOptions, TrainOptions
from nemotron_v3.train.plan import show_plan
from nemotron_v3.train.run import train
from nemotron_v3.train.tokenizer import read_tokenizer
from tests.train.test_run import Crash, crash_after

SIZES = {
    "hybrid_override_pattern": "M*-", "vocab_size": 264, "hidden_size": 32, "mamba_num_heads": 4,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "n_groups": 1,
    "ssm_state_size": 16, "mamba_head_dim": 16, "intermediate_size": 32,
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
OTHER = TEMPLATE.replace("assistant: ", "me: ")
CHAT = {"messages": [{"role": "user", "content": "say a"}, {"role": "assistant", "content": "a a"}]}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NEMOTRON_V3_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def texts(tmp_path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a a a a"}\n' * 40)
    return path


@pytest.fixture
def chats(tmp_path) -> Path:
    path = tmp_path / "chats.jsonl"
    path.write_text((json.dumps(CHAT) + "\n") * 40)
    return path


def fresh(source: Path, out: Path, model: dict | None = None, **changes) -> TrainOptions:
    told = {
        "out": out,
        "data": DataOptions((Source(str(source)),), tokens_per_row=64, rows=2, epochs=None),
        "model": ModelOptions(config=SIZES | (model or {}), device="cpu"),
        "schedule": ScheduleOptions(steps=1),
    }
    return TrainOptions(**told | changes)


def with_template(options: TrainOptions, told: str) -> TrainOptions:
    return replace(options, data=replace(options.data, chat_template=told))


def said(options: TrainOptions, **more) -> str:
    """What a run says; it is run."""
    with (options.out.parent / "said").open("w+") as file:
        train(options, display=Display(Console(file=file, width=2000)), **more)
        file.seek(0)
        return file.read()


def warned(options: TrainOptions) -> list[str]:
    return [line for line in said(options).splitlines() if line.startswith("warning")]


def stops(folder: Path) -> frozenset[int]:
    model = from_pretrained(folder)
    return GenerationOptions.of({}, model.generation_config).eos(model.config)


def test_a_fresh_model_ends_where_its_tokenizer_ends_a_text(texts, tmp_path):
    asked = fresh(texts, tmp_path / "run")
    assert not warned(asked)
    config, tokenizer = NemotronV3Config.from_json(asked.out), PretrainedTokenizer.load(asked.out)
    assert tokenizer.eos_token_id == 0
    assert [config.eos_token_id, config.bos_token_id, config.pad_token_id] == [0, 0, 0]
    assert stops(asked.out) == {0}


def test_transformers_stops_there_too(texts, tmp_path):
    transformers = pytest.importorskip("transformers")
    asked = fresh(texts, tmp_path / "run")
    said(asked)
    about = json.loads((asked.out / "config.json").read_text())
    theirs = transformers.GenerationConfig.from_model_config(
        transformers.PretrainedConfig.from_dict(about)
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(asked.out)
    assert theirs.eos_token_id == tokenizer.eos_token_id == 0
    assert theirs.bos_token_id == tokenizer.bos_token_id == 0


def test_samples_of_the_log_stop_there(texts, tmp_path):
    """A head that always chooses token 0 writes nothing more; token 2 would be written on."""
    found = []

    def write_on(model, prompts, tokens, tokenizer):
        head = torch.zeros_like(model.lm_head.weight)
        kept, model.lm_head.weight.data = model.lm_head.weight.data, head
        try:
            found.extend(_write_on(model, prompts, tokens, tokenizer))
        finally:
            model.lm_head.weight.data = kept
        return found

    asked = fresh(texts, tmp_path / "run", log=LogOptions(samples=("a",), sample_tokens=5))
    assert "no samples" not in said(asked, write_on=write_on)
    assert found == [""]


def test_a_recipe_that_says_otherwise_is_obeyed_and_told_of(texts, tmp_path):
    asked = fresh(texts, tmp_path / "run", {"eos_token_id": 5})
    (told,) = warned(asked)
    assert "texts end in the tokenizer's token 0 ('<|endoftext|>')" in told
    assert "stops at 5" in told and "Give model.config.eos_token_id = 0" in told
    assert stops(asked.out) == {5}
    both = fresh(texts, tmp_path / "both", {"eos_token_id": [0, 5]})
    assert not warned(both) and stops(both.out) == {0, 5}
    outside = fresh(texts, tmp_path / "outside", {"eos_token_id": 264})
    with pytest.raises(ValueError, match=r"eos_token_id is 264, and the model has 264 tokens"):
        train(outside)
    assert not outside.out.exists()


def test_a_preset_does_not_say_where_a_tokenizer_of_the_data_ends(texts, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(NemotronV3Config(**SIZES).to_dict()))
    model = ModelOptions(preset=str(tmp_path / "config.json"), device="cpu")
    asked = fresh(texts, tmp_path / "run", model=None)
    asked = replace(asked, model=model)
    assert not warned(asked) and stops(asked.out) == {0}


def folder_of_a_tokenizer(folder: Path, eos: str = "Z", **more) -> Path:
    """Another than that of `base`, whose texts end in a letter."""
    folder.mkdir()
    Tokenizer.train(["z y x w"] * 3, 262).save(folder)
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos}
    (folder / "tokenizer_config.json").write_text(json.dumps(about | more))
    return folder


def test_a_given_tokenizer_says_so_for_a_fresh_model(texts, tmp_path):
    folder = folder_of_a_tokenizer(tmp_path / "tokenizer")
    end = PretrainedTokenizer.load(folder).eos_token_id
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 7, "top_k": 5}))
    asked = fresh(texts, tmp_path / "run")
    asked = replace(asked, model=replace(asked.model, tokenizer=folder))
    assert not warned(asked) and stops(asked.out) == {end}
    assert json.loads((asked.out / "generation_config.json").read_text())["top_k"] == 5
    # Of bos and padding it says nothing: a fresh model has none, in place of tokens 1 and 0.
    config = NemotronV3Config.from_json(asked.out)
    assert config.bos_token_id is config.pad_token_id is None


def test_a_checkpoint_keeps_what_it_says_and_is_told_of_a_contradiction(texts, base, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)  # its config ends in 2, its tokenizer in 0
    asked = fresh(texts, tmp_path / "run", model=None)
    asked = replace(asked, model=ModelOptions(path=copy, device="cpu"))
    (told,) = warned(asked)
    assert "stops at 2" in told and f'{{"eos_token_id": 0}} into {copy}/generation_config' in told
    assert stops(asked.out) == {2}
    (copy / "generation_config.json").write_text('{"eos_token_id": [2, 0], "top_k": 3}')
    again = replace(asked, out=tmp_path / "again")
    assert not warned(again)
    kept = [folder / "generation_config.json" for folder in (again.out, copy)]
    assert kept[0].read_bytes() == kept[1].read_bytes()


def test_an_exchanged_tokenizer_is_saved_and_ends_texts(texts, base, tmp_path):
    folder = folder_of_a_tokenizer(tmp_path / "tokenizer")
    end = PretrainedTokenizer.load(folder).eos_token_id
    model = ModelOptions(path=base, tokenizer=folder, device="cpu")
    asked = replace(fresh(texts, tmp_path / "run"), model=model)
    assert not warned(asked)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (asked.out / name).read_bytes() == (folder / name).read_bytes()
    assert end != 2 and stops(asked.out) == {end}


def test_a_dry_run_tells_the_same(texts, tmp_path):
    asked = fresh(texts, tmp_path / "run", {"eos_token_id": 5})
    with (tmp_path / "said").open("w+") as file:
        show_plan(asked, 0.4, Console(file=file, width=2000))
        file.seek(0)
        assert "warning: texts end in the tokenizer's token 0" in file.read()


def test_a_template_that_teaches_no_end_is_told_of(chats, tmp_path):
    asked = with_template(fresh(chats, tmp_path / "run"), TEMPLATE.replace("{{ eos_token }}", ""))
    (told,) = warned(asked)
    assert "the chats teach no end of an answer" in told
    assert not warned(with_template(fresh(chats, tmp_path / "fine"), TEMPLATE))


@pytest.mark.parametrize("place", ["text", "file", "folder"])
def test_the_template_that_was_trained_with_is_saved(place, chats, base, tmp_path):
    """In place of all of the base's, that in tokenizer_config.json and those by name included."""
    copy, given = tmp_path / "copy", tmp_path / "given"
    shutil.copytree(base, copy)
    (copy / "chat_template.jinja").write_text(OTHER)
    (copy / "additional_chat_templates").mkdir()
    (copy / "additional_chat_templates" / "tool_use.jinja").write_text(OTHER)
    about = json.loads((copy / "tokenizer_config.json").read_text()) | {"chat_template": OTHER}
    (copy / "tokenizer_config.json").write_text(json.dumps(about))
    given.mkdir()
    (given / "chat_template.jinja").write_text(TEMPLATE)
    told = {"text": TEMPLATE, "file": str(given / "chat_template.jinja"), "folder": str(given)}
    model = ModelOptions(path=copy, device="cpu")
    asked = with_template(replace(fresh(chats, tmp_path / "run"), model=model), told[place])
    said(asked)
    assert (asked.out / "chat_template.jinja").read_text() == TEMPLATE
    assert not (asked.out / "additional_chat_templates").exists()
    del about["chat_template"]
    assert json.loads((asked.out / "tokenizer_config.json").read_text()) == about
    rendered = ChatTemplate.load(asked.out).render(CHAT["messages"], tools=[])
    assert rendered.startswith("user: say a\nassistant: a a<|endoftext|>")


def test_a_fresh_model_has_the_template_and_a_resumed_run_too(chats, tmp_path):
    asked = fresh(chats, tmp_path / "run", schedule=ScheduleOptions(steps=3))
    asked = with_template(asked, TEMPLATE)
    with pytest.raises(Crash):
        said(asked, after_step=crash_after(1))
    said(asked, resume=True)
    assert (asked.out / "chat_template.jinja").read_text() == TEMPLATE
    assert stops(asked.out) == {0}


def test_a_checkpoint_without_its_template_told_keeps_it(chats, base, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    (copy / "chat_template.jinja").write_text(TEMPLATE)
    model = ModelOptions(path=copy, device="cpu")
    asked = replace(fresh(chats, tmp_path / "run"), model=model)
    said(asked)
    assert (asked.out / "chat_template.jinja").read_text() == TEMPLATE


def test_released_ends_of_a_chat_model_are_no_contradiction(texts, base, tmp_path):
    """Its config ends in one token, its tokenizer and its generation config in another."""
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    (copy / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    asked = replace(fresh(texts, tmp_path), model=ModelOptions(path=copy, device="cpu"))
    config = read_model_config(asked.model, torch.device("cpu"))
    ends = settle_ends(asked, config, read_tokenizer(asked))
    assert (ends.config, ends.warnings) == ({}, ())
