"""What training a model by a plan takes of each GPU: memory, and bytes sent."""

from typing import TYPE_CHECKING

from nemotron_v3.cli.terminal import new_table

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from nemotron_v3.config import NemotronV3Config
    from nemotron_v3.parallel import Plan

DEVICES = {"h100": 80, "h200": 140, "b200": 180}  # GiB of memory that a program may have
MOMENTS = {"float32": 8.0, "8bit": 2.0 + 2 * 4 / 64}  # bytes a parameter; a scale for each 64
_FIELDS = ("gpus", "ep", "dp_replicate", "cp")


def read_plan(text: str) -> "tuple[Plan, int]":
    """`gpus=8,ep=4` as a plan with all sizes settled, and its GPUs.

    Raises:
        ValueError: another field, no integer, or a plan that does not divide the GPUs.
    """
    from nemotron_v3.parallel import Plan

    parts = [part.partition("=") for part in text.replace(" ", "").split(",")]
    given = {name: value for name, _, value in parts}
    if len(given) < len(parts):
        raise ValueError(f"--plan is {text!r}: a size stands there twice")
    if "gpus" not in given or not given.keys() <= set(_FIELDS):
        raise ValueError(
            f"--plan is {text!r}: give gpus, and ep, cp or dp_replicate beside it, such as "
            "gpus=8,ep=4"
        )
    try:
        sizes = {name: int(value) for name, value in given.items()}
    except ValueError:
        raise ValueError(f"--plan is {text!r}: every size is an integer") from None
    gpus = sizes.pop("gpus")
    if gpus < 1:
        raise ValueError(f"--plan is {text!r}: gpus is at least 1")
    ep, cp, sets = (sizes.get(name, 1) for name in ("ep", "cp", "dp_replicate"))
    return Plan(dp_replicate=sets, ep=ep, cp=cp).over(gpus), gpus


def costs_of_plan(
    config: "NemotronV3Config", text: str, tokens: int, dtype: "torch.dtype", moments: str
) -> dict[str, int]:
    """Bytes of memory of a GPU, and bytes that it sends in a forward and a backward pass.

    Raises:
        ValueError: see `read_plan`; experts that it does not divide.
    """
    from nemotron_v3.parallel.costs import plan_costs

    plan, gpus = read_plan(text)
    costs = plan_costs(config, plan, tokens=tokens, dtype=dtype, moments=MOMENTS[moments])
    sizes = {"gpus": gpus, "ep": plan.ep, "cp": plan.cp, "dp_replicate": plan.dp_replicate}
    return sizes | {f"{name}_bytes": size for name, size in vars(costs).items()}


def plan_table(text: str, costs: dict[str, int], tokens: int, memory: int | None) -> "Table":
    """The same as a table, beside the memory of a GPU where it is known."""
    title = f"a GPU of {text}, training all weights"
    table = new_table("memory", "GB", title=title)
    held = {
        "weights": costs["weights_bytes"],
        "gradients": costs["gradients_bytes"],
        "moments": costs["moments_bytes"],
        "weights gathered at once": costs["gathered_bytes"],
    }
    if memory is not None:
        held["left for activations"] = memory - sum(held.values())
    sent = {
        f"sent of {tokens:,} tokens: to experts and back": costs["experts_bytes"],
        "sent of weights and sums of gradients": costs["dense_bytes"],
        "sent of rows of the embeddings": costs["embeddings_bytes"],
    }
    if costs["cp"] > 1:
        sent["sent of states, whatever the tokens"] = costs["mixers_bytes"]
        sent[f"sent of keys and values of {tokens:,} tokens"] = costs["attention_bytes"]
    for section in (held, sent):
        for name, size in section.items():
            table.add_row(name, f"{size / 1e9:,.2f}")
        table.add_section()
    return table
