"""What transformers' trainers ask a model and its config for, answered in one sentence."""

from typing import Any

USE_THEIRS = (
    "transformers' Trainer and TRL's trainers do not train a model of nemotron_v3 itself: load the "
    "checkpoint with transformers.AutoModelForCausalLM.from_pretrained(path), call "
    "nemotron_v3.hf.accelerate(model) on it and give them that (docs/transformers.md); this model "
    "is for a training loop of your own"
)


class AskedByTrainers:
    """Descriptor that raises TypeError when a transformers Trainer reads it."""

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        raise TypeError(USE_THEIRS)
