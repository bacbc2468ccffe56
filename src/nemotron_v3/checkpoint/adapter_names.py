"""The names of an adapter's tensors, without what wrappers put around them."""

import re

# Modules that hold another one and nothing else: of torch.compile, FSDP, activation checkpointing.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_ROOTS = ("model", "backbone", "lm_head")  # what the whole model holds
# A state dict in memory has the adapter's name behind that of its tensor; a file has not.
_LORA = re.compile(r"(\.lora_(?:(?:embedding_)?[AB]|magnitude_vector))(?:\.(?!weight$|bias$)\w+)?")


def plain_adapter_name(name: str) -> str:
    """The name of a tensor as the model in memory has its module: `model.layers.0...lora_A.weight`.

    Taken off are PEFT's `base_model.model.`, `module.` of DDP and the wrappers of torch.compile,
    FSDP and checkpointing, in any number, and an adapter's own name; `backbone.` becomes `model.`,
    and a backbone that was adapted alone gets its `model.` back.
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1:
        if parts[:2] == ["base_model", "model"]:
            del parts[:2]
        elif parts[0] == "module" or (parts[0] == "model" and parts[1] in _ROOTS):
            del parts[0]
        else:
            break
    if parts and parts[0] == "backbone":
        parts[0] = "model"
    elif parts and parts[0] in ("layers", "embeddings", "norm_f"):
        parts.insert(0, "model")
    return _LORA.sub(r"\1", ".".join(parts), count=1)


def both_spellings(module: str) -> tuple[str, ...]:
    """Both names of a module: with the backbone as `model`, and as `backbone`."""
    if module.startswith("model."):
        return module, "backbone." + module.removeprefix("model.")
    return (module,)
