"""Prefill and decode through the cache equal the whole sequence at once, in any pieces."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_v3 import NemotronHybridCache, SequenceLayout
from nemotron_v3.layers import NemotronV3Attention, NemotronV3Mamba2Mixer
from tests.models import tiny_config, tiny_model, tokens

BIASES = {"use_bias": True, "mlp_bias": True, "attention_bias": True, "moe_latent_size": 28}
LIMITS = {"time_step_limit": (0.3, 0.6)}


def assert_near(measured: torch.Tensor, expected: torch.Tensor) -> None:
    assert (measured - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def in_pieces(model, ids: torch.Tensor, pieces: list[int], **cache_options) -> torch.Tensor:
    cache = NemotronHybridCache(model.config, ids.shape[0], **cache_options)
    parts = ids.split(pieces, dim=1)
    return torch.cat([model(part, past_key_values=cache).logits for part in parts], 1)


@pytest.mark.parametrize("changes", [{}, BIASES, LIMITS], ids=["plain", "biases", "dt limits"])
@pytest.mark.parametrize("pieces", [[40], [39, 1], [1] * 40, [1, 15, 1, 16, 3, 2, 2]])
def test_any_pieces_equal_the_whole(pieces, changes):
    model, ids = tiny_model(**changes), tokens(2, 40)
    assert_near(in_pieces(model, ids, pieces), model(ids).logits)


@settings(max_examples=20)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(0, 3))
def test_drawn_pieces_with_and_without_a_rollback_window(pieces, window):
    model, ids = tiny_model(), tokens(1, sum(pieces))
    measured = in_pieces(model, ids, pieces, rollback_window=window)
    assert_near(measured, model(ids).logits)


def test_a_growing_and_a_fixed_buffer_agree_and_the_fixed_one_stays_where_it_is():
    model, ids = tiny_model(), tokens(2, 70)
    grown = in_pieces(model, ids, [1] * 70)
    cache = NemotronHybridCache(model.config, 2, max_length=70)
    keys = {i: s.keys.data_ptr() for i, s in cache.states.items() if hasattr(s, "keys")}
    with torch.no_grad():
        fixed = [model(part, past_key_values=cache).logits for part in ids.split(1, dim=1)]
    assert torch.equal(torch.cat(fixed, 1), grown)
    assert keys == {i: cache.states[i].keys.data_ptr() for i in keys}


@pytest.mark.parametrize("side", ["left", "right", "mixed"])
def test_padded_prompts_leave_the_states_of_the_same_prompts_alone(side):
    model = tiny_model(**BIASES)
    lengths, width = [1, 3, 4, 17, 20], 20
    mask = torch.zeros(5, width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        start = {"left": width - length, "right": 0, "mixed": (width - length) // 2}[side]
        mask[row, start : start + length] = 1
    ids = tokens(5, width)
    batch = NemotronHybridCache(model.config, 5)
    with torch.no_grad():
        logits = model(ids, mask, past_key_values=batch).logits
        following = model(tokens(5, 1, seed=1), past_key_values=batch).logits
    assert batch.lengths == (2, 4, 5, 18, 21)
    assert batch.positions.tolist() == [2, 4, 5, 18, 21]
    for row, length in enumerate(lengths):
        alone = NemotronHybridCache(model.config, 1)
        prompt = ids[row][mask[row] == 1][None]
        with torch.no_grad():
            assert_near(logits[row][mask[row] == 1], model(prompt, past_key_values=alone).logits[0])
            next_one = model(tokens(5, 1, seed=1)[row : row + 1], past_key_values=alone).logits
        assert_near(following[row], next_one[0])
        for layer, state in alone.states.items():
            held, mine = state.held(length + 1), batch.states[layer].held(length + 1)
            for name, tensor in held.tensors().items():
                if tensor.numel():  # without a rollback window there are no past states
                    assert_near(mine.tensors()[name][row], tensor[0])


def test_a_mask_over_the_whole_sequence_is_read_at_its_end():
    model, ids = tiny_model(), tokens(2, 12)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, :4] = 0
    cache = NemotronHybridCache(model.config, 2)
    with torch.no_grad():
        model(ids[:, :11], mask[:, :11], past_key_values=cache)
        last = model(ids[:, 11:], mask, past_key_values=cache).logits
        whole = model(ids, mask).logits
    assert cache.lengths == (12, 8)
    assert_near(last, whole[:, 11:])


def test_a_mask_of_neither_the_new_tokens_nor_all_is_refused():
    model, ids = tiny_model(), tokens(2, 12)
    cache = NemotronHybridCache(model.config, 2)
    with torch.no_grad():
        model(ids[:, :10], past_key_values=cache)
        with pytest.raises(ValueError, match="5 columns for 2 new tokens behind a cache of 10"):
            model(ids[:, 10:], torch.ones(2, 5), past_key_values=cache)
        assert cache.lengths == (10, 10)
        last = model(ids[:, 10:], torch.ones(2, 2), past_key_values=cache).logits
        assert_near(last, model(ids).logits[:, 10:])


def test_a_block_alone_takes_the_mask_of_the_whole_sequence_too():
    config = tiny_config("ME", dtype=torch.float64)
    x = torch.randn(2, 9, 48, dtype=torch.float64)
    mask = torch.ones(2, 9)
    mask[1, :4] = 0
    for layer, block in enumerate(tiny_model("ME", dtype=torch.float64).model.layers):
        cache = NemotronHybridCache(config, 2)
        with torch.no_grad():
            cache_of_both = {"past_key_values": cache}
            if layer == 1:  # an expert block keeps nothing: something else has filled the cache
                tiny_model("ME", dtype=torch.float64)(tokens(2, 8), mask[:, :8], **cache_of_both)
            else:
                block(x[:, :8], attention_mask=mask[:, :8], **cache_of_both)
            last = block(x[:, 8:], attention_mask=mask, **cache_of_both)
            assert_near(last, block(x, attention_mask=mask)[:, 8:])


def test_a_pack_of_prompts_fills_one_row_each():
    model, lengths = tiny_model(), [5, 1, 16]
    docs = list(tokens(22).split(lengths))
    cache = NemotronHybridCache(model.config, 3)
    with torch.no_grad():
        layout = SequenceLayout.from_lengths(lengths)
        model(torch.cat(docs), layout=layout, past_key_values=cache)
        new = tokens(3, 1, seed=2)
        measured = model(new, past_key_values=cache).logits
        for row, doc in enumerate(docs):
            whole = model(torch.cat([doc, new[row]])[None]).logits
            assert_near(measured[row, -1], whole[0, -1])


def test_use_cache_makes_one():
    model, ids = tiny_model(), tokens(2, 9)
    with torch.no_grad():
        out = model(ids[:, :8], use_cache=True)
        last = model(ids[:, 8:], past_key_values=out.past_key_values).logits
    assert out.past_key_values.lengths == (9, 9)
    assert_near(last, model(ids).logits[:, 8:])


@pytest.mark.parametrize("kind", ["mamba", "attention"])
def test_a_layer_alone_takes_a_cache_by_its_documented_signature(kind):
    config = tiny_config("M*", dtype=torch.float64)
    layer = (
        NemotronV3Mamba2Mixer(config, 0) if kind == "mamba" else NemotronV3Attention(config).eval()
    )
    number = {"layer_idx": 1} if kind == "attention" else {}
    x = torch.randn(2, 9, 48, dtype=torch.float64)
    cache = NemotronHybridCache(config, 2)
    with torch.no_grad():
        parts = [
            layer(part, past_key_values=cache, **number) for part in x.split([4, 1, 1, 3], dim=1)
        ]
    assert_near(torch.cat(parts, 1), layer(x))
    assert cache.lengths == (9, 9)


def test_only_layers_with_state_have_any_and_the_dtypes_are_the_promised_ones():
    config = tiny_config(dtype=torch.bfloat16)
    cache = NemotronHybridCache(config, 3)
    assert list(cache.conv_states) == list(cache.ssm_states) == [0, 4]
    assert list(cache.states) == [0, 2, 4, 5]
    assert cache.conv_states[0].shape == (3, config.conv_dim, config.conv_kernel)
    assert cache.conv_states[0].dtype == torch.bfloat16
    assert cache.ssm_states[0].dtype == torch.float32
    narrow = NemotronHybridCache(config.replace(mamba_ssm_cache_dtype=torch.bfloat16), 1)
    assert narrow.ssm_states[0].dtype == torch.bfloat16


def test_a_model_without_attention_still_counts_its_tokens():
    model = tiny_model("M-M")
    cache = NemotronHybridCache(model.config, 1)
    assert not cache.has_previous_state and cache.get_seq_length() == 0
    with torch.no_grad():
        model(tokens(1, 5), past_key_values=cache)
    assert cache.has_previous_state and cache.get_seq_length() == 5


@pytest.mark.heavy
def test_a_bf16_model_decodes_4096_tokens_as_well_as_it_recomputes_them():
    changes = {"mamba_head_dim": 8, "ssm_state_size": 16}
    ids = tokens(1, 4096)
    model = tiny_model("M*M", **changes).bfloat16()
    truth = tiny_model("M*M", **changes).bfloat16().double()
    with torch.no_grad():
        true = truth(ids).logits[0, -64:]
        whole = model(ids).logits[0, -64:].double()
        cache = NemotronHybridCache(model.config, 1, torch.bfloat16, max_length=4096)
        layout = SequenceLayout.plain(1, 1)
        steps = [
            model(token, layout=layout, past_key_values=cache).logits[0, 0]
            for token in ids.split(1, dim=1)
        ]
    decoded = torch.stack(steps[-64:]).double()
    assert (decoded - true).norm() <= 2 * (whole - true).norm()


def test_states_are_differentiable_through_a_cache_and_detach_cuts_them():
    ids = tokens(1, 24)
    whole = tiny_model().double()
    whole(ids).logits.square().sum().backward()
    pieces = tiny_model().double()
    cache = NemotronHybridCache(pieces.config, 1, torch.float64)
    logits = [pieces(part, past_key_values=cache).logits for part in ids.split([7, 1, 16], dim=1)]
    torch.cat(logits, 1).square().sum().backward()
    for (name, a), b in zip(whole.named_parameters(), pieces.parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() <= 1e-10 * (a.grad.abs().max() + 1e-6), name
    cut = tiny_model().double()
    cache = NemotronHybridCache(cut.config, 1, torch.float64)
    cut(ids[:, :7], past_key_values=cache)
    cache.detach()
    assert not any(t.requires_grad for s in cache.states.values() for t in s.tensors().values())
    cut(ids[:, 7:], past_key_values=cache).logits.square().sum().backward()
    assert not torch.equal(cut.model.embeddings.weight.grad, whole.model.embeddings.weight.grad)
