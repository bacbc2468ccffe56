"""transformers' Nemotron-H model and its language-model head, around the accelerated layers.

Letters: B batch, S sequence, T packed tokens, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.models.nemotron_h import modeling_nemotron_h as theirs

from nemotron_v3.hf import opaque
from nemotron_v3.hf.classes import takes_place_of
from nemotron_v3.hf.context import PACKING_NAMES, TheirContext
from nemotron_v3.hf.settings import SETTINGS, Accelerated
from nemotron_v3.hf.spelling import as_in_memory
from nemotron_v3.hf.states import CACHE_NAME, as_cache, fresh_cache, holds_tokens, one_cache
from nemotron_v3.hf.swap import install_as_built
from nemotron_v3.layout import SequenceLayout
from nemotron_v3.model.checks import check_kept, check_labels, check_places, refuse_ids, token_grid
from nemotron_v3.model.head import plain_weight
from nemotron_v3.model.loss import IGNORE_INDEX, check_items, per_item

_F = TypeVar("_F", bound=Callable[..., Any])
LOSS_CHUNK = 1024  # tokens whose logits are held at once with loss="linear"


class AcceleratedModelMixin(nn.Module):
    """What all accelerated models share: the backbone and models with any head.

    Built from a config or by `from_pretrained`, the modules are the accelerated ones from the
    start, and `A_log`, `D` and `dt_bias` stay fp32 whatever dtype the rest is loaded in.
    """

    _can_compile_fullgraph = False  # the ops are calls that no graph goes through
    _keep_in_fp32_modules_strict = [
        *(theirs.NemotronHForCausalLM._keep_in_fp32_modules_strict or ()),
        *("A_log", "D", "dt_bias"),
    ]

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        if SETTINGS not in vars(self):
            install_as_built(self)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load a state dict, as `nn.Module` does.

        Also accepts checkpoint names; `backbone.` and per-expert tensors are renamed here. (A
        Trainer resumes with the tensors of checkpoint files, and ignores keys that do not fit.)
        """
        state = as_in_memory(state_dict, self.state_dict(), strict)
        return super().load_state_dict(state, strict, assign)


@takes_place_of(theirs.NemotronHModel)
class NemotronHModel(AcceleratedModelMixin, Accelerated, theirs.NemotronHModel):
    """transformers' `NemotronHModel`, the backbone without a head, computed by this package.

    Args and Raises: as `NemotronHForCausalLM`.
    """

    # transformers renames and stacks a checkpoint's tensors (`backbone.`, one tensor an expert), in
    # loading and in saving, only for a model whose class is its own; this one passes for it.
    __module__ = theirs.__name__

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled by a function of this file, since `__module__` does not lead to the class."""
        return _unpickled, ("NemotronHModel",), vars(self)

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        attention_mask: Any = None,
        context: TheirContext | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast | tuple[Any, ...]:
        """transformers' arguments and output; `context` is what the head has worked out already."""
        as_tuple = not _wanted(self.config, kwargs, "return_dict")
        cache = one_cache(past_key_values, cache)
        if context is None:
            cache, context = enter(
                self,
                input_ids,
                inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                cache=cache,
                use_cache=use_cache,
                kwargs=kwargs,
            )
        assert context is not None
        if inputs_embeds is not None:
            hidden = inputs_embeds
        else:
            assert input_ids is not None  # `enter` takes one of the two
            try:
                hidden = self.embeddings(input_ids)
            except IndexError:
                refuse_ids(self.embeddings, input_ids)
                raise
        kept = [hidden] if _wanted(self.config, kwargs, "output_hidden_states") else None
        # Padding would otherwise contribute to the norm weights' gradients.
        hidden = _without_padding(hidden, context)
        for block in self.layers:
            # By transformers' name: its gradient checkpointing leaves the cache out by that.
            hidden = block(hidden, context=context, **{CACHE_NAME: cache})
            if kept is not None:
                kept.append(hidden)
        hidden = _without_padding(self.norm_f(hidden), context)
        if kept is not None:
            kept[-1] = hidden
        logits = context.router_logits
        rest: dict[str, Any] = {CACHE_NAME: cache}
        if logits is not None:
            rest["router_logits"] = tuple(logits[i] for i in sorted(logits))
        output = MoeModelOutputWithPast(
            last_hidden_state=hidden,
            hidden_states=None if kept is None else tuple(kept),
            **rest,
        )
        return output.to_tuple() if as_tuple else output


