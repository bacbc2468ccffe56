"""Calls of single layers as the documentation of their API makes them, and the errors beside."""

from types import SimpleNamespace

import pytest
import torch

from nemotron_v3 import BackendConfig, NemotronHybridCache, NemotronV3Model
from nemotron_v3.layers import (
    ExpertLoad,
    NemotronV3Attention,
    NemotronV3Block,
    NemotronV3Mamba2Mixer,
    NemotronV3MambaRMSNormGated,
)
from nemotron_v3.layers.norm import NemotronV3RMSNorm
from tests.models import tiny_config, tiny_model, tokens

CONFIG = tiny_config("*-EM")
KINDS = {"attention": 0, "mlp": 1, "moe": 2, "mamba": 3}
x = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(0))


def block(kind, **options):
    torch.manual_seed(0)
    return NemotronV3Block(CONFIG, KINDS[kind], **options)


def attention(**options):
    torch.manual_seed(0)
    return NemotronV3Attention(CONFIG, **options)


def mixer():
    torch.manual_seed(0)
    return NemotronV3Mamba2Mixer(CONFIG, 3)


def cache(rows=2):
    return NemotronHybridCache(CONFIG, rows)


# --- a 4-D mask with a cache ----------------------------------------------------------------------

CAUSAL = torch.ones(9, 9, dtype=torch.bool).tril()
HIDDEN = CAUSAL.clone()
HIDDEN[3:, 2] = False  # token 2 is for its neighbours alone


def grid(mask, additive, rows=2, heads=1):
    mask = mask.expand(rows, heads, *mask.shape)
    return torch.zeros(mask.shape).masked_fill(~mask, float("-inf")) if additive else mask


@torch.no_grad()
@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("cuts", [[9], [8, 1], [5, 3, 1]], ids=str)
@pytest.mark.parametrize("backend", [{}, {"impl": "reference"}, {"attn": "flex"}], ids=str)
def test_a_4d_mask_with_a_cache_gives_the_numbers_without(additive, cuts, backend):
    layer = attention(backend=BackendConfig(**backend))
    whole = attention()(x, grid(HIDDEN, additive))
    held, parts, start = cache(), [], 0
    for length in cuts:
        end = start + length
        mask = grid(HIDDEN[start:end, :end], additive, rows=1, heads=1 if additive else 4)
        parts.append(layer(x[:, start:end], mask, held, 0))
        start = end
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert held.lengths == (9, 9) and not torch.allclose(whole, layer(x))


@torch.no_grad()
def test_a_block_of_attention_takes_one_too():
    held = cache()
    first = block("attention")(x[:, :8], grid(HIDDEN[:8, :8], True), held)
    last = block("attention")(x[:, 8:], grid(HIDDEN[8:], True), held)
    whole = block("attention")(x, grid(HIDDEN, True))
    torch.testing.assert_close(torch.cat([first, last], 1), whole)


@torch.no_grad()
def test_tokens_without_a_batch_dimension_and_offsets_beside_a_4d_mask():
    held = cache(1)
    got = attention()(x[0], grid(HIDDEN, False, 1), held, 0, cu_seqlens=torch.tensor([0, 5]))
    torch.testing.assert_close(got, attention()(x[:1], grid(HIDDEN, False, 1))[0])
    assert held.lengths == (9,)


@torch.no_grad()
def test_a_4d_mask_that_does_not_fit_the_cache_is_refused_before_it_moves():
    layer, held = attention(), cache()
    layer(x[:, :5], past_key_values=held, layer_idx=0)
    before = held.key_cache[0].clone()
    message = r"shape \(2, 1, 1, 9\): behind 5 tokens of the cache, 1 new ones need \(2, 1, 1, 6\)"
    with pytest.raises(ValueError, match=message + ".*padding mask"):
        layer(x[:, 5:6], grid(HIDDEN[8:], False), held, 0)
    with pytest.raises(ValueError, match="bool .* or additive floats, got torch.int64"):
        layer(x[:, 5:6], torch.ones(2, 1, 1, 6, dtype=torch.int64), held, 0)
    assert torch.equal(held.key_cache[0], before) and held.lengths == (5, 5)
    rows = cache()
    layer(x[:, :5], torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]), rows, 0)
    with pytest.raises(ValueError, match=r"hold \[5, 3\] and get \[1, 1\]; give a padding mask"):
        layer(x[:, 5:6], grid(HIDDEN[5:6, :6], False), rows, 0)


