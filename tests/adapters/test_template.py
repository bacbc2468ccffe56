"""An adapter chats by the template that it was trained with, wherever it goes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")

from nemotron_v3 import from_pretrained, save_pretrained
from nemotron_v3.checkpoint import convert, merge_adapter
from nemotron_v3.cli.chat import Conversation
from nemotron_v3.data.options import Source
from nemotron_v3.evaluation import Candidate, EvalOptions, evaluate
from nemotron_v3.hf import lora
from nemotron_v3.train.options import LoraOptions, ModelOptions
from tests.train.conftest import base as base
from tests.train.test_ends import CHAT, OTHER, TEMPLATE, fresh, said, with_template

pytestmark = pytest.mark.filterwarnings("ignore")
NAME = "chat_template.jinja"


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory) -> tuple[Path, Path]:
    """A checkpoint with a template, and an adapter that was trained with another one."""
    folder = tmp_path_factory.mktemp("adapter")
    copy = folder / "base"
    shutil.copytree(base, copy)
    (copy / NAME).write_text(OTHER)
    (folder / "chats.jsonl").write_text((json.dumps(CHAT) + "\n") * 8)
    asked = fresh(folder / "chats.jsonl", folder / "adapter", lora=LoraOptions(rank=2))
    asked = replace(asked, model=ModelOptions(path=copy, device="cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEMOTRON_V3_CACHE", str(folder / "cache"))
        said(with_template(asked, TEMPLATE), adapters=lora)
    return copy, asked.out


def test_it_is_saved_beside_the_adapter(trained):
    assert (trained[1] / NAME).read_text() == TEMPLATE


def test_merged_on_the_disk_or_in_memory_it_takes_the_bases_place(trained, tmp_path):
    copy, adapter = trained
    convert(copy, tmp_path / "converted", adapter=adapter)
    model = from_pretrained(copy)
    merge_adapter(model, adapter)
    save_pretrained(model, tmp_path / "saved")
    for name in ("converted", "saved"):
        assert (tmp_path / name / NAME).read_text() == TEMPLATE


def test_a_chat_beside_the_base_goes_by_it(trained):
    copy, adapter = trained
    model = from_pretrained(copy)
    messages = CHAT["messages"]
    with_it = Conversation(model, copy, None, {}, adapter).chat.template.render(messages)
    without = Conversation(model, copy, None, {}).chat.template.render(messages)
    assert "assistant: a a<|endoftext|>" in with_it and without.endswith("me: ")


def test_an_evaluation_scores_chats_by_it(trained, tmp_path, monkeypatch):
    """Its targets are a token fewer each without the template's end of an answer."""
    monkeypatch.setenv("NEMOTRON_V3_CACHE", str(tmp_path))
    copy, adapter = trained
    (copy / NAME).write_text(OTHER.replace("{{ eos_token }}", ""))
    sources = (Source(str(copy.parent / "chats.jsonl")),)
    found = evaluate([Candidate(copy), Candidate(copy, adapter)], EvalOptions(sources=sources))
    plain, adapted = (each.texts[0].tokens for each in found.checkpoints)
    assert adapted == plain + 8