@takes_place_of(theirs.NemotronHForCausalLM)
class NemotronHForCausalLM(AcceleratedModelMixin, Accelerated, theirs.NemotronHForCausalLM):
    """transformers' `NemotronHForCausalLM`, computed by this package.

    Args:
        config: a transformers `NemotronHConfig`.

    Raises:
        ImportError: a transformers outside the supported versions.
        ValueError: a config that asks for what this package does not have.
    """

    __module__ = theirs.__name__  # for the reason that the backbone has it

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, ("NemotronHForCausalLM",), vars(self)

    def extra_repr(self) -> str:
        return "computed by nemotron_v3"

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of the next token, and the loss where labels are given.

        Args:
            input_ids: int64 `[B, S]`.
            attention_mask: `[B, S]`, 1 = real; `[B, past + S]` with a cache; a 4-D mask; or a dict
                of both by kind of layer.
            position_ids: `[B or 1, S]`; a document starts at a real token where they do not go on
                from the one before. Beside `seq_idx` or offsets, which say it, they say nothing.
            past_key_values: a cache of transformers, updated in place.
            cache: the same, as transformers calls it since 5.24.
            inputs_embeds: `[B, S, D]` in place of `input_ids`.
            labels: int64 or int32 `[B, S]`, shifted by one inside and never across a document's
                border. A label at padding counts right behind a real token, and has to be -100
                elsewhere in a row that holds one.
            use_cache: None makes a cache as the config says, but not in training nor for a pack.
            logits_to_keep: logits of the last so many positions (0: all), or of a tensor's.
            **kwargs: `seq_idx`, `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q`, `max_length_k`
                of the data collators; `num_items_in_batch`, `shift_labels`, `ignore_index` of the
                loss; `output_hidden_states`, `output_router_logits`, `return_dict`.

        Returns:
            `loss` (fp32 or wider), `logits` `[B, S, V]` in fp32 or wider, 0 at padding (None in
            training with labels and `loss="linear"`), `past_key_values`, `hidden_states`,
            `router_logits` (`[B * S, E]` a moe layer).

        Raises:
            ValueError: arguments that contradict each other, or that no accelerated model serves; a
                label that padding would have to predict.
            TypeError: a mask or cache of another kind.
        """
        cache = one_cache(past_key_values, cache)
        if not isinstance(self, Accelerated):  # undone, and called by a method that was kept
            return type(self).forward(
                self,
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                labels=labels,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                **kwargs,
                **{CACHE_NAME: cache},
            )
        as_tuple = not _wanted(self.config, kwargs, "return_dict")
        cache, context = enter(
            cast(NemotronHModel, self.model),
            input_ids,
            inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            use_cache=use_cache,
            kwargs=kwargs,
        )
        _check_kept(logits_to_keep, context.layout.shape[-1])
        given = labels is not None or kwargs.get("shift_labels") is not None
        linear = given and self.training and self.settings.loss == "linear"
        if linear and self._has_own_loss():
            raise ValueError(
                f"loss='linear' cannot compute the loss_function {self.loss_function} that this "
                "model was given, which takes logits: accelerate with loss='logits'"
            )
        for name, said in (("labels", labels), ("shift_labels", kwargs.get("shift_labels"))):
            if said is not None and not self._has_own_loss():
                check_labels(said, context.layout.shape, name=name)
        if not self._has_own_loss():
            check_items(kwargs.get("num_items_in_batch"))
            _refuse_strays(labels, context.layout, kwargs)
        passed_on = {k: v for k, v in kwargs.items() if k not in PACKING_NAMES}
        out = self.model(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            context=context,
            **(passed_on | {"return_dict": True, CACHE_NAME: cache}),
        )
        hidden = out.last_hidden_state
        loss = logits = None
        if linear:
            loss = self._linear_loss(hidden, labels, context.layout, kwargs)
        elif given:
            logits = self.lm_head(hidden)
            loss = self._loss(logits, labels, context.layout, kwargs)
            logits = _wide(_last(logits, logits_to_keep))
        else:
            logits = _wide(self.lm_head(_last(hidden, logits_to_keep)))
        output = MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=out.hidden_states,
            router_logits=out.router_logits,
            **{CACHE_NAME: out.get(CACHE_NAME)},
        )
        return output.to_tuple() if as_tuple else output

    def _has_own_loss(self) -> bool:
        return self.loss_function is not LOSS_MAPPING["ForCausalLM"]

    def _loss(
        self, logits: Tensor, labels: Tensor | None, layout: SequenceLayout, kwargs: dict[str, Any]
    ) -> Tensor:
        """The loss of logits `[B, S, V]`; by the model's own `loss_function` if it has one."""
        if self._has_own_loss():
            given = {k: v for k, v in kwargs.items() if k in _LOSS_NAMES}
            return self.loss_function(
                logits=_wide(logits), labels=labels, vocab_size=self.config.vocab_size, **given
            )
        targets = _targets(labels, layout, logits.device, kwargs)  # [B, S]
        mean = opaque.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return per_item(mean, targets, kwargs.get("num_items_in_batch"))

    def _linear_loss(
        self, hidden: Tensor, labels: Tensor | None, layout: SequenceLayout, kwargs: dict[str, Any]
    ) -> Tensor:
        """The same from hidden states `[B, S, D]`, with the logits of some tokens at a time.

        A head that is more than its matrix is called as a module, so that adapters, quantisation
        and sharding act; its logits are then computed twice.
        """
        layout = layout.to(hidden.device)
        hidden, targets = (
            layout.pack(hidden),
            _packed_targets(labels, layout, kwargs),
        )  # [T, D], [T]
        items = kwargs.get("num_items_in_batch")
        weight = plain_weight(self.lm_head)
        if weight is not None:
            mean = opaque.linear_cross_entropy(hidden, weight, targets, impl=self.impl)
            return per_item(mean, targets, items)
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        for x, t in zip(hidden.split(LOSS_CHUNK), targets.split(LOSS_CHUNK), strict=True):
            part = checkpoint(partial(_summed_loss, self.lm_head), x, t, use_reentrant=False)
            total = total + part.to(total.device)
        count = (targets != IGNORE_INDEX).sum().clamp(min=1)
        return per_item(total / count, targets, items)


