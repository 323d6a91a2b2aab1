"""Layers."""

from evenkeel.nn.batch_norm import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from evenkeel.nn.conditional import ConditionalBatchNorm
from evenkeel.nn.cross_iteration import CrossIterationBatchNorm
from evenkeel.nn.domain.convert_domains import convert_domains, use_domain
from evenkeel.nn.domain.domain_batch_norm import DomainBatchNorm
from evenkeel.nn.ghost import GhostBatchNorm
from evenkeel.nn.l1 import L1BatchNorm, RangeBatchNorm
from evenkeel.nn.lazy import LazyBatchNorm, LazyBatchNorm1d, LazyBatchNorm2d, LazyBatchNorm3d
from evenkeel.nn.moving_average import MovingAverageBatchNorm, center_weights
from evenkeel.nn.recurrent.cells import BatchNormGRUCell, BatchNormLSTMCell
from evenkeel.nn.recurrent.recurrent_layers import BatchNormGRU, BatchNormLSTM
from evenkeel.nn.recurrent.stepwise import StepwiseBatchNorm
from evenkeel.nn.renorm import BatchRenorm, LinearRamp
from evenkeel.nn.sequential import Sequential
from evenkeel.nn.split import SplitBatchNorm, using_split
from evenkeel.nn.sync.sync_batch_norm import SyncBatchNorm
from evenkeel.nn.virtual import VirtualBatchNorm, collect_reference
from evenkeel.nn.whitening import WhiteningBatchNorm

__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormGRU",
    "BatchNormGRUCell",
    "BatchNormLSTM",
    "BatchNormLSTMCell",
    "BatchRenorm",
    "ConditionalBatchNorm",
    "CrossIterationBatchNorm",
    "DomainBatchNorm",
    "GhostBatchNorm",
    "L1BatchNorm",
    "LazyBatchNorm",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "LinearRamp",
    "MovingAverageBatchNorm",
    "RangeBatchNorm",
    "Sequential",
    "SplitBatchNorm",
    "StepwiseBatchNorm",
    "SyncBatchNorm",
    "VirtualBatchNorm",
    "WhiteningBatchNorm",
    "center_weights",
    "collect_reference",
    "convert_domains",
    "use_domain",
    "using_split",
]
