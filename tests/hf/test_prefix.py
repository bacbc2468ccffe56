"""A cache that holds keys and values before the first token: a prefix that attention sees."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from nemotron_v3.hf.states import CACHE_NAME
from tests.hf.models import accelerated, close, tokens, transformers_model

BLOCKS = {
    "hybrid": ["mamba", "attention", "moe", "mamba", "attention", "mlp"],
    "attention first": ["attention", "mamba", "mlp"],
    "attention alone": ["attention", "mlp", "attention"],
}
LENGTH = 5  # of the prefix
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(params=BLOCKS.values(), ids=BLOCKS)
def pair(request):
    plain = transformers_model(layers_block_type=request.param)
    return plain, accelerated(plain)


def keys_and_values(rows: int = 2, seed: int = 0) -> list[torch.Tensor]:
    """Two tensors for each of two attention layers."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 2, LENGTH, 20, generator=generator) for _ in range(4)]


def prefixed(model, tensors, kind=DynamicCache, **options):
    cache = kind(config=model.config, **options)
    blocks = model.config.layers_block_type
    attention = [i for i, block in enumerate(blocks) if block == "full_attention"]
    for n, layer in enumerate(attention):
        cache.update(tensors[2 * n], tensors[2 * n + 1], layer)
    return cache


def masks(S: int) -> dict[str, torch.Tensor | None]:
    left, right, prefix = (torch.ones(2, LENGTH + S, dtype=torch.int64) for _ in range(3))
    left[1, LENGTH : LENGTH + 3] = 0
    right[1, -3:] = 0
    prefix[0, :2] = 0
    return {"none": None, "left": left, "right": right, "in the prefix": prefix}


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("said", ["none", "left", "right", "in the prefix"])
@torch.no_grad()
def test_attention_sees_it_and_scans_begin_behind_it(pair, said, kind):
    ids, following = tokens(2, 9), tokens(2, 3, seed=1)
    mask = masks(9)[said]
    real = torch.ones(2, 9, dtype=torch.bool) if mask is None else mask[:, LENGTH:] == 1
    options = {"kind": StaticCache, "max_cache_len": 30} if kind == "static" else {}
    found = []
    for model in pair:
        cache = prefixed(model, keys_and_values(), **options)
        logits = [model(ids, attention_mask=mask, past_key_values=cache).logits[real]]
        longer = mask
        for token in following.split(1, 1):
            if mask is not None:
                longer = torch.cat([longer, torch.ones(2, 1, dtype=torch.int64)], 1)
            out = model(token, attention_mask=longer, past_key_values=cache)
            logits.append(out.logits[:, 0])
        found.append(torch.cat(logits))
    if said == "right":  # a plain model's scans go on from padding
        found = [logits[: int(real.sum())] for logits in found]
    plain, ours = found
    assert close(ours, plain)
    without = pair[1](ids, attention_mask=None if mask is None else mask[:, LENGTH:]).logits
    assert not close(without[real], plain[: int(real.sum())], 1e-3)


@pytest.mark.parametrize("training", [False, True])
def test_a_prefix_is_trained(pair, training):
    ids, found = tokens(2, 9), []
    for model in pair:
        model.train(training)
        prefix = [t.requires_grad_() for t in keys_and_values()]
        model.zero_grad()
        model(ids, labels=ids, past_key_values=prefixed(model, prefix)).loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        grads |= {f"prefix {n}": t.grad for n, t in enumerate(prefix) if t.grad is not None}
        found.append(grads)
    plain, ours = found
    assert plain.keys() == ours.keys() and "prefix 0" in ours
    for name, gradient in plain.items():
        assert close(ours[name], gradient, 1e-4), name


