"""What the tests of the references share: small fp64 inputs, and equality between two of them."""

import torch
from torch import Tensor

from nemotron_v3.layout import SequenceLayout
from tests.accuracy import relative_error

EQUAL = 2.0**-40  # two fp64 computations of the same thing, thousands of roundings apart
LENGTHS = (1, 0, 5, 1, 9, 3)


def randn(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def assert_equal(measured: Tensor, true: Tensor) -> None:
    assert relative_error(measured, true) < EQUAL


def assert_gradients(outputs, cotangents, leaves: dict[str, Tensor], by_hand: dict[str, Tensor]):
    """Autograd through a reference gives what a README's formulas give."""
    assert leaves.keys() == by_hand.keys()
    gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    for (name, expected), gradient in zip(by_hand.items(), gradients, strict=True):
        assert relative_error(gradient, expected) < EQUAL, name


def documents(x: Tensor, lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, ...]:
    return x.split(list(lengths))


def ssd_inputs(
    layout: SequenceLayout, heads: int = 6, head_dim: int = 4, groups: int = 2, state: int = 5
) -> dict[str, Tensor]:
    tokens = layout.num_tokens
    return {
        "x": randn(tokens, heads, head_dim, grad=True),
        "dt": randn(tokens, heads, grad=True),
        "A": (-torch.rand(heads, dtype=torch.float64) - 0.1).requires_grad_(),
        "B": randn(tokens, groups, state, grad=True),
        "C": randn(tokens, groups, state, grad=True),
        "D": randn(heads, grad=True),
        "dt_bias": randn(heads, grad=True),
        "initial_states": randn(layout.num_documents, heads, head_dim, state, grad=True),
    }


def mamba2_inputs(layout: SequenceLayout) -> tuple[dict[str, Tensor], dict[str, int]]:
    heads, head_dim, groups, state, width = 4, 3, 2, 5, 4
    inner = heads * head_dim
    channels = inner + 2 * groups * state
    documents = layout.num_documents
    tensors = {
        "zxbcdt": randn(layout.num_tokens, inner + channels + heads, grad=True),
        "conv_weight": randn(channels, width, grad=True),
        "conv_bias": randn(channels, grad=True),
        "dt_bias": randn(heads, grad=True),
        "A_log": randn(heads, grad=True),
        "D": randn(heads, grad=True),
        "norm_weight": randn(inner, grad=True),
        "conv_states": randn(documents, channels, width, grad=True),
        "ssm_states": randn(documents, heads, head_dim, state, grad=True),
    }
    return tensors, {"n_groups": groups, "head_dim": head_dim, "state_size": state}


def expert_inputs() -> tuple[dict[str, Tensor], Tensor]:
    leaves = {
        "x": randn(9, 6, grad=True),
        "weights": randn(9, 3, grad=True),
        "up_proj": randn(5, 7, 6, grad=True),
        "down_proj": randn(5, 6, 7, grad=True),
    }
    indices = torch.rand(9, 5).argsort(1)[:, :3]
    indices[indices == 4] = 3  # expert 4 is idle, and one may be chosen twice
    return leaves, indices
