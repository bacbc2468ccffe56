"""An interrupt at any line or tensor operation leaves a cache as it was, or withheld.

Each operation is run again and again, stopped at its first line of the package, its second, and so
on, until it comes through; then the same at each of its tensor operations.
"""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import nemotron_v3
from nemotron_v3 import NemotronHybridCache
from tests.models import tiny_model, tokens

PACKAGE = Path(nemotron_v3.__file__).parent
STATEFUL = ("cache", "layers", "model")  # rooms: whatever lies in them can leave a cache half done
FILES = {str(path) for room in STATEFUL for path in (PACKAGE / room).rglob("*.py")}
MODEL = tiny_model("M*", chunk_size=8).requires_grad_(False)
TRAINED = tiny_model("M*", chunk_size=8)


class AtLine:
    """Raises KeyboardInterrupt in place of the n-th line that is run of `FILES`."""

    def __init__(self, n: int):
        self.left = n

    def __enter__(self):
        self.outer = sys.gettrace()
        sys.settrace(self.call)

    def __exit__(self, *_):
        sys.settrace(self.outer)

    def call(self, frame, event, argument):
        return self.line if frame.f_code.co_filename in FILES else None

    def line(self, frame, event, argument):
        if event == "line":
            if self.left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
            self.left -= 1
        return self.line


class AtOperation(TorchDispatchMode):
    """Raises KeyboardInterrupt in place of the n-th tensor operation."""

    def __init__(self, n: int):
        super().__init__()
        self.left = n

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return function(*args, **kwargs or {})


class WithoutMemory(TorchDispatchMode):
    """Raises MemoryError in place of the n-th tensor operation that makes a new tensor."""

    def __init__(self, n: int):
        super().__init__()
        self.left = n

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(made.alias_info is None for made in function._schema.returns):
            if self.left == 0:
                raise MemoryError
            self.left -= 1
        return function(*args, **kwargs or {})


def filled(model=MODEL, **options) -> NemotronHybridCache:
    cache = NemotronHybridCache(model.config, 2, rollback_window=2, **options)
    mask = torch.ones(2, 7)
    mask[1, :3] = 0
    model(tokens(2, 7), mask, past_key_values=cache)
    return cache


def content(cache: NemotronHybridCache) -> list[torch.Tensor]:
    """All that the cache holds, without a look at whether it lets itself be used."""
    told = [list(cache.lengths), cache._floors, sorted(cache._behind), cache.positions.tolist()]
    longest = max(cache.lengths)
    held = [t for s in cache.states.values() for t in s.held(longest).tensors().values()]
    return [torch.tensor([len(part), *part]) for part in told] + [t.detach().clone() for t in held]


def same(a, b) -> bool:
    return all(map(torch.equal, a, b))


LONGER = NemotronHybridCache(MODEL.config, 2, rollback_window=2)
with torch.no_grad():
    MODEL(tokens(2, 90, seed=3), past_key_values=LONGER)  # more than the first buffer has room for
SNAPSHOT = LONGER.snapshot()


def step(length: int, model=MODEL, **options):
    def run(cache, path):
        model(tokens(2, length, seed=5), past_key_values=cache, **options)

    return run


def layer(number: int, length: int = 2):
    def run(cache, path):
        x = torch.ones(2, length, 48)
        MODEL.model.layers[number](x, past_key_values=cache)

    return run


def update(cache, path):
    keys = torch.ones(2, 2, 3, 20)
    cache.update(keys, keys, 1)


OPERATIONS = {
    "restore": lambda cache, path: cache.restore(SNAPSHOT),
    "load": lambda cache, path: cache.load(path),
    "rollback": lambda cache, path: cache.rollback([2, 1]),
    "rollback of all": lambda cache, path: cache.rollback([7, 0]),
    "crop": lambda cache, path: cache.crop(6),
    "clear": lambda cache, path: cache.clear(1),
    "reorder": lambda cache, path: cache.reorder_cache(torch.tensor([1, 0])),
    "detach": lambda cache, path: cache.detach(),
    "finish": lambda cache, path: cache.finish(),
    "select": lambda cache, path: cache.select([1]),
    "repeat": lambda cache, path: cache.repeat(2),
    "split": lambda cache, path: cache.split(),
    "cat": lambda cache, path: NemotronHybridCache.cat([cache, cache]),
    "snapshot": lambda cache, path: cache.snapshot(),
    "save": lambda cache, path: cache.save(path.with_name("new")),
    "update": update,
}
STEPS = {
    "decode": step(1),
    "with labels": step(2, labels=tokens(2, 2)),
    "a mamba block": layer(0),
    "an attention block": layer(1, length=60),  # more than the buffer has room for
}
GRAPH = {
    "restore": OPERATIONS["restore"],
    "rollback": OPERATIONS["rollback"],
    "reorder": OPERATIONS["reorder"],
    "detach": OPERATIONS["detach"],
}