def test_a_cache_without_the_layers_number_is_refused():
    with pytest.raises(ValueError, match=r"give layer_idx, the layer's number.*one of \[0, 3\]"):
        attention()(x, past_key_values=cache())


# --- offsets --------------------------------------------------------------------------------------

MASKS = [
    torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0, 0]]),
    torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]]),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", MASKS, ids=["right", "left"])
def test_offsets_beside_a_mask_count_real_tokens(kind, mask):
    layer, real = block(kind), mask.bool()
    x1 = x[:1]
    got = layer(x1, mask, cu_seqlens=torch.tensor([0, 5]))
    assert torch.equal(got[real], layer(x1, mask)[real])
    two = layer(x1, mask, cu_seqlens=torch.tensor([0, 2, 5]))[real]
    alone = [layer(part[None])[0] for part in x1[real].split([2, 3])]
    torch.testing.assert_close(two, torch.cat(alone))


def test_offsets_of_real_tokens_in_several_rows():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    got = mixer()(x[:, :5], mask, cu_seqlens=torch.tensor([0, 1, 3, 7]))
    rows = [mixer()(x[:1, 2:3]), mixer()(x[:1, 3:5]), mixer()(x[1:, :4])]
    torch.testing.assert_close(got[mask.bool()], torch.cat([row[0] for row in rows]))
    with pytest.raises(ValueError, match="must hold the row border 3, counted in real tokens"):
        mixer()(x[:, :5], mask, cu_seqlens=torch.tensor([0, 4, 7]))
    with pytest.raises(ValueError, match="ends at 6, but attention_mask has 7 real tokens of 10"):
        mixer()(x[:, :5], mask, cu_seqlens=torch.tensor([0, 3, 6]))


@pytest.mark.parametrize("kind", ["mlp", "moe"])
def test_offsets_that_end_early_where_tokens_go_one_by_one(kind):
    layer = block(kind)
    offsets = {"cu_seqlens": torch.tensor([0, 5]), "max_seqlen": 5}
    assert torch.equal(layer(x[:1], **offsets), layer(x[:1]))
    assert torch.equal(layer(x[0], **offsets), layer(x[0]))
    assert torch.equal(layer(x, **offsets), layer(x))
    with pytest.raises(ValueError, match="ends at 10 but the input holds 9"):
        block("moe")(x[:1], cu_seqlens=torch.tensor([0, 10]))
    with pytest.raises(ValueError, match="max_seqlen is 4 but the longest document has 5"):
        block("moe")(x[:1], cu_seqlens=torch.tensor([0, 5]), max_seqlen=4)


def test_the_tail_is_routed_and_a_document_of_its_own():
    layer, seen = block("moe"), []
    layer.mixer.gate.watchers.append(lambda routing: seen.append(routing.layout.lengths))
    layer(x, cu_seqlens=torch.tensor([0, 2, 5]))
    assert seen == [(2, 3, 4, 9)]
    with ExpertLoad(layer) as load:
        layer(x[:1], cu_seqlens=torch.tensor([0, 5]))
    assert [int(count.sum()) for count in load.counts.values()] == [9 * 3]


@pytest.mark.parametrize("kind", ["attention", "mamba"])
def test_offsets_that_end_early_are_refused_where_documents_matter(kind):
    with pytest.raises(ValueError, match="ends at 5 but the input holds 9"):
        block(kind)(x[:1], cu_seqlens=torch.tensor([0, 5]))


@torch.no_grad()
@pytest.mark.parametrize("told", [[0, 9, 17], None], ids=["offsets", "alone"])
def test_offsets_of_whole_sequences_behind_a_cache(told):
    """Row 1 has a token of padding in its prompt; all blocks of a pass are told the same."""
    blocks, held = [block(kind) for kind in KINDS], cache()
    prompt = torch.tensor([[1] * 8, [0] + [1] * 7])
    for layer in blocks:
        layer(x[:, :8], prompt, held)
    new = x[:, 8:]
    more = {} if told is None else {"cu_seqlens": torch.tensor(told), "max_seqlen": 9}
    got = [layer(new, past_key_values=held, **more) for layer in blocks]
    full = torch.cat([prompt, torch.ones(2, 1, dtype=torch.int64)], 1)
    expected = [layer(x, full)[:, 8:] for layer in blocks]
    for mine, whole in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, whole)
    if told:
        for layer in (blocks[0], blocks[3]):
            with pytest.raises(ValueError, match="ends at 17 but the input holds 2"):
                layer(new, past_key_values=held, cu_seqlens=torch.tensor(told))


