"""`attn`, `linear` and `rms_norm` of a backend: the same numbers as the default, or a clear error.

Transformer Engine is a stand-in here, with the signatures of its documentation: it records what it
is called with and computes it in plain PyTorch. The real package was not run.
"""

import copy
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import nn

from nemotron_v3 import BackendConfig, NemotronV3ForCausalLM, SequenceLayout, ops
from nemotron_v3.layers import NemotronV3Attention, NemotronV3Block
from tests.accuracy import document_lengths
from tests.models import labels_of, tiny_config, tiny_model, tokens

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


# --- the stand-in -------------------------------------------------------------------------------


class WithExtraState(nn.Module):
    """Every module of Transformer Engine has an entry in its state dict for FP8 scales."""

    def get_extra_state(self):
        return torch.zeros(0, dtype=torch.uint8)

    def set_extra_state(self, state):
        raise AssertionError("state dicts hold no extra state")


class StandInLinear(WithExtraState):
    def __init__(
        self,
        in_features,
        out_features,
        sequence_parallel=False,
        fuse_wgrad_accumulation=False,
        tp_group=None,
        tp_size=1,
        get_rng_state_tracker=None,
        init_method=None,
        bias=True,
        return_bias=False,
        params_dtype=None,
        parallel_mode=None,
        parameters_split=None,
        device="cuda",
    ):
        super().__init__()
        kind = {"dtype": params_dtype, "device": device}
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **kind))
        # Without a bias it holds an empty tensor in its place.
        self.bias = nn.Parameter(torch.empty(out_features, **kind)) if bias else torch.empty(0)
        self.use_bias = bias

    def forward(self, inp, is_first_microbatch=None):
        return F.linear(inp, self.weight, self.bias if self.use_bias else None)


class StandInRMSNorm(WithExtraState):
    def __init__(
        self,
        normalized_shape=None,
        eps=1e-5,
        sequence_parallel=None,
        params_dtype=None,
        zero_centered_gamma=False,
        hidden_size=None,
        device="cuda",
    ):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(normalized_shape, dtype=params_dtype, device=device))

    def forward(self, input):
        assert input.dtype == self.weight.dtype
        return F.rms_norm(input, input.shape[-1:], self.weight, self.eps)


class StandInAttention(WithExtraState):
    calls: list[dict] = []

    def __init__(
        self,
        num_attention_heads,
        kv_channels,
        num_gqa_groups=None,
        attention_dropout=0.0,
        qkv_format="sbhd",
        attn_mask_type="causal",
        window_size=None,
        sequence_parallel=False,
        tp_size=1,
        get_rng_state_tracker=None,
        tp_group=None,
        layer_number=None,
        attention_type="self",
        softmax_scale=None,
    ):
        super().__init__()
        self.heads, self.width, self.groups = num_attention_heads, kv_channels, num_gqa_groups
        self.dropout = attention_dropout

    def forward(
        self,
        query_layer,
        key_layer,
        value_layer,
        attention_mask=None,
        qkv_format=None,
        cu_seqlens_q=None,
        cu_seqlens_kv=None,
        cu_seqlens_q_padded=None,
        cu_seqlens_kv_padded=None,
        max_seqlen_q=None,
        max_seqlen_kv=None,
        attn_mask_type=None,
        window_size=None,
    ):
        heads = (query_layer.shape[-2:], key_layer.shape[-2:], value_layer.shape[-2:])
        assert heads == ((self.heads, self.width), *[(self.groups, self.width)] * 2)
        StandInAttention.calls.append(
            {"qkv_format": qkv_format, "mask": attn_mask_type, "cu_seqlens": cu_seqlens_q}
        )
        streams = (query_layer, key_layer, value_layer)
        if qkv_format == "bshd":
            assert (attn_mask_type, cu_seqlens_q, query_layer.dim()) == ("causal", None, 4)
            return self.attend(*streams).flatten(2)
        assert (qkv_format, attn_mask_type, query_layer.dim()) == ("thd", "padding_causal", 3)
        assert cu_seqlens_q.dtype == cu_seqlens_kv.dtype == torch.int32
        lengths = cu_seqlens_q.diff().tolist()
        assert min(lengths) > 0 and max(lengths) == max_seqlen_q == max_seqlen_kv
        assert cu_seqlens_q.tolist() == cu_seqlens_kv.tolist()
        documents = zip(*(t.split(lengths) for t in streams), strict=True)
        return torch.cat([self.attend(*(t[None] for t in d))[0] for d in documents]).flatten(1)

    def attend(self, *streams):
        streams = (t.transpose(1, 2) for t in streams)
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(*streams, is_causal=True, enable_gqa=True, dropout_p=p)
        return y.transpose(1, 2)