def _unpickled(name: str = "NemotronHForCausalLM") -> NemotronHModel | NemotronHForCausalLM:
    kind = {"NemotronHModel": NemotronHModel, "NemotronHForCausalLM": NemotronHForCausalLM}[name]
    return kind.__new__(kind)


_LOSS_NAMES = ("num_items_in_batch", "shift_labels", "ignore_index")


def _outside_of_graphs(function: _F) -> _F:
    return cast(Any, torch.compiler.disable)(function)  # whose own type loses the function's


@_outside_of_graphs  # it reads tensors (masks, positions)
def enter(
    model: NemotronHModel,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    *,
    attention_mask: Any,
    position_ids: Tensor | None,
    cache: Any,
    use_cache: bool | None,
    kwargs: dict[str, Any],
) -> tuple[Cache | None, TheirContext]:
    """Check the arguments of a pass; returns its cache and its context.

    Raises:
        ValueError, TypeError: see `NemotronHForCausalLM.forward`; nothing has been changed then.
    """
    config = model.config
    shape, device = token_grid(input_ids, inputs_embeds, config.hidden_size)
    if len(shape) != 2:
        raise ValueError(f"tokens have shape {shape}: (batch, seq_len) is needed")
    if _wanted(config, kwargs, "output_attentions"):
        raise ValueError(
            "output_attentions=True: an accelerated model never holds attention weights; call "
            "nemotron_v3.hf.undo(model) first"
        )
    cache = as_cache(cache)
    packing = {name: kwargs.get(name) for name in PACKING_NAMES}
    wanted = cache is not None or bool(use_cache)
    follows = holds_tokens(cache, model.settings.config, shape[0])
    context = TheirContext.read(
        shape,
        device,
        attention_mask=attention_mask,
        position_ids=position_ids,
        follows=follows,
        cached=wanted,
        router_logits=_wanted(config, kwargs, "output_router_logits"),
        packing=packing,
    )
    if cache is None and use_cache is None:
        one_a_row = context.layout.num_documents == shape[0]
        wanted = bool(getattr(config, "use_cache", False)) and not model.training and one_a_row
    if wanted and cache is None:
        cache = fresh_cache(config)
    return cache, context


