"""What a cache holds when a stream is left, and in which modes of autograd it can go on."""

import contextlib
import copy

import pytest
import torch

from nemotron_v3.cache import NemotronHybridCache
from nemotron_v3.generation import engine, generate, stream
from tests.generation.samples import prompts
from tests.generation.test_engine import rows_that_end
from tests.models import tiny_model, tokens

NO_EOS = {"eos_token_id": []}


@pytest.fixture(scope="module", params=["lean step", "forward"])
def model(request):
    """Decoding by `DecodeStep`, and by the model's forward."""
    model = tiny_model("ME*-M").eval()
    if request.param == "forward":
        model.model.norm_f.register_forward_hook(lambda module, inputs, output: output)
    return model


class Left:
    """A stream that is left after `count` tokens, and what it had yielded by then."""

    def __init__(self, model, rows, count, way, **options):
        self.cache = NemotronHybridCache(model.config, len(rows))
        self.rows = [row.tolist() for row in rows]
        self.prompt_lengths = [len(row) for row in rows]
        tokens = stream(model, rows, past_key_values=self.cache, **options)
        with contextlib.suppress(ZeroDivisionError):
            self._take(tokens, count, way)
        if way == "close":
            tokens.close()
        del tokens

    def _take(self, tokens, count, way):
        for number, token in enumerate(tokens, 1):
            self.rows[token.row].append(token.token_id)
            if number == count:
                if way == "exception":
                    raise ZeroDivisionError
                break

    @property
    def new(self):
        return [len(row) - n for row, n in zip(self.rows, self.prompt_lengths, strict=True)]


