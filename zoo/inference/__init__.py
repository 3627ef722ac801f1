"""Using trained models: text token by token, and what chooses the tokens."""

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

__all__ = [
    "Draw",
    "RepetitionPenalty",
    "Sampler",
    "Temperature",
    "TopK",
    "TopP",
    "generate",
    "greedy",
]
