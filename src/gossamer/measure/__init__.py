"""What a network costs and does, measured: MACs, bytes, latency."""

from gossamer.measure.latency import LatencyComparison, compare_latency
from gossamer.measure.macs import Account, TrainingMacs, account, bytes_on_disk, training_products

__all__ = [
    "Account",
    "LatencyComparison",
    "TrainingMacs",
    "account",
    "bytes_on_disk",
    "compare_latency",
    "training_products",
]
