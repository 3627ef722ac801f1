"""Functions to be learned from examples: classes of functions, prompts, and what can be known.

A function class draws prompts: `sample(rng, points, dims) -> Prompt`. `Prompts` makes a source of
one, in which an index stands for one function and its points, and for nothing else: prompts come
without end, in the same order on any number of hosts.

    continuous   linear, sparse, noisy, quadratic, networks, trees, sliding windows, random labels
    boolean      conjunctions, parities, ..., with teaching sequences
    uncertain    linear functions with noise of unknown size, and their shifts
    baselines    least squares, ridge, lasso, neighbours, averages, gradient descent
    bayes        the exact mean and variance of the next label
    learners     what is optimal for a class of Boolean functions
    known        these with their settings, for configs
"""

from zoo.data.functions.prompts import Either as Either
from zoo.data.functions.prompts import FunctionClass as FunctionClass
from zoo.data.functions.prompts import Prompt as Prompt
from zoo.data.functions.prompts import Prompts as Prompts
from zoo.data.functions.prompts import Ramp as Ramp
from zoo.data.functions.prompts import prompt_data as prompt_data
