"""Moving a cache in time, between rows and to disk: exact, in any order."""

import copy
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_v3 import NemotronHybridCache, SequenceLayout
from tests.models import tiny_config, tiny_model, tokens

WINDOW = 4
MODEL = tiny_model("M*-M", chunk_size=8).eval()


class Shadow:
    """A cache beside the token lists it should stand for."""

    def __init__(self, cache: NemotronHybridCache, rows: list[list[int]]):
        self.cache, self.rows = cache, rows

    @classmethod
    def fresh(cls, rows: int) -> "Shadow":
        cache = NemotronHybridCache(MODEL.config, rows, rollback_window=WINDOW)
        return cls(cache, [[] for _ in range(rows)])

    @torch.no_grad()
    def feed(self, counts: list[int], rng: random.Random) -> None:
        new = [[rng.randrange(97) for _ in range(n)] for n in counts]
        flat = torch.tensor([token for row in new for token in row], dtype=torch.int64)
        layout = SequenceLayout.from_lengths(counts)
        MODEL(flat, layout=layout, past_key_values=self.cache)
        for row, more in zip(self.rows, new, strict=True):
            row.extend(more)

    @torch.no_grad()
    def check(self) -> None:
        """One more token a row has the logits of the whole row computed anew."""
        assert self.cache.lengths == tuple(map(len, self.rows))
        assert self.cache.positions.tolist() == list(map(len, self.rows))
        probe = copy.deepcopy(self.cache)
        token = torch.full((len(self.rows), 1), 5)
        measured = MODEL(token, past_key_values=probe).logits[:, 0]
        for row, logits in zip(self.rows, measured, strict=True):
            expected = MODEL(torch.tensor([[*row, 5]])).logits[0, -1]
            assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def reach(shadow: Shadow, row: int) -> int:
    """How far the row can be taken back for certain."""
    cache = shadow.cache
    return len(shadow.rows[row]) - cache._floors[row]


def act(shadow: Shadow, kind: str, rng: random.Random, tmp_path) -> Shadow:
    cache, rows = shadow.cache, shadow.rows
    if kind == "feed":
        counts = [rng.choice([0, 1, 1, 2, 5, 9]) for _ in rows]
        if sum(counts):
            shadow.feed(counts, rng)
    elif kind == "step":
        shadow.feed([1] * len(rows), rng)
    elif kind == "rollback":
        back = [rng.randint(0, reach(shadow, row)) for row in range(len(rows))]
        cache.rollback(back)
        shadow.rows = [row[: len(row) - n] for row, n in zip(rows, back, strict=True)]
    elif kind == "crop":
        length = max(len(row) - reach(shadow, i) for i, row in enumerate(rows))
        cache.crop(length)
        shadow.rows = [row[:length] for row in rows]
    elif kind == "snapshot":
        snapshot, before = cache.snapshot(), [list(row) for row in rows]
        shadow.feed([3] * len(rows), rng)
        cache.restore(snapshot)
        shadow.rows = before
        assert_same(cache.snapshot(), snapshot)
    elif kind == "repeat" and len(rows) < 4:
        return Shadow(cache.repeat(2), [list(row) for row in rows for _ in range(2)])
    elif kind == "select":
        order = [rng.randrange(len(rows)) for _ in range(rng.randint(1, 3))]
        return Shadow(cache.select(order), [list(rows[i]) for i in order])
    elif kind == "reorder":
        order = [rng.randrange(len(rows)) for _ in rows]
        cache.reorder_cache(torch.tensor(order))
        shadow.rows = [list(rows[i]) for i in order]
    elif kind == "split and cat":
        parts = cache.split()
        parts.reverse()
        return Shadow(NemotronHybridCache.cat(parts), [list(row) for row in reversed(rows)])
    elif kind == "clear":
        row = rng.randrange(len(rows))
        cache.clear(row)
        rows[row] = []
    elif kind == "disk":
        cache.save(tmp_path / "cache.safetensors")
        again = NemotronHybridCache(MODEL.config, len(rows), rollback_window=WINDOW)
        again.load(tmp_path / "cache.safetensors")
        assert_same(again.snapshot(), cache.snapshot())
        return Shadow(again, rows)
    return shadow


def assert_same(a, b) -> None:
    assert (a.lengths, a.floors) == (b.lengths, b.floors)
    for layer, state in a.states.items():
        for name, tensor in state.tensors().items():
            assert torch.equal(tensor, b.states[layer].tensors()[name])


