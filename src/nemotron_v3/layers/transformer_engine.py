"""Adapters onto Transformer Engine's attention and norm.

They use the arguments that its documentation gives. `docs/backends.md` says what they have been run
against.

Letters: T packed tokens, B documents of one length S, H query heads, J key/value heads, P head
width, D hidden size.
"""

import torch
from torch import Tensor, nn

from nemotron_v3.config import NemotronV3Config
from nemotron_v3.layers.extra_state import keep_state_dict_names
from nemotron_v3.layers.linear import load_transformer_engine
from nemotron_v3.layout import SequenceLayout


class TEAttention(nn.Module):
    """`transformer_engine.pytorch.DotProductAttention` behind the signature of `ops.attention`.

    Documents of one length go in as `bshd` with the mask type `causal`, others as `thd` with
    `padding_causal` and their cumulative lengths.

    Raises:
        ModuleNotFoundError: Transformer Engine is not installed.
    """

    def __init__(self, heads: int, kv_heads: int, head_dim: int, dropout: float):
        super().__init__()
        te = load_transformer_engine("attn")
        attention = te.DotProductAttention(
            heads,
            head_dim,
            num_gqa_groups=kv_heads,
            attention_dropout=dropout,
            qkv_format="bshd",
            attn_mask_type="causal",
        )
        self.attention: nn.Module = keep_state_dict_names(attention)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        layout: SequenceLayout,
        mask: Tensor | None = None,
        dropout_p: float = 0.0,
        impl: str = "auto",
    ) -> Tensor:
        """`[T, H, P]`, and `[T, J, P]` twice -> `[T, H, P]`, causal inside each document.

        `dropout_p` and `impl` are ignored: Transformer Engine drops while it is in training mode,
        and chooses its own kernels.

        Raises:
            ValueError: a 4-D mask.
        """
        if mask is not None:
            raise ValueError(
                f"attn='te' is causal inside documents and takes no 4-D attention_mask (got one of "
                f"shape {tuple(mask.shape)}): give cu_seqlens or a padding mask, or use "
                "BackendConfig(attn='sdpa')"
            )
        if q.shape[0] == 0:
            return torch.zeros_like(q)
        if layout.uniform_length is not None:
            grid = (layout.num_documents, layout.uniform_length)
            out = self.attention(  # [B, S, H*P]
                *(t.unflatten(0, grid) for t in (q, k, v)),
                qkv_format="bshd",
                attn_mask_type="causal",
            )
        else:
            offsets = layout.derived("te_attention", _offsets)
            longest = max(layout.lengths)
            out = self.attention(  # [T, H*P]
                q,
                k,
                v,
                qkv_format="thd",
                attn_mask_type="padding_causal",
                cu_seqlens_q=offsets,
                cu_seqlens_kv=offsets,
                max_seqlen_q=longest,
                max_seqlen_kv=longest,
            )
        return out.reshape(q.shape)


def _offsets(layout: SequenceLayout) -> Tensor:
    """int32 starts of the documents that hold a token."""
    starts = sorted(set(layout.offsets))
    return torch.tensor(starts, dtype=torch.int32, device=layout.device)


def make_te_attention(config: NemotronV3Config) -> TEAttention:
    """The attention of a layer with these sizes."""
    return TEAttention(
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.attention_dropout,
    )


class TERMSNorm:
    """`transformer_engine.pytorch.RMSNorm` computing with a weight that another module owns.

    It is no module itself, so that the owner's weight keeps its place and name. An fp32 stream is
    rounded to the weight's dtype before the statistics, as Transformer Engine does it.

    Raises:
        ModuleNotFoundError: Transformer Engine is not installed.
    """

    def __init__(self, weight: nn.Parameter, eps: float):
        te = load_transformer_engine("rms_norm")
        self._norm = te.RMSNorm(
            weight.shape[0], eps=eps, params_dtype=weight.dtype, device=weight.device
        )

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """`[..., D]` -> `[..., D]` in the weight's dtype."""
        if self._norm.weight is not weight:  # casts, sharding and `to_empty` replace a parameter
            self._norm.weight = weight
        return self._norm(x.to(weight.dtype))