def assert_holds(model, cache, rows):
    """One more token a row has the logits of what `rows` say the cache holds, computed anew."""
    assert cache.lengths == tuple(map(len, rows))
    assert cache.positions.tolist() == list(map(len, rows))
    with torch.no_grad():
        logits = model(torch.full((len(rows), 1), 5), past_key_values=cache).logits[:, 0]
        for row, its in zip(rows, logits, strict=True):
            expected = model(torch.tensor([[*row, 5]])).logits[0, -1]
            assert (its - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("way", ["break", "close", "exception"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_one_row_left_early_goes_on_as_if_it_had_not_been(model, count, way):
    prompt = tokens(7)
    left = Left(model, [prompt], count, way, max_new_tokens=9, **NO_EOS)
    assert left.cache.lengths == (7 + count - 1,)
    whole = generate(model, prompt, max_new_tokens=9, **NO_EOS).sequences
    assert left.rows[0] == whole[0, : 7 + count].tolist()
    more = generate(
        model, left.rows, past_key_values=left.cache, max_new_tokens=9 - count, **NO_EOS
    )
    assert torch.equal(more.sequences, whole)


@pytest.mark.parametrize("way", ["break", "close", "exception"])
@pytest.mark.parametrize("count", [1, 4, 5, 6, 7, 8, 11, 15, 22])
def test_several_rows_hold_what_was_yielded(model, count, way):
    """Also after rows have ended, and between the tokens of one step."""
    rows, eos, expected = rows_that_end(model, number=4, new=12)
    left = Left(model, rows, count, way, max_new_tokens=12, eos_token_id=eos)
    assert sum(left.new) == min(count, sum(map(len, expected)))
    steps = max(left.new)
    held = []
    for row, new, its in zip(left.rows, left.new, expected, strict=True):
        ended = new == len(its)
        held.append(row[:-1] if new == steps or ended else row)
    assert_holds(model, left.cache, held)


def test_left_at_the_end_of_a_step_all_rows_go_on_by_generate(model):
    rows = prompts((5, 1, 9))
    for count in (3, 6):
        left = Left(model, rows, count, "break", max_new_tokens=12, **NO_EOS)
        more = generate(model, left.rows, past_key_values=left.cache, max_new_tokens=4, **NO_EOS)
        assert more.new_tokens == generate(model, left.rows, max_new_tokens=4, **NO_EOS).new_tokens


def test_a_stream_that_was_never_begun_leaves_the_cache_as_it_was(model):
    cache = NemotronHybridCache(model.config, 1)
    stream(model, tokens(5), past_key_values=cache, max_new_tokens=3, **NO_EOS).close()
    assert cache.lengths == (0,)


def test_an_open_stream_holds_a_cache_that_is_behind_back(model):
    rows, eos, expected = rows_that_end(model, number=4, new=12)
    cache = NemotronHybridCache(model.config, 4)
    first = min(map(len, expected))
    tokens = stream(model, rows, past_key_values=cache, max_new_tokens=12, eos_token_id=eos)
    for _ in range(4 * first + 1):  # a row has ended and left
        next(tokens)
    with pytest.raises(RuntimeError, match="a stream over the cache is still open"):
        cache.snapshot()
    tokens.close()
    assert cache.withheld is None and max(cache.lengths) > 0


def test_samples_of_a_given_cache_leave_it_with_the_prompts(model):
    cache = NemotronHybridCache(model.config, 1)
    options = {"max_new_tokens": 6, "num_return_sequences": 3, "do_sample": True, "seed": 0}
    for number, _ in enumerate(
        stream(model, tokens(5), past_key_values=cache, **options, **NO_EOS)
    ):
        if number == 4:
            break
    assert_holds(model, cache, [tokens(5).tolist()])


@pytest.mark.parametrize("steps", [1, 4])
def test_an_interrupted_step_withholds_the_cache_until_a_snapshot_is_restored(
    model, monkeypatch, steps
):
    cache = NemotronHybridCache(model.config, 1)
    snapshot = cache.snapshot()
    calls = []

    def interrupted(self, logits):
        calls.append(logits)
        if len(calls) == steps + 2:  # behind the first token that was given
            raise KeyboardInterrupt
        return sample(self, logits)

    sample = engine.Sampler.__call__
    monkeypatch.setattr(engine.Sampler, "__call__", interrupted)
    run = engine._Run(
        model, tokens(6), None, cache, engine.GenerationOptions(max_new_tokens=8, eos_token_id=[])
    )
    run.steps_at_once = steps
    with pytest.raises(KeyboardInterrupt):
        list(run.tokens())
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="interrupted within a step"):
        generate(model, tokens(12), past_key_values=cache, max_new_tokens=1)
    cache.restore(snapshot)
    out = generate(model, tokens(6), past_key_values=cache, max_new_tokens=8, **NO_EOS)
    assert out.new_tokens == generate(model, tokens(6), max_new_tokens=8, **NO_EOS).new_tokens


class WantOfMemory(RuntimeError):
    """Stands for an accelerator's."""


def fails(*args, **kwargs):
    raise WantOfMemory


def nth(n, function):
    """`function`, whose n-th call from now on fails."""
    calls = []

    def call(*args, **kwargs):
        calls.append(1)
        return fails() if len(calls) == n else function(*args, **kwargs)

    return call


cat = torch.cat


def no_logits(tensors, **kwargs):
    """`torch.cat`, which fails for tensors as wide as the vocabulary."""
    return fails() if tensors[0].shape[-1:] == (97,) else cat(tensors, **kwargs)


# What fails before the first token is given, and the tokens that the cache then holds of a prompt
# of 11 whose first 2 it held, fed in pieces of 4.
BEFORE_THE_FIRST = {
    "a layer in the second piece": (
        lambda m, model: m.setattr(
            model.model.layers[4].mixer, "forward", nth(2, model.model.layers[4].mixer.forward)
        ),
        6,
    ),
    "logits of all pieces": (lambda m, model: m.setattr(torch, "cat", no_logits), 10),
    "what decodes": (lambda m, model: m.setattr(engine._Run, "_make_step", fails), 10),
    "the first choice": (lambda m, model: m.setattr(engine.Sampler, "__call__", fails), 10),
    "samples": (lambda m, model: m.setattr(NemotronHybridCache, "repeat", fails), 10),
}


@pytest.mark.parametrize("name", BEFORE_THE_FIRST)
@pytest.mark.parametrize("window", [0, 3])
def test_what_fails_before_the_first_token_leaves_the_cache_before_the_piece(
    model, monkeypatch, name, window
):
    plant, held = BEFORE_THE_FIRST[name]
    prompt = tokens(11)
    cache = NemotronHybridCache(model.config, 1, rollback_window=window)
    with torch.no_grad():
        model(prompt[None, :2], past_key_values=cache)
    number = 2 if name == "samples" else 1
    options = {"max_new_tokens": 5, "num_return_sequences": number, "prefill_chunk": 4, **NO_EOS}
    with monkeypatch.context() as patches:
        plant(patches, model)
        with pytest.raises(WantOfMemory):
            generate(model, prompt, past_key_values=cache, **options)
    assert cache.lengths == (held,) and cache.withheld is None
    assert_holds(model, copy.copy(cache), [prompt[:held].tolist()])
    out = generate(model, prompt, past_key_values=cache, **options)
    assert out.new_tokens == generate(model, prompt, **options).new_tokens
    if window and number == 1:
        cache.rollback(3)


@pytest.mark.parametrize("name", ["cat", "snapshot", "restore"])
def test_an_end_that_fails_says_so_in_the_cache(model, monkeypatch, name):
    """No stream is open any more that could be closed."""
    rows, eos, _ = rows_that_end(model, number=3, new=12)
    cache = NemotronHybridCache(model.config, 3)
    snapshot = cache.snapshot()
    with monkeypatch.context() as patches:
        patches.setattr(NemotronHybridCache, name, fails)
        with pytest.raises(WantOfMemory):
            generate(model, rows, past_key_values=cache, max_new_tokens=12, eos_token_id=eos)
    with pytest.raises(RuntimeError, match="could not be put into the cache"):
        cache.select([0])
    cache.restore(snapshot)
    assert cache.lengths == (0, 0, 0)


# --- modes of autograd --------------------------------------------------------------------------


def go_on(model, cache):
    """By hand: a decode step, a step back, and a loss that is trained through."""
    with torch.no_grad():
        logits = model(torch.full((cache.batch_size, 1), 5), past_key_values=cache).logits
        if cache.rollback_window:
            cache.rollback(1)
    model.zero_grad()
    again = model(torch.full((cache.batch_size, 3), 5), past_key_values=cache).logits
    again.square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return [logits, again.detach(), *gradients]


@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("given", [False, True])
def test_what_generate_gives_in_inference_mode_goes_on_outside_of_it(model, given, window):
    """With rows that end at different tokens, so that rows leave the batch and come back."""
    rows, eos, _ = rows_that_end(model, number=3, new=40)

    def run():
        cache = None
        if given:
            cache = NemotronHybridCache(model.config, 3, rollback_window=window)
        options = {"do_sample": True, "seed": 0, "repetition_penalty": 1.1, "top_k": 3}
        return generate(
            model, rows, past_key_values=cache, max_new_tokens=40, eos_token_id=eos,
            return_logprobs=True, **options,
        )  # fmt: skip

    with torch.inference_mode():
        out = run()
    expected = run()
    for tensor in (out.sequences, out.attention_mask, out.logprobs):
        assert not tensor.is_inference()
    assert torch.equal(out.sequences, expected.sequences)
    assert all(map(torch.equal, go_on(model, out.cache), go_on(model, expected.cache)))


@pytest.mark.parametrize("first", [True, False])
def test_a_stream_may_cross_the_border_of_inference_mode(model, first):
    rows, eos, expected = rows_that_end(model, number=3, new=20)
    options = {"max_new_tokens": 20, "eos_token_id": eos, "repetition_penalty": 1.0}
    cache = NemotronHybridCache(model.config, 3)
    with torch.inference_mode(first):
        tokens = stream(model, rows, past_key_values=cache, **options)
        found = [next(tokens) for _ in range(4)]
        assert torch.is_inference_mode_enabled() is first
    with torch.inference_mode(not first):
        found += tokens
    for row, its in enumerate(expected):
        assert [t.token_id for t in found if t.row == row] == its
    assert len(go_on(model, cache)) > 2


def test_scores_from_inference_mode_stand_in_a_loss(model):
    ids = tokens(2, 9)
    with torch.inference_mode():
        old = model.score(ids)
    assert not old.requires_grad
    (model.score(ids) * old).sum().backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    (model.score(ids) * model.score(ids).detach()).sum().backward()
    assert all(map(torch.equal, found, [p.grad for p in model.parameters()]))
    model.zero_grad()


def test_a_cache_with_a_graph_is_generated_from_and_its_loss_differentiated(model):
    prompt = tokens(9)

    def gradients(then):
        model.zero_grad()
        cache = NemotronHybridCache(model.config, 1)
        loss = model(prompt[None], past_key_values=cache).logits.square().sum()
        new = then(cache)
        loss.backward()
        found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return found, new

    longer = torch.cat([prompt, tokens(2, seed=1)])
    expected, _ = gradients(lambda cache: None)
    found, out = gradients(
        lambda cache: generate(model, longer, past_key_values=cache, max_new_tokens=5, **NO_EOS)
    )
    assert all(map(torch.equal, found, expected))
    assert out.new_tokens == generate(model, longer, max_new_tokens=5, **NO_EOS).new_tokens
