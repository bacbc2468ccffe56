"""What users get wrong: every call says what was given and what to give, and changes nothing."""

import pytest
import torch

from nemotron_v3 import NemotronHybridCache, SequenceLayout
from nemotron_v3.layers import NemotronV3Mamba2Mixer
from tests.models import tiny_config, tiny_model, tokens

MODEL = tiny_model("ME*-")
CONFIG = MODEL.config
BLOCKS = MODEL.model.layers
ATTENTION, MIXER = BLOCKS[2].mixer, BLOCKS[0].mixer
LAYERS = {
    "mamba": MIXER,
    "moe": BLOCKS[1].mixer,
    "attention": ATTENTION,
    "mlp": BLOCKS[3].mixer,
    **{f"{block.block_type} block": block for block in BLOCKS},
}
WITH_LAYOUTS = [name for name in LAYERS if name != "mlp"]
X, IDS = torch.randn(2, 7, 48), tokens(2, 7)
META = {"device": "meta"}


def raises(error, message: str, action) -> None:
    with pytest.raises(error, match=message), torch.no_grad():
        action()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([[1.0] * 48], "hidden states are a list: give a tensor"),
        (None, "hidden states are a NoneType"),
        (X.numpy(), "hidden states are a ndarray"),
        (X.long(), "hidden states are torch.int64: give floating-point"),
        (X > 0, "hidden states are torch.bool"),
        (X.to(torch.complex64), "hidden states are torch.complex64"),
    ],
)
def test_hidden_states_that_are_no_floats(name, given, message):
    raises(TypeError, message, lambda: LAYERS[name](given))


@pytest.mark.parametrize("name", LAYERS)
def test_a_scalar(name):
    raises(ValueError, r"(hidden size|width) 1 .*48", lambda: LAYERS[name](torch.tensor(1.0)))


