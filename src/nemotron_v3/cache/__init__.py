"""What a model remembers between calls: plain data with a position on each row."""

from nemotron_v3.cache.cache import NemotronHybridCache
from nemotron_v3.cache.outside import held_by
from nemotron_v3.cache.step import Transaction
from nemotron_v3.cache.tokens import Step
from nemotron_v3.cache.way_back import WayBack

__all__ = ["NemotronHybridCache", "Step", "Transaction", "WayBack", "held_by"]
