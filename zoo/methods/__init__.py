"""What changes a model or its training and works on every model, one file a method."""

from zoo.methods.lora import LoRA
from zoo.methods.method import Method, adapt_all, wrap_all
from zoo.methods.prompts import Prompts
from zoo.methods.quiet_attention import QuietAttention
from zoo.methods.sigma_reparam import SigmaReparam, WithoutNorms

__all__ = [
    "LoRA",
    "Method",
    "Prompts",
    "QuietAttention",
    "SigmaReparam",
    "WithoutNorms",
    "adapt_all",
    "wrap_all",
]
