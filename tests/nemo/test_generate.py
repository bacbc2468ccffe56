"""Generation and the cache of NeMo AutoModel, on a CPU, beside our own model."""

import copy

import pytest
import torch
from nemo_automodel.components.models.nemotron_v3.cache import NemotronHybridCache as TheirCache

from nemotron_v3 import NemotronHybridCache, from_pretrained
from nemotron_v3.nemo import accelerate
from tests.models import tokens
from tests.nemo.models import CPU, saved, their_model

NEW = 9


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Theirs, accelerated, and ours with the weights that it exported."""
    model = accelerate(their_model().eval())
    return model, from_pretrained(saved(model, tmp_path_factory.mktemp("exported"))).eval()


def padded(lengths, width, side, seed=0):
    ids, mask = tokens(len(lengths), width, seed=seed) % 90 + 5, torch.zeros(len(lengths), width)
    for row, n in enumerate(lengths):
        mask[row, slice(width - n, width) if side == "left" else slice(n)] = 1
    return ids.masked_fill(mask == 0, 0), mask.long()


def test_left_padded_rows_generate_what_ours_generates(both):
    theirs, ours = both
    lengths = (13, 5, 1)
    ids, mask = padded(lengths, 13, "left")
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": -1}
    found = theirs.generate(input_ids=ids, attention_mask=mask, **options)
    for row, n in enumerate(lengths):
        alone = ids[row : row + 1, -n:]
        expected = ours.generate(alone, max_new_tokens=NEW, eos_token_id=()).sequences
        assert torch.equal(found[row : row + 1, 13 - n :], expected)
        assert torch.equal(theirs.generate(input_ids=alone, **options), expected)


def test_sampling_goes_on_as_with_theirs(both):
    theirs, _ = both
    ids = tokens(2, 6)
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(theirs.generate(input_ids=ids, max_new_tokens=NEW, do_sample=True, top_k=20))
    assert torch.equal(*drawn) and drawn[0].shape == (2, 6 + NEW)


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[12], [1, 11], [11, 1], [4, 5, 3], [1] * 12], ids=str)
@pytest.mark.parametrize("lengths", [(12, 12), (12, 7)], ids=str)
def test_pieces_on_their_cache_give_the_numbers_of_one_pass(both, cuts, lengths):
    """A second piece of several tokens too, and rows that begin with padding."""
    theirs, _ = both
    ids, mask = padded(lengths, 12, "left")
    whole = theirs(ids, attention_mask=mask).logits
    cache = TheirCache(theirs.config, 2, torch.float32, CPU)
    parts, start = [], 0
    for length in cuts:
        end = start + length
        out = theirs(
            ids[:, start:end],
            attention_mask=mask[:, :end],
            past_key_values=cache,
            cache_position=torch.arange(start, end),
            use_cache=True,
        )
        assert out.past_key_values is cache and cache.has_previous_state
        parts.append(out.logits)
        start = end
    real = mask.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real])
    assert cache.get_seq_length() == 12


@torch.no_grad()
def test_their_cache_holds_what_ours_holds(both):
    theirs, ours = both
    ids = tokens(2, 10)
    cache, own = (
        TheirCache(theirs.config, 2, torch.float32, CPU),
        NemotronHybridCache(ours.config, 2),
    )
    places = {i: t.data_ptr() for i, t in cache.ssm_states.items()}
    for start, end in ((0, 7), (7, 8), (8, 10)):
        theirs(ids[:, start:end], past_key_values=cache, use_cache=True)
        ours(ids[:, start:end], past_key_values=own, use_cache=True)
    for layer, kind in enumerate(theirs.model.layers.values()):
        if kind.block_type == "mamba":
            torch.testing.assert_close(cache.conv_states[layer], own.conv_states[layer])
            torch.testing.assert_close(cache.ssm_states[layer], own.ssm_states[layer])
            assert cache.ssm_states[layer].data_ptr() == places[layer]  # in place
        elif kind.block_type == "attention":
            torch.testing.assert_close(cache.key_cache[layer], own.key_cache[layer])
            torch.testing.assert_close(cache.value_cache[layer], own.value_cache[layer])


@torch.no_grad()
def test_rows_of_their_cache_are_exchanged(both):
    theirs, _ = both
    ids = tokens(2, 8)
    cache = TheirCache(theirs.config, 2, torch.float32, CPU)
    theirs(ids, past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    swapped = theirs(ids[:, :1], past_key_values=cache).logits
    whole = theirs(torch.cat([ids.flip(0), ids[:, :1]], 1)).logits[:, -1:]
    torch.testing.assert_close(swapped, whole)


@torch.no_grad()
def test_step_limits_hold_in_decoding_too():
    """Theirs forgets them there."""
    model = accelerate(their_model(time_step_limit=(0.02, 0.05)).eval())
    ids = tokens(1, 9)
    cache = TheirCache(model.config, 1, torch.float32, CPU)
    parts = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(9)]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits)


@torch.no_grad()
def test_a_4d_mask_beside_a_padding_mask_sees_no_padding(both):
    theirs, _ = both
    ids, mask = padded((9, 4), 9, "left")
    causal = torch.zeros(2, 1, 9, 9).masked_fill(~torch.ones(9, 9).tril().bool(), float("-inf"))
    told = theirs(ids, attention_mask=mask, causal_mask_mapping={"full_attention": causal}).logits
    real = mask.bool()
    torch.testing.assert_close(told[real], theirs(ids, attention_mask=mask).logits[real])


@torch.no_grad()
def test_a_cache_in_bf16():
    model = accelerate(their_model(dtype=torch.bfloat16, torch_dtype="bfloat16").eval())
    ids = tokens(2, 9)
    cache = TheirCache(model.config, 2, torch.bfloat16, CPU)
    parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 6), (6, 7), (7, 9))]
    whole = model(ids).logits
    assert cache.ssm_states[0].dtype == torch.bfloat16
    wide = accelerate(their_model().eval())
    with torch.no_grad():
        for mine, its in zip(wide.parameters(), model.parameters(), strict=True):
            mine.copy_(its)
    truth = wide(ids).logits
    error = (torch.cat(parts, 1).float() - truth).norm() / truth.norm()
    assert error <= 2 * (whole.float() - truth).norm() / truth.norm() + 2**-9


def test_errors_say_what_to_give(both):
    theirs, ours = both
    ids = tokens(2, 5)
    own = NemotronHybridCache(ours.config, 2)
    with pytest.raises(ValueError, match="holds 3 rows, the tokens have 2"):
        theirs(ids, past_key_values=TheirCache(theirs.config, 3, torch.float32, CPU))
    with pytest.raises(
        TypeError, match=r"nemotron_v3\.cache\.cache\.NemotronHybridCache: give NeMo"
    ):
        theirs(ids, past_key_values=own)
    with pytest.raises(ValueError, match=r"cp_size=2, but no parallelizer has told the layer"):
        theirs(ids, cp_size=2, cp_rank=0)
    offsets = torch.tensor([0, 2, 5])
    cache = TheirCache(theirs.config, 1, torch.float32, CPU)
    with pytest.raises(ValueError, match="2 documents in a batch of 1 rows and a cache"):
        theirs(ids[:1], cu_seqlens=offsets, past_key_values=cache)
    mixer = copy.deepcopy(theirs.model.layers["0"].mixer)
    with pytest.raises(ValueError, match="a scan takes a padding mask"):
        mixer(torch.randn(1, 5, 48), attention_mask=torch.ones(1, 1, 5, 5))