@torch.no_grad()
def test_a_model_takes_offsets_of_whole_sequences_too():
    model, ids = tiny_model("M*E").eval(), tokens(1, 9)
    held = model(ids[:, :8], use_cache=True).past_key_values
    step = model(ids[:, 8:], past_key_values=held, cu_seqlens=torch.tensor([0, 9])).logits
    torch.testing.assert_close(step, model(ids).logits[:, 8:])
    with pytest.raises(ValueError, match="ends at 9 but the input holds 1"):
        model(ids[:, 8:], past_key_values=held, cu_seqlens=torch.tensor([0, 9]))


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_queries_and_keys(kind):
    layer, offsets = block(kind), torch.tensor([0, 3, 9])
    expected = layer(x[:1], cu_seqlens=offsets)
    for told in (
        {"cu_seqlens": offsets, "max_seqlen_q": 6, "max_seqlen_kv": 6},
        {"cu_seqlens_q": offsets, "cu_seqlens_kv": offsets.clone(), "max_seqlen_q": 6},
        {"cu_seqlens_kv": offsets, "max_seqlen_kv": torch.tensor(6)},
    ):
        assert torch.equal(layer(x[:1], **told), expected)
    for told, message in (
        ({"max_seqlen_q": 6, "max_seqlen_kv": 7}, "max_seqlen_q 6 and max_seqlen_kv 7 contradict"),
        ({"cu_seqlens_q": torch.tensor([0, 4, 9])}, r"\[0, 3, 9\] and cu_seqlens_q \[0, 4, 9\]"),
        ({"max_seqlen_q": 4}, "max_seqlen is 4 but the longest document has 6"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(x[:1], cu_seqlens=offsets, **told)
    with pytest.raises(TypeError, match="window_size"):
        layer(x[:1], window_size=(4, 0))


@pytest.mark.parametrize("kind", KINDS)
def test_no_context_parallelism_may_be_said_as_none(kind):
    layer = block(kind)
    assert torch.equal(layer(x, cp_size=None, cp_rank=None), layer(x))
    with pytest.raises(ValueError, match="cp_size=2"):
        layer(x, cp_size=2, cp_rank=None)


# --- masks, norms, objects set from outside -------------------------------------------------------


def test_a_4d_mask_says_nothing_to_a_mixture_of_experts():
    layer = block("moe")
    assert torch.equal(layer(x, grid(CAUSAL, True)), layer(x))
    assert torch.equal(layer.mixer(x, grid(CAUSAL, True)), layer.mixer(x))
    with pytest.raises(ValueError, match="only an attention layer takes a 4-D mask"):
        block("mamba")(x, grid(CAUSAL, True))


@pytest.mark.parametrize("norm", [NemotronV3RMSNorm(8), NemotronV3MambaRMSNormGated(8, 4)])
def test_a_norm_draws_itself_anew(norm):
    torch.nn.init.normal_(norm.weight)
    norm.reset_parameters()
    assert torch.equal(norm.weight, torch.ones(8))


@pytest.mark.parametrize("value", [SimpleNamespace(cp_size=2), torch.nn.Identity(), 2])
@pytest.mark.parametrize("name", ["cp", "cp_mesh", "attn_module"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_object_for_context_parallelism_is_refused(kind, name, value):
    layer = block(kind).mixer
    with pytest.raises(ValueError, match=f"{name} = a .*share_tokens"):
        setattr(layer, name, value)
    layer.cp = None
    assert layer.cp is None and layer(x).shape == x.shape


def test_attention_refuses_to_be_set_up_for_context_parallelism():
    layer = attention()
    with pytest.raises(ValueError, match="setup_cp_attention.*share_tokens"):
        layer.setup_cp_attention(object())
    assert not hasattr(layer, "attn_module")


def test_a_backend_is_the_object_that_was_given():
    foreign = SimpleNamespace(attn="flex", linear="torch", rms_norm="torch_fp32", experts="gmm")
    assert attention(backend=foreign).backend is foreign
    assert attention().backend == BackendConfig()
    model = NemotronV3Model(CONFIG, foreign)
    assert model.layers[0].mixer.impl == "flex"
