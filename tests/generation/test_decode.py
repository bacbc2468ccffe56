"""The lean decode step against the model's forward."""

import pytest
import torch

from nemotron_v3 import BackendConfig
from nemotron_v3.cache import NemotronHybridCache
from nemotron_v3.generation import generate
from nemotron_v3.generation.cpu_decode import DecodeStep, parts
from nemotron_v3.layers.block import MIXERS
from nemotron_v3.layers.moe.dispatcher import LocalDispatcher
from nemotron_v3.layers.moe.router import watching_routers
from tests.generation.samples import prompts
from tests.models import tiny_model, tokens

MODELS = {
    "all blocks": {},
    "latent, expert groups, every bias": {
        "moe_latent_size": 28, "n_group": 4, "topk_group": 2, "mlp_bias": True, "use_bias": True,
        "attention_bias": True,
    },
    "no conv bias, two taps, one group": {
        "n_groups": 1, "conv_kernel": 2, "use_conv_bias": False, "time_step_limit": (0.01, 0.2),
    },
    "tied": {"tie_word_embeddings": True, "n_groups": 3, "residual_in_fp32": True},
    "fp64": {"dtype": torch.float64},
}  # fmt: skip


def filled(model, rows, **options):
    """A cache that holds prompts of different lengths."""
    dtype = model.model.embeddings.weight.dtype
    cache = NemotronHybridCache(model.config, len(rows), dtype, **options)
    lengths = torch.tensor([0, *map(len, rows)])
    with torch.no_grad():
        model(torch.cat(rows), cu_seqlens=lengths.cumsum(0), past_key_values=cache)
    return cache


def values(cache):
    states = cache.snapshot().states
    named = {(i, n): t for i, s in states.items() for n, t in s.tensors().items()}
    return {name: tensor for name, tensor in named.items() if tensor.numel()}


@pytest.mark.parametrize("lengths", [(9,), (4, 7), (9, 9, 9), (4, 17, 9), (5,) * 40])
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_a_step_is_forward(changes, lengths):
    model = tiny_model(**changes)
    rows = prompts(lengths)
    plain, lean = filled(model, rows), filled(model, rows)
    assert DecodeStep.fits(model, lean)
    step = DecodeStep(model, lean)
    for n in range(70):  # past the first growth of the keys' and values' buffers
        new = tokens(len(rows), seed=100 + n)
        with torch.no_grad():
            expected = model(new[:, None], past_key_values=plain).logits[:, 0]
        logits = step(new)
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert lean.lengths == plain.lengths and torch.equal(lean.positions, plain.positions)
    for name, value in values(plain).items():
        close = (values(lean)[name] - value).abs().max() <= 1e-5 * value.abs().max()
        assert close, name


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def with_hook(model):
    mixer = model.model.layers[0].mixer
    mixer.out_proj.register_forward_hook(lambda module, inputs, output: 2 * output)
    return model


def with_another_projection(model):
    old = model.model.layers[0].mixer.out_proj
    model.model.layers[0].mixer.out_proj = Doubled(old.in_features, old.out_features, bias=False)
    return model


def with_another_forward(model):
    model.model.norm_f.forward = lambda x: 2 * x
    return model


def with_another_epsilon(model):
    model.model.layers[1].norm.variance_epsilon = 0.1
    return model


class Halved(LocalDispatcher):
    def combine(self, y, metadata):
        return y / 2


def with_another_dispatcher(model):
    model.model.layers[2].mixer.dispatcher = Halved()
    return model


def with_another_method_of_its_dispatcher(model):
    model.model.layers[2].mixer.dispatcher.combine = lambda y, metadata: y / 2
    return model


NOT_PLAIN = {
    "a hook": lambda: with_hook(tiny_model("M*E")),
    "a projection of another class": lambda: with_another_projection(tiny_model("M*E")),
    "another forward": lambda: with_another_forward(tiny_model("M*E")),
    "another epsilon": lambda: with_another_epsilon(tiny_model("M*E")),
    "another dispatcher": lambda: with_another_dispatcher(tiny_model("M*E")),
    "another method of its dispatcher": lambda: with_another_method_of_its_dispatcher(
        tiny_model("M*E")
    ),
    "bf16": lambda: tiny_model("M*E").bfloat16(),
    "the reference": lambda: tiny_model("M*E", backend=BackendConfig(impl="reference")).double(),
    "a narrow state": lambda: tiny_model("M*E", mamba_ssm_cache_dtype=torch.bfloat16),
}


# bf16 rounds the logits, and the state, to 8 bits.
ALLOWED = {"bf16": 0.2, "a narrow state": 2e-2}


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_what_it_does_not_know_goes_through_forward(name):
    model = NOT_PLAIN[name]()
    dtype = model.model.embeddings.weight.dtype
    assert not DecodeStep.fits(model, NemotronHybridCache(model.config, 1, dtype))
    out = generate(model, tokens(6), max_new_tokens=4, return_logprobs=True, eos_token_id=[])
    with torch.no_grad():
        scores = model.score(out.sequences)[:, 6:]
    assert (out.logprobs - scores).abs().max() <= ALLOWED.get(name, 1e-5)


def test_a_block_of_a_type_that_it_does_not_know(monkeypatch):
    """A type that only the layers know runs through forward, by either way of decoding."""
    monkeypatch.setitem(MIXERS, "another", MIXERS["mlp"])
    model = tiny_model("M-E")
    prompt = tokens(6)
    expected = generate(model, prompt, max_new_tokens=3, eos_token_id=[]).sequences
    model.model.layers[1].block_type = "another"
    assert not DecodeStep.fits(model, NemotronHybridCache(model.config, 1, torch.float32))
    out = generate(model, prompt, max_new_tokens=3, eos_token_id=[])
    assert torch.equal(out.sequences, expected)


def test_a_pytorch_that_cannot_pack_weights(monkeypatch):
    monkeypatch.setattr(parts, "onednn_works", lambda: False)
    test_a_step_is_forward({}, (4, 17, 9))


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_weights_shared_among_threads(monkeypatch, changes):
    monkeypatch.setattr(parts, "THREAD", 64)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        test_a_step_is_forward(changes, (9,))
    finally:
        torch.set_num_threads(threads)


def test_a_watched_router_sees_every_token():
    model = tiny_model("ME")
    step = DecodeStep(model, filled(model, prompts((9,))))
    expected = step(tokens(1)).clone()
    seen = []
    with watching_routers(model, lambda name: lambda routing: seen.append((name, len(routing.x)))):
        logits = DecodeStep(model, filled(model, prompts((9,))))(tokens(1))
    assert seen == [("model.layers.1.mixer.gate", 9), ("model.layers.1.mixer.gate", 1)]
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_rollback_window_is_kept():
    model = tiny_model("M*E")
    cache = NemotronHybridCache(model.config, 1, rollback_window=3)
    assert not DecodeStep.fits(model, cache)
    out = generate(model, tokens(6), max_new_tokens=5, past_key_values=cache, eos_token_id=[])
    cache.rollback(2)
    again = generate(
        model, out.sequences[:, :-2], max_new_tokens=2, past_key_values=cache, eos_token_id=[]
    )
    assert torch.equal(again.sequences, out.sequences)
