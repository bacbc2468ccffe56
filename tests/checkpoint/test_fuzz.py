"""10,000 damaged headers, indices and configs: each loads, or is refused with one clear error."""

import json
import random
import resource
import signal
import time
import warnings
from pathlib import Path

import pytest
from safetensors.torch import save

from nemotron_v3.checkpoint import CheckpointError, from_pretrained, open_checkpoint
from tests.checkpoint.files import released_tensors, write_checkpoint
from tests.models import tiny_config

HEADERS, INDICES, CONFIGS = 5000, 2500, 2500
SECONDS_A_CASE = 10
MIB_IN_ALL = 300

CONFIG = tiny_config("ME*-", n_routed_experts=3, n_group=1, num_experts_per_tok=2)
INDEX = "model.safetensors.index.json"
NUMBERS = [0, -1, 1, 3, 2**31, 2**62, 2**63, 2**64, 10**30, 1.5, 1e308, float("inf"), float("nan")]
VALUES = [*NUMBERS, None, True, "", "x", "../x", "F32", "BF16", "bfloat16", "moe", "MEMEM*", [], {},
          [0, 8], [-1], [[]], ["mamba"], {"__float__": "Infinity"}, "a" * 1000]  # fmt: skip
TOKENS = [b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\\u0000", b"NaN", b"1e999", b"-",
          b"\x00", b"\xff", b"null", b'"__metadata__":', b"9" * 40]  # fmt: skip


grown: list[float] = []  # by how many MiB each case raised this process's peak


class Hang(BaseException):
    """Not an Exception, so that nothing swallows it."""


@pytest.fixture(autouse=True)
def watched(tmp_path_factory):
    """No case may take long, nor all of them much memory beyond that of an intact load."""
    intact = tmp_path_factory.mktemp("intact")
    from_pretrained(write_checkpoint(intact, released_tensors(CONFIG), CONFIG))

    def ring(number, frame):
        raise Hang(f"a case took more than {SECONDS_A_CASE} s")

    previous = signal.signal(signal.SIGALRM, ring)
    grown.clear()
    yield
    signal.signal(signal.SIGALRM, previous)
    assert sum(grown) < MIB_IN_ALL


def damage_bytes(raw: bytes, chance: random.Random) -> bytes:
    raw = bytearray(raw)
    for _ in range(chance.choice([1, 1, 1, 2, 5, 20])):
        at = chance.randrange(len(raw) + 1)
        match chance.randrange(5):
            case 0:
                raw[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                del raw[at : at + chance.choice([1, 2, 10, 1000])]
            case 2:
                raw[at:at] = chance.choice(TOKENS) * chance.choice([1, 1, 3, 3000])
            case 3:
                start = chance.randrange(len(raw) + 1)
                raw[at:at] = raw[start : start + chance.choice([1, 20, 200])]
            case 4:
                digits = [k for k, byte in enumerate(raw) if 48 <= byte < 58]
                if digits:
                    raw[chance.choice(digits)] = chance.choice(b"0123456789")
    return bytes(raw)


def damage_value(value, chance: random.Random):
    """One change somewhere inside a JSON value."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        changed = dict(value)
        match chance.randrange(6):
            case 0:
                del changed[key]
            case 1:
                changed[key + chance.choice(["s", "_", "x" * 50])] = changed.pop(key)
            case 2:
                changed[chance.choice(["more", "", "__metadata__"])] = chance.choice(VALUES)
            case _:
                changed[key] = damage_value(value[key], chance)
        return changed
    if isinstance(value, list) and value and chance.random() < 0.7:
        at = chance.randrange(len(value))
        return [*value[:at], damage_value(value[at], chance), *value[at + 1 :]]
    if isinstance(value, int | float) and chance.random() < 0.5:
        return value + chance.choice([-1, 1, 8, 2**40])
    if isinstance(value, list | str) and chance.random() < 0.2:
        return value * chance.choice([2, 5000])
    return chance.choice(VALUES)


def damage_json(text: str, chance: random.Random) -> bytes:
    if chance.random() < 0.5:
        return damage_bytes(text.encode(), chance)
    value = json.loads(text)
    for _ in range(chance.choice([1, 1, 2, 4])):
        value = damage_value(value, chance)
    return json.dumps(value).encode()


def loads(action) -> bool:
    """Whether a damaged checkpoint still loads; if not, its error is checked."""
    before = peak_mib()
    signal.alarm(SECONDS_A_CASE)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            action()
    except CheckpointError as error:
        text = str(error)
        assert 10 < len(text) < 100_000
        assert text.isprintable() or "\n" in text
        return False
    finally:
        signal.alarm(0)
        grown.append(peak_mib() - before)
    return True


def exchange(path: Path, content: bytes) -> None:
    path.unlink()  # quicker than to truncate, where the file system syncs at that
    path.write_bytes(content)


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def test_damaged_headers(tmp_path):
    chance = random.Random(1)
    content = save(released_tensors(CONFIG), metadata={"format": "pt"})
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    directory = write_checkpoint(tmp_path, released_tensors(CONFIG), CONFIG)
    survivors = 0
    for _ in range(HEADERS):
        damaged = damage_json(header.decode(), chance)
        told = len(damaged)
        if chance.random() < 0.1:
            told = chance.choice([0, 1, told - 1, told + 1, 2**31, 2**62, 2**64 - 1])
        cut = chance.choice([len(data)] * 8 + [0, len(data) - 1])
        content = told.to_bytes(8, "little") + damaged + data[:cut]
        exchange(directory / "model.safetensors", content)
        survivors += loads(lambda: from_pretrained(directory))
    assert survivors < HEADERS / 4


def test_damaged_indices(tmp_path):
    chance = random.Random(2)
    directory = write_checkpoint(tmp_path, released_tensors(CONFIG), CONFIG, shards=3)
    index = (directory / INDEX).read_text()
    survivors = 0
    for _ in range(INDICES):
        exchange(directory / INDEX, damage_json(index, chance))
        survivors += loads(lambda: open_checkpoint(directory))
    assert 0 < survivors < INDICES / 2


def test_damaged_configs(tmp_path):
    chance = random.Random(3)
    directory = write_checkpoint(tmp_path, released_tensors(CONFIG), CONFIG)
    config = (directory / "config.json").read_text()
    survivors = 0
    for _ in range(CONFIGS):
        exchange(directory / "config.json", damage_json(config, chance))
        survivors += loads(lambda: from_pretrained(directory))
    assert 0 < survivors < CONFIGS / 2


@pytest.mark.parametrize(
    "bomb",
    [
        b"[" * 10_000_000,
        b'{"a":' * 2_000_000,
        b'{"hybrid_override_pattern": "' + b"M" * 30_000_000 + b'"}',
        b'{"layers_block_type": [' + b'"mamba",' * 100_000 + b'"mamba"]}',
        b"{" + b",".join(b'"k%d":0' % k for k in range(80_000)) + b"}",
    ],
    ids=["brackets", "nesting", "pattern", "layers", "keys"],
)
@pytest.mark.parametrize("file", ["config.json", INDEX, "model.safetensors"])
def test_bombs(tmp_path, file, bomb):
    shards = 3 if file == INDEX else 1
    directory = write_checkpoint(tmp_path, released_tensors(CONFIG), CONFIG, shards=shards)
    head = len(bomb).to_bytes(8, "little") if file == "model.safetensors" else b""
    (directory / file).write_bytes(head + bomb)
    started = time.monotonic()
    assert not loads(lambda: from_pretrained(directory))
    assert time.monotonic() - started < 5
