"""Linear cross entropy by the rule, and what it must neither compute nor hold."""

from functools import partial
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nemotron_v3 import ops
from nemotron_v3.ops.linear_cross_entropy import _chunks, cases, reference
from tests.accuracy import PlainPyTorch, check, relative_error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("linear_cross_entropy", "linear_log_probabilities")


def inputs_for(name, case, dtype, generator):
    inputs = cases.make_inputs(case, dtype, "cpu", generator)
    if name == "linear_log_probabilities":
        del inputs.options["z_loss"]
    return inputs


def hold(name, case, dtype):
    """The portable form; a linear head returns the model's dtype, so plain PyTorch's does too."""
    truth = getattr(reference, name)
    check(
        partial(getattr(ops, name), impl="portable"),
        truth,
        partial(inputs_for, name, case, dtype),
        dtype=dtype,
        plain=PlainPyTorch(truth, dtype, results=True),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("name", NAMES)
def test_accuracy(name, case, dtype):
    hold(name, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_many_chunks_and_few_of_them_added_in_16_bits(name, dtype, monkeypatch):
    case = cases.Case("many", 70, 16, 67, ignored=0.3)
    monkeypatch.setattr(_chunks, "ROWS", 8)
    for rows in (8, 16):  # 9 chunks, added up in fp32, and 5, in the weight's dtype
        monkeypatch.setattr(_chunks, "CPU_BYTES", 67 * rows * dtype.itemsize)
        assert _chunks.chunk_rows(70, 67, dtype, torch.device("cpu")) == rows
        hold(name, case, dtype)


@pytest.mark.parametrize(
    ("tokens", "limit", "rows"),
    [(0, 100, 1), (5, 10**6, 5), (1000, 256 * 67, 256), (300, 1, 128), (130, 66 * 130, 128)],
)
def test_chunks_are_few_and_equal(tokens, limit, rows, monkeypatch):
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(_chunks, "CPU_BYTES", limit * dtype.itemsize)
        assert _chunks.chunk_rows(tokens, 67, dtype, torch.device("cpu")) == rows


def drawn(T=40, D=8, V=31, dtype=torch.float64):
    hidden = torch.randn(T, D, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, dtype=dtype, requires_grad=True)
    targets = torch.randint(V, (T,))
    targets[::7] = -100
    return hidden, weight, targets


def test_the_reference_is_torchs():
    hidden, weight, targets = drawn()
    logits = hidden @ weight.T
    expected = F.cross_entropy(logits, targets, ignore_index=-100)
    counted = targets != -100
    z = logits.logsumexp(1)[counted].square().mean()
    measured = reference.linear_cross_entropy(hidden, weight, targets, z_loss=0.3)
    torch.testing.assert_close(measured, expected + 0.3 * z, rtol=1e-13, atol=0)
    gradients = (torch.autograd.grad(x, (hidden, weight)) for x in (measured, expected + 0.3 * z))
    for a, b in zip(*gradients, strict=True):
        assert relative_error(a, b) < 1e-13


@pytest.mark.parametrize("impl", ["reference", "portable"])
def test_terms_of_a_token(impl):
    hidden, weight, targets = drawn()
    out = ops.linear_cross_entropy(hidden, weight, targets, z_loss=0.2, per_token=True, impl=impl)
    logits, counted = (hidden @ weight.T).detach(), targets != -100
    log_p = logits.log_softmax(1).gather(1, targets.clamp(min=0)[:, None])[:, 0] * counted
    log_z = logits.logsumexp(1) * counted
    torch.testing.assert_close(out.log_probabilities, log_p)
    torch.testing.assert_close(out.log_normalizers, log_z)
    assert not out.log_probabilities.requires_grad and not out.log_normalizers.requires_grad
    torch.testing.assert_close(out.loss, (0.2 * log_z**2 - log_p).sum() / counted.sum())
    differentiable = ops.linear_log_probabilities(hidden, weight, targets, impl=impl)
    for a, b in zip(differentiable, (log_p, log_z), strict=True):
        torch.testing.assert_close(a, b)
        assert a.requires_grad


class Products(TorchDispatchMode):
    """How many matrix products run, and the most elements of a tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.count = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.untyped_storage().nbytes() // out.itemsize)
        return out


def test_only_wanted_gradients_are_computed_and_none_without_grad():
    hidden, weight, targets = drawn()
    with Products() as seen, torch.no_grad():
        loss = ops.linear_cross_entropy(hidden, weight, targets)
    assert (seen.count, loss.requires_grad) == (1, False)
    for leaves in ((hidden, weight), (hidden,), (weight,)):
        given = [t if any(t is leaf for leaf in leaves) else t.detach() for t in (hidden, weight)]
        with Products() as seen:
            loss = ops.linear_cross_entropy(*given, targets)
            torch.autograd.grad(loss, leaves)
        assert seen.count == 1 + len(leaves)


def test_no_array_holds_all_logits(monkeypatch):
    monkeypatch.setattr(_chunks, "CPU_BYTES", 128 * 300 * 8)
    hidden, weight, targets = drawn(T=1024, D=4, V=300)
    with Products() as seen:
        ops.linear_cross_entropy(hidden, weight, targets).backward()
    assert 0 < seen.largest <= 128 * 300


def test_gradients_scale_with_what_follows_and_can_be_asked_for_twice():
    hidden, weight, targets = drawn()
    loss = ops.linear_cross_entropy(hidden, weight, targets)
    once = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    thrice = torch.autograd.grad(3 * loss, (hidden, weight))
    for a, b in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * a, b)


def test_the_scale_of_a_gradient_is_not_rounded():
    """1/192 in bf16 is off by 2e-3, in every element the same way."""
    hidden, weight, targets = drawn(T=192, D=32, dtype=torch.float32)
    targets = targets.clamp(min=0)
    narrow = [t.detach().bfloat16().requires_grad_() for t in (hidden, weight)]
    measured = torch.autograd.grad(ops.linear_cross_entropy(*narrow, targets), narrow)
    exact = [t.detach().double().requires_grad_() for t in narrow]
    true = torch.autograd.grad(reference.linear_cross_entropy(*exact, targets), exact)
    for a, b in zip(measured, true, strict=True):
        mean = float((a.double() * b).sum() / (b * b).sum())
        assert abs(mean - 1) < 5e-4


def test_a_compiled_graph_equals_eager():
    hidden, weight, targets = drawn(dtype=torch.float32)

    def loss(h, w):
        return ops.linear_cross_entropy(h, w, targets, impl="portable")

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    results = [
        (value, *torch.autograd.grad(value, (hidden, weight)))
        for value in (loss(hidden, weight), compiled(hidden, weight))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autocast_multiplies_in_its_dtype_and_returns_fp32_gradients():
    hidden, weight, targets = drawn(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ops.linear_cross_entropy(hidden, weight, targets)
    assert loss.dtype == torch.float32
    gradients = torch.autograd.grad(loss, (hidden, weight))
    assert {g.dtype for g in gradients} == {torch.float32}
    rounded = [t.detach().bfloat16() for t in (hidden, weight)]
    assert torch.equal(loss, ops.linear_cross_entropy(*rounded, targets))


def test_bad_input_is_refused():
    hidden, weight, targets = drawn()
    with pytest.raises(ValueError, match=r"weight \(31, 7\)"):
        ops.linear_cross_entropy(hidden, weight[:, :7], targets)
    with pytest.raises(ValueError, match=r"targets \(3,\)"):
        ops.linear_cross_entropy(hidden, weight, targets[:3])
    with pytest.raises(ValueError, match="float64 and the weight torch.float32"):
        ops.linear_cross_entropy(hidden, weight.float(), targets)
    with pytest.raises(RuntimeError, match="Triton form cannot run"):
        ops.linear_cross_entropy(hidden, weight, targets, impl="triton")
    targets[1] = 31
    said = "token 1 is 31, outside the vocabulary of 31"
    for impl in ("reference", "portable"):
        with pytest.raises(IndexError, match=said):
            ops.linear_cross_entropy(hidden, weight, targets, impl=impl)
        with pytest.raises(IndexError, match=said):
            ops.cross_entropy(hidden @ weight.t(), targets, impl=impl)
    targets[1] = -1
    with pytest.raises(IndexError, match="token 1 is -1"):
        ops.linear_log_probabilities(hidden, weight, targets)
    targets[targets < 0] = -1
    ops.linear_log_probabilities(hidden, weight, targets, ignore_index=-1)


def test_the_room_offers_both_functions_in_every_form():
    for form in ("reference", "portable"):
        module = import_module(f"nemotron_v3.ops.linear_cross_entropy.{form}")
        assert all(callable(getattr(module, name)) for name in NAMES)
