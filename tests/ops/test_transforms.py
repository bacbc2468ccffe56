"""torch.func: the reference can be transformed, and no other form pretends to."""

import logging

import pytest
import torch

from nemotron_v3 import ops
from nemotron_v3.ops import registry
from tests.models import tiny_model, tokens


@pytest.fixture(scope="module")
def model():
    return tiny_model("ME*-", dtype=torch.float64)


def loss(model, parameters, ids):
    return torch.func.functional_call(model, parameters, (ids,), {"labels": ids}).loss


def test_grad_and_jvp_are_those_of_autograd(model, caplog):
    registry._say_reference_once.cache_clear()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    ids = tokens(2, 9)
    with caplog.at_level(logging.WARNING, "nemotron_v3"):
        found = torch.func.grad(lambda p: loss(model, p, ids))(parameters)
    assert "rms_norm: the step-by-step reference runs" in caplog.text
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    for name, gradient in expected.items():
        gradient = torch.zeros_like(found[name]) if gradient is None else gradient
        assert (found[name] - gradient).abs().max() <= 1e-10 * gradient.abs().max() + 1e-14, name
    along = {name: torch.randn_like(p) for name, p in parameters.items()}
    _, slope = torch.func.jvp(lambda p: loss(model, p, ids), (parameters,), (along,))
    product = sum((found[name] * along[name]).sum() for name in along)
    assert (slope - product).abs() <= 1e-9 * product.abs()


def norm(impl):
    weight = torch.randn(32)
    return lambda x: ops.rms_norm(x, weight, 1e-5, torch.float32, impl=impl).square().sum()


TRANSFORMS = {
    "grad": lambda f: torch.func.grad(f)(torch.randn(4, 32)),
    "vjp": lambda f: torch.func.vjp(f, torch.randn(4, 32)),
    "jvp": lambda f: torch.func.jvp(f, (torch.randn(4, 32),), (torch.randn(4, 32),)),
    "vmap of grad": lambda f: torch.func.vmap(torch.func.grad(f))(torch.randn(3, 4, 32)),
    "vmap": lambda f: torch.func.vmap(f)(torch.randn(3, 4, 32)),
}


@pytest.mark.parametrize("impl", ["portable", "triton"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_form_asked_for_by_name_says_what_it_cannot_do(name, impl):
    with pytest.raises(RuntimeError, match="use torch.autograd.grad .* impl='reference'"):
        TRANSFORMS[name](norm(impl))


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_vmap_takes_the_reference(impl):
    x, f = torch.randn(3, 4, 32), norm(impl)
    expected = torch.stack([f(part) for part in x])
    assert torch.allclose(torch.func.vmap(f)(x), expected, rtol=1e-6)


@pytest.mark.parametrize("pattern", ["M", "*", "-"])
def test_a_model_is_batched(pattern):
    model, ids = tiny_model(pattern, dtype=torch.float64), tokens(3, 9)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def logits(ids):
        return torch.func.functional_call(model, parameters, (ids[None],)).logits[0]

    expected = model(ids).logits
    assert (torch.func.vmap(logits)(ids) - expected).abs().max() <= 1e-10 * expected.abs().max()
