"""Generation against the same tokens computed in the slowest, plainest way."""

import pytest
import torch

from nemotron_v3.cache import NemotronHybridCache
from nemotron_v3.generation import engine, generate, stream
from tests.generation.samples import Bytes, padded, prompts, recomputed
from tests.models import tiny_model, tokens

NO_EOS = {"eos_token_id": []}
NEW = 64
MODELS = {
    "all blocks": {},
    "latent, expert groups, biases": {
        "moe_latent_size": 28, "n_group": 4, "topk_group": 2, "mlp_bias": True, "use_bias": True,
    },
    "mamba alone, one group": {"pattern": "MM", "n_groups": 1, "conv_kernel": 2},
    "attention alone": {"pattern": "*-*"},
    "state that dt limits": {"pattern": "M*ME", "time_step_limit": (0.01, 0.2)},
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS)
def case(request):
    """A model, prompts, and the greedy tokens that follow them."""
    model = tiny_model(**request.param)
    rows = prompts()
    return model, rows, [recomputed(model, row, NEW) for row in rows]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.parametrize("side", ["left", "right", "mixed"])
def test_64_greedy_tokens_of_a_padded_batch(case, side):
    model, rows, expected = case
    ids, mask = padded(rows, side)
    out = generate(model, ids, mask, max_new_tokens=NEW, **NO_EOS)
    assert out.new_tokens == expected
    assert out.finish_reason == ("length",) * len(rows)


def test_64_greedy_tokens_of_single_rows_and_of_a_list(case):
    model, rows, expected = case
    for row, its in zip(rows, expected, strict=True):
        assert generate(model, row, max_new_tokens=NEW, **NO_EOS).new_tokens == [its]
    out = generate(model, [row.tolist() for row in rows], max_new_tokens=NEW, **NO_EOS)
    assert out.new_tokens == expected


@pytest.mark.parametrize("piece", [1, 2, 7, 16])
def test_64_greedy_tokens_after_prefill_in_pieces(case, piece):
    model, rows, expected = case
    out = generate(model, rows, max_new_tokens=NEW, prefill_chunk=piece, **NO_EOS)
    assert out.new_tokens == expected


@pytest.mark.parametrize("seed", range(4))
def test_prefill_in_random_pieces_by_several_calls(model, seed):
    # Any part of a prompt may be in the cache already, of each row another.
    draw = torch.Generator().manual_seed(seed)
    rows = prompts((30, 21, 40))
    cache = NemotronHybridCache(model.config, 3)
    held = [0, 0, 0]
    for _ in range(3):
        more = [int(torch.randint(0, 9, (), generator=draw)) for _ in rows]
        pieces = [row[n : n + m] for row, n, m in zip(rows, held, more, strict=True)]
        if any(more):
            cu_seqlens = torch.tensor([0, *more]).cumsum(0)
            with torch.no_grad():
                model(torch.cat(pieces), cu_seqlens=cu_seqlens, past_key_values=cache)
        held = [n + m for n, m in zip(held, more, strict=True)]
    out = generate(model, rows, max_new_tokens=20, past_key_values=cache, **NO_EOS)
    assert out.new_tokens == [recomputed(model, row, 20) for row in rows]
    assert out.cache is cache


def test_sequences_are_prompts_then_new_tokens_padded_right(model):
    rows = prompts((5, 1, 9))
    ids, mask = padded(rows, "left")
    out = generate(model, ids, mask, max_new_tokens=6, pad_token_id=90, **NO_EOS)
    for row, prompt in enumerate(rows):
        length = len(prompt) + 6
        assert out.lengths[row] == length and out.prompt_lengths[row] == len(prompt)
        assert out.sequences[row].tolist() == [
            *prompt.tolist(), *out.new_tokens[row], *[90] * (15 - length),
        ]  # fmt: skip
        assert out.attention_mask[row].tolist() == [1] * length + [0] * (15 - length)


# --- the end of a row ---------------------------------------------------------------------------


def rows_that_end(model, number=6, new=24):
    """Prompts, and an eos token that ends each of them at another place, some of them never."""
    rows = prompts([3 + row for row in range(number)], seed=40)
    free = generate(model, rows, max_new_tokens=new, **NO_EOS).new_tokens
    eos = max(range(97), key=lambda token: len({_place(row, token) for row in free}))
    assert len({_place(row, eos) for row in free}) >= 3
    cut = [row[: _place(row, eos) + 1] for row in free]
    return rows, eos, cut


