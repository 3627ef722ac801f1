"""Decision Transformer for continuous control and for Atari."""

from collections.abc import Callable
from typing import Any

import golden
import jax
import numpy as np

import zoo


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """Whichever of the two the state dict is of."""
    case.config.ignore("class", "left_pad", "embd_pdrop", "resid_pdrop", "attn_pdrop", "dropout")
    return _gym(case) if "embed_timestep.weight" in case.shapes else _atari(case)


def _gym(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    fields = case.config.rename(
        state_dim="state_dim",
        action_dim="act_dim",
        embed_dim="hidden_size",
        depth="n_layer",
        num_heads="n_head",
        max_steps="max_ep_len",
        mlp_dim="n_inner",
        activation="activation_function",
        action_tanh="action_tanh",
    )
    case.config.ignore("max_length", "n_positions", "n_ctx", "vocab_size", "n_embd")
    case.config.expect(layer_norm_epsilon=1e-5)
    case.dead = ("transformer.wte.weight",)  # a table of words that no forward pass reads
    model = zoo.create("decision_transformer_hopper", **fields)
    names = ("states", "actions", "returns_to_go", "timesteps")
    inputs = [case.input(name) for name in names]
    inputs[3] = inputs[3].astype(np.int32).reshape(inputs[0].shape[:2])
    mask = case.input("attention_mask") if "attention_mask" in case.names else None
    case.unread("rewards", "targets")

    def run(variables: dict) -> golden.Outputs:
        call = jax.jit(lambda v, mask, *x: model.apply(v, *x, mask, method="features"))
        out = call(variables, mask, *inputs)
        kept = np.ones(inputs[3].shape, bool) if mask is None else mask > 0
        errors = (np.asarray(out["prediction"]) - inputs[1])[kept] ** 2
        return {
            "state_preds": out["state_prediction"],
            "action_preds": out["prediction"],
            "return_preds": out["return_prediction"],
            "action_loss": errors.mean(),
        }

    return model, run


def _atari(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    fields = case.config.rename(
        num_actions="vocab_size",
        embed_dim="n_embd",
        depth="n_layer",
        num_heads="n_head",
        max_steps="max_timestep",
    )
    fields["context"] = case.config.take("block_size") // 3
    kind = case.config.take("model_type", "reward_conditioned")
    fields["conditioned"] = kind == "reward_conditioned"
    model = zoo.create("decision_transformer_breakout", **fields)
    states = case.input("states")
    states = states.reshape(*states.shape[:2], 4, 84, 84).transpose(0, 1, 3, 4, 2)
    times = case.input("timesteps").astype(np.int32).reshape(-1)
    targets = case.input("targets") if "targets" in case.names else None
    inputs = {"states": states, "times": times}
    if "actions" in case.names:
        actions = case.input("actions").astype(np.int32)[..., 0]
        missing = targets is None and actions.shape[1] == states.shape[1]
        inputs["actions"] = actions[:, 1:] if missing else actions
    if "rtgs" in case.names:
        returns = case.input("rtgs")
        inputs |= {"returns": returns} if fields["conditioned"] else {}

    def run(variables: dict) -> golden.Outputs:
        logits = jax.jit(lambda v, x: model.apply(v, **x))(variables, inputs)
        out = {"logits": logits}
        if targets is not None:
            chosen = targets.astype(int).reshape(logits.shape[:2])[..., None]
            each = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), chosen, -1)
            out["loss"] = -each.mean()
        return out

    return model, run


def made_by(case: golden.Case) -> bool:
    """Whether the source is the official repository."""
    return "decision-transformer" in case.source
