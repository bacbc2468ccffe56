"""A sequence in segments in time: its loss and every gradient are those of the whole."""

import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nemotron_v3 import NemotronV3ForCausalLM, SequenceLayout
from nemotron_v3.layers.moe.load_balancing import BalanceLoss, ExpertLoad
from nemotron_v3.layers.moe.routing_replay import record_routing, replay_routing
from nemotron_v3.model.segmented import segmented
from tests.models import labels_of, tiny_model, tokens

EXACT = 1e-12  # of each gradient's largest entry, in fp64
PADDING = torch.tensor([[0] * 7 + [1] * 13, [1] * 20, [1] * 15 + [0] * 5])
# Documents of one token, shorter than the convolution, empty, over more than three segments; a
# segment that ends one document and begins the next.
PACK = (1, 1, 2, 0, 33, 1, 3, 17)


@pytest.fixture(scope="module")
def model() -> NemotronV3ForCausalLM:
    return tiny_model("ME*-M*E").double().train()


def taken(model: nn.Module) -> dict[str, Tensor]:
    """The gradients, which are gone afterwards."""
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def whole(model: NemotronV3ForCausalLM, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), taken(model)


def same(found: dict[str, Tensor], wanted: dict[str, Tensor], allowed: float = EXACT) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        error = (found[name] - gradient).abs().max() / gradient.abs().max()
        assert error <= allowed, f"{name}: {error:.1e}"


def batch_of(*shape: int, **where: Any) -> dict[str, Any]:
    ids = tokens(*shape)
    mask = where.get("attention_mask")
    return {"input_ids": ids, "labels": ids if mask is None else labels_of(ids, mask), **where}


@pytest.mark.parametrize("states", ["device", "host"])
@pytest.mark.parametrize(
    ("batch", "size"),
    [
        pytest.param(batch_of(41), 7, id="one-document"),
        pytest.param(batch_of(13), 2, id="below-the-convolution"),
        pytest.param(batch_of(20), 64, id="one-segment"),
        pytest.param(batch_of(3, 20, attention_mask=PADDING), 9, id="padded"),
        pytest.param(batch_of(58, layout=SequenceLayout.from_lengths(PACK)), 10, id="pack"),
    ],
)
def test_every_gradient_is_that_of_the_whole_sequence(model, batch, size, states):
    loss, wanted = whole(model, batch)
    long = segmented(model, size, states=states)
    found = long.backward(**batch)
    torch.testing.assert_close(found, loss, rtol=EXACT, atol=0)
    same(taken(model), wanted)
    torch.testing.assert_close(long.loss(**batch), loss, rtol=EXACT, atol=0)


def test_no_token_at_all_has_a_loss_of_zero(model):
    batch = batch_of(0, layout=SequenceLayout.from_lengths([0]))
    loss, wanted = whole(model, batch)
    assert segmented(model, 4).backward(**batch) == loss == 0
    assert taken(model).keys() == wanted.keys()


def test_gradients_are_added_to_those_that_are_there(model):
    parts, items = [batch_of(30), batch_of(25)], 53
    for batch in parts:
        model(**batch, num_items_in_batch=items).loss.backward()
    wanted = taken(model)
    for batch in parts:
        segmented(model, 8).backward(**batch, num_items_in_batch=items)
    same(taken(model), wanted)


def test_checkpointing_acts_within_a_segment(model):
    batch = batch_of(58, layout=SequenceLayout.from_lengths(PACK))
    _, wanted = whole(model, batch)
    model.gradient_checkpointing_enable()
    try:
        segmented(model, 10).backward(**batch)
    finally:
        model.gradient_checkpointing_disable()
    same(taken(model), wanted)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_balance_loss_is_that_of_whole_documents(model, checkpointing):
    batch = batch_of(58, layout=SequenceLayout.from_lengths(PACK))
    with BalanceLoss(model, 0.5) as balance:
        loss = model(**batch).loss
        term = balance.take()
        (loss + term).backward()
        wanted = taken(model)
        if checkpointing:
            model.gradient_checkpointing_enable()
        try:
            segmented(model, 10).backward(**batch, balance=balance)
        finally:
            model.gradient_checkpointing_disable()
        same(taken(model), wanted)
        torch.testing.assert_close(balance.take(), term.detach(), rtol=EXACT, atol=0)
        assert balance.take() == 0


def test_tokens_are_counted_once(model):
    batch = batch_of(41)
    with ExpertLoad(model) as load:
        whole(model, batch)
        wanted = {name: counts.clone() for name, counts in load.counts.items()}
        load.reset()
        segmented(model, 7).backward(**batch)
        taken(model)
        assert all(torch.equal(load.counts[name], counts) for name, counts in wanted.items())