def _place(row, token):
    return row.index(token) if token in row else len(row)


@pytest.mark.parametrize("steps", [1, 2, 5, 16, 100])
def test_rows_end_at_their_eos_however_often_the_host_looks(model, monkeypatch, steps):
    rows, eos, expected = rows_that_end(model)
    run = engine._Run(
        model, rows, None, None,
        engine.GenerationOptions(max_new_tokens=24, eos_token_id=eos, return_logprobs=True),
    )  # fmt: skip
    run.steps_at_once = steps
    list(run.tokens())
    out = run.output()
    assert out.new_tokens == expected
    reasons = ["stop" if row[-1] == eos else "length" for row in expected]
    assert list(out.finish_reason) == reasons
    assert out.cache.lengths == tuple(length - 1 for length in out.lengths)
    # What each row of the cache holds is what continuing it shows.
    more = generate(
        model, out.sequences, out.attention_mask, past_key_values=out.cache, max_new_tokens=12,
        **NO_EOS,
    )  # fmt: skip
    for row, prompt in enumerate(rows):
        longer = recomputed(model, prompt, len(expected[row]) + 12)
        assert expected[row] + more.new_tokens[row] == longer


def test_the_given_cache_is_the_one_that_comes_back(model):
    rows, eos, expected = rows_that_end(model)
    cache = NemotronHybridCache(model.config, len(rows), max_length=64)
    out = generate(model, rows, max_new_tokens=24, eos_token_id=eos, past_key_values=cache)
    assert out.cache is cache and out.new_tokens == expected
    assert cache.lengths == tuple(length - 1 for length in out.lengths)
    more = generate(
        model, out.sequences, out.attention_mask, past_key_values=cache, max_new_tokens=8, **NO_EOS
    )
    for row, prompt in enumerate(rows):
        longer = recomputed(model, prompt, len(expected[row]) + 8)
        assert expected[row] + more.new_tokens[row] == longer


def test_several_eos_tokens_and_the_configs_own(model):
    prompt = tokens(6, seed=3)
    free = recomputed(model, prompt, 12)
    first, second = free[4], free[9]
    out = generate(model, prompt, max_new_tokens=12, eos_token_id=[second, first])
    assert out.new_tokens == [free[: free.index(first) + 1]]
    own = tiny_model(eos_token_id=first)
    assert generate(own, prompt, max_new_tokens=12).new_tokens == out.new_tokens


def test_a_cache_that_comes_back_can_be_trained_through(model):
    out = generate(model, tokens(5), max_new_tokens=3, **NO_EOS)
    follow = model(tokens(1, 2), past_key_values=out.cache)
    follow.logits.sum().backward()  # inference tensors would refuse
    assert model.lm_head.weight.grad is not None
    model.zero_grad()


# --- several samples, streaming, logprobs -------------------------------------------------------


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "seed": list(range(12))}])
def test_several_samples_are_those_of_repeated_prompts(model, sampling):
    rows = prompts()
    shared = generate(model, rows, max_new_tokens=16, num_return_sequences=3, **sampling, **NO_EOS)
    repeated = [row for row in rows for _ in range(3)]
    alone = generate(model, repeated, max_new_tokens=16, **sampling, **NO_EOS)
    assert shared.new_tokens == alone.new_tokens
    assert shared.cache.lengths == alone.cache.lengths


def test_several_samples_share_their_prefill(model, monkeypatch):
    fed = []
    forward = type(model.model).forward
    monkeypatch.setattr(
        type(model.model),
        "forward",
        lambda self, x, **kw: fed.append(len(x)) or forward(self, x, **kw),
    )
    cache = NemotronHybridCache(model.config, 1)
    options = {"max_new_tokens": 1, "num_return_sequences": 4, "past_key_values": cache}
    out = generate(model, tokens(10), **options, **NO_EOS)
    assert fed == [10]
    assert cache.lengths == (10,) and out.cache.lengths == (10,) * 4