def test_generating_behind_a_prefix(pair):
    ids = tokens(2, 6)
    mask = torch.ones(2, LENGTH + 6, dtype=torch.int64)
    # generate() takes the cache's places to be the first tokens' own.
    ids = torch.cat([torch.zeros(2, LENGTH, dtype=torch.int64), ids], 1)
    plain, ours = (
        model.generate(
            ids,
            attention_mask=mask,
            past_key_values=prefixed(model, keys_and_values()),
            max_new_tokens=12,
            **GREEDY,
        )
        for model in pair
    )
    assert torch.equal(ours, plain)


def peft_prefix(model):
    from peft import PrefixTuningConfig, get_peft_model

    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, num_attention_heads=2, token_dim=40
    )
    torch.manual_seed(0)
    return get_peft_model(model, config).eval()


def test_prefix_tuning_of_attention_alone_is_the_plain_models():
    pytest.importorskip("peft")
    plain = transformers_model(layers_block_type=BLOCKS["attention alone"])
    ids, found = tokens(2, 7), []
    mask, models = torch.ones_like(ids), [peft_prefix(m) for m in (plain, accelerated(plain))]
    for tuned in models:
        out = tuned(ids, attention_mask=mask, labels=ids)
        out.loss.backward()
        (gradient,) = [p.grad for p in tuned.parameters() if p.requires_grad]
        found.append((out.logits, gradient))
    assert close(found[1][0], found[0][0]) and close(found[1][1], found[0][1], 1e-4)

    def generated(model):
        return model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, **GREEDY)

    if CACHE_NAME == "cache":  # a plain model generates without the prefix, and only warns
        with pytest.raises(ValueError, match="PEFT.*prefix beside the cache"):
            generated(models[1])
    else:
        assert torch.equal(generated(models[1]), generated(models[0]))


def test_prefix_tuning_of_a_hybrid_is_refused_by_both():
    pytest.importorskip("peft")
    plain = transformers_model(layers_block_type=BLOCKS["hybrid"])
    ids = tokens(1, 4)
    ours = peft_prefix(accelerated(plain))
    with pytest.raises(
        ValueError,
        match=r"keys and values of 5 tokens for layer 0, a mamba layer.*prefix tuning.*LoRA.*"
        r"DynamicCache\(config=model.config\) whose attention layers \[1, 4\] alone",
    ):
        ours(ids)
    with pytest.raises(ValueError, match="layer"):
        peft_prefix(plain)(ids)


def test_what_cannot_be_a_prefix_is_refused_before_anything_is_changed():
    ours = accelerated(transformers_model(layers_block_type=BLOCKS["hybrid"]))
    with pytest.raises(TypeError, match=rf"{CACHE_NAME} is a tuple: .*update\(keys, values"):
        ours(tokens(1, 4), past_key_values=tuple(keys_and_values()))
    cache = prefixed(ours, keys_and_values())
    with pytest.raises(ValueError, match="2 rows in layer 1, the tokens have 3"):
        ours(tokens(3, 4), past_key_values=cache)
    assert cache.get_seq_length() == LENGTH and not cache.has_previous_state(0)
    with torch.no_grad():
        ours(tokens(2, 4), past_key_values=cache)
    with pytest.raises(ValueError, match="2 rows in layer 0, the tokens have 1"):
        ours(tokens(1, 1), past_key_values=cache)
    assert cache.get_seq_length() == LENGTH + 4


@pytest.mark.parametrize(
    ("own", "other", "message"),
    [
        ("mamba attention", "attention mamba", "no state for the mamba layer 0"),
        ("attention mlp", "mamba attention", "no place for keys of the attention layer 0"),
        ("attention mlp", "mlp attention", "no place for keys of the attention layer 0"),
    ],
)
def test_a_cache_of_other_layers_is_refused(own, other, message):
    ours = accelerated(transformers_model(layers_block_type=own.split()))
    cache = DynamicCache(config=transformers_model(layers_block_type=other.split()).config)
    with pytest.raises(ValueError, match=message + ".*DynamicCache.config=model.config"):
        ours(tokens(1, 3), past_key_values=cache)
