"""The demo's options. They import no torch, so that the command line's help comes at once."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nemotron_v3.config import NemotronV3Config


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """The model, in the names of its config."""

    pattern: str = "MEM*ME"
    """blocks in order: M mamba, E mixture of experts, * attention, - MLP"""
    hidden_size: int = 160
    vocab_size: int = 4096
    """entries of the tokeniser, 2048 to 4096 for this corpus"""
    mamba_num_heads: int = 5
    mamba_head_dim: int = 64
    ssm_state_size: int = 32
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 40
    intermediate_size: int = 768
    n_routed_experts: int = 16
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 160
    moe_shared_expert_intermediate_size: int = 256

    def config(self) -> "NemotronV3Config":
        import torch

        from nemotron_v3.config import NemotronV3Config
        from nemotron_v3.data import SEPARATOR_ID

        sizes = asdict(self)
        return NemotronV3Config(
            hybrid_override_pattern=sizes.pop("pattern"),
            **sizes,
            n_groups=1,
            chunk_size=64,
            tie_word_embeddings=True,
            # So narrow a model learns faster from larger weights than the usual 0.02.
            initializer_range=0.05,
            pad_token_id=SEPARATOR_ID,
            bos_token_id=SEPARATOR_ID,
            eos_token_id=SEPARATOR_ID,
            dtype=torch.float32,
        )


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What to train, for how long, and where to put it."""

    minutes: float = 3.7
    """time for the whole demo, from the corpus to the sample"""
    steps: int | None = None
    """train exactly this many steps instead: the same steps and seed give the same model"""
    seed: int = 0
    out: Path = Path("runs/demo")
    """replaced if it holds an earlier run, once the new one is whole"""
    tokens_per_row: int = 1024
    rows: int = 2
    """of a step, which pass the model side by side, on a thread each"""
    document_tokens: int = 512
    """longer documents are cut for training; measuring keeps them whole"""
    learning_rate: float = 8e-3
    weight_decay: float = 0.1
    model: ModelSizes = field(default_factory=ModelSizes)

    def check(self) -> None:
        """`ValueError` for a length that is none, or for sizes that make no model."""
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps is {self.steps}: give at least 1")
        if not 0 < self.minutes < math.inf:
            raise ValueError(f"minutes is {self.minutes}: give a positive number")
        if self.rows < 1:
            raise ValueError(f"rows is {self.rows}: give at least 1")
        self.model.config()  # told before the corpus is read, which takes a while
