"""Environments as pure functions, so that rollouts run on the device, inside a training step."""

from zoo.environments.cart_pole import CartPole, HiddenCartPole
from zoo.environments.corridor import SwitchCorridor
from zoo.environments.environment import Environment, Transition, continued, rollout
from zoo.environments.memory import MemoryChain, TMaze
from zoo.environments.seeds import Seeds

__all__ = [
    "CartPole",
    "Environment",
    "HiddenCartPole",
    "MemoryChain",
    "Seeds",
    "SwitchCorridor",
    "TMaze",
    "Transition",
    "continued",
    "rollout",
]
