"""The accuracy rule, and what else every numerical test needs.

The rule: a function is right in a dtype if the error of each of its outputs and of every gradient
is at most twice the error that plain PyTorch makes in that dtype, plus one unit roundoff of the
tensor's dtype (2.5 times where long decays are the case). Errors are relative, over the whole
tensor, in the Frobenius norm, against the step-by-step reference in fp64. docs/numerics.md says
what "plain PyTorch" is and why small tensors are pooled over several draws.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.common.cases import Inputs

POOL = 64  # elements a tensor's error is measured over, at least

MakeInputs = Callable[[torch.Generator], Inputs]

# --- the rule ---------------------------------------------------------------------------------


def check(
    function: Callable[..., Any],
    truth: Callable[..., Any],
    make_inputs: MakeInputs,
    *,
    dtype: torch.dtype,
    plain: Callable[..., Any] | None = None,
    long_decay: bool = False,
    seed: int = 0,
) -> "Report":
    """Hold `function` to the accuracy rule, forward and every gradient; AssertionError if it fails.

    Args:
        function: called as `function(**tensors, **options)` with allocations poisoned; returns a
            tensor, or a tuple or dict of tensors and Nones.
        truth: the reference: the same arguments and `dtype`, the dtype it computes in.
        make_inputs: draws `Inputs` from a generator; tensors in the dtypes the function is given.
        dtype: the dtype whose arithmetic is tested, narrower than fp64.
        plain: what sets the measure, `PlainPyTorch(truth, dtype)` by default; another project's
            function to be compared with that project.
        long_decay: allow 2.5 times plain's error instead of twice.
        seed: of the inputs and cotangents.

    Returns:
        The measured errors, for a caller that prints them.
    """
    if dtype == torch.float64:
        raise ValueError("the truth is float64 itself: test float32 or narrower")
    plain = PlainPyTorch(truth, dtype) if plain is None else plain
    generator = torch.Generator().manual_seed(seed)
    report = Report(factor=2.5 if long_decay else 2.0)
    draws = 1
    while report.draws < draws:
        inputs = make_inputs(generator)
        report.add(*three_ways(function, truth, plain, inputs, generator))
        draws = math.ceil(POOL / report.smallest())
    report.assert_allowed()
    return report


@dataclass
class PlainPyTorch:
    """The reference as plain PyTorch computes it in `dtype`: fp32 arithmetic, rounded products.

    Attributes:
        truth: the reference.
        dtype: the dtype that is tested.
        operands: what the operands of matrix products are rounded to; None is `dtype`, fp32 is for
            an op whose products are fp32 by contract (the router).
        results: whether products return rounded values too, as PyTorch's linear layers do; not
            where a product is an inner step of one op (scores, states).
    """

    truth: Callable[..., Any]
    dtype: torch.dtype
    operands: torch.dtype | None = None
    results: bool = False

    @property
    def arithmetic(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    def __call__(self, **arguments: Any) -> Any:
        return self.truth(**arguments, dtype=self.arithmetic)

    def products(self) -> AbstractContextManager:
        """To be entered around forward and backward."""
        operands = self.operands or self.dtype
        if operands == self.arithmetic:
            return nullcontext()
        return RoundedProducts(operands, results=self.results)


def relative_error(measured: Tensor, true: Tensor) -> float:
    """`|measured - true| / |true|` in the Frobenius norm; `|measured|` where true is all zeros."""
    error = _Error()
    error.add(measured, true)
    return error.relative_to(error.size or 1.0)


@dataclass
class _Error:
    """Squared norms of a difference and of the truth, summed over draws."""

    difference: float = 0.0
    size: float = 0.0

    def add(self, measured: Tensor, true: Tensor) -> None:
        assert measured.shape == true.shape, f"{tuple(measured.shape)} != {tuple(true.shape)}"
        true = true.detach().double()
        self.difference += float((measured.detach().double() - true).square().sum())
        self.size += float(true.square().sum())

    def relative_to(self, size: float) -> float:
        return math.sqrt(self.difference / size)


@dataclass
class Row:
    """One tensor: the error of the function and that of plain PyTorch."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    measured: _Error
    plain: _Error


