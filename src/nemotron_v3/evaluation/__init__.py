"""What a checkpoint is worth: its scores on texts, and on tasks of lm-evaluation-harness."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemotron_v3.evaluation.options import Candidate, EvalOptions, TaskOptions
    from nemotron_v3.evaluation.result import Evaluation
    from nemotron_v3.evaluation.run import evaluate, score_texts

__all__ = [
    "Candidate",
    "EvalOptions",
    "Evaluation",
    "TaskOptions",
    "evaluate",
    "score_texts",
]

# Imported when they are asked for (PEP 562): a result is read without torch.
_FILES = {
    "Candidate": "options",
    "EvalOptions": "options",
    "Evaluation": "result",
    "TaskOptions": "options",
    "evaluate": "run",
    "score_texts": "run",
}


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_FILES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