@pytest.mark.parametrize("name", ["mamba", "moe", "attention", "mlp"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_than_the_layers(name, dtype):
    message = f"hidden states are {dtype}, the layer's weights torch.float32: cast .*to.{dtype}"
    raises(TypeError, message, lambda: LAYERS[name](X.to(dtype)))


@pytest.mark.parametrize("name", ["mamba", "moe", "attention", "mlp"])
def test_autocast_brings_dtypes_together(name):
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        narrow, wide = LAYERS[name](X.bfloat16()).float(), LAYERS[name](X.bfloat16().float())
    assert (narrow - wide).abs().max() <= 0.05 * wide.abs().max()


@pytest.mark.parametrize("name", WITH_LAYOUTS)
@pytest.mark.parametrize(
    ("said", "error", "message"),
    [
        ({"attention_mask": [[1] * 7] * 2}, TypeError, "attention_mask is a list: give a tensor"),
        ({"attention_mask": torch.ones(2, 7, **META)}, ValueError, "attention_mask is on the meta"),
        ({"attention_mask": torch.ones(2, 6)}, ValueError, r"shape \(2, 6\), the tokens \(2, 7\)"),
        ({"attention_mask": torch.ones(2, 1, 7)}, ValueError, r"got \(2, 1, 7\)"),
        ({"attention_mask": torch.full((2, 7), 2)}, ValueError, "got 2: give document numbers"),
        ({"cu_seqlens": [0, 7, 14]}, TypeError, "cu_seqlens is a list"),
        ({"cu_seqlens": torch.tensor([0, 7, 14], **META)}, ValueError, "cu_seqlens is on the meta"),
        ({"cu_seqlens": torch.tensor([0, -7, 14])}, ValueError, r"never decrease, got \[0, -7"),
        ({"seq_idx": [[0] * 7] * 2}, TypeError, "seq_idx is a list"),
        ({"seq_idx": torch.zeros(2, 7)}, ValueError, "seq_idx must be integers"),
        ({"layout": "packed"}, TypeError, "layout is a str: give a SequenceLayout"),
        ({"layout": torch.ones(2, 7)}, TypeError, "layout is a Tensor: give a SequenceLayout"),
        ({"layout": SequenceLayout.from_lengths([14])}, ValueError, r"\(14,\), the input .*\(2, 7"),
    ],
)
def test_where_tokens_lie(name, said, error, message):
    raises(error, message, lambda: LAYERS[name](X, **said))


def test_layouts_made_by_hand():
    raises(TypeError, "seq_idx is a list", lambda: SequenceLayout.from_seq_idx([0, 1]))
    raises(TypeError, "mask is a list", lambda: SequenceLayout.from_padding_mask([[1]]))
    raises(TypeError, "cu_seqlens is a list", lambda: SequenceLayout.from_cu_seqlens([0, 2]))


CALLS = [
    ({"input_ids": IDS.to(torch.uint8)}, TypeError, "input_ids are torch.uint8: .*int64 or int32"),
    ({"input_ids": IDS.to(torch.int16)}, TypeError, "input_ids are torch.int16"),
    ({"input_ids": IDS - 97}, IndexError, f"token id {int(IDS[0, 0]) - 97} is outside .* of 97"),
    ({"input_ids": torch.full((2, 3), 97)}, IndexError, "token id 97 is outside the vocabulary"),
    ({"input_ids": IDS.to("meta")}, ValueError, "tokens are on the meta device, the model on cpu"),
    ({"input_ids": IDS[:0]}, ValueError, r"shape \(0, 7\) hold no document"),
    ({"inputs_embeds": X.long()}, TypeError, "inputs_embeds are torch.int64: give floats"),
    ({"inputs_embeds": X.to(torch.complex64)}, TypeError, "inputs_embeds are torch.complex64"),
    (
        {"inputs_embeds": torch.tensor(1.0)},
        ValueError,
        r"shape \(\), the model's hidden size is 48",
    ),
    ({"labels": IDS.tolist()}, TypeError, "labels are a list: give a tensor"),
    ({"labels": IDS[:, 1:]}, ValueError, r"labels have shape \(2, 6\), the tokens \(2, 7\)"),
    ({"labels": IDS.to("meta")}, ValueError, "labels are on meta, the tokens on cpu: move one"),
    ({"labels": IDS.to(torch.complex64)}, TypeError, "labels are torch.complex64"),
    ({"labels": IDS - 97}, IndexError, "outside the vocabulary of 97"),
    ({"logits_to_keep": 1.5}, TypeError, "logits_to_keep is 1.5: give how many"),
    ({"logits_to_keep": None}, TypeError, "logits_to_keep is None"),
    ({"logits_to_keep": True}, TypeError, "logits_to_keep is True"),
    ({"logits_to_keep": [1]}, TypeError, r"logits_to_keep is \[1\]"),
    ({"logits_to_keep": torch.ones(7)}, TypeError, r"is torch.float32 of shape \(7,\)"),
    ({"logits_to_keep": IDS > 3}, TypeError, r"is torch.bool of shape \(2, 7\)"),
    ({"logits_to_keep": torch.tensor([6, 7])}, ValueError, "the position 7, .* has 7 places: give"),
    ({"logits_to_keep": torch.tensor(-1)}, ValueError, "the position -1, .* positions from 0 to 6"),
    ({"output_attentions": True}, TypeError, "'output_attentions': the model takes layout, cu_seq"),
    ({"attention_mask": torch.ones(2, 1, 7, 7)}, ValueError, "only an attention layer takes a 4-D"),
    ({"attention_mask": [[1] * 7] * 2}, TypeError, "attention_mask is a list"),
]


@pytest.mark.parametrize(("call", "error", "message"), CALLS, ids=[c[2] for c in CALLS])
@pytest.mark.parametrize("cached", [False, True])
def test_a_model(call, error, message, cached):
    """A cache that is given with it is as it was."""
    cache = NemotronHybridCache(CONFIG, 2)
    with torch.no_grad():
        MODEL(IDS, past_key_values=cache)
    before = cache.snapshot()
    tokens_given = {} if call.keys() & {"input_ids", "inputs_embeds"} else {"input_ids": IDS}
    if error is IndexError and "labels" in call:
        cached = False  # a target is looked at by the loss, which is behind the layers
    given = {"past_key_values": cache} if cached else {}
    raises(error, message, lambda: MODEL(**tokens_given, **call, **given))
    after = cache.snapshot()
    assert cache.lengths == (7, 7)
    for layer, state in before.states.items():
        for name, tensor in state.tensors().items():
            assert torch.equal(tensor, after.states[layer].tensors()[name])


def cache(**options) -> NemotronHybridCache:
    return NemotronHybridCache(CONFIG, 2, **options)


OTHER = NemotronHybridCache(tiny_config("-E*", num_key_value_heads=1), 2)
NARROW = NemotronHybridCache(tiny_config("M", ssm_state_size=8), 2)
CACHES = [
    (lambda: NemotronHybridCache(CONFIG, 2.0), TypeError, "batch_size is 2.0, a float"),
    (lambda: NemotronHybridCache(CONFIG, "2"), TypeError, "batch_size is '2', a str"),
    (lambda: NemotronHybridCache(CONFIG, True), TypeError, "batch_size is True, a bool"),
    (lambda: cache(max_length=3.5), TypeError, "max_length is 3.5"),
    (lambda: cache(rollback_window=1.5), TypeError, "rollback_window is 1.5"),
    (lambda: cache(dtype=torch.int64), TypeError, "a cache cannot hold torch.int64"),
    (lambda: cache(dtype="float32"), TypeError, "a cache cannot hold 'float32'"),
    (lambda: cache().rollback("1"), TypeError, "an amount of tokens is '1', a str"),
    (lambda: cache().rollback(0.5), TypeError, "an amount of tokens is 0.5"),
    (lambda: cache().crop(0.5), TypeError, "length is 0.5"),
    (lambda: cache().select([0.5]), TypeError, "a row is 0.5"),
    (lambda: cache().clear("a"), TypeError, "row is 'a'"),
    (lambda: cache().repeat(1.5), TypeError, "n is 1.5"),
    (lambda: cache().restore(None), TypeError, "the snapshot is a NoneType"),
    (lambda: NemotronHybridCache.cat([None]), TypeError, "cache 0 is a NoneType"),
    (lambda: NemotronHybridCache.cat([cache(), 1]), TypeError, "cache 1 is a int"),
    (lambda: cache().update_conv_state(2, X), ValueError, "layer 2 holds no conv state"),
    (lambda: cache().update_conv_state(9, X), ValueError, "layer 9 holds no conv state"),
    (lambda: cache().update_conv_state(0, X), ValueError, r"conv state \(2, 7, 48\) does not fit"),
    (lambda: ATTENTION(X, past_key_values=cache()), ValueError, "layer None holds no keys"),
    (
        lambda: ATTENTION(X, past_key_values=cache(), layer_idx="2"),
        ValueError,
        "layer '2' holds no keys",
    ),
    (
        lambda: ATTENTION(X, past_key_values=cache(), layer_idx=0),
        ValueError,
        "layer 0 holds no keys",
    ),
    (
        lambda: ATTENTION(X, past_key_values=OTHER, layer_idx=2),
        ValueError,
        r"keys \(14, 2, 20\).*1 heads",
    ),
    (
        lambda: NemotronV3Mamba2Mixer(CONFIG, 2)(X, past_key_values=cache()),
        ValueError,
        "layer 2 holds no mamba states",
    ),
    (
        lambda: MIXER(X, past_key_values=NARROW),
        ValueError,
        r"92 channels and states \(6, 10, 8\), the mixer 124 and \(6, 10, 16\)",
    ),
]


@pytest.mark.parametrize(("action", "error", "message"), CACHES, ids=[c[2] for c in CACHES])
def test_a_cache(action, error, message):
    raises(error, message, action)
    for kept in (OTHER, NARROW):
        assert kept.lengths == (0, 0) and kept.withheld is None


def test_what_is_right_at_the_edges():
    with torch.no_grad():
        assert MODEL(IDS, logits_to_keep=99).logits.shape == (2, 7, 97)
        assert MODEL(IDS[:, :0], labels=IDS[:, :0]).loss == 0
        assert MODEL(IDS[:, :1], labels=IDS[:, :1]).loss == 0
        assert MODEL(IDS, labels=torch.full_like(IDS, -100)).loss == 0
        assert torch.equal(MODEL(IDS.int(), labels=IDS.int()).logits, MODEL(IDS).logits)
        held = cache()
        MODEL(IDS, past_key_values=held)
        held.rollback(torch.tensor([0, 7]))
        held.reorder_cache([1, 0])
    assert held.lengths == (0, 7)
