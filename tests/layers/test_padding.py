"""What is not a number at padding reaches nothing: no output, no gradient, no state, no loss."""

import pytest
import torch

from nemotron_v3 import BackendConfig, NemotronHybridCache, SequenceLayout
from tests.models import tiny_model, tokens

MASK = torch.tensor(
    [[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0, 0]]
)
REAL = MASK.bool()
BIASES = {"use_bias": True, "mlp_bias": True, "attention_bias": True}
BLOCKS = {"mamba": 0, "moe": 1, "attention": 2, "mlp": 3}
WITHOUT_TRITON = ("attention",)
FORMS = ("reference", "portable", "triton")
DTYPES = {"reference": torch.float64, "portable": torch.float32, "triton": torch.float32}


def padded_layouts():
    """The same padding said in three ways."""
    numbers = torch.arange(4)[:, None].expand_as(MASK).masked_fill(~REAL, -1)
    return [
        {"attention_mask": MASK},
        {"seq_idx": numbers},
        {"layout": SequenceLayout.from_padding_mask(MASK)},
    ]


def model_of(form: str, pattern: str = "ME*-", **changes):
    backend = BackendConfig(impl=form)
    return tiny_model(pattern, backend=backend, **(BIASES | changes)).to(DTYPES[form])


def results(layer, x, dy, **said) -> dict[str, torch.Tensor]:
    """Output at real tokens, and all gradients."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x, **said)
    y.backward(dy)
    grads = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach()[REAL], "x": x.grad[REAL]} | grads


def hold(clean: dict[str, torch.Tensor], spoilt: dict[str, torch.Tensor]) -> None:
    assert clean.keys() == spoilt.keys()
    for name, tensor in clean.items():
        assert torch.isfinite(tensor).all(), name
        assert torch.equal(spoilt[name], tensor), name


def drawn(form: str) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = DTYPES[form]
    x, dy = torch.randn(2, *MASK.shape, 48, dtype=dtype)
    return x, dy * MASK[..., None]


@pytest.mark.parametrize("said", range(3), ids=["mask", "seq_idx", "layout"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("form", ["reference", "portable"])
@pytest.mark.parametrize("kind", BLOCKS)
def test_a_block_and_its_mixer_called_alone(kind, form, value, said):
    block = model_of(form).model.layers[BLOCKS[kind]]
    x, dy = drawn(form)
    spoilt = x.masked_fill(~REAL[..., None], value)
    kwargs = padded_layouts()[said]
    for layer in (block,) if kind == "mlp" else (block, block.mixer):
        hold(results(layer, x, dy, **kwargs), results(layer, spoilt, dy, **kwargs))


@pytest.mark.heavy  # in the interpreter
@pytest.mark.parametrize("kind", [kind for kind in BLOCKS if kind not in WITHOUT_TRITON])
def test_a_block_in_triton(kind):
    block = model_of("triton").model.layers[BLOCKS[kind]]
    x, dy = drawn("triton")
    spoilt = x.masked_fill(~REAL[..., None], float("nan"))
    hold(
        results(block, x, dy, attention_mask=MASK), results(block, spoilt, dy, attention_mask=MASK)
    )


@pytest.mark.parametrize("behind", [-100, 5])
@pytest.mark.parametrize(
    ("form", "pattern"), [("portable", "ME*-"), ("reference", "ME*-"), ("triton", "E")]
)
def test_a_model_its_loss_and_its_logits(form, pattern, behind):
    model = model_of(form, pattern, vocab_size=33)
    labels = tokens(*MASK.shape, vocab=33).masked_fill(~REAL, -100)
    labels[1, 4] = behind  # at padding, predicted by the last real token
    x, _ = drawn(form)
    found = []
    for embeds in (x, x.masked_fill(~REAL[..., None], float("nan"))):
        model.zero_grad()
        embeds = embeds.requires_grad_()
        out = model(inputs_embeds=embeds, attention_mask=MASK, labels=labels)
        out.loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append({"loss": out.loss, "logits": out.logits, "x": embeds.grad} | grads)
    hold(*found)


@pytest.mark.parametrize("window", [0, 2])
def test_a_cache(window):
    model = model_of("portable")
    x, _ = drawn("portable")
    found = []
    for embeds in (x, x.masked_fill(~REAL[..., None], float("nan"))):
        cache = NemotronHybridCache(model.config, 4, rollback_window=window)
        with torch.no_grad():
            first = model(inputs_embeds=embeds, attention_mask=MASK, past_key_values=cache).logits
            again = model(inputs_embeds=embeds, attention_mask=MASK, past_key_values=cache).logits
            last = model(tokens(4, 1), past_key_values=cache).logits
        states = {
            f"{name} {layer}": tensor
            for layer, state in cache.states.items()
            for name, tensor in state.tensors().items()
        }
        found.append({"first": first, "again": again, "last": last} | states)
    hold(*found)


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_block_leaves_the_stream_at_padding_as_it_is(kind):
    block = model_of("portable").model.layers[BLOCKS[kind]]
    x, dy = drawn("portable")
    x = x.requires_grad_()
    y = block(x, attention_mask=MASK)
    assert torch.equal(y[~REAL], x[~REAL])
    y.backward(torch.ones_like(y))
    assert torch.equal(x.grad[~REAL], torch.ones_like(x)[~REAL])


@pytest.mark.parametrize("kind", BLOCKS)
def test_another_document_that_is_not_a_number(kind):
    """In a pack: outputs and the gradient of its own tokens."""
    block = model_of("portable").model.layers[BLOCKS[kind]]
    lengths, own = [5, 9, 4], slice(5, 14)
    x, dy = torch.randn(2, 18, 48)
    found = []
    for value in (0.0, float("nan")):
        given = torch.full_like(x, value)
        given[own] = x[own]
        given.requires_grad_()
        y = block(given, layout=SequenceLayout.from_lengths(lengths))
        y.backward(dy)
        found.append({"y": y.detach()[own], "x": given.grad[own]})
    hold(*found)
