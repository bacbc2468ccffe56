"""Faults seen in other implementations' caches and generation, one test each, by number.

As in `test_faults.py`: each test states what is right, with expected values from the same model
asked in another way.
"""

import pytest
import torch

from nemotron_v3 import NemotronHybridCache
from nemotron_v3.layers import NemotronV3Attention, NemotronV3Mamba2Mixer
from tests.accuracy import relative_error
from tests.faults.test_faults import assert_near, left_padded
from tests.models import tiny_config, tiny_model, tokens


@torch.no_grad()
def through_a_cache(model, ids, pieces, **options):
    """Logits of `ids` `[B, S]`, given in pieces."""
    dtype = model.model.embeddings.weight.dtype
    cache = NemotronHybridCache(model.config, ids.shape[0], dtype, **options)
    parts = ids.split(pieces, dim=1)
    return torch.cat([model(part, past_key_values=cache).logits for part in parts], 1), cache


def test_01_prefill_onto_a_filled_cache_starts_the_states_anew():
    model, ids = tiny_model("M-M"), tokens(1, 11)
    assert_near(through_a_cache(model, ids, [6, 5])[0], model(ids).logits)


def test_02_attention_of_a_continuation_sees_the_future_or_loses_its_history():
    model, ids = tiny_model("*-*"), tokens(1, 11)
    logits, _ = through_a_cache(model, ids, [6, 5])
    assert_near(logits, model(ids).logits)
    other = ids.clone()
    other[0, 10] = (other[0, 10] + 1) % 97
    assert torch.equal(through_a_cache(model, other, [6, 5])[0][:, :10], logits[:, :10])


def test_03_only_the_last_of_several_new_tokens_reaches_a_filled_cache():
    model, ids = tiny_model(), tokens(1, 14)
    _, cache = through_a_cache(model, ids[:, :6], [6])
    out = model.generate(ids, past_key_values=cache, max_new_tokens=4, eos_token_id=[])
    fresh = model.generate(ids, max_new_tokens=4, eos_token_id=[])
    assert torch.equal(out.sequences, fresh.sequences)


def test_04_left_padded_prompts_generate_something_else_than_alone():
    model = tiny_model(use_bias=True, mlp_bias=True, attention_bias=True)
    ids, mask, documents = left_padded([3, 20, 9], 24)
    out = model.generate(ids, mask, max_new_tokens=12, eos_token_id=[])
    for row, document in enumerate(documents):
        alone = model.generate(document[None], max_new_tokens=12, eos_token_id=[])
        assert torch.equal(out.sequences[row, : len(document) + 12], alone.sequences[0])


def test_06_the_state_of_a_bf16_model_is_bf16_and_drifts():
    ids = tokens(1, 200)
    truth = tiny_model("MM").bfloat16().double()(ids).logits[:, -50:]
    model = tiny_model("MM").bfloat16()
    logits, cache = through_a_cache(model, ids, [1] * 200)
    assert cache.ssm_states[0].dtype == torch.float32
    whole = relative_error(model(ids).logits[:, -50:], truth)
    assert relative_error(logits[:, -50:], truth) <= 2 * whole


@pytest.mark.parametrize("limit", [(0.3, 0.6), (0.01, 0.1)])
def test_07_decoding_forgets_the_limits_of_dt(limit):
    model, ids = tiny_model("MM", time_step_limit=limit), tokens(1, 30)
    assert_near(through_a_cache(model, ids, [10] + [1] * 20)[0], model(ids).logits)


@pytest.mark.parametrize("position", [None, torch.tensor([4])])
def test_08_a_cache_needs_a_cache_position(position):
    config = tiny_config("M*", dtype=torch.float64)
    mixer, x = NemotronV3Mamba2Mixer(config, 0), torch.randn(2, 5, 48, dtype=torch.float64)
    cache = NemotronHybridCache(config, 2)
    with torch.no_grad():
        mixer(x[:, :4], past_key_values=cache)
        last = mixer(x[:, 4:], past_key_values=cache, cache_position=position)
        assert_near(last, mixer(x)[:, 4:])


