"""Layers."""

from keelnorm.nn.batch_norm import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from keelnorm.nn.conditional import ConditionalBatchNorm
from keelnorm.nn.cross_iteration import CrossIterationBatchNorm
from keelnorm.nn.domain.convert_domains import convert_domains, use_domain
from keelnorm.nn.domain.domain_batch_norm import DomainBatchNorm
from keelnorm.nn.ghost import GhostBatchNorm
from keelnorm.nn.l1 import L1BatchNorm, RangeBatchNorm
from keelnorm.nn.lazy import LazyBatchNorm, LazyBatchNorm1d, LazyBatchNorm2d, LazyBatchNorm3d
from keelnorm.nn.moving_average import MovingAverageBatchNorm, center_weights
from keelnorm.nn.recurrent.recurrent_cells import BatchNormGRUCell, BatchNormLSTMCell
from keelnorm.nn.recurrent.recurrent_layers import BatchNormGRU, BatchNormLSTM
from keelnorm.nn.recurrent.stepwise import StepwiseBatchNorm
from keelnorm.nn.renorm import BatchRenorm, LinearRamp
from keelnorm.nn.sequential import Sequential
from keelnorm.nn.split import SplitBatchNorm, use_split
from keelnorm.nn.sync.sync_batch_norm import SyncBatchNorm
from keelnorm.nn.virtual import VirtualBatchNorm, collect_reference
from keelnorm.nn.whitening import WhiteningBatchNorm

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
    "use_split",
]
