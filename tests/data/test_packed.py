import json
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_v3.data.options import Source
from nemotron_v3.data.pieces import IGNORE_INDEX
from tests.data.samples import (
    EOS,
    TEMPLATE,
    byte_tokenizer,
    chat,
    documents_of,
    ids,
    packed,
    write_jsonl,
)
from tests.models import tiny_model

T = 16
texts = st.lists(st.text(alphabet="abcdefgh", max_size=40), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("packed")


def texts_of(folder, contents, name="a.jsonl"):
    return write_jsonl(folder / name, [{"text": text} for text in contents])


def steps_of(data) -> list[list]:
    with data:
        return [[row.input_ids.tolist() for row in rows] for rows in data]


def predictions(row) -> list[tuple[int, int]]:
    """Each target beside the token that predicts it, by the model's rule: within a document."""
    found = []
    for a, b in pairwise(row.cu_seqlens):
        assert row.labels[a] == IGNORE_INDEX
        for i in range(a + 1, b):
            if row.labels[i] != IGNORE_INDEX:
                assert row.labels[i] == row.input_ids[i]
                found.append((int(row.input_ids[i - 1]), int(row.labels[i])))
    return found


@settings(deadline=None, max_examples=50)
@given(texts.filter(any), st.integers(1, 3))
def test_every_token_is_predicted_once_an_epoch(folder, contents, rows):
    documents = [ids(text) for text in contents if text]
    expected = Counter(pair for document in documents for pair in pairwise(document))
    with packed(folder, texts_of(folder, contents), tokens_per_row=T, rows=rows) as data:
        steps = list(data)
        assert data.total_steps(at_most=len(steps) - 1) == len(steps) - 1
        assert len(steps) == data.total_steps() == data.total_steps(at_most=len(steps) + 1)
        report = data.report()
    found = [row for step in steps for row in step]
    assert Counter(pair for row in found for pair in predictions(row)) == expected
    assert sum(row.num_targets for row in found) == expected.total()
    for row in found:
        assert row.input_ids.shape == row.labels.shape == (T,)
        assert row.cu_seqlens[0] == 0 and row.num_tokens <= T
        assert (row.labels[row.num_tokens :] == IGNORE_INDEX).all()
    # What fits into a row is whole there.
    whole = Counter(tuple(d) for d in documents if len(d) <= T)
    assert not whole - Counter(tuple(d) for d in documents_of(found))
    assert report.cut == sum(len(d) > T for d in documents)
    assert (report.documents, report.tokens) == (len(documents), sum(map(len, documents)))
    assert report.sources[0].empty == sum(not text for text in contents)


@settings(deadline=None, max_examples=30)
@given(texts.filter(any), st.integers(0, 20), st.integers(1, 3), st.integers(1, 3))
def test_a_run_goes_on_at_any_step_with_any_number_of_ranks(folder, contents, stop, before, after):
    path = texts_of(folder, contents)
    kind = {"tokens_per_row": T, "rows": 3, "epochs": 3}
    whole = steps_of(packed(folder, path, **kind))

    def dealt(world_size, state, count):
        """The first steps' rows, put together from all ranks, and each rank's state behind."""
        ranks = [
            packed(folder, path, rank=r, world_size=world_size, **kind) for r in range(world_size)
        ]
        steps = []
        for data in ranks:
            if state is not None:
                data.load_state_dict(json.loads(json.dumps(state)))
        for _ in range(count):
            parts = [next(data, None) for data in ranks]
            assert len({None if part is None else len(part) for part in parts}) == 1
            if parts[0] is None:
                break
            rows = [row for turn in zip(*parts, strict=True) for row in turn]
            steps.append([row.input_ids.tolist() for row in rows[:3]])
            assert all(row.cu_seqlens == [0] for row in rows[3:])
        states = [data.state_dict() for data in ranks]
        assert all(state == states[0] for state in states)
        for data in ranks:
            data.close()
        return steps, states[0]

    first, state = dealt(before, None, stop)
    second, _ = dealt(after, state, 1000)
    assert first + second == whole


def test_one_order_for_a_seed_and_others_for_others(tmp_path):
    path = texts_of(tmp_path, [f"document {n}" for n in range(50)])
    first, again, other = (steps_of(packed(tmp_path, path, seed=seed)) for seed in (0, 0, 1))
    assert first == again != other


def test_the_loss_of_a_row_is_that_of_its_documents_alone(tmp_path):
    path = texts_of(tmp_path, ["ab", "hello", "a longer one than that"])
    model = tiny_model("M*-E", vocab_size=300).double()
    with packed(tmp_path, path, tokens_per_row=48, rows=1) as data:
        ((row,),) = list(data)
    assert 0 < row.num_tokens < 48
    loss = model(input_ids=row.input_ids, labels=row.labels, layout=row.layout()).loss
    alone = torch.zeros((), dtype=torch.float64)
    for document in documents_of([row]):
        tokens = torch.tensor(document)[None]
        alone += model(input_ids=tokens, labels=tokens).loss * (len(document) - 1)
    torch.testing.assert_close(loss * row.num_targets, alone)


def test_a_row_of_padding_has_no_loss_and_can_be_trained_on(tmp_path):
    path = texts_of(tmp_path, ["ab"])
    with packed(tmp_path, path, rank=1, world_size=2) as data:
        ((row,),) = list(data)
    assert row.cu_seqlens == [0] and row.num_targets == 0 and row.sources == []
    model = tiny_model("M*-E", vocab_size=300)
    loss = model(input_ids=row.input_ids, labels=row.labels, layout=row.layout()).loss
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_chats_learn_the_assistants_words_alone(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [chat("hi", "yes"), chat("why?", "so", "hm", "ok")])
    with packed(tmp_path, path, chat_template=TEMPLATE, tokens_per_row=64) as data:
        rows = [row for step in data for row in step]
    taught = [n for row in rows for n in row.labels.tolist() if n != IGNORE_INDEX]
    text = byte_tokenizer().backend.decode(taught, skip_special_tokens=False)
    assert sorted(text.split("<end>")) == ["", "ok", "so", "yes"]


def test_stretches_of_a_chat_without_a_target_are_left_out_and_counted(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [chat("x" * 100, "yes")])
    with packed(tmp_path, path, chat_template=TEMPLATE, tokens_per_row=32) as data:
        rows = [row for step in data for row in step if row.sources]
        (source,) = data.report().sources
    assert (source.cut, source.stretches_left_out) == (1, 3)
    assert sum(row.num_targets for row in rows) == len(ids("yes"))


def test_each_document_names_its_source_and_file(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        (tmp_path / "in" / f"{name}.txt").write_text(name * 5)
    other = texts_of(tmp_path, ["ccc", "dddd"], "c.jsonl")
    with packed(tmp_path, tmp_path / "in", other) as data:
        rows = [row for step in data for row in step]
        found = {
            data.file_of(*place): document
            for row in rows
            for place, document in zip(row.sources, documents_of([row]), strict=True)
        }
    assert found["a.txt"] == ids("aaaaa") and found["b.txt"] == ids("bbbbb")
    assert found["c.jsonl"] in (ids("ccc"), ids("dddd"))


def test_a_state_of_other_data_is_refused_by_name(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / f"{name}.txt").write_text(name * 40)
    with packed(tmp_path, folder) as data:
        state = data.state_dict()

    def refused(*sources, **options):
        with packed(tmp_path, *sources, **options) as data:
            before = data.state_dict()
            with pytest.raises(ValueError) as error:
                data.load_state_dict(state)
            assert data.state_dict() == before
        return str(error.value)

    assert "seed was 0, is 1" in refused(folder, seed=1)
    assert "tokens_per_row was 32, is 64" in refused(folder, tokens_per_row=64)
    assert "weight was 1.0, is 2.0" in refused(Source(str(folder), weight=2.0))
    assert "there were 1 sources, there are 2" in refused(folder, folder)
    (folder / "b.txt").write_text("other")
    assert "source 0: b.txt gives other tokens: it was changed" in refused(folder)
    (folder / "b.txt").rename(folder / "d.txt")
    told = refused(folder)
    assert "b.txt is not there any more" in told and "d.txt was not there" in told


def test_data_that_were_moved_are_the_same_data(tmp_path):
    texts_of(tmp_path, ["ab", "cd"])
    with packed(tmp_path, tmp_path / "a.jsonl") as data:
        state = data.state_dict()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a.jsonl").rename(tmp_path / "elsewhere" / "a.jsonl")
    with packed(tmp_path, tmp_path / "elsewhere" / "a.jsonl") as data:
        data.load_state_dict(state)


def test_epochs_may_be_raised_but_not_within_a_part_of_one(tmp_path):
    path = texts_of(tmp_path, [f"document {n}" for n in range(40)])
    with packed(tmp_path, path, epochs=1) as data:
        first = steps_of(data)
        state = data.state_dict()
    with packed(tmp_path, path, epochs=2) as data:
        data.load_state_dict(state)
        assert first + steps_of(data) == steps_of(packed(tmp_path, path, epochs=2))
    with packed(tmp_path, path, epochs=1.5) as data:
        list(data)
        state = data.state_dict()
    with packed(tmp_path, path, epochs=2) as data, pytest.raises(ValueError, match="was 1.5, is 2"):
        data.load_state_dict(state)


def test_a_rank_that_is_none_and_a_foreign_tokenizer_are_refused(tmp_path):
    path = texts_of(tmp_path, ["ab"])
    with pytest.raises(ValueError, match="rank is 2 of 2"):
        packed(tmp_path, path, rank=2, world_size=2)
    from nemotron_v3.data.options import DataOptions
    from nemotron_v3.data.packed import PackedData

    options = DataOptions((Source(str(path)),), 32, 2)
    with pytest.raises(TypeError, match="the tokenizer is a Tokenizer: give what"):
        PackedData(options, byte_tokenizer().backend, cache=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens_per_row": 1}, "tokens_per_row is 1"),
        ({"rows": 0}, "rows is 0"),
        ({"epochs": 0}, "epochs is 0"),
        ({"workers": -1}, "workers is -1"),
        ({"train_on": "user"}, "train_on is 'user': give one of assistant, all"),
    ],
)
def test_options_that_none_can_have_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        packed(tmp_path, "a.txt", **change)


def test_sources_that_none_can_have_are_refused():
    for change, message in (
        ({"path": ""}, "empty path"),
        ({"format": "csv"}, "format is 'csv': give one of auto, text, jsonl"),
        ({"weight": 0}, "weight is 0"),
        ({"weight": float("nan")}, "weight is nan"),
        ({"field": ""}, "field is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            Source(**{"path": "a.txt", **change})


def test_what_is_ready_ahead_changes_nothing(tmp_path):
    """With workers the next step is read in a thread; the state is of what was handed out."""
    path = texts_of(tmp_path, [f"document {n}" for n in range(40)])
    plain = packed(tmp_path, path)
    with packed(tmp_path, path, workers=1) as data:  # the tokens are there already
        for expected in plain:
            rows = next(data)
            assert [r.input_ids.tolist() for r in rows] == [r.input_ids.tolist() for r in expected]
            assert data.state_dict() == plain.state_dict()
        with pytest.raises(StopIteration):
            next(data)
        assert EOS in rows[0].input_ids.tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row": -3}, "'row': -3"),
        ({"window": -1}, "'window': -1"),
        ({"epoch": -1}, "'epoch': -1"),
        ({"row": 10**6, "rows": 10**6}, "the window has .* rows"),
        ({"window": 7}, "the epoch has 1 windows"),
        ({"epoch": 9}, "in epoch 9 of 1"),
        ({"rows": 0}, "rows counts"),
        ({"row": "2"}, r"position\.row is '2'"),
        ({"row": None}, r"position\.row is None"),
    ],
)
def test_a_position_that_the_rows_do_not_have_is_refused(folder, change, message):
    path = texts_of(folder, ["some text", "and more of it"] * 4, "positions.jsonl")
    with packed(folder, path, tokens_per_row=T, rows=2) as data:
        next(data)
        state = data.state_dict()
        told = json.loads(json.dumps(state))
        told["position"] |= change
        with pytest.raises(ValueError, match=message):
            data.load_state_dict(told)
        assert data.state_dict() == state


@pytest.mark.parametrize(
    "change", [{"data": None}, {"epochs": "1"}, {"data": {"seed": 0}}, {"position": [0]}]
)
def test_a_state_of_another_shape_is_refused(folder, change):
    path = texts_of(folder, ["some text", "and more of it"], "states.jsonl")
    with packed(folder, path, tokens_per_row=T, rows=2) as data:
        with pytest.raises(ValueError, match="the data's state"):
            data.load_state_dict(data.state_dict() | change)
        told = json.loads(json.dumps(data.state_dict()))
        told["data"]["sources"][0]["files"][0].append("x")
        with pytest.raises(ValueError, match="a name and a hash"):
            data.load_state_dict(told)
