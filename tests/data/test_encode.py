import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_v3.chat import ChatTemplate
from nemotron_v3.data.encode import Encoder, only_in
from nemotron_v3.data.read import Record
from nemotron_v3.data.tokenizer import Tokenizer
from tests.data.samples import EOS, TEMPLATE, byte_tokenizer, chat

words = st.text(alphabet="ab \né漢🙂<>", min_size=1, max_size=12)
TAGGED = ChatTemplate(TEMPLATE)
# The end tag is not learnt here, so that the assistant's words end with a character of theirs.
WORDS_ALONE = TEMPLATE.replace("<end>{% endgeneration %}", "{% endgeneration %}<end>")


def encoder(template=TAGGED, train_on="assistant", tokenizer=None) -> Encoder:
    tokenizer = tokenizer or byte_tokenizer()
    before, behind = tokenizer.frame()
    literal = tokenizer.backend.encode_special_tokens
    return Encoder(tokenizer.backend, literal, tuple(before), tuple(behind), template, train_on)


def encoded(*values, field="text", **options):
    records = [Record(line, value) for line, value in enumerate(values, 1)]
    return encoder(**options).documents(iter(records), field)


def split(signed: list[int]) -> tuple[list[int], list[bool]]:
    return [~n if n < 0 else n for n in signed], [n >= 0 for n in signed]


@settings(deadline=None)  # templates are rendered in a process of their own
@given(st.lists(words, min_size=2, max_size=6), st.sampled_from([TEMPLATE, WORDS_ALONE]))
def test_the_targets_of_a_chat_are_transformers_assistant_tokens(contents, template):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer().backend)
    row = chat(*contents)
    expected = theirs.apply_chat_template(
        row["messages"], chat_template=template, return_assistant_tokens_mask=True, return_dict=True
    )
    (found,) = encoded(row, template=ChatTemplate(template)).ids
    ids, targets = split(found)
    assert ids == expected["input_ids"]
    assert targets == [bool(n) for n in expected["assistant_masks"]]


@settings(deadline=None)  # templates are rendered in a process of their own
@given(st.lists(words, min_size=2, max_size=4))
def test_a_character_of_several_tokens_is_a_target_whole(contents):
    template = ChatTemplate(WORDS_ALONE)
    (found,) = encoded(chat(*contents), template=template).ids
    ids, targets = split(found)
    taught = [i for i, is_target in zip(ids, targets, strict=True) if is_target]
    expected = [n for text in contents[1::2] for n in byte_tokenizer().encode(text)]
    assert taught == expected


def test_all_words_of_a_chat_are_targets_where_that_is_asked_for():
    plain = ChatTemplate(
        TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    )
    (found,) = encoded(chat("hi", "yes"), train_on="all", template=plain).ids
    ids, targets = split(found)
    assert all(targets) and byte_tokenizer().backend.decode(ids, skip_special_tokens=False) == (
        "<start>user\nhi<end><start>assistant\nyes<end>"
    )


def test_only_in_marks_tokens_that_touch_a_span():
    offsets = [(0, 2), (2, 2), (2, 5), (5, 6), (6, 9)]
    assert only_in([(1, 3), (6, 7)], [1, 2, 3, 4, 5], offsets) == [1, ~2, 3, ~4, 5]
    assert only_in([], [0, 7], [(0, 1), (1, 2)]) == [-1, -8]


def test_text_has_its_frame_and_all_of_it_are_targets():
    assert encoded({"text": "ab"}).ids == [[*byte_tokenizer().encode("ab"), EOS]]
    assert encoded({"body": "ab"}, field="body").ids == encoded({"text": "ab"}).ids
    own = Tokenizer.train(["ab" * 9], 258)
    assert encoded({"text": "ab"}, tokenizer=own).ids == [[0, *own.encode("ab"), 0]]


