"""Attention and recurrences in one call each, for CPU, TPU and GPU.

Every function chooses its implementation by the platform that is compiled for; Pallas itself is
imported only when a Pallas kernel is traced. Beside each operation stands `reference.py`, its
definition in plain code.
"""

from kernels_pallas.attention.api import attention as attention
from kernels_pallas.dispatch import explain as explain
from kernels_pallas.masks import And as And
from kernels_pallas.masks import Causal as Causal
from kernels_pallas.masks import Chunked as Chunked
from kernels_pallas.masks import Dilated as Dilated
from kernels_pallas.masks import Full as Full
from kernels_pallas.masks import Neighborhood as Neighborhood
from kernels_pallas.masks import Or as Or
from kernels_pallas.masks import PrefixLM as PrefixLM
from kernels_pallas.masks import SlidingWindow as SlidingWindow
from kernels_pallas.neighborhood.api import (
    neighborhood_attention as neighborhood_attention,
)
from kernels_pallas.recurrence.api import delta_rule as delta_rule
from kernels_pallas.recurrence.api import delta_rule_step as delta_rule_step
from kernels_pallas.recurrence.api import gated_linear_attention as gated_linear_attention
from kernels_pallas.recurrence.api import gated_linear_attention_step as gated_linear_attention_step
from kernels_pallas.recurrence.api import selective_scan as selective_scan
from kernels_pallas.recurrence.api import selective_scan_step as selective_scan_step
from kernels_pallas.recurrence.api import ssd as ssd
from kernels_pallas.recurrence.api import ssd_step as ssd_step
from kernels_pallas.recurrence.api import tree_ssd as tree_ssd
from kernels_pallas.scores import ClippedSoftmax as ClippedSoftmax
from kernels_pallas.scores import Sigmoid as Sigmoid
from kernels_pallas.scores import Softmax as Softmax
from kernels_pallas.window.api import window_attention as window_attention
