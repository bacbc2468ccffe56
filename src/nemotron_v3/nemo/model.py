"""NeMo AutoModel's Nemotron blocks and models, around layers that this package computes.

Letters: B batch, S sequence, T packed tokens, D hidden size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from nemotron_v3.layers.inputs import unknown_block_type
from nemotron_v3.nemo import shared_tokens
from nemotron_v3.nemo.classes import Accelerated, takes_place_of
from nemotron_v3.nemo.context import NemoContext, split_mask
from nemotron_v3.nemo.moe import GroupedExperts


@takes_place_of("layers.NemotronV3Block")
class Block(Accelerated):
    block_type: str
    residual_in_fp32: bool
    norm: Any
    mixer: Any
    layer_idx: int

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        past_key_values: Any = None,
        cache_position: Tensor | None = None,
        *,
        context: NemoContext | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """`x + mixer(norm(x))`: `[B, S, D]` or `[T, D]` -> the same; fp32 with `residual_in_fp32`.

        Args:
            hidden_states: the tokens.
            attention_mask: a padding mask, or a 4-D mask for attention.
            past_key_values: their NemotronHybridCache.
            cache_position: handed on.
            context: of the model's pass.
            **kwargs: handed on to mamba and attention layers.
        """
        x = self.norm(hidden_states)
        if self.residual_in_fp32:
            x = x.to(self.norm.weight.dtype)  # a stream in fp32 does not fit the mixer's weights
            wide = torch.promote_types(hidden_states.dtype, torch.float32)
            hidden_states = hidden_states.to(wide)
        match self.block_type:
            case "mamba" | "attention":
                places = {"cache_position": cache_position}
                if self.block_type == "attention":
                    places = {"layer_idx": self.layer_idx}
                y = self.mixer(
                    x,
                    attention_mask=attention_mask,
                    past_key_values=past_key_values,
                    context=context,
                    **places,
                    **kwargs,
                )
            case "moe":
                y = self._routed(x, attention_mask, past_key_values, context, kwargs)
            case "mlp":
                y = self.mixer(x)
            case _:
                raise unknown_block_type(self.block_type)
        return hidden_states + y

    def _routed(
        self,
        x: Tensor,
        attention_mask: Any,
        cache: Any,
        context: NemoContext | None,
        told: dict[str, Any],
    ) -> Tensor:
        """The mixture of experts, which padding is no part of."""
        if context is None:
            padding, _ = split_mask(attention_mask)  # of pairs of tokens: nothing to a router
            if told.get("cp_size") not in (None, 1):  # nothing that is said of all tokens, either
                told = {}
            context = NemoContext.read(
                tuple(x.shape[:-1]), x.device, padding=padding, cache=cache, told=told
            )
        layout = context.on(x.device)
        if layout.token_index is None:
            return self.mixer(x)
        experts = self.mixer.experts
        alone = isinstance(experts, GroupedExperts) and not experts.gives_to_others()
        if not alone or not layout.num_tokens:  # all processes give what their places are
            return self.mixer(x, context.padding_mask(x.device))
        return layout.unpack(self.mixer(layout.pack(x)))


@takes_place_of("model.NemotronV3Model")
class Model(Accelerated):
    """The stack of blocks, which their loop calls; each is handed one context."""

    backend: Any
    layers: nn.ModuleDict

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        attention_mask: Any = None,
        causal_mask_mapping: dict[str, Tensor] | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        cache_position: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Tokens `[B, S]` or embeddings `[B, S, D]` -> hidden states `[B, S, D]`.

        Args:
            input_ids: tokens; in a later stage of a pipeline, hidden states.
            attention_mask: a padding mask `[B, S]` or, with a cache, `[B, held + S]`; or a 4-D mask
                for attention.
            causal_mask_mapping: a 4-D mask as "full_attention"; a padding mask holds beside it.
            inputs_embeds: in the place of tokens.
            past_key_values: their NemotronHybridCache.
            cache_position: handed on.
            **kwargs: handed on; what `NemoContext.read` knows says where documents lie.
        """
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is not None:
            padding, mask = split_mask(attention_mask)
            if causal_mask_mapping is not None and mask is None:
                mask = causal_mask_mapping.get("full_attention")
            kwargs["context"] = NemoContext.read(
                self._grid(given, kwargs),
                given.device,
                padding=padding,
                mask=mask,
                cache=past_key_values,
                told=kwargs,
                group=self._token_group(),
            )
        return super().forward(
            input_ids,
            attention_mask=attention_mask,
            causal_mask_mapping=causal_mask_mapping,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            cache_position=cache_position,
            **kwargs,
        )

    def _token_group(self) -> ProcessGroup | None:
        """The processes that a parallelizer has told any of the layers to share tokens with."""
        groups = map(shared_tokens.group_of, self.layers.values())
        return next((group for group in groups if group is not None), None)

    def _grid(self, given: Tensor, told: dict[str, Any]) -> tuple[int, ...]:
        """The tokens as the layers see them: Transformer Engine takes a pack without its batch
        dimension."""
        is_hidden = given.is_floating_point()
        shape = tuple(given.shape[:-1] if is_hidden else given.shape)
        squeezed = told.get("qkv_format") == "thd" and self.backend.attn == "te"
        return shape[1:] if squeezed and len(shape) == 2 and shape[0] == 1 else shape


@takes_place_of("model.NemotronHForCausalLM")
class CausalLM(Accelerated):
    """The language model; all but the masks of a generation is theirs."""

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Theirs, without the causal mask, which is blind to padding: the padding mask and the
        order of the tokens say all that it does."""
        theirs: Any = super()
        inputs = theirs.prepare_inputs_for_generation(*args, **kwargs)
        inputs.pop("causal_mask_mapping", None)
        return inputs