class Report:
    """Errors by tensor name; its text is the table a failure shows."""

    def __init__(self, factor: float):
        self.factor = factor
        self.rows: dict[str, Row] = {}
        self.draws = 0

    def add(
        self, measured: dict[str, Tensor], plain: dict[str, Tensor], true: dict[str, Tensor]
    ) -> None:
        for name, tensor in measured.items():
            row = self.rows.setdefault(
                name, Row(tuple(tensor.shape), tensor.dtype, _Error(), _Error())
            )
            assert torch.isfinite(true[name]).all(), f"the truth of {name} is not finite"
            row.measured.add(tensor, true[name])
            row.plain.add(plain[name].to(tensor.dtype), true[name])
        self.draws += 1

    def smallest(self) -> int:
        """Elements of the smallest tensor whose relative error means something."""
        sizes = [
            math.prod(row.shape)
            for row in self.rows.values()
            if row.dtype.is_floating_point and row.measured.size > 0.0
        ]
        return min(sizes, default=POOL)

    def error(self, name: str) -> float:
        return self.rows[name].measured.relative_to(self._size(name))

    def allowed(self, name: str) -> float:
        """`factor` times plain's error and one unit roundoff; integers have to be equal.

        Of a zero that is the difference of two sums: the roundoffs of both.
        """
        row = self.rows[name]
        if not row.dtype.is_floating_point:
            return 0.0
        roundoffs = 1 if row.measured.size else 2
        roundoff = torch.finfo(row.dtype).eps / 2
        return self.factor * row.plain.relative_to(self._size(name)) + roundoffs * roundoff

    def _size(self, name: str) -> float:
        """The squared norm a tensor's error is relative to.

        That of the truth. Where the truth is zero (a lone token's query has no gradient) it is the
        largest among the outputs, or the gradients, that the tensor stands with.
        """
        own = self.rows[name].measured.size
        fellows = [
            row.measured.size
            for other, row in self.rows.items()
            if other.startswith("grad ") == name.startswith("grad ")
        ]
        return own or max(fellows) or 1.0

    def failures(self) -> list[str]:
        # `not <=` so that NaN fails.
        return [name for name in self.rows if not self.error(name) <= self.allowed(name)]

    def assert_allowed(self) -> None:
        failures = self.failures()
        assert not failures, f"less accurate than allowed: {', '.join(failures)}\n{self}"

    def __str__(self) -> str:
        lines = [f"{'tensor':<22} {'shape':<20} {'dtype':<9} {'error':>9} {'allowed':>9}  ratio"]
        failures = self.failures()
        for name, row in self.rows.items():
            error, allowed = self.error(name), self.allowed(name)
            ratio = error / allowed if allowed else math.inf if error else 0.0
            dtype = str(row.dtype).removeprefix("torch.")
            line = f"{name:<22} {str(row.shape):<20} {dtype:<9} {error:9.2e} {allowed:9.2e}"
            lines.append(f"{line} {ratio:6.2f}{'  <-- too large' if name in failures else ''}")
        return "\n".join([*lines, f"{self.factor} x plain + 1 roundoff, over {self.draws} draw(s)"])