@pytest.fixture
def te(monkeypatch):
    package, pytorch = ModuleType("transformer_engine"), ModuleType("transformer_engine.pytorch")
    pytorch.Linear = StandInLinear
    pytorch.RMSNorm = StandInRMSNorm
    pytorch.DotProductAttention = StandInAttention
    package.pytorch = pytorch
    monkeypatch.setitem(sys.modules, "transformer_engine", package)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", pytorch)
    monkeypatch.setattr(StandInAttention, "calls", [])
    return pytorch


TE = BackendConfig(attn="te", linear="te", rms_norm="te")
BIASES = {"use_bias": True, "mlp_bias": True, "attention_bias": True, "moe_latent_size": 28}


def both(**changes) -> tuple[NemotronV3ForCausalLM, NemotronV3ForCausalLM]:
    ours = tiny_model(**changes)
    theirs = NemotronV3ForCausalLM(ours.config, TE)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def assert_near(measured, expected):
    assert (measured - expected).abs().max() <= 1e-5 * expected.abs().max()


LAYOUTS = {
    "batch": SequenceLayout.plain(2, 20),
    "pack": SequenceLayout.from_lengths([5, 1, 0, 30, 4]),
    "padded": SequenceLayout.from_padding_mask(
        torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0, 0]])
    ),
}
FORMATS = {
    "batch": ("bshd", "causal", None),
    "pack": ("thd", "padding_causal", [0, 5, 6, 36, 40]),
    "padded": ("thd", "padding_causal", [0, 5, 12, 14]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("changes", [{}, BIASES], ids=["plain", "biases and latent"])
def test_transformer_engine_gives_the_same_numbers_and_gradients(te, layout, changes):
    ours, theirs = both(**changes)
    ids = tokens(*LAYOUTS[layout].shape)
    labels = labels_of(ids, LAYOUTS[layout])
    results = []
    for model in (ours, theirs):
        out = model(ids, labels=labels, layout=LAYOUTS[layout])
        out.loss.backward()
        results.append((out.logits, dict(model.named_parameters())))
    (a, grads), (b, other) = results
    assert_near(b, a)
    for name, parameter in grads.items():
        # A softmax does not feel a shift of its scores: the true gradient of k_proj.bias is 0.
        if not name.endswith("k_proj.bias"):
            assert_near(other[name].grad, parameter.grad)
    called = [(c["qkv_format"], c["mask"], c["cu_seqlens"]) for c in te.DotProductAttention.calls]
    for qkv_format, mask, offsets in called:
        offsets = None if offsets is None else offsets.tolist()
        assert (qkv_format, mask, offsets) == FORMATS[layout]
    assert len(called) == 2  # attention layers


def test_names_are_the_same_whatever_the_backend(te):
    ours, theirs = both()
    assert list(theirs.state_dict()) == list(ours.state_dict())
    assert dict(theirs.named_parameters()).keys() == dict(ours.named_parameters()).keys()
    kinds = [type(m).__name__ for m in theirs.modules()]
    assert kinds.count("StandInLinear") == 2 * 2 + 2 * 4 + 2 + 2 * 2 + 1  # the last is the head
    assert kinds.count("StandInRMSNorm") == 0  # it computes with a weight that the layer owns


def test_casts_copies_and_meta_reach_transformer_engine(te):
    ours, theirs = both()
    ids = tokens(2, 20)
    copied = copy.deepcopy(theirs).double()
    truth = ours.double()(ids).logits
    assert torch.equal(copied.double()(ids).logits, truth)
    with torch.device("meta"):
        empty = NemotronV3ForCausalLM(ours.config, TE)
    assert all(p.is_meta for p in empty.parameters())
    empty.to_empty(device="cpu").load_state_dict(theirs.state_dict())
    assert_near(empty(ids).logits, truth)


def test_an_fp32_stream_enters_a_bf16_layer_through_the_norm(te):
    norm = NemotronV3Block(tiny_config(dtype=torch.bfloat16), 0, backend=TE).norm
    x = torch.randn(3, 48)
    expected = F.rms_norm(x.bfloat16(), (48,), norm.weight, norm.variance_epsilon)
    assert torch.equal(norm(x), expected) and expected.dtype == torch.bfloat16


def test_transformer_engine_drops_in_training_only(te):
    layer = NemotronV3Attention(tiny_config(attention_dropout=0.5), TE)
    x = torch.randn(1, 9, 48)
    assert torch.equal(layer.eval()(x), layer(x))
    assert not torch.equal(layer.train()(x), layer(x))


@pytest.mark.parametrize("attn", ["te", "flex"])
def test_a_mask_of_any_pattern_needs_sdpa(te, attn):
    layer = NemotronV3Attention(tiny_config(), BackendConfig(attn=attn))
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    with torch.no_grad(), pytest.raises(ValueError, match=r"\(1, 1, 5, 5\).*attn='sdpa'"):
        layer(torch.randn(1, 5, 48), attention_mask=mask)


@pytest.mark.parametrize("field", ["attn", "linear", "rms_norm"])
def test_what_is_not_installed_is_named_with_the_way_out(monkeypatch, field):
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    default = getattr(BackendConfig(), field)
    message = f"{field}='te' needs Transformer Engine.*BackendConfig\\({field}='{default}'\\)"
    with pytest.raises(ModuleNotFoundError, match=message):
        NemotronV3Block(tiny_config(), 2, backend=BackendConfig(**{field: "te"}))


# --- flex ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flex_attention_gives_the_same_logits(layout):
    model = tiny_model()
    flex = NemotronV3ForCausalLM(model.config, BackendConfig(attn="flex"))
    flex.load_state_dict(model.state_dict())
    ids = tokens(*LAYOUTS[layout].shape)
    with torch.no_grad():
        assert_near(
            flex(ids, layout=LAYOUTS[layout]).logits, model(ids, layout=LAYOUTS[layout]).logits
        )


@settings(max_examples=15)
@given(document_lengths(chunk_size=128, max_documents=5, allow_empty=True))
def test_its_block_mask_holds_exactly_the_pairs_that_may_meet(lengths):
    """Blocks of 128 tokens; those marked full are not looked at again, so they must be right."""
    from torch.nn.attention.flex_attention import create_block_mask

    from nemotron_v3.ops.attention.flex import block_mask

    layout = SequenceLayout.from_lengths(lengths)
    ours = block_mask(layout)
    T = layout.num_tokens
    theirs = create_block_mask(ours.mask_mod, None, None, T, T, device="cpu")
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    for name in ("full_kv_num_blocks", "kv_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    query, key = torch.arange(T)[:, None], torch.arange(T)[None]
    pairs = ours.mask_mod(0, 0, query, key)
    assert torch.equal(pairs, (layout.seq_idx[query] == layout.seq_idx[key]) & (key <= query))


def test_flex_attention_over_many_blocks_is_sdpa():
    lengths = (100, 1, 300, 128, 40)
    layout = SequenceLayout.from_lengths(lengths)
    q, k, v = (torch.randn(sum(lengths), heads, 20) for heads in (4, 2, 2))
    expected = ops.attention(q, k, v, layout=layout)
    assert_near(ops.attention(q, k, v, layout=layout, impl="flex"), expected)


def test_flex_attention_cannot_train_on_a_cpu():
    layer = NemotronV3Attention(tiny_config(), BackendConfig(attn="flex"))
    with pytest.raises(RuntimeError, match="no backward pass on a CPU.*attn='sdpa'"):
        layer(torch.randn(1, 5, 48))


def test_flex_attention_has_no_dropout():
    layer = NemotronV3Attention(tiny_config(attention_dropout=0.3), BackendConfig(attn="flex"))
    with torch.no_grad(), pytest.raises(ValueError, match=r"attention_dropout is 0\.3"):
        layer(torch.randn(1, 5, 48))
