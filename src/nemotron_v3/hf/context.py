"""transformers' arguments about tokens, turned into one `SequenceLayout` a forward pass.

Letters: B batch, S sequence, L places a cache holds after the pass.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nemotron_v3.layers.context import ForwardContext
from nemotron_v3.layout import SequenceLayout
from nemotron_v3.layout.modes import capturing

# What transformers' data collators and generate() say about where sequences lie.
PACKING_NAMES = (
    "seq_idx",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
)


class TheirContext(ForwardContext):
    """What the layers of one forward pass of a transformers model know about its tokens.

    Attributes:
        layout: of the new tokens on their grid `[B, S]`.
        mask: a 4-D attention mask `[B or 1, 1, S, L]`, which then decides alone in attention.
        columns: a padding mask `[B, <= L]` that covers what a cache held before, too.
        follows: whether a cache holds tokens already.
        router_logits: by layer, where a caller asked for them; else None.
    """

    def __init__(
        self,
        layout: SequenceLayout,
        mask: Tensor | None = None,
        columns: Tensor | None = None,
        follows: bool = False,
        router_logits: dict[int, Tensor] | None = None,
    ):
        super().__init__(layout, mask)
        self.columns = columns
        self.follows = follows
        self.router_logits = router_logits
        self._allowed: dict[Any, Tensor] = {}

    @classmethod
    def read(
        cls,
        shape: tuple[int, int],
        device: torch.device,
        *,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        follows: bool = False,
        cached: bool = False,
        router_logits: bool = False,
        packing: Mapping[str, Any] | None = None,
    ) -> "TheirContext":
        """Read what a caller of a transformers model says about its tokens.

        Args:
            shape: `(B, S)` of the new tokens.
            device: where they are.
            attention_mask: a padding mask `[B, S]`, or `[B, past + S]` with a cache; a 4-D mask; or
                a dict of both by kind of layer, as `create_masks_for_generate` makes them.
            position_ids: `[B or 1, S]`; a document starts at a real token whose position does not
                go on from the one before. Positions of left-padded rows go on, whether they count
                the real tokens or the places.
            follows: whether a cache holds tokens already.
            cached: whether a cache is there at all: it holds one sequence a row.
            router_logits: whether the caller wants them.
            packing: values of `PACKING_NAMES`.

        Raises:
            ValueError: arguments that contradict each other or the shape; a pack with a cache.
            TypeError: a mask of another kind.
        """
        packing = {k: v for k, v in (packing or {}).items() if v is not None}
        padding, mask = _split_masks(attention_mask, shape)
        new = padding
        if padding is not None and follows:
            # A graph that is captured cannot ask whether the one token of a row is real: it is.
            blind = shape[1] == 1 and capturing(padding.device)
            new = None if blind else padding[:, -shape[1] :]
        explicit = _explicit(packing)
        layout = _resolve(shape, device, new, explicit)
        # A 4-D mask speaks of attention alone: scans go by the positions, without a cache.
        counted = mask is None or padding is not None or not cached
        if not explicit and counted and not follows:
            layout = layout.split_by(position_ids, every_break=True)
        if cached and layout.num_documents != shape[0]:
            raise ValueError(
                f"{layout.num_documents} documents in a batch of {shape[0]} rows and a cache, "
                "which holds one sequence a row: leave use_cache and past_key_values out, or give "
                "one document a row"
            )
        return cls(layout, mask, padding, follows, {} if router_logits else None)

    def allowed(self, past: int | Tensor, length: int, device: torch.device) -> Tensor:
        """Bool `[B or 1, 1, S, L]`: which of `length` places in a cache each new token may see."""
        key = (length, device, past if isinstance(past, int) else None)
        if key not in self._allowed:
            S = self.layout.shape[1]
            places = torch.arange(length, device=device)
            own = past + torch.arange(S, device=device)  # each new token's place
            seen = (places <= own[:, None])[None]  # [1, S, L]
            if self.columns is not None:
                real = torch.zeros(self.columns.shape[0], length, dtype=torch.bool, device=device)
                known = min(length, self.columns.shape[1])
                real[:, :known] = self.columns[:, :known].to(device) != 0
                if self.columns.shape[1] == S:  # earlier tokens are real
                    real = (places < past) | real.roll(int(past), 1)
                seen = seen & real[:, None]
            self._allowed[key] = seen[:, None]
        return self._allowed[key]


def _split_masks(
    attention_mask: Any, shape: tuple[int, int]
) -> tuple[Tensor | None, Tensor | None]:
    """The padding mask and the 4-D mask that an `attention_mask` holds."""
    if isinstance(attention_mask, Mapping):
        full = attention_mask.get("full_attention", attention_mask.get("attention"))
        padding = attention_mask.get("linear_attention", attention_mask.get("mamba"))
        for kind, mask in (("attention", full), ("mamba", padding)):
            if mask is not None and not isinstance(mask, Tensor):
                raise TypeError(
                    f"the attention_mask for {kind} layers is a {type(mask).__name__}: give a "
                    "tensor or None"
                )
        if full is not None and full.dim() == 2:
            return full, None
        return padding, full
    if attention_mask is None:
        return None, None
    if not isinstance(attention_mask, Tensor):
        raise TypeError(
            f"attention_mask is a {type(attention_mask).__name__}: give a padding mask (batch, "
            "seq_len), a 4-D mask, or a dict of them"
        )
    if attention_mask.dim() == 4:
        return None, attention_mask
    if attention_mask.dim() != 2 or attention_mask.shape[0] != shape[0]:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, the tokens {shape}: give a "
            "padding mask (batch, seq_len), or a 4-D mask"
        )
    return attention_mask, None


def _explicit(packing: dict[str, Any]) -> dict[str, Any]:
    """The collators' packing arguments in the names of `SequenceLayout.resolve`."""
    found: dict[str, Any] = {}
    if "seq_idx" in packing:
        found["seq_idx"] = packing["seq_idx"]
    q, k = packing.get("cu_seq_lens_q"), packing.get("cu_seq_lens_k")
    for name, offsets in (("cu_seq_lens_q", q), ("cu_seq_lens_k", k)):
        if offsets is not None and not isinstance(offsets, Tensor):
            raise TypeError(f"{name} is a {type(offsets).__name__}: give a tensor")
    if q is not None and k is not None and q is not k and not torch.equal(q, k.to(q.device)):
        raise ValueError(
            f"cu_seq_lens_q {q.tolist()} and cu_seq_lens_k {k.tolist()} differ: every token is a "
            "query and a key, give the same for both"
        )
    if q is not None or k is not None:
        found["cu_seqlens"] = q if q is not None else k
        longest = packing.get("max_length_q", packing.get("max_length_k"))
        if longest is not None:
            found["max_seqlen"] = longest
    return found


def _resolve(
    shape: tuple[int, int],
    device: torch.device,
    padding: Tensor | None,
    explicit: dict[str, Any],
) -> SequenceLayout:
    if padding is not None and padding.shape[1] != shape[1]:
        raise ValueError(
            f"attention_mask has shape {tuple(padding.shape)}, the tokens {shape}: without tokens "
            "in a cache they must match"
        )
    return SequenceLayout.resolve(shape, device, padding, **explicit)