KINDS = (
    "feed", "step", "rollback", "crop", "snapshot", "repeat", "select", "reorder",
    "split and cat", "clear", "disk",
)  # fmt: skip


@settings(max_examples=40)
@given(st.lists(st.sampled_from(KINDS), max_size=8), st.integers(1, 3), st.integers(0, 2**32))
def test_random_sequences_of_operations(tmp_path_factory, kinds, rows, seed):
    rng = random.Random(seed)
    folder = tmp_path_factory.mktemp("cache")
    shadow = Shadow.fresh(rows)
    shadow.feed([rng.randint(1, 12) for _ in range(rows)], rng)
    for kind in kinds:
        shadow = act(shadow, kind, rng, folder)
    shadow.check()


def test_a_rollback_is_bit_identical_to_never_having_gone_on():
    rng = random.Random(0)
    shadow = Shadow.fresh(2)
    shadow.feed([7, 3], rng)
    for _ in range(3):
        before = shadow.cache.snapshot()
        shadow.feed([1, 1], rng)
        shadow.cache.rollback(1)
        after = shadow.cache.snapshot()
        assert after.lengths == before.lengths
        for row, length in enumerate(after.lengths):
            for layer, state in after.states.items():
                then, now = (s.held(length).tensors() for s in (before.states[layer], state))
                for name in now.keys() - {"past_conv", "past_ssm"}:
                    assert torch.equal(now[name][row], then[name][row])
        shadow.feed([1, 1], rng)


def test_keys_go_back_any_distance_where_there_is_no_mamba():
    model = tiny_model("*-*")
    cache = NemotronHybridCache(model.config, 1)
    ids = tokens(1, 20)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        cache.crop(3)
        measured = model(ids[:, 3:5], past_key_values=cache).logits
    expected = model(ids[:, :5]).logits[:, 3:]
    assert (measured - expected).abs().max() <= 1e-5 * expected.abs().max()


# --- errors leave it as it was --------------------------------------------------------------------


def filled(**options) -> NemotronHybridCache:
    cache = NemotronHybridCache(MODEL.config, 2, **options)
    with torch.no_grad():
        MODEL(tokens(2, 10), past_key_values=cache)
    return cache


def refused(cache: NemotronHybridCache, action, error, message: str) -> None:
    before = cache.snapshot()
    with pytest.raises(error, match=message), torch.no_grad():
        action(cache)
    assert_same(cache.snapshot(), before)


OTHER = tiny_model("M*-M", ssm_state_size=8)
ERRORS = [
    (lambda c: c.rollback(3), "can be taken back 2 tokens, not 3"),
    (lambda c: c.rollback(11), "row 0 holds 10 tokens: 11"),
    (lambda c: c.rollback([1]), "1 amounts for 2 rows"),
    (lambda c: c.rollback(-1), "-1 cannot be taken back"),
    (lambda c: c.crop(-1), "length must be at least 0, got -1"),
    (lambda c: c.crop(4), "can be taken back 2 tokens, not 6"),
    (lambda c: c.clear(2), "row 2 is outside the cache's 2 rows"),
    (lambda c: c.select([2]), r"rows \[2\]"),
    (lambda c: c.select([]), r"rows \[\]"),
    (lambda c: c.repeat(0), "n must be at least 1, got 0"),
    (lambda c: c.reorder_cache(torch.tensor([0])), "beam_idx has shape"),
    (lambda c: c.restore(NemotronHybridCache(MODEL.config, 1).snapshot()), "snapshot has 1 rows"),
    (lambda c: MODEL(tokens(3, 1), past_key_values=c), "3 documents do not fit a cache of 2"),
    (lambda c: MODEL(tokens(2, 7), past_key_values=c), "row 0 holds 10 tokens and gets 7"),
    (lambda c: OTHER(tokens(2, 1), past_key_values=c), "another config"),
    (
        lambda c: copy.deepcopy(MODEL).bfloat16()(tokens(2, 1), past_key_values=c),
        "holds torch.float32, the model is torch.bfloat16",
    ),
    (lambda c: NemotronHybridCache.cat([c, filled()]), "cache 1 has max_length None"),
    (
        lambda c: MODEL.model.layers[1].mixer(
            torch.randn(2, 1, 48), torch.ones(2, 1, 1, 12), past_key_values=c, layer_idx=1
        ),
        r"shape \(2, 1, 1, 12\): behind 10 tokens of the cache, 1 new ones need \(2, 1, 1, 11\)",
    ),
    (lambda c: MODEL.model.layers[1].mixer(torch.randn(2, 1, 48), past_key_values=c), "layer None"),
]


