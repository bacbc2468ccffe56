"""A model whose own call shares the tokens of a batch: what `Plan.cp` makes of one."""

from typing import Any

import torch
from torch import Tensor, nn

from nemotron_v3.layers.moe.load_balancing import BalanceLoss
from nemotron_v3.layout import SequenceLayout
from nemotron_v3.model.model import NemotronV3ForCausalLM
from nemotron_v3.model.output import CausalLMOutput
from nemotron_v3.parallel.context import ContextParallel
from nemotron_v3.parallel.meshes import Meshes


def share_batches(model: NemotronV3ForCausalLM, meshes: Meshes) -> None:
    """Have a model be called with the batch of its group, of which each process computes a part.

    Its layers get the group too, for calls with `cp_size` and `cp_rank`.
    """
    assert meshes.cp is not None
    whole, layout = model.forward, meshes.plan.cp_layout
    shared = ContextParallel(model, meshes.cp, layout, call=whole, together=meshes.host)

    def forward(
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        layout: SequenceLayout | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        balance: BalanceLoss | None = None,
        **layout_kwargs: Any,
    ) -> CausalLMOutput:
        """This process's part of the loss, as `ContextParallel` gives it; there are no logits."""
        if "context" in layout_kwargs:
            return whole(input_ids, num_items_in_batch=num_items_in_batch, **layout_kwargs)
        absent = {
            "past_key_values": past_key_values is not None,
            "inputs_embeds": inputs_embeds is not None,
            "use_cache": bool(use_cache),
            "output_hidden_states": output_hidden_states,
            "logits_to_keep": isinstance(logits_to_keep, Tensor) or logits_to_keep != 0,
        }
        asked = ", ".join(name for name, given in absent.items() if given)
        problem = None
        if asked:
            problem = (
                f"{asked}: a process of a plan with cp = {meshes.plan.cp} has a part of the tokens,"
                " and gives its part of the loss alone"
            )
        about = {"layout": layout, "position_ids": position_ids, **layout_kwargs}
        told = (input_ids, labels, attention_mask, num_items_in_batch, about)
        return CausalLMOutput(shared.part(problem, balance, *told))

    model.model.register_forward_pre_hook(_refuse_whole, with_kwargs=True)
    model.forward = forward  # type: ignore[method-assign]


def _refuse_whole(backbone: nn.Module, args: Any, told: dict[str, Any]) -> None:
    """Raises ValueError for a call that would have a graph of all tokens on each process."""
    context = told.get("context")
    if torch.is_grad_enabled() and (context is None or context.carry is None):
        raise ValueError(
            "the model's layers are called with whole batches, and its gradients are sums over the "
            "processes that share tokens: they would be counted several times. Call the model with "
            "labels, or under torch.no_grad()"
        )
