"""Using trained models: text token by token, what chooses the tokens, and drafts of them."""

from zoo.inference.generate import generate
from zoo.inference.samplers import (
    Draw,
    RepetitionPenalty,
    Sampler,
    Temperature,
    TopK,
    TopP,
    greedy,
)
from zoo.inference.speculate import STREE, Tree, chain, speculate

__all__ = [
    "STREE",
    "Draw",
    "RepetitionPenalty",
    "Sampler",
    "Temperature",
    "TopK",
    "TopP",
    "Tree",
    "chain",
    "generate",
    "greedy",
    "speculate",
]
