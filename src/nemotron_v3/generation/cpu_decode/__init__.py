"""The second way through the layers: a decode step on a CPU, laid out once for a cache."""

from nemotron_v3.generation.cpu_decode.reading import Reading
from nemotron_v3.generation.cpu_decode.step import DecodeStep

__all__ = ["DecodeStep", "Reading"]
