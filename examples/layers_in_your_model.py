"""Two of the layers in a model of your own: it learns to recall, over packed documents.

A document is a list of keys with their values, then one of the keys; the answer is its value.

    python examples/layers_in_your_model.py
"""

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from nemotron_v3 import NemotronV3Config
from nemotron_v3.layers import NemotronV3Attention, NemotronV3Mamba2Mixer

LETTERS = 8  # keys are 0..7, values 8..15
PAIRS = 3

config = NemotronV3Config(
    hidden_size=64,
    hybrid_override_pattern="M*",
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    mamba_num_heads=8,
    mamba_head_dim=16,
    ssm_state_size=32,
    n_groups=2,
)


class Recall(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(2 * LETTERS, config.hidden_size)
        self.norms = nn.ModuleList(nn.RMSNorm(config.hidden_size) for _ in range(3))
        self.mamba = NemotronV3Mamba2Mixer(config, layer_idx=0)
        self.attention = NemotronV3Attention(config)
        self.head = nn.Linear(config.hidden_size, 2 * LETTERS)

    def forward(self, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        x = self.embed(tokens)  # [T, D]: one row of documents, no batch dimension
        x = x + self.mamba(self.norms[0](x), cu_seqlens=cu_seqlens)
        x = x + self.attention(self.norms[1](x), cu_seqlens=cu_seqlens)
        return self.head(self.norms[2](x))


def documents(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of `count` documents in one row, their offsets, and the answers."""
    keys = torch.stack([torch.randperm(LETTERS)[:PAIRS] for _ in range(count)])
    values = LETTERS + torch.randint(LETTERS, keys.shape)
    asked = torch.randint(PAIRS, (count, 1))
    pairs = torch.stack([keys, values], 2).flatten(1)
    tokens = torch.cat([pairs, keys.gather(1, asked)], 1)
    length = tokens.shape[1]
    return (
        tokens.flatten(),
        torch.arange(count + 1) * length,
        values.gather(1, asked).flatten(),
    )


def main(steps: int = 150) -> None:
    torch.manual_seed(0)
    model = Recall()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(1, steps + 1):
        tokens, cu_seqlens, answers = documents(64)
        logits = model(tokens, cu_seqlens)[cu_seqlens[1:] - 1]  # at each document's last token
        loss = F.cross_entropy(logits, answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 25 == 0 or step == 1:
            right = (logits.argmax(-1) == answers).float().mean()
            print(f"step {step:4d}  loss {loss:.3f}  right {right:.0%}")


if __name__ == "__main__":
    tyro.cli(main)