def test_text_and_chats_keep_their_order():
    found = encoded({"text": "ab"}, chat("hi", "yes"), {"text": "cd"}).ids
    assert [split(ids)[0][0] for ids in found] == [ord("a") - 33 + 0, 257, ord("c") - 33 + 0]


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ({"content": "x", "id": 1}, "no field 'text': there are 'content', 'id'"),
        ({"text": 3}, "the field 'text' is 3: neither text nor a list of messages"),
        ({"text": None}, "the field 'text' is None: neither"),
        ({"text": "\ud800"}, "half a character"),
        ({"messages": []}, "an empty list of messages"),
        ({"messages": ["hi"]}, "is ['hi']: a list, and not of messages"),
        ({"messages": [{"role": "user"}, "hi"]}, "message 1 is 'hi': give a dict"),
        ({"messages": [{"content": "x"}], "chat_template_kwargs": 3}, "is no object"),
        ({"messages": [{"role": "user"}], "tools": "x"}, "tools is 'x': give a list"),
    ],
)
def test_a_record_that_is_no_document_is_counted_and_the_others_stay(value, why):
    found = encoded({"text": "ab"}, value, {"text": "cd"})
    assert len(found.ids) == 2
    ((line, told),) = found.bad
    assert line == 2 and why in told


def test_a_list_of_texts_needs_no_template_to_be_a_bad_line():
    records = [Record(1, {"text": ["a", "b"]}), Record(2, {"text": "cd"})]
    found = encoder(template=None).documents(iter(records), "text")
    assert len(found.ids) == 1 and [line for line, _ in found.bad] == [1]


def test_what_a_template_refuses_is_a_bad_line():
    refusing = "{% generation %}{{ raise_exception('no system') }}{% endgeneration %}"
    found = encoded(chat("hi", "yes"), template=ChatTemplate(refusing))
    assert found.bad == [(1, "the chat template refuses the messages: no system")]


def test_documents_without_text_or_targets_are_counted_apart():
    found = encoded({"text": ""}, {"text": " \n"}, chat("only a question"))
    assert (found.ids, found.bad, found.empty, found.without_targets) == ([], [], 2, 1)


def test_chats_need_a_template_that_marks_the_assistants_words():
    with pytest.raises(
        ValueError,
        match=r"no chat template: .*--data\.chat-template FILE, eval",
    ):
        encoded(chat("hi", "yes"), template=None)
    plain = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(ValueError, match=r"marks no assistant's words.*\{% generation %\}"):
        encoded(chat("hi", "yes"), template=plain)


def test_an_encoder_travels_with_all_its_settings():
    own = Tokenizer.train(["ab" * 9], 258)
    text = {"text": "<|endoftext|>"}
    for each in (encoder(tokenizer=own), encoder()):
        there = pickle.loads(pickle.dumps(each))
        records = [Record(1, text), Record(2, chat("hi", "yes"))]
        assert there.documents(iter(records), "text") == each.documents(iter(records), "text")
        assert there.fingerprint() == each.fingerprint()
    # The own tokeniser reads a special token's spelling as text.
    assert len(encoded(text, tokenizer=own).ids[0]) > 3


def test_tools_and_variables_of_a_row_reach_the_template():
    source = "{{ tools[0].function.name }} {{ mood }}{% generation %}!{% endgeneration %}"
    tools = [{"type": "function", "function": {"name": "weather"}}]
    row = {**chat("hi"), "tools": tools, "chat_template_kwargs": {"mood": "calm"}}
    found = encoded(row, template=ChatTemplate(source))
    assert byte_tokenizer().decode(split(found.ids[0])[0]) == "weather calm!"


@pytest.mark.parametrize("how", ["text", "file", "folder"])
def test_a_template_is_given_the_tokenizer_s_special_tokens_wherever_it_lies(tmp_path, how):
    template = "{{ bos_token }}{{ messages[0].content }}"
    (tmp_path / "chat_template.jinja").write_text(template)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "of another tokenizer"}')
    told = {"text": template, "file": str(tmp_path / "chat_template.jinja")}.get(how)
    tokenizer = byte_tokenizer()
    tokenizer.special_tokens = {"bos_token": "<start>"}
    encoder = Encoder.of(tokenizer, told or str(tmp_path), "all")
    found = encoder.documents(iter([Record(1, {"messages": [{"content": "a"}]})]), "text")
    assert found.ids == [tokenizer.encode("<start>a")] and len(found.ids[0]) == 2
