"""The context of one forward pass: layout, mask and cache, read once by the outermost module.

That is a model, or a layer that is called alone. The modules within are given its context, and read
no argument again.
"""

import functools
import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from nemotron_v3.cache import NemotronHybridCache, Transaction
from nemotron_v3.layers.carry import Carry
from nemotron_v3.layers.context_parallel import TokenGroup
from nemotron_v3.layers.offsets import offsets_of_this_call
from nemotron_v3.layout import SequenceLayout
from nemotron_v3.layout.checks import agreed, read_offsets
from nemotron_v3.ops import compat


class ForwardContext:
    """How the tokens of one forward pass lie, and what they follow.

    It is no dataclass and no pytree, so that what moves or casts the arguments of a module (FSDP,
    device hooks) leaves it alone; each layer asks for the layout on its own device.

    Attributes:
        layout: of the tokens on the grid that the layers see.
        mask: a 4-D mask `[B or 1, 1 or H, S, L]` that speaks of pairs of tokens and decides alone
            in attention; or None.
        cache: what the tokens follow, or None.
        step: what the layers write of the cache, while `writing()` is entered; or None.
        carry: what stands for the tokens of the documents that are not in this pass, or None.
        has_padding: whether layers are to be given the real tokens alone. A 4-D mask speaks of the
            whole grid.
    """

    def __init__(
        self,
        layout: SequenceLayout,
        mask: Tensor | None = None,
        cache: NemotronHybridCache | None = None,
        step: Transaction | None = None,
        carry: Carry | None = None,
    ):
        self.layout: SequenceLayout = layout
        self.mask: Tensor | None = mask
        self.cache: NemotronHybridCache | None = cache
        self.step: Transaction | None = step
        self.carry: Carry | None = carry
        self.has_padding: bool = layout.token_index is not None and mask is None

    @classmethod
    def enter(
        cls,
        shape: tuple[int, ...],
        device: torch.device,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        layout_kwargs: dict[str, Any] | None = None,
        *,
        layer_idx: int | None = None,
        takes_4d_mask: bool = False,
        is_stateless: bool = False,
        who: str = "a layer",
        group: TokenGroup | None = None,
    ) -> "ForwardContext":
        """Read what a caller says about the tokens of a pass.

        Args:
            shape: the grid of the tokens, `(B, S)` or `(T,)`.
            device: where they are.
            attention_mask: `[B, S]`, 1 = real; it may also cover what the cache holds. Or a 4-D
                mask, for a layer that takes it or to which it says nothing.
            past_key_values: a `NemotronHybridCache` or None.
            layout_kwargs: the keyword arguments of `SequenceLayout.resolve`.
            layer_idx: of a layer called alone, its number in the cache where it has a state there.
            takes_4d_mask: the layer takes a 4-D mask, which speaks of pairs of tokens.
            is_stateless: the layer works token by token (see `offsets_of_this_call`); a 4-D mask
                says nothing to it.
            who: of whose arguments an error speaks.
            group: the processes that `cp_size` and `cp_rank` speak of; the other arguments are then
                those of the tokens of all.

        Raises:
            ValueError: masks, layouts or a cache that do not fit.
            TypeError: an unknown keyword argument, or a cache of another kind.
        """
        cache = past_key_values
        if cache is not None and not isinstance(cache, NemotronHybridCache):
            _refuse_cache(cache)
        mask, may_end_early = None, is_stateless
        if (takes_4d_mask or is_stateless) and _is_4d(attention_mask):
            mask = attention_mask if takes_4d_mask else None
            attention_mask, may_end_early = None, True
        kwargs = layout_kwargs or {}
        if group is not None and kwargs.get("cp_size") not in (None, 1):
            check_names(kwargs, who)
            if attention_mask is not None or mask is not None or cache is not None:
                raise ValueError(
                    "tokens that processes share come without a mask and without a cache: say "
                    "where the documents of all tokens lie by cu_seqlens or a layout"
                )
            return cls(*_shared(shape, device, kwargs, group))
        if attention_mask is None and not kwargs:
            layout = None if cache is None else cache.one_token_layout(shape, device)
            if layout is None and _is_shared(device):
                layout = _rows_on_cpu(shape)
            elif layout is None:
                layout = SequenceLayout.of_rows(shape, device)
        elif attention_mask is None and _is_ready(kwargs, shape, device):
            layout = kwargs["layout"]
        else:
            check_names(kwargs, who)
            attention_mask = _of_new_tokens(attention_mask, shape, cache)
            kwargs = offsets_of_this_call(
                kwargs, shape, attention_mask, cache, layer_idx, may_end_early
            )
            layout = SequenceLayout.resolve(shape, device, attention_mask, **kwargs)
        return cls(layout, mask, cache)

    def writing(self) -> AbstractContextManager[Transaction | None]:
        """Entered around the layers of the pass: what they write of the cache belongs together."""
        if self.cache is None:
            return nullcontext()
        layout = self.layout if self.mask is None else _whole_rows(self.layout)
        self.step = Transaction(self.cache, layout)
        return self.step

    def packed(self) -> "ForwardContext":
        """The same pass as layers see it that are given the real tokens alone, `[T, D]`."""
        return ForwardContext(self.layout.packed, None, self.cache, self.step, self.carry)

    def on(self, device: torch.device) -> SequenceLayout:
        """The layout on a device; moved once a pass."""
        layout = self.layout
        if layout.device == device:
            return layout
        return layout.derived(("on", device), lambda layout: layout.to(device))

    def leave(self, y: Tensor) -> Tensor:
        """Put a mixer's output `[T, D]` back on the grid, 0 at padding.

        It is the mixer's last call, and marks what the layer wrote of the cache as complete.
        """
        if self.step is not None:
            self.step.layer_is_done()
        layout = self.layout if self.layout.device == y.device else self.on(y.device)
        return layout.unpack(y)


