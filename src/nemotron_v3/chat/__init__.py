"""Between messages and text: chat templates, and what an answer says."""

from nemotron_v3.chat.answer import MARKUP, Answer, is_thinking, parse_answer
from nemotron_v3.chat.messages import Message
from nemotron_v3.chat.template import ChatTemplate

__all__ = ["MARKUP", "Answer", "ChatTemplate", "Message", "is_thinking", "parse_answer"]