def test_the_second_pass_sends_tokens_where_the_first_did(model, monkeypatch):
    """Even where the scores lie so close that rounding would decide otherwise."""
    batch, size = batch_of(30), 10
    with record_routing(model) as record:
        _, wanted = whole(model, batch)
    cut = {
        name: [part for call in calls for part in call.split(size)]
        for name, calls in record.indices.items()
    }
    router = model.model.layers[1].mixer.gate
    first_choice, calls = router._by_scores, []

    def undecided(x: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(len(x))
        weights, indices = first_choice(x)
        return (weights, indices) if len(calls) <= 3 else (weights, (indices + 1) % 8)

    monkeypatch.setattr(router, "_by_scores", undecided)
    segmented(model, size).backward(**batch)
    assert calls == [size] * 3
    same(taken(model), wanted)
    monkeypatch.undo()
    with replay_routing(model, cut):  # the caller's own replay, a call a segment
        segmented(model, size).backward(**batch)
    same(taken(model), wanted)


def test_adapters_train_alone(model):
    batch = batch_of(41)
    trained = {n for n, _ in model.named_parameters() if ".q_proj." in n or ".in_proj." in n}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    try:
        _, wanted = whole(model, batch)
        assert wanted.keys() == trained
        segmented(model, 7).backward(**batch)
        same(taken(model), wanted)
    finally:
        model.requires_grad_(True)


def test_narrow_gradients_are_added_up_in_fp32():
    narrow = tiny_model("M*").bfloat16().train()
    batch = batch_of(64)
    _, wanted = whole(tiny_model("M*").bfloat16().double().train(), batch)
    _, plain = whole(narrow, batch)
    segmented(narrow, 4).backward(**batch)
    for name, gradient in taken(narrow).items():
        assert gradient.dtype == plain[name].dtype
        error, of_plain = (
            float((g.double() - wanted[name]).norm() / wanted[name].norm())
            for g in (gradient, plain[name])
        )
        assert error <= 2 * of_plain + 2**-8, name


# --- what is refused ------------------------------------------------------------------------------


def dropping(model: NemotronV3ForCausalLM) -> Any:
    attention = model.model.layers[2].mixer
    attention.attention_dropout = 0.1

    class Undo(nullcontext):
        def __exit__(self, *_: Any) -> None:
            attention.attention_dropout = 0.0

    return Undo()


def hooked(model: NemotronV3ForCausalLM) -> Any:
    handle = model.lm_head.weight.register_post_accumulate_grad_hook(lambda p: None)

    class Undo(nullcontext):
        def __exit__(self, *_: Any) -> None:
            handle.remove()

    return Undo()


REFUSED: dict[str, tuple[Callable[[NemotronV3ForCausalLM], Any], dict[str, Any], str]] = {
    "no labels": (lambda m: nullcontext(), {"labels": None}, "labels are missing"),
    "shape of labels": (lambda m: nullcontext(), {"labels": tokens(19)}, "one a token"),
    "unknown": (lambda m: nullcontext(), {"attn_mask": None}, "attn_mask"),
    "dropout": (dropping, {}, "attention_dropout is 0.1"),
    "hook": (hooked, {}, "once a segment"),
    "balance": (lambda m: BalanceLoss(m, 0.1), {}, "balance="),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exact_is_refused_and_nothing_changed(model, case):
    around, changes, message = REFUSED[case]
    model.zero_grad()
    with around(model), pytest.raises((ValueError, TypeError), match=message):
        segmented(model, 7).backward(**(batch_of(20) | changes))
    assert not taken(model)


def test_an_error_on_the_way_leaves_the_gradients_that_were_there(model, monkeypatch):
    batch = batch_of(20)
    _, wanted = whole(model, batch)
    for name, parameter in model.named_parameters():
        parameter.grad = wanted[name].clone()
    norm = model.model.norm_f
    left = iter([norm.forward] * 4)  # of three segments, the second one backwards stops

    def stops(x: Tensor) -> Tensor:
        forward = next(left, None)
        if forward is None:
            raise KeyboardInterrupt
        return forward(x)

    monkeypatch.setattr(norm, "forward", stops)
    with pytest.raises(KeyboardInterrupt):
        segmented(model, 7).backward(**batch)
    same(taken(model), wanted, allowed=0)


@pytest.mark.parametrize("tokens_per_segment", [0, -1, 2.0, True])
def test_a_segment_has_a_number_of_tokens(model, tokens_per_segment):
    with pytest.raises(ValueError, match="tokens_per_segment is"):
        segmented(model, tokens_per_segment)


def test_segments_need_the_model_itself(model):
    with pytest.raises(TypeError, match="without what is wrapped around it"):
        segmented(nn.Sequential(model), 7)
    with pytest.raises(ValueError, match="'device' or the 'host'"):
        segmented(model, 7, states="disk")


# --- memory ---------------------------------------------------------------------------------------

UNDER_A_LIMIT = """
import resource
import sys

import torch

from nemotron_v3.model.segmented import segmented
from tests.models import tiny_model, tokens

how, room = sys.argv[1], int(sys.argv[2]) * 2**20
torch.set_num_threads(1)
model = tiny_model("ME*-M").train()


def whole(ids):
    model.gradient_checkpointing_enable()
    loss = model(ids, labels=ids).loss
    loss.backward()
    model.gradient_checkpointing_disable()
    return loss


ways = {"whole": whole, "segments": lambda ids: segmented(model, 256).backward(ids, labels=ids)}
for way in ways.values():  # what is loaded at first use is loaded
    way(tokens(300))
with open("/proc/self/status") as status:
    held = next(int(line.split()[1]) for line in status if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (held * 1024 + room,) * 2)
try:
    print("loss", float(ways[how](tokens(6144))))
except (MemoryError, RuntimeError) as error:  # each library has its own words
    print("stopped:", error)
"""


@pytest.mark.heavy
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_sequence_trains_in_segments_under_a_limit_that_the_whole_does_not_fit():
    """Checkpointing of every block needs more than 40 MiB for 6144 tokens; segments do not."""

    def run(how: str, room: int) -> str:
        command = [sys.executable, "-c", UNDER_A_LIMIT, how, str(room)]
        root = Path(__file__).parents[2]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    loss = run("whole", 4096)
    assert loss.startswith("loss ")
    assert run("whole", 40).startswith("stopped:")
    assert float(run("segments", 40).split()[1]) == pytest.approx(float(loss.split()[1]), rel=1e-6)