@pytest.mark.parametrize("do_sample", [False, True])
def test_stream_gives_what_generate_gives(model, do_sample):
    rows, eos, _ = rows_that_end(model)
    options = {
        "max_new_tokens": 24, "eos_token_id": eos, "do_sample": do_sample,
        "seed": 5 if do_sample else None, "return_logprobs": True, "tokenizer": Bytes(),
    }  # fmt: skip
    out = generate(model, rows, **options)
    new = [[] for _ in rows]
    text = [""] * len(rows)
    logprobs = [[] for _ in rows]
    reasons = [None] * len(rows)
    for token in stream(model, rows, **options):
        assert reasons[token.row] is None
        new[token.row].append(token.token_id)
        text[token.row] += token.text
        logprobs[token.row].append(token.logprob)
        reasons[token.row] = token.finish_reason
    assert new == out.new_tokens
    assert tuple(text) == out.text
    assert tuple(reasons) == out.finish_reason
    for row, its in enumerate(logprobs):
        assert out.logprobs[row, : len(its)].tolist() == its
        assert not out.logprobs[row, len(its) :].any()


def test_logprobs_are_those_of_score(model):
    ids, mask = padded(prompts((5, 11, 30)), "left")
    options = {"do_sample": True, "temperature": 1.7, "top_k": 20, "repetition_penalty": 1.2}
    out = generate(
        model, ids, mask, max_new_tokens=NEW, return_logprobs=True, seed=0, **options, **NO_EOS
    )
    with torch.no_grad():
        scores = model.score(out.sequences, attention_mask=out.attention_mask)
    worst = 0.0
    for row, (start, end) in enumerate(zip(out.prompt_lengths, out.lengths, strict=True)):
        worst = max(worst, (out.logprobs[row] - scores[row, start:end]).abs().max().item())
    print(f"decoded against teacher-forced log-probabilities: max |delta| {worst:.1e}")
    assert out.logprobs.abs().max() > 1  # they are no zeros
    assert worst < 1e-5


def test_text_prompts_go_through_the_tokenizer():
    model = tiny_model(vocab_size=256, pattern="M*")
    tokenizer = Bytes()
    out = generate(model, ["né", "a"], tokenizer=tokenizer, max_new_tokens=5, **NO_EOS)
    ids = [tokenizer.encode("né"), tokenizer.encode("a")]
    assert out.new_tokens == generate(model, ids, max_new_tokens=5, **NO_EOS).new_tokens
    one = generate(model, "a", tokenizer=tokenizer, max_new_tokens=5, **NO_EOS)
    assert one.new_tokens == out.new_tokens[1:]


def test_the_models_methods_are_the_functions(model):
    ids = tokens(2, 6)
    expected = generate(model, ids, max_new_tokens=5, **NO_EOS)
    assert model.generate(ids, max_new_tokens=5, **NO_EOS).new_tokens == expected.new_tokens
    streamed = [t.token_id for t in model.stream(ids[0], max_new_tokens=5, **NO_EOS)]
    assert streamed == expected.new_tokens[0]


def test_a_model_in_bf16_keeps_its_dtypes():
    model = tiny_model().bfloat16()
    out = generate(model, tokens(2, 9), max_new_tokens=8, return_logprobs=True, **NO_EOS)
    assert out.cache.dtype == torch.bfloat16 and out.logprobs.dtype == torch.float32
    assert {s.dtype for s in out.cache.ssm_states.values()} == {torch.float32}
    with torch.no_grad():
        scores = model.score(out.sequences)[:, 9:]
    assert (out.logprobs - scores).abs().max() < 0.2  # bf16 rounds the logits to 8 bits


def test_host_tensors_stay_on_the_host_whatever_the_default_device(model):
    """The default device is often "cuda": "meta" stands for it here, where nothing may land."""
    ids, mask = padded(prompts(), "left")
    options = {"max_new_tokens": 6, "do_sample": True, "seed": 3, "repetition_penalty": 1.1}
    expected = generate(model, ids, mask, return_logprobs=True, **options)
    with torch.device("meta"):
        found = generate(model, ids, mask, return_logprobs=True, **options)
    assert found.new_tokens == expected.new_tokens
    assert torch.equal(found.logprobs, expected.logprobs)
