"""Reading and writing Hugging Face checkpoints: lazy, streamed, proven; safetensors alone."""

from nemotron_v3.checkpoint.audit import audit
from nemotron_v3.checkpoint.convert import Conversion, convert, plan_conversion
from nemotron_v3.checkpoint.errors import CheckpointError
from nemotron_v3.checkpoint.load import from_pretrained
from nemotron_v3.checkpoint.load_parts import load_parts
from nemotron_v3.checkpoint.merge import merge_adapter
from nemotron_v3.checkpoint.names import CheckpointOrigin, LoadReport
from nemotron_v3.checkpoint.reader import Checkpoint, open_checkpoint
from nemotron_v3.checkpoint.save import save_pretrained

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CheckpointOrigin",
    "Conversion",
    "LoadReport",
    "audit",
    "convert",
    "from_pretrained",
    "load_parts",
    "merge_adapter",
    "open_checkpoint",
    "plan_conversion",
    "save_pretrained",
]
