"""Using trained models: texts token by token, their drafts, and images and clips from noise."""

from zoo.inference.beams import Beams, beam_search
from zoo.inference.diffusion import (
    DDIM,
    DDPM,
    Diffusion,
    DPMSolver,
    Euler,
    Flow,
    Guidance,
    Renoise,
    sample,
)
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
from zoo.inference.tiles import in_tiles

__all__ = [
    "DDIM",
    "DDPM",
    "STREE",
    "Beams",
    "DPMSolver",
    "Diffusion",
    "Draw",
    "Euler",
    "Flow",
    "Guidance",
    "Renoise",
    "RepetitionPenalty",
    "Sampler",
    "Temperature",
    "TopK",
    "TopP",
    "Tree",
    "beam_search",
    "chain",
    "generate",
    "greedy",
    "in_tiles",
    "sample",
    "speculate",
]
