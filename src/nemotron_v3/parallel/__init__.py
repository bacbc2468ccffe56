"""Turns a model of one device into one that several share, from outside."""

from nemotron_v3.parallel.fsdp import shard_model

__all__ = ["shard_model"]
