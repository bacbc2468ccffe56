"""Masks, biases, dropout and positions of the attention layer."""

import pytest
import torch

from nemotron_v3 import BackendConfig
from nemotron_v3.layers import NemotronV3Attention
from tests.models import disturb, tiny_config


def layer(**changes) -> NemotronV3Attention:
    attention = NemotronV3Attention(tiny_config(dtype=torch.float64, **changes))
    disturb(attention, torch.Generator().manual_seed(0))
    return attention


X = torch.randn(2, 7, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
CAUSAL = torch.ones(7, 7, dtype=torch.bool).tril()[None, None].expand(2, 1, 7, 7)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(((a - b).abs() <= 1e-12 * b.abs().max()).all())


def test_a_causal_mask_changes_nothing():
    attention = layer()
    assert close(attention(X, attention_mask=CAUSAL), attention(X))
    additive = torch.zeros(2, 1, 7, 7, dtype=torch.float64).masked_fill(~CAUSAL, float("-inf"))
    assert close(attention(X, attention_mask=additive), attention(X))


def test_a_mask_of_any_pattern_is_honoured():
    attention = layer(attention_bias=True)
    pattern = torch.rand(2, 1, 7, 7, generator=torch.Generator().manual_seed(2)) < 0.4
    pattern[0, 0, 3] = False  # a query that may attend nothing
    y = attention(X, attention_mask=pattern)
    slow = NemotronV3Attention(attention_config := tiny_config(
        dtype=torch.float64, attention_bias=True), BackendConfig(impl="reference"))  # fmt: skip
    assert attention_config.attention_bias
    slow.load_state_dict(attention.state_dict())
    assert close(y, slow(X, attention_mask=pattern))
    assert close(y[0, 3], attention.o_proj.bias)  # nothing attended: 0 before the projection


def test_a_block_causal_mask_is_the_same_as_documents():
    attention = layer()
    numbers = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 1]])
    same = (numbers[:, :, None] == numbers[:, None, :])[:, None]
    assert close(attention(X, attention_mask=CAUSAL & same), attention(X, seq_idx=numbers))


def test_positions_change_nothing():
    attention = layer()
    positions = torch.randint(0, 99, (2, 7))
    assert torch.equal(attention(X, position_ids=positions), attention(X))


def test_dropout_acts_in_training_only_and_keeps_the_mean():
    attention = layer(attention_dropout=0.5)
    attention.eval()
    expected = attention(X)
    attention.train()
    draws = torch.stack([attention(X) for _ in range(400)])
    assert not torch.equal(draws[0], draws[1])
    spread = draws.std(0) / 400**0.5
    assert ((draws.mean(0) - expected).abs() < 6 * spread + 1e-9).all()


@pytest.mark.parametrize("shape", [(7, 48), (1, 7, 48)])
def test_tokens_without_a_batch_dimension_come_back_so(shape):
    attention = layer()
    assert close(attention(X[0].reshape(shape)).reshape(7, 48), attention(X)[0])
