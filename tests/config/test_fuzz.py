"""Whatever a config.json holds, it is read or refused with the file's name, and nothing else."""

import json
import tempfile
import warnings
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_v3.config import NemotronV3Config
from tests.config import released

RELEASED = released.paths()
TEXTS = [path.read_text() for path in RELEASED]
KEYS = sorted({key for text in TEXTS for key in json.loads(text)})

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


def reads_or_refuses(text: str) -> None:
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(directory) / "config.json"
        path.write_bytes(text.encode(errors="surrogateescape"))
        before = path.read_bytes()
        try:
            config = NemotronV3Config.from_json(path)
        except ValueError as error:
            assert str(path) in str(error)
        else:
            config.to_json(path)
            assert path.read_bytes() == before


@settings(max_examples=200)
@given(
    st.sampled_from(TEXTS),
    st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=12), json_values, max_size=4),
)
def test_any_values(text, changes):
    reads_or_refuses(json.dumps(json.loads(text) | changes))


@settings(max_examples=200)
@given(st.sampled_from(TEXTS), st.data())
def test_damaged_text(text, data):
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 40)))
    junk = data.draw(st.text(st.characters(codec="utf-8"), max_size=5) | st.just("\udc80"))
    reads_or_refuses(text[:start] + junk + text[end:])


def test_every_truncation():
    text = TEXTS[0].rstrip()
    for length in range(0, len(text), 7):
        reads_or_refuses(text[:length])