def _is_shared(device: torch.device) -> bool:
    """Whether passes over plain grids of one shape may share their layout, and with it the index
    tables that ops work out for it.

    Those of a GPU belong to the stream that they were made on. What a compiler, a mode or a
    transform of torch.func makes is not to be met outside of it, nor the other way round.
    """
    return (
        device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not compat.dispatch_modes()
        and compat.current_transform() is None
    )


@functools.lru_cache(maxsize=4)  # shapes of training, of evaluation, of prompts
def _rows_on_cpu(shape: tuple[int, ...]) -> SequenceLayout:
    return SequenceLayout.of_rows(shape, "cpu")


def _shared(
    shape: tuple[int, ...], device: torch.device, kwargs: dict[str, Any], group: TokenGroup
) -> tuple[SequenceLayout, None, None, None, Carry]:
    """What `ForwardContext` takes, of a process's share of packed tokens.

    Raises:
        ValueError: another group than the layer's, no word of where the documents lie, or another
            number of tokens than the share has.
    """
    others = {name: said for name, said in kwargs.items() if name not in ("cp_size", "cp_rank")}
    size, rank = kwargs["cp_size"], kwargs.get("cp_rank")
    if size != group.size or rank not in (None, group.rank):
        raise ValueError(
            f"cp_size={size}, cp_rank={rank}, but the layer's group has {group.size} processes and "
            f"this is number {group.rank}: leave cp_rank out, or give those"
        )
    layout, names = others.get("layout"), ("cu_seqlens", "cu_seqlens_q", "cu_seqlens_kv")
    offsets = agreed("cu_seqlens", *map(others.get, names))
    if layout is None and offsets is None:
        raise ValueError(
            "tokens that processes share need cu_seqlens or a layout of all of them, not of this "
            "process's share"
        )
    total = layout.num_tokens if layout is not None else read_offsets("cu_seqlens", offsets)[-1]
    local, carry = group.share(SequenceLayout.resolve((total,), device, **others))
    if shape not in ((local.num_tokens,), (1, local.num_tokens)):
        raise ValueError(
            f"the call holds tokens of shape {shape}; the share of process {group.rank} of "
            f"{group.size} is {local.num_tokens} of {total} tokens: give those, packed"
        )
    own = SequenceLayout(shape, local.lengths, local.cu_seqlens, None)
    return own, None, None, None, carry


def _is_4d(mask: Any) -> bool:
    """Whether a mask speaks of pairs of tokens."""
    return isinstance(mask, Tensor) and mask.dim() == 4


def _is_ready(kwargs: dict[str, Any], shape: tuple[int, ...], device: torch.device) -> bool:
    """Whether all that is said is a layout of just these tokens, as for many steps of one token."""
    layout = kwargs.get("layout")
    return (
        len(kwargs) == 1
        and isinstance(layout, SequenceLayout)
        and (layout.shape, layout.device) == (shape, device)
    )


def check_names(layout_kwargs: dict[str, Any], who: str) -> None:
    """Raises TypeError for a keyword argument that no layer understands."""
    for name in layout_kwargs:
        if name not in _LAYOUT_NAMES:
            raise TypeError(
                f"unexpected keyword argument {name!r}: {who} takes {', '.join(_LAYOUT_NAMES)}"
            )


_LAYOUT_NAMES = tuple(
    name
    for name, parameter in inspect.signature(SequenceLayout.resolve).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
)


def _of_new_tokens(
    mask: Tensor | None, shape: tuple[int, ...], cache: NemotronHybridCache | None
) -> Tensor | None:
    """The columns of a padding mask that belong to the new tokens.

    With a cache a caller may go on giving the mask of the whole sequence: what the cache holds is
    settled, only the last columns say anything.

    Raises:
        ValueError: more columns than new tokens, but fewer than a row of the cache holds.
    """
    if cache is None or not isinstance(mask, Tensor) or not 1 <= mask.dim() <= 2:
        return mask
    if not cache.has_previous_state or mask.shape[-1] <= shape[-1]:
        return mask
    if mask.shape[-1] < (longest := cache.get_seq_length()):
        raise ValueError(
            f"attention_mask has {mask.shape[-1]} columns for {shape[-1]} new tokens behind a "
            f"cache of {longest}: give those of the new tokens, or of all"
        )
    return mask[..., -shape[-1] :]


def _whole_rows(layout: SequenceLayout) -> SequenceLayout:
    """All tokens of each row as one document: a 4-D mask decides which of them see each other.

    Raises:
        ValueError: a layout with padding, which would not be stored.
    """
    B, S = layout.shape if len(layout.shape) == 2 else (1, *layout.shape)
    if layout.token_index is not None:
        raise ValueError(
            f"a layout of {layout.num_tokens} real tokens on a grid of {B * S} contradicts a 4-D "
            "mask with a cache, which stores all of them: give a padding mask"
        )
    return SequenceLayout.plain(B, S, layout.device)


def _refuse_cache(past_key_values: Any) -> None:
    """Raises TypeError: a cache of another kind would hold states of other shapes."""
    raise TypeError(
        f"past_key_values is a {full_name(past_key_values)}: give a "
        "nemotron_v3.NemotronHybridCache made from the model's config"
    )


def full_name(value: Any) -> str:
    """The class of a value with its module, for another package's class of the same name."""
    kind = type(value)
    own = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"{own}{kind.__qualname__}"
