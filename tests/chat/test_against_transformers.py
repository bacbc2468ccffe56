"""The text of templates is what transformers' own renderer makes of them."""

import copy
import itertools

import pytest
import tokenizers

from nemotron_v3.chat import ChatTemplate
from tests.chat.samples import CONVERSATIONS, OWN, SPECIAL, TOOLS, trl_templates

transformers = pytest.importorskip("transformers")
WAYS = [
    {"add_generation_prompt": prompt, **tools, **thinking}
    for prompt, tools, thinking in itertools.product(
        (False, True),
        ({}, {"tools": TOOLS}),
        ({}, {"enable_thinking": True}, {"enable_thinking": False}),
    )
]
# The family's always, others' where there is time.
TRL = [
    pytest.param(
        path, id=path.stem, marks=() if "nemotron" in path.stem else pytest.mark.integration
    )
    for path in trl_templates()
]


@pytest.fixture(scope="module")
def theirs():
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0}, "<pad>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)


def outcome(render):
    """The text, or that there is none."""
    try:
        return render()
    except Exception:
        return None


def compare(source, theirs, conversations=None, ways=WAYS):
    """Compare every conversation in every way; how many have a text."""
    ours, texts = ChatTemplate(source, SPECIAL), 0
    conversations = conversations or list(CONVERSATIONS.values())
    for conversation, way in itertools.product(conversations, ways):
        before = copy.deepcopy(conversation)
        want = outcome(
            lambda c=conversation, w=way: theirs.apply_chat_template(
                c, chat_template=source, tokenize=False, **w
            )
        )
        try:
            got = ours.render(conversation, **way)
        except ValueError:
            got = None
        assert got == want, (conversation, way)
        assert conversation == before
        texts += want is not None
    return texts


@pytest.mark.parametrize("name", OWN)
def test_a_template_of_our_own(theirs, name):
    texts = compare(OWN[name], theirs)
    assert texts >= len(WAYS) * (len(CONVERSATIONS) - 2)


@pytest.mark.parametrize("path", TRL)
def test_a_template_of_trl(theirs, path):
    texts = compare(path.read_text(encoding="utf-8"), theirs)
    assert texts >= len(WAYS)
    if "nemotron" in path.stem:
        assert texts == len(WAYS) * len(CONVERSATIONS)


@pytest.mark.parametrize("path", TRL)
@pytest.mark.parametrize("field", [True, "reasoning_content"])
def test_a_last_message_is_left_open(theirs, path, field):
    source = path.read_text(encoding="utf-8")
    conversations = [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": text} | thought]
        for text in ("So ", "So", "<think>\nx\n</think>\nSo\n")
        for thought in ({}, {"reasoning_content": "hm, "})
    ]
    compare(source, theirs, conversations, [{"continue_final_message": field}])


def test_parts_of_a_message_that_are_texts_and_images(theirs):
    source = (
        "{% for m in messages %}{% for part in m.content %}{% if part.type == 'image' %}<image>"
        "{% else %}{{ part.text }}{% endif %}{% endfor %}{{ m.content[-1] is mapping }}{% endfor %}"
    )
    image = {"type": "image", "image": b"\x89"}
    conversation = [{"role": "user", "content": [image, {"type": "text", "text": "what? "}]}]
    ways = [{}, {"continue_final_message": True}]
    assert compare(source, theirs, [conversation], ways) == 2


def test_documents(theirs):
    source = "{% for d in documents %}{{ d.title }}: {{ d.text }}\n{% endfor %}"
    documents = [{"title": "A", "text": "é"}, {"title": "B", "text": "<"}]
    assert compare(source, theirs, ways=[{"documents": documents}]) == len(CONVERSATIONS)


@pytest.mark.parametrize("path", [each for each in TRL if "_training" in each.id])
def test_spans_are_those_that_transformers_masks(path):
    """transformers tells the places in characters by what it hands its tokenizer to mask."""
    from transformers.utils.chat_template_utils import render_jinja_template

    source = path.read_text(encoding="utf-8")
    for conversation in (CONVERSATIONS["thoughts in the text"], CONVERSATIONS["one question"]):
        theirs = outcome(
            lambda c=conversation: render_jinja_template(
                [c], chat_template=source, return_assistant_tokens_mask=True, **SPECIAL
            )
        )
        if theirs is None:  # such as one that takes parts of messages alone
            continue
        got = ChatTemplate(source, SPECIAL).render_spans(conversation)
        assert got == (theirs[0][0], [tuple(pair) for pair in theirs[1][0]])
