"""What a network costs and does, measured: MACs, bytes, latency, pattern and topology."""

from gossamer.measure.latency import LatencyComparison, compare_latency
from gossamer.measure.macs import Account, TrainingMacs, account, bytes_on_disk, training_products
from gossamer.measure.pattern import PatternReport, check_nm
from gossamer.measure.topology import Sad, SadCheck, SadTracker, sad

__all__ = [
    "Account",
    "LatencyComparison",
    "PatternReport",
    "Sad",
    "SadCheck",
    "SadTracker",
    "TrainingMacs",
    "account",
    "bytes_on_disk",
    "check_nm",
    "compare_latency",
    "sad",
    "training_products",
]