@pytest.mark.parametrize(("action", "message"), ERRORS, ids=[message for _, message in ERRORS])
def test_errors_leave_the_cache_as_it_was(action, message):
    refused(filled(max_length=16, rollback_window=2), action, ValueError, message)


def test_what_cannot_be_made_is_refused():
    for options, message in [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"batch_size": 1, "max_length": 0}, "max_length must be at least 1"),
        ({"batch_size": 1, "rollback_window": -1}, "rollback_window must be at least 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            NemotronHybridCache(tiny_config(), **options)


@pytest.mark.parametrize(
    "place", ["layers.0.mixer.out_proj", "layers.2", "layers.3.mixer.out_proj"]
)
def test_a_pass_that_failed_half_way_is_noticed_and_a_snapshot_mends_it(place):
    """In the last layer with a state as well, where every layer has begun its step."""
    cache = filled()
    snapshot = cache.snapshot()
    module = MODEL.model.get_submodule(place)
    module.forward = lambda *a, **k: 1 / 0
    try:
        with pytest.raises(ZeroDivisionError), torch.no_grad():
            MODEL(tokens(2, 1), past_key_values=cache)
    finally:
        del module.forward
    uses = [
        lambda: MODEL(tokens(2, 1), past_key_values=cache),
        lambda: MODEL.model.layers[0].mixer(torch.randn(2, 1, 48), past_key_values=cache),
        lambda: cache.rollback(1),
        cache.snapshot,
        cache.detach,
        lambda: cache.select([0]),
        lambda: cache.crop(1),
        lambda: cache.clear(0),
        lambda: cache.reorder_cache(torch.tensor([1, 0])),
        lambda: cache.to("meta"),
        lambda: copy.copy(cache),
        lambda: NemotronHybridCache.cat([cache]),
        lambda: cache.update(*(torch.ones(2, 2, 1, 20),) * 2, 1),
        lambda: cache.update_conv_state(0, cache.conv_states[0]),
        lambda: cache.conv_states.update({0: cache.conv_states[0]}),
        lambda: cache.ssm_states.update({0: cache.ssm_states[0]}),
    ]
    assert cache.get_seq_length() == 11 and cache.key_cache[1].isfinite().all()
    for use in uses:
        with pytest.raises(RuntimeError, match="a forward pass failed half-way"), torch.no_grad():
            use()
    cache.restore(snapshot)
    assert_same(cache.snapshot(), snapshot)
    assert torch.isfinite(MODEL(tokens(2, 1), past_key_values=cache).logits).all()


@pytest.mark.parametrize("block", range(4))
def test_what_is_refused_before_the_first_layer_does_not_withhold_the_cache(block):
    """Of a block behind layers with a state as well."""
    cache = filled()
    before = cache.snapshot()
    MODEL.gradient_checkpointing_enable(blocks=[block])
    try:
        with pytest.raises(ValueError, match="cannot be recomputed"):
            MODEL(tokens(2, 1), past_key_values=cache)
    finally:
        MODEL.gradient_checkpointing_disable()
    assert_same(cache.snapshot(), before)


# --- modes of autograd --------------------------------------------------------------------------


def probe(cache):
    """Logits of one more token a row."""
    return MODEL(torch.full((cache.batch_size, 1), 5), past_key_values=cache).logits


MADE_IN_INFERENCE_MODE = {
    "used": lambda cache: cache,
    "snapshot restored": lambda cache: (cache.restore(cache.snapshot()), cache)[1],
    "repeat": lambda cache: cache.repeat(2),
    "select": lambda cache: cache.select([1, 0]),
    "cat": lambda cache: NemotronHybridCache.cat([cache, cache]),
    "reordered": lambda cache: (cache.reorder_cache(torch.tensor([1, 0])), cache)[1],
}


@pytest.mark.parametrize("name", MADE_IN_INFERENCE_MODE)
def test_a_cache_from_inference_mode_goes_on_outside_of_it(name):
    def made():
        cache = NemotronHybridCache(MODEL.config, 2, rollback_window=2)
        MODEL(tokens(2, 70), past_key_values=cache)  # past the first growth of the buffers
        return MADE_IN_INFERENCE_MODE[name](cache)

    with torch.inference_mode():
        cache = made()
    with torch.no_grad():
        expected = made()
        assert torch.equal(probe(cache), probe(expected))
        cache.rollback(1)
        expected.rollback(1)
    assert torch.equal(probe(cache), probe(expected))
    gradients = []
    for each in (cache, expected):
        MODEL.zero_grad()
        probe(each).sum().backward()
        gradients.append([p.grad.clone() for p in MODEL.parameters()])
    MODEL.zero_grad()
    assert all(map(torch.equal, *gradients)) and any(g.any() for g in gradients[0])


WITHOUT_GRADIENTS = {
    "decode": lambda cache: probe(cache),
    "prefill": lambda cache: MODEL(tokens(2, 3), past_key_values=cache),
    "rollback": lambda cache: cache.rollback([1, 0]),
    "clear": lambda cache: cache.clear(0),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "restore": lambda cache: cache.restore(filled(rollback_window=2).snapshot()),
}


@pytest.mark.parametrize("name", WITHOUT_GRADIENTS)
def test_what_goes_on_without_gradients_leaves_the_graph_before_it_alone(name):
    """The loss of earlier tokens still has its gradients; that of later ones ends at the cut."""

    def gradients(between):
        MODEL.zero_grad()
        cache = NemotronHybridCache(MODEL.config, 2, rollback_window=2)
        loss = MODEL(tokens(2, 9), past_key_values=cache).logits.square().sum()
        loss = loss + probe(cache).square().sum()
        with torch.no_grad():
            between(cache)
        loss.backward()
        found = [p.grad.clone() for p in MODEL.parameters()]
        MODEL.zero_grad()
        return found, cache

    expected, _ = gradients(lambda cache: None)
    found, cache = gradients(WITHOUT_GRADIENTS[name])
    assert all(map(torch.equal, found, expected))
    held = [t for state in cache.states.values() for t in state.tensors().values()]
    assert not any(t.requires_grad for t in held)
    probe(cache).sum().backward()
    MODEL.zero_grad()


def test_files_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "cache.safetensors"
    filled().save(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # nothing temporary stays
    whole = path.read_bytes()
    refused(
        filled(), lambda c: NemotronHybridCache(MODEL.config, 3).load(path), ValueError, "2 rows"
    )
    bf16 = NemotronHybridCache(MODEL.config, 2, torch.bfloat16)
    refused(bf16, lambda c: c.load(path), ValueError, "with dtype float32, not bfloat16")
    small = NemotronHybridCache(MODEL.config, 2, max_length=9)
    refused(small, lambda c: c.load(path), ValueError, "more than the cache's max_length 9")
    other = NemotronHybridCache(OTHER.config, 2)
    refused(other, lambda c: c.load(path), ValueError, "holds a cache with config")
    path.write_bytes(whole[:-100])
    refused(filled(), lambda c: c.load(path), ValueError, "no whole safetensors file")
    torch.save({}, path)
    refused(filled(), lambda c: c.load(path), ValueError, "no whole safetensors file")


def test_a_device_by_another_name_is_the_same_device():
    """A second cache over the same tensors would move on with the first."""
    cache = filled()
    assert cache.to("cpu:0") is cache.to(torch.device("cpu")) is cache


def test_the_documented_update_methods():
    config = tiny_config("M*")
    cache = NemotronHybridCache(config, 2)
    k = torch.randn(2, 2, 3, 20)
    keys, values = cache.update(k, 2 * k, layer_idx=1)
    assert torch.equal(keys, k) and torch.equal(values, 2 * k)
    keys, _ = cache.update(k[:, :, :1], k[:, :, :1], layer_idx=1)
    assert torch.equal(keys, torch.cat([k, k[:, :, :1]], 2))
    assert cache.get_seq_length() == 4
    state = torch.randn(2, config.conv_dim, 4)
    assert torch.equal(cache.update_conv_state(0, state), state)
    column = torch.randn(2, config.conv_dim)
    pushed = cache.update_conv_state(0, column)
    assert torch.equal(pushed, torch.cat([state[..., 1:], column[..., None]], -1))