def _wanted(config: Any, kwargs: dict[str, Any], name: str) -> bool:
    value = kwargs.get(name)
    return bool(getattr(config, name, False) if value is None else value)


def _without_padding(hidden: Tensor, context: TheirContext) -> Tensor:
    """`[B, S, D]` with 0 at padding, so that logits are 0 there."""
    if context.layout.token_index is None:
        return hidden
    layout = context.on(hidden.device)
    return layout.unpack(layout.pack(hidden))


def _targets(
    labels: Tensor | None, layout: SequenceLayout, device: torch.device, kwargs: dict[str, Any]
) -> Tensor:
    """int64 `[B, S]`: `_packed_targets` at their places, -100 at padding."""
    layout = layout.to(device)
    packed = _packed_targets(labels, layout, kwargs)
    if layout.token_index is None:
        return packed.reshape(layout.shape)
    grid = packed.new_full((layout.shape[0] * layout.shape[1],), IGNORE_INDEX)
    return grid.index_copy(0, layout.token_index, packed).reshape(layout.shape)


def _packed_targets(
    labels: Tensor | None, layout: SequenceLayout, kwargs: dict[str, Any]
) -> Tensor:
    """int64 `[T]`: the label of each token's successor in its document, -100 where none counts."""
    shifted = kwargs.get("shift_labels")
    if shifted is None:
        assert labels is not None  # one of the two is given
        return opaque.targets_of(_labels(labels, layout, kwargs), layout)
    return layout.pack(_labels(shifted, layout, kwargs))


def _labels(given: Tensor, layout: SequenceLayout, kwargs: dict[str, Any]) -> Tensor:
    """Labels on the layout's device in int64, with -100 where none counts."""
    given = given.to(layout.device, torch.int64)
    ignored = kwargs.get("ignore_index", IGNORE_INDEX)
    return given if ignored == IGNORE_INDEX else given.masked_fill(given == ignored, IGNORE_INDEX)


def _refuse_strays(labels: Tensor | None, layout: SequenceLayout, kwargs: dict[str, Any]) -> None:
    """Raises ValueError for a label that padding would have to predict.

    The mask was read just now, so that a GPU has nothing left to do that one more read waits for.
    """
    shifted = kwargs.get("shift_labels")
    given = labels if shifted is None else shifted
    if given is not None and layout.token_index is not None:
        opaque.refuse_stray_label(
            _labels(given, layout, kwargs), layout, shifted=shifted is not None
        )


def _summed_loss(head: torch.nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """Sum of the losses of some tokens: hidden `[T, D]`, targets `[T]`."""
    logits = head(hidden)
    count = (targets != IGNORE_INDEX).sum()
    return opaque.cross_entropy(logits, targets.to(logits.device)) * count.to(logits.device)


def _wide(logits: Tensor) -> Tensor:
    """The tensor in fp32 or wider, as transformers returns logits."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _check_kept(logits_to_keep: Any, seq_len: int) -> None:
    """Raises ValueError or TypeError for logits that cannot be kept of `seq_len` places.

    A tensor may be a mask, and may count from the end.
    """
    if not isinstance(logits_to_keep, Tensor):
        check_kept(logits_to_keep, seq_len)
    elif logits_to_keep.dtype != torch.bool:
        check_places(logits_to_keep, -seq_len, seq_len)
    elif logits_to_keep.shape != (seq_len,):
        raise ValueError(
            f"logits_to_keep is a mask of shape {tuple(logits_to_keep.shape)}: give one of the "
            f"{seq_len} places, ({seq_len},)"
        )


def _last(x: Tensor, positions: int | Tensor) -> Tensor:
    """The last `positions` places of `[B, S, ...]` (all for 0), or the places a tensor lists."""
    if isinstance(positions, Tensor):
        return x[:, positions]
    return x[:, -positions:] if positions else x
