"""NeMo AutoModel's arguments about tokens, turned into one `SequenceLayout` a forward pass.

Letters: B batch, S sequence, T packed tokens, L places that a cache holds after the pass.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nemotron_v3.layers.carry import Carry
from nemotron_v3.layers.context import ForwardContext, full_name
from nemotron_v3.layout import SequenceLayout
from nemotron_v3.layout.checks import agreed, read_offsets
from nemotron_v3.nemo import shared_tokens
from nemotron_v3.nemo.classes import is_cache

_FILLER = -1000  # what their collater fills offsets up with


class NemoContext(ForwardContext):
    """What the layers of one forward pass of an AutoModel model know about its tokens.

    Attributes:
        layout: of the new tokens on their grid, `[B, S]` or `[T]`.
        mask: a 4-D attention mask `[B or 1, 1 or H, S, L]`, which decides alone in attention.
        columns: a padding mask `[B, <= L]` that covers what a cache held before, too.
        follows: whether a cache holds tokens already.
        carry: what stands for the tokens of other processes, or None.
    """

    def __init__(
        self,
        layout: SequenceLayout,
        mask: Tensor | None = None,
        columns: Tensor | None = None,
        follows: bool = False,
        carry: Carry | None = None,
    ):
        super().__init__(layout, mask, carry=carry)
        self.columns = columns
        self.follows = follows
        self._allowed: dict[Any, Tensor] = {}

    @classmethod
    def read(
        cls,
        shape: tuple[int, ...],
        device: torch.device,
        *,
        padding: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Any = None,
        told: Mapping[str, Any] | None = None,
        group: ProcessGroup | None = None,
    ) -> "NemoContext":
        """Read what a caller says about its tokens, in AutoModel's order of precedence.

        Behind a cache that holds tokens each row goes on. Otherwise documents are those of
        `seq_idx`, else of `cu_seqlens_padded`, else of `cu_seqlens`; a batch of several rows with
        offsets has one document a row. Tokens behind the last offset belong to none.

        Args:
            shape: the grid of the new tokens, `(B, S)` or `(T,)`.
            device: where they are.
            padding: a padding mask `[B, S]`, or `[B, held + S]` with a cache.
            mask: a 4-D mask, bool or additive; beside a padding mask, both hold.
            cache: their NemotronHybridCache, or None.
            told: the other keyword arguments: those that say nothing about documents are passed by.
            group: the processes that share the tokens, as `shared_tokens` has them. Offsets and
                numbers of documents are then those of all tokens; a padding mask of these or all.

        Raises:
            ValueError: arguments that contradict each other or the shape; a pack with a cache;
                tokens of processes that the layer does not know.
            TypeError: a cache of another kind.
        """
        told = {k: v for k, v in (told or {}).items() if v is not None}
        shared_tokens.check_size(told, group)
        if cache is not None and not is_cache(cache):
            raise TypeError(
                f"past_key_values is a {full_name(cache)}: give NeMo AutoModel's "
                "NemotronHybridCache(config, batch_size, dtype, device)"
            )
        if group is not None:
            return cls._shared(shape, device, padding, mask, cache, told, group)
        follows = cache is not None and bool(cache.has_previous_state)
        new = padding
        if padding is not None:
            padding = padding.reshape(-1, padding.shape[-1]) if padding.dim() == 1 else padding
            new = padding[:, -shape[-1] :] if follows else padding
            if mask is None and bool((padding != 0).all()):
                padding = new = None
        layout = _layout(shape, device, new, {} if follows else told)
        if cache is not None and layout.num_documents != _rows(shape):
            raise ValueError(
                f"{layout.num_documents} documents in a batch of {_rows(shape)} rows and a cache, "
                "which holds one sequence a row: leave past_key_values out, or give one document "
                "a row"
            )
        return cls(layout, _both(mask, padding), padding, follows)

    @classmethod
    def _shared(
        cls,
        shape: tuple[int, ...],
        device: torch.device,
        padding: Tensor | None,
        mask: Tensor | None,
        cache: Any,
        told: Mapping[str, Any],
        group: ProcessGroup,
    ) -> "NemoContext":
        if mask is not None or cache is not None:
            given = "a 4-D mask" if cache is None else "a cache"
            raise ValueError(
                f"{given} beside tokens that {group.size()} processes share: give a padding mask "
                "or offsets; generate in one process"
            )
        if padding is not None:
            padding = shared_tokens.whole_mask(padding, shape, group)
        whole = _layout(shared_tokens.whole_shape(shape, group), device, padding, told)
        offsets, slots = _offsets(told) if len(shape) == 1 else (None, None)
        slots = offsets if slots is None else slots
        read = None if slots is None else read_offsets("cu_seqlens", slots)
        layout, carry = shared_tokens.share(whole, read, shape, group)
        return cls(layout, carry=carry)

    def allowed(self, held: int, device: torch.device) -> Tensor | None:
        """Bool `[B, 1, S, held + S]`, which places of a cache each new token may see; None where
        the causal rule alone says so."""
        B, S = self.layout.shape
        key = (held, device)
        if self.columns is None:
            return None
        if key not in self._allowed:
            real = torch.ones(B, held + S, dtype=torch.bool, device=device)
            known = min(held + S, self.columns.shape[1])
            real[:, -known:] = self.columns[:, -known:].to(device) != 0
            places = torch.arange(held + S, device=device)
            seen = places <= (held + torch.arange(S, device=device))[:, None]  # [S, L]
            self._allowed[key] = (real[:, None] & seen)[:, None]
        return self._allowed[key]

    def padding_mask(self, device: torch.device) -> Tensor | None:
        """Bool on the grid, True at padding; None where every token is real."""
        layout = self.on(device)
        if layout.token_index is None:
            return None
        real = torch.ones(layout.num_tokens, dtype=torch.bool, device=device)
        return ~layout.unpack(real)


def split_mask(attention_mask: Any) -> tuple[Tensor | None, Tensor | None]:
    """The padding mask and the 4-D mask that an `attention_mask` is."""
    if attention_mask is None:
        return None, None
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() not in (1, 2, 4):
        shape = getattr(attention_mask, "shape", None)
        of_shape = "" if shape is None else f" of shape {tuple(shape)}"
        raise ValueError(
            f"attention_mask is a {type(attention_mask).__name__}{of_shape}: give a padding mask "
            "(batch, seq_len), a 4-D mask, or None"
        )
    return (None, attention_mask) if attention_mask.dim() == 4 else (attention_mask, None)


def _rows(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) == 2 else 1


def _layout(
    shape: tuple[int, ...],
    device: torch.device,
    padding: Tensor | None,
    told: Mapping[str, Any],
) -> SequenceLayout:
    if told.get("seq_idx") is not None:
        return SequenceLayout.resolve(shape, device, padding, seq_idx=told["seq_idx"])
    offsets, slots = _offsets(told)
    if offsets is None or _rows(shape) > 1:
        return SequenceLayout.resolve(shape, device, padding)
    if slots is not None or padding is None:
        return _of_offsets(offsets, offsets if slots is None else slots, shape).to(device)
    if offsets.tolist() == [0, int((padding != 0).sum())]:  # made of the mask: says nothing more
        return SequenceLayout.resolve(shape, device, padding)
    return SequenceLayout.resolve(shape, device, padding, cu_seqlens=offsets)


def _offsets(told: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """Where documents lie among the real tokens, and on the grid with their padding."""
    given = (told.get(f"cu_seqlens{end}") for end in ("", "_q", "_kv"))
    offsets = agreed("cu_seqlens", *map(_without_filler, given))
    slots = _without_filler(told.get("cu_seqlens_padded"))
    return slots if offsets is None else offsets, slots


def _of_offsets(offsets: Tensor, slots: Tensor, shape: tuple[int, ...]) -> SequenceLayout:
    """Documents at the starts of their slots; tokens behind the last one are padding."""
    total = shape[-1]
    if read_offsets("cu_seqlens", slots)[-1] < total:
        offsets = torch.cat([offsets, offsets[-1:]])
        slots = torch.cat([slots, slots.new_tensor([total])])
    return SequenceLayout.from_cu_seqlens(offsets, shape, slots)


def _without_filler(offsets: Tensor | None) -> Tensor | None:
    if offsets is None:
        return None
    return offsets.flatten()[offsets.flatten() != _FILLER]


def _both(mask: Tensor | None, padding: Tensor | None) -> Tensor | None:
    """A 4-D mask that lets nothing see padding either."""
    if mask is None or padding is None:
        return mask
    known = min(mask.shape[-1], padding.shape[-1])
    real = mask.new_ones(padding.shape[0], mask.shape[-1], dtype=torch.bool)
    real[:, -known:] = padding[:, -known:].to(mask.device) != 0
    real = real[:, None, None]
    if mask.dtype == torch.bool:
        return mask & real
    return mask.masked_fill(~real, float("-inf"))
