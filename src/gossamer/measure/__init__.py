"""What a network costs and does, measured: MACs, bytes, latency, pattern and topology."""

from gossamer.measure.channels import ChannelStats, channel_stats
from gossamer.measure.latency import LatencyComparison, compare_latency
from gossamer.measure.macs import Account, TrainingMacs, account, bytes_on_disk, training_products
from gossamer.measure.pattern import BlockReport, PatternReport, check_block, check_nm
from gossamer.measure.topology import Sad, Topology, TopologyCheck, TopologyTracker, sad

__all__ = [
    "Account",
    "BlockReport",
    "ChannelStats",
    "LatencyComparison",
    "PatternReport",
    "Sad",
    "Topology",
    "TopologyCheck",
    "TopologyTracker",
    "TrainingMacs",
    "account",
    "bytes_on_disk",
    "channel_stats",
    "check_block",
    "check_nm",
    "compare_latency",
    "sad",
    "training_products",
]
