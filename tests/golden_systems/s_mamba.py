"""S-Mamba, and a Mamba block by itself as it reads a sequence and as it steps through one."""

import re
from collections.abc import Callable
from typing import Any

import golden
import jax
import jax.numpy as jnp
from golden_systems.itransformer import inverted_fields, inverted_inputs

import zoo
from zoo.checkpoints.rules import Rules
from zoo.models.timeseries.s_mamba import Mamba, mamba_rules
from zoo.system import System

SYSTEM = System(variants={}, layouts={"mamba": Rules(mamba_rules("", ""))})  # of `Alone`


class Alone(Mamba):
    """A Mamba block that says what it takes, as a model does."""

    shape: tuple[int, ...] = ()

    def example_inputs(self, batch_size: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__`."""
        return {"x": jax.ShapeDtypeStruct((batch_size, *self.shape[1:]), jnp.float32)}


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The forecaster and its first block that reads forwards, or the block alone."""
    config = case.config
    if "seq_len" not in config.entries:
        return build_block(case)
    sizes = config.rename(state_size="d_state", conv_size="d_conv", expand="expand")
    config.ignore("n_heads", "factor")  # of the other models of the repository
    # Each layer holds two blocks and an attention that it never calls.
    case.dead = tuple(name for name in case.shapes if re.search(r"\.(man2?|a)\.", name))
    model = zoo.info("s_mamba_test").create(**{"state_size": 32, **sizes}, **inverted_fields(case))
    inputs = inverted_inputs(case)

    def outputs(variables: dict) -> golden.Outputs:
        blocks = lambda module, _: isinstance(module, Mamba)  # noqa: E731
        run = jax.jit(
            lambda v, x: model.apply(v, **x, capture_intermediates=blocks, mutable="intermediates")
        )
        forecast, state = run(variables, inputs)
        first = state["intermediates"]["layers_0"]["forward"]["__call__"][0][0]
        return {"pred": forecast, "mamba0_forward": first}

    return model, outputs


def build_block(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """A block of the library's own sizes; its states are those after the last single step."""
    config, x = case.config, case.input("x")
    channels = config.take("d_model", x.shape[-1])
    config.ignore("dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "use_fast_path")
    config.ignore("layer_idx")
    config.ignore("device", "dtype")
    sizes = config.rename(state_size="d_state", conv_size="d_conv", expand="expand",
                          conv_bias="conv_bias", use_bias="bias", step_rank="dt_rank")  # fmt: skip
    sizes = {name: value for name, value in sizes.items() if value not in ("auto", None)}
    model = Alone(shape=x.shape, **sizes)

    def outputs(variables: dict) -> golden.Outputs:
        @jax.jit
        def run(variables: dict, x: jax.Array) -> golden.Outputs:
            def step(state: dict, token: jax.Array) -> tuple[dict, dict]:
                state = model.apply(variables, token[:, None], state)[1]
                return state, state

            _, states = jax.lax.scan(step, model.init_state(len(x), channels), x.swapaxes(0, 1))
            # Theirs holds one input more than the next step needs: the oldest of the step before.
            inputs = jnp.concatenate([states["conv"][-2][:, :1], states["conv"][-1]], 1)
            return {
                "y": model.apply(variables, x)[0],
                "conv_state": inputs.swapaxes(1, 2),
                "ssm_state": states["memory"][-1],
            }

        return run(variables, x)

    return model, outputs


def made_by(case: golden.Case) -> bool:
    """Whether the header names either official repository."""
    return case.source.startswith(("wzhwzhwzh0921/S-D-Mamba@", "state-spaces/mamba mamba_ssm"))
