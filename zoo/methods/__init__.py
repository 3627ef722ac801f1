"""What changes a model or its training and works on every model, one file a method."""

from zoo.methods.cut import PruneHeads, PruneNeurons
from zoo.methods.depth import EarlyExit, LayerDrop
from zoo.methods.float_quantize import SmallFloat
from zoo.methods.gtsp import SparseHeads, SparseLayers, SparseTokens, SparseWeights
from zoo.methods.insides import Insides
from zoo.methods.int8 import Int8
from zoo.methods.lora import LoRA
from zoo.methods.method import Method, adapt_all, wrap_all
from zoo.methods.norms import FixedNorms, UnifiedNorms
from zoo.methods.prompts import Prompts
from zoo.methods.prune import Movement, Prune
from zoo.methods.quiet_attention import QuietAttention
from zoo.methods.sigma_reparam import SigmaReparam, WithoutNorms
from zoo.methods.slimfit import SlimFit
from zoo.methods.token_pruning import TokenPruning

__all__ = [
    "EarlyExit",
    "FixedNorms",
    "Insides",
    "Int8",
    "LayerDrop",
    "LoRA",
    "Method",
    "Movement",
    "Prompts",
    "Prune",
    "PruneHeads",
    "PruneNeurons",
    "QuietAttention",
    "SigmaReparam",
    "SlimFit",
    "SmallFloat",
    "SparseHeads",
    "SparseLayers",
    "SparseTokens",
    "SparseWeights",
    "TokenPruning",
    "UnifiedNorms",
    "WithoutNorms",
    "adapt_all",
    "wrap_all",
]