@pytest.mark.parametrize("kind", ["mamba", "attention"])
def test_09_tokens_without_a_batch_dimension_break_with_a_cache(kind):
    config = tiny_config("M*", dtype=torch.float64)
    layer = NemotronV3Mamba2Mixer(config, 0) if kind == "mamba" else NemotronV3Attention(config)
    number = {"layer_idx": 1} if kind == "attention" else {}
    x, cache = torch.randn(7, 48, dtype=torch.float64), NemotronHybridCache(config, 1)
    with torch.no_grad():
        parts = [layer(part, past_key_values=cache, **number) for part in x.split([5, 1, 1])]
        assert_near(torch.cat(parts), layer(x))


def test_10_every_block_gets_a_state_it_has_no_use_for():
    config = tiny_config("ME*-M")
    cache = NemotronHybridCache(config, 1, max_length=10)
    assert list(cache.states) == [0, 2, 4]
    assert list(cache.conv_states) == list(cache.ssm_states) == [0, 4]


def test_24_without_attention_the_length_is_0_and_decoding_starts_over():
    model, ids = tiny_model("M-M"), tokens(1, 12)
    logits, cache = through_a_cache(model, ids, [8, 1, 1, 1, 1])
    assert cache.get_seq_length() == 12
    assert_near(logits, model(ids).logits)


@pytest.mark.parametrize("way", ["clear", "rollback", "restore"])
def test_nan_behind_a_rows_length_comes_back_after_it_was_dropped(way):
    model = tiny_model("*-*")
    embeds = model.model.embeddings(tokens(2, 7)).detach()
    embeds[1, 2:] = float("nan")
    cache = NemotronHybridCache(model.config, 2)
    snapshot = cache.snapshot()
    with torch.no_grad():
        model(inputs_embeds=embeds, past_key_values=cache)
        if way == "clear":
            cache.clear(1)
        elif way == "rollback":
            cache.rollback([0, 7])
        else:
            cache.restore(snapshot)
            model(tokens(7), cu_seqlens=torch.tensor([0, 7, 7]), past_key_values=cache)
        assert cache.lengths == (7, 0)
        token = tokens(2, 1, seed=1)
        logits = model(token, past_key_values=cache).logits
        assert_near(logits[1], model(token[1:]).logits[0])


def test_a_step_of_one_token_drops_the_gradients_of_the_mixers_own_parameters():
    ids, gradients = tokens(1, 7), []
    for pieces in ([7], [1] * 7):
        model = tiny_model("M").double().requires_grad_(False)
        mixer = model.model.layers[0].mixer
        chosen = [p.requires_grad_() for p in (mixer.A_log, mixer.D, mixer.dt_bias)]
        cache = NemotronHybridCache(model.config, 1, torch.float64)
        parts = [model(part, past_key_values=cache).logits for part in ids.split(pieces, dim=1)]
        torch.cat(parts, 1).square().sum().backward()
        gradients.append(torch.cat([p.grad for p in chosen]))
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-10 * gradients[0].abs().max()


@pytest.mark.parametrize("window", [0, 2])
def test_a_batch_that_is_all_padding_breaks_without_gradients(window):
    model = tiny_model()
    cache = NemotronHybridCache(model.config, 2, rollback_window=window)
    with torch.no_grad():
        model(tokens(2, 5), past_key_values=cache)
        logits = model(tokens(2, 3), torch.zeros(2, 3), past_key_values=cache).logits
    assert torch.count_nonzero(logits) == 0 and cache.lengths == (5, 5)


def test_a_snapshot_that_does_not_fit_corrupts_the_cache():
    model = tiny_model("M*")
    caches = [NemotronHybridCache(model.config, 1, rollback_window=w) for w in (2, 3)]
    with torch.no_grad():
        for cache, length in zip(caches, (5, 4), strict=True):
            model(tokens(1, length), past_key_values=cache)
    before = caches[1].conv_states[0].clone()
    with pytest.raises(ValueError, match="another config, dtype or window"):
        caches[1].restore(caches[0].snapshot())
    assert torch.equal(caches[1].conv_states[0], before)


def test_a_model_without_any_state_does_not_count_its_tokens():
    model = tiny_model("-E")
    out = model.generate(tokens(2, 5), max_new_tokens=4, eos_token_id=[])
    assert out.cache.lengths == (8, 8)
    with torch.no_grad():
        cache = model(tokens(2, 5), torch.ones(2, 5), use_cache=True).past_key_values
        model(tokens(2, 1), torch.ones(2, 6), past_key_values=cache)
    assert cache.lengths == (6, 6)