def three_ways(
    function: Callable[..., Any],
    truth: Callable[..., Any],
    plain: Callable[..., Any],
    inputs: Inputs,
    generator: torch.Generator,
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and gradients of all three, on the same inputs and cotangents."""
    before = {k: t.detach().clone() for k, t in inputs.tensors.items() if t is not None}
    cotangents: dict[str, Tensor] = {}
    with poison_empty():
        measured = _forward_backward(function, inputs, cotangents, generator)
    for name, tensor in before.items():
        assert torch.equal(tensor, inputs.tensors[name]), f"the function changed its input {name}"
    with plain.products() if isinstance(plain, PlainPyTorch) else nullcontext():
        plain_results = _forward_backward(plain, inputs, cotangents)
    exact = Inputs(
        {k: None if t is None else t.detach().double() for k, t in inputs.tensors.items()},
        inputs.options,
    )
    return measured, plain_results, _forward_backward(truth, exact, cotangents)


def _forward_backward(
    function: Callable[..., Any],
    inputs: Inputs,
    cotangents: dict[str, Tensor],
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Outputs by name, then `grad NAME` of every tensor; draws `cotangents` given a generator."""
    leaves = {k: t.detach().requires_grad_() for k, t in inputs.tensors.items() if t is not None}
    absent = dict.fromkeys(k for k, t in inputs.tensors.items() if t is None)
    outputs = _named(function(**leaves, **absent, **inputs.options))
    if generator is not None:
        for name, output in outputs.items():
            if output.is_floating_point():
                drawn = torch.randn(output.shape, generator=generator, dtype=torch.float64)
                cotangents[name] = drawn.to(output.device, output.dtype)
    differentiable = [name for name, output in outputs.items() if output.requires_grad]
    gradients = [None] * len(leaves)
    if differentiable:
        gradients = torch.autograd.grad(
            [outputs[name] for name in differentiable],
            list(leaves.values()),
            [cotangents[name].to(outputs[name].dtype) for name in differentiable],
            allow_unused=True,
        )
    results = {name: output.detach() for name, output in outputs.items()}
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        # A tensor without influence has no gradient or a gradient of zeros: the same thing.
        results[f"grad {name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return results


def _named(outputs: Any) -> dict[str, Tensor]:
    if isinstance(outputs, Tensor):
        return {"output": outputs}
    pairs = outputs.items() if isinstance(outputs, dict) else enumerate(outputs)
    return {
        name if isinstance(name, str) else f"output {name}": output
        for name, output in pairs
        if output is not None
    }


# --- what "its matmul operands rounded" means ----------------------------------------------------

_aten = torch.ops.aten
_OPERANDS = {  # matrix products as autograd's forward and backward call them: where operands stand
    _aten.mm: (0, 1),
    _aten.bmm: (0, 1),
    _aten.mv: (0, 1),
    _aten.dot: (0, 1),
    _aten.addmm: (1, 2),
    _aten.addmv: (1, 2),
    _aten.baddbmm: (1, 2),
}


class RoundedProducts(TorchDispatchMode):
    """Within it, forward and backward, matrix products see their operands rounded to `dtype`.

    They accumulate in the operands' own dtype, as tensor cores do, and return that, or, with
    `results`, values rounded to `dtype`. Nothing else is rounded.
    """

    def __init__(self, dtype: torch.dtype, *, results: bool = False):
        super().__init__()
        self.dtype, self.results = dtype, results

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        places = _OPERANDS.get(func.overloadpacket)
        if places is None:
            return func(*args, **(kwargs or {}))
        args = [self._round(a) if i in places else a for i, a in enumerate(args)]
        result = func(*args, **(kwargs or {}))
        return self._round(result) if self.results else result

    def _round(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).to(x.dtype)


# --- memory that nobody wrote --------------------------------------------------------------------


@contextmanager
def poison_empty() -> Iterator[None]:
    """Within it, torch's uninitialised allocations hold NaN (integers their maximum).

    The allocators are replaced rather than switched to PyTorch's deterministic mode, which would
    fill them too: that mode also picks other algorithms than the ones to be tested.
    """
    with torch.device("cpu"):  # torch makes its list of allocators once, at the first such context
        torch.zeros(())
    places = [
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (Tensor, "new_empty"),
        (Tensor, "new_empty_strided"),
    ]
    originals = [getattr(owner, name) for owner, name in places]
    for (owner, name), original in zip(places, originals, strict=True):
        setattr(owner, name, _poisoned(original))
    try:
        yield
    finally:
        for (owner, name), original in zip(places, originals, strict=True):
            setattr(owner, name, original)


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point() or tensor.is_complex():
            return tensor.detach().fill_(math.nan).requires_grad_(tensor.requires_grad)
        if tensor.dtype == torch.bool:
            return tensor.fill_(True)
        return tensor.fill_(torch.iinfo(tensor.dtype).max)

    return poisoned


# --- layouts to draw from ------------------------------------------------------------------------


@st.composite
def document_lengths(
    draw: st.DrawFn,
    *,
    conv_width: int = 4,
    chunk_size: int = 16,
    max_documents: int = 6,
    allow_empty: bool = False,
) -> tuple[int, ...]:
    """Lengths of 1 to `max_documents` documents, most of them where a form changes its path."""
    borders = [1, 2, conv_width - 1, conv_width, conv_width + 1]
    borders += [chunk_size - 1, chunk_size, chunk_size + 1]
    length = st.sampled_from(borders) | st.integers(1, 2 * chunk_size + 1)
    if allow_empty:
        length |= st.just(0)
    lengths = draw(st.lists(length.filter(lambda n: n >= 0), min_size=1, max_size=max_documents))
    return tuple(lengths) if sum(lengths) else (*lengths, 1)


@st.composite
def padding_masks(
    draw: st.DrawFn,
    *,
    conv_width: int = 4,
    chunk_size: int = 16,
    max_rows: int = 4,
    side: str = "mixed",
    allow_empty: bool = False,
) -> Tensor:
    """int64 `[B, S]` padding masks, 1 = real; `side` is "left", "right" or "mixed".

    A mixed row has padding before its tokens and after them, each of any length.
    """
    if side not in ("left", "right", "mixed"):
        raise ValueError(f"side must be 'left', 'right' or 'mixed', got {side!r}")
    lengths = draw(
        document_lengths(
            conv_width=conv_width,
            chunk_size=chunk_size,
            max_documents=max_rows,
            allow_empty=allow_empty,
        )
    )
    width = max(lengths) + draw(st.integers(0, conv_width))
    mask = torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        spare = width - length
        start = {"left": spare, "right": 0}.get(side)
        if start is None:
            start = draw(st.integers(0, spare))
        mask[row, start : start + length] = 1
    return mask


@st.composite
def layouts(
    draw: st.DrawFn,
    *,
    conv_width: int = 4,
    chunk_size: int = 16,
    max_documents: int = 6,
    allow_empty: bool = False,
) -> SequenceLayout:
    """Packs without a batch dimension, plain batches, and batches padded on any side."""
    sizes = {"conv_width": conv_width, "chunk_size": chunk_size, "allow_empty": allow_empty}
    kind = draw(st.sampled_from(["packed", "plain", "left", "right", "mixed"]))
    if kind == "packed":
        lengths = draw(document_lengths(max_documents=max_documents, **sizes))
        return SequenceLayout.from_lengths(lengths)
    if kind == "plain":
        lengths = draw(document_lengths(max_documents=1, **sizes))
        return SequenceLayout.plain(draw(st.integers(1, max_documents)), max(lengths))
    masks = padding_masks(max_rows=max_documents, side=kind, **sizes)
    return SequenceLayout.from_padding_mask(draw(masks))
