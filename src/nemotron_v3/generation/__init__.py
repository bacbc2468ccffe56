"""From a model and token ids to more token ids: generate, stream, score, chat."""

from nemotron_v3.chat import ChatTemplate
from nemotron_v3.generation.chat import Chat
from nemotron_v3.generation.engine import GenerationOutput, StreamedToken, generate, stream
from nemotron_v3.generation.options import GenerationOptions
from nemotron_v3.generation.score import score
from nemotron_v3.generation.warm import warm

__all__ = [
    "Chat",
    "ChatTemplate",
    "GenerationOptions",
    "GenerationOutput",
    "StreamedToken",
    "generate",
    "score",
    "stream",
    "warm",
]