def stop_everywhere(operation, made, path, way) -> int:
    """How many times it was stopped before it came through."""
    stopped = 0
    while True:
        cache = copy.copy(made)
        cache.states = {i: s.map(lambda t: t + 0) for i, s in made.states.items()}
        cache.positions = made.positions.clone()
        cache._updated = set(made._updated)
        before, snapshot = content(cache), cache.snapshot() if made._step is None else None
        try:
            with way(stopped):
                operation(cache, path)
        except KeyboardInterrupt:
            stopped += 1
        else:
            assert cache.withheld is None
            return stopped
        finally:
            sys.settrace(None)
        if cache.withheld is None:
            assert same(content(cache), before), f"stopped at {stopped - 1}"
            cache.snapshot()  # it is not in the middle of anything either
        if snapshot is not None:
            cache.restore(snapshot)
            assert cache.withheld is None and same(content(cache), before)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("cache") / "cache"
    LONGER.save(path)
    return path


# safetensors reads no file under a dispatch mode; what `load` does then is `restore`.
WAYS = [
    (n, w) for n in OPERATIONS for w in (AtLine, AtOperation) if (n, w) != ("load", AtOperation)
]


@pytest.mark.parametrize(("name", "way"), WAYS)
@torch.no_grad()
def test_an_interrupt_at_any_point(name, way, path):
    stopped = stop_everywhere(OPERATIONS[name], filled(), path, way)
    assert stopped >= (5 if way is AtLine and name != "finish" else 0)
    if name == "save":
        assert [p.name for p in path.parent.iterdir() if p.name.startswith(".")] == []


ASK_FIRST = ["restore", "rollback", "rollback of all", "crop", "clear", "reorder"]


@pytest.mark.parametrize("name", ASK_FIRST)
@torch.no_grad()
def test_want_of_memory_leaves_the_cache_as_it_was(name, path):
    cache, asked = filled(), 0
    before = content(cache)
    while True:
        try:
            with WithoutMemory(asked):
                OPERATIONS[name](cache, path)
            break
        except MemoryError:
            asked += 1
        assert cache.withheld is None and same(content(cache), before), f"at {asked - 1}"
    assert asked >= 2 and cache.withheld is None


@pytest.mark.parametrize("name", STEPS)
@torch.no_grad()
def test_an_interrupt_at_any_line_of_a_step(name, path):
    assert stop_everywhere(STEPS[name], filled(), path, AtLine) >= 20


def test_an_interrupt_at_any_line_of_a_step_with_a_graph(path):
    assert stop_everywhere(step(1, TRAINED), filled(TRAINED), path, AtLine) >= 20


@pytest.mark.parametrize("way", [AtLine, AtOperation])
@pytest.mark.parametrize("name", GRAPH)
def test_an_interrupt_where_the_cache_has_a_graph(name, way, path):
    assert stop_everywhere(GRAPH[name], filled(TRAINED), path, way) >= 2


@pytest.mark.parametrize("way", [AtLine, AtOperation])
def test_an_interrupt_while_the_positions_move_on(way):
    """Of a pass whose layers were called one by one, which nobody has finished yet."""
    stopped = 0
    while True:
        cache = filled()
        with torch.no_grad():
            for block in MODEL.model.layers:
                block(torch.ones(2, 3, 48), past_key_values=cache)
        try:
            with way(stopped):
                cache.finish()
            break
        except KeyboardInterrupt:
            stopped += 1
        sys.settrace(None)
        if cache.withheld is None:
            cache.finish()
            assert cache.lengths == (10, 7) and cache.positions.tolist() == [10, 7]
    assert stopped >= 1
