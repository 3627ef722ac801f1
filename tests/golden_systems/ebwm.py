"""Energy-based transformers of alexiglad/EBT: the body, and the language model with its steps."""

from collections.abc import Callable
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np

from zoo.models.control.ebwm import EBT, EnergyTransformer, contrastive_loss, refinement_loss


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """By the class that the case is of."""
    return _language(case) if "embeddings.weight" in case.shapes else _body(case)


def _body(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    config = case.config
    fields = config.rename(
        embed_dim="dim", depth="n_layers", num_heads="n_heads", epsilon="norm_eps",
        max_steps="max_mcmc_steps",
    )  # fmt: skip
    config.expect(**{"class": ("EBTDefault", "EBTTimeConcat", "EBTAdaLN")})
    config.expect(n_kv_heads=(None, config.entries.get("n_heads")))
    config.ignore("max_seq_len", "max_batch_size", "adaln_zero_init", "weight_initialization",
                  "weight_initialization_gain", "dyt_alpha_init")  # fmt: skip
    timed = "time_embeddings.weight" in case.shapes
    modulated = "final_layer.linear.weight" in case.shapes
    kind = "adaln" if modulated else "time_embed" if timed else "default"
    fields |= {"conditioning": kind, **kinds(config, kind)}
    fields["mlp_ratio"] = config.take("ffn_dim_multiplier") or 1.0
    both = jnp.asarray(case.uniform("embeddings"))
    model = EnergyTransformer(**fields, length=both.shape[1] // 2)

    def run(variables: dict) -> golden.Outputs:
        out = {}
        for name in case.header["outputs"]:
            step = int(name.rpartition("step")[2])

            def total(both: Any, step: int = step) -> Any:
                tokens, candidates = jnp.split(both, 2, 1)
                energy = model.apply(variables, tokens, candidates, step)
                return energy.sum(), energy

            slope, energy = jax.jit(jax.grad(total, has_aux=True))(both)
            out |= {f"energy_step{step}": energy[..., None], f"grad_step{step}": slope}
        return out

    return model, run


def kinds(config: golden.Config, conditioning: str) -> dict[str, str]:
    """Norms and activation, of which only the code of time embeddings has a choice."""
    norm, activation = config.take("ebt_norm", "rms"), config.take("ebt_act_func", "silu")
    if conditioning != "time_embed":
        return {}
    norm = {"ebm_backwards_norm": "both_ways"}.get(norm, norm)
    return {"norm": norm, "activation": activation}


def _language(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    config = case.config
    fields = config.rename(
        vocab_size="vocab", embed_dim="embedding_dim", depth="num_transformer_blocks",
        num_heads="multiheaded_attention_heads", conditioning="ebt_type",
        steps="mcmc_num_steps", alpha="mcmc_step_size", truncate="truncate_mcmc",
        embeds_by_table="vocab_to_embed_uses_prob_dist", clamp="absolute_clamp",
        temperature="sharpen_predicted_distribution", last_repeats="randomize_mcmc_num_steps",
    )  # fmt: skip
    fields |= kinds(config, fields.get("conditioning", "default"))
    fields["mlp_ratio"] = config.take("ffn_dim_multiplier") or 1.0
    fields["detach"] = not config.take("no_mcmc_detach", False)
    every = config.take("normalize_initial_condition", True)
    first = config.take("normalize_initial_condition_only_first_step", False)
    fields["normalise"] = "never" if not every else "first" if first else "every"
    change = config.take("clamp_futures_grad_max_change", 9.0)
    fields["clamp_gradient"] = change if config.take("clamp_futures_grad", False) else 0.0
    soften = config.take("soften_target_prob_dist", 0.0)
    steps = case.shapes.get("transformer.time_embeddings.weight", (None,))[0]
    fields["max_steps"] = steps
    config.expect(
        langevin_dynamics_noise=0.0, num_modality_processing_mlp_layers=1,
        execution_mode=("pretrain", "inference"),
    )  # fmt: skip
    config.ignore(
        "tokenizer", "mcmc_step_size_learnable", "langevin_dynamics_noise_learnable", "class",
        "weight_initialization_method", "weight_initialization_gain", "context_length",
        "batch_size_per_device", "dyt_alpha_init", "debug_unused_parameters",
        "randomize_mcmc_step_size_scale", "randomize_mcmc_num_steps_min",
        "randomize_mcmc_num_steps_final_landscape", "denoising_initial_condition",
        "gaussian_random_noise_scaling",
    )  # fmt: skip
    factor = config.take("reconstruction_coeff", 1.0)
    share = config.take("contrastive_loss_coeff", 0.0005)
    contrasts = config.take("contrastive_loss", False)
    certain = config.take("discrete_contrastive_loss_true_logit_val", 0.0)
    ids = case.input("input_ids").astype(np.int32)
    model = EBT(**fields, length=ids.shape[1] - 1)
    start = jnp.zeros((len(ids), model.length, model.vocab_size))
    if "init_logits" in case.names or config.take("denoising_initial_condition") != "zeros":
        start = jnp.asarray(2 * case.uniform("init_logits"))

    def run(variables: dict) -> golden.Outputs:
        params = {**variables["params"], "alpha": jnp.float32(model.alpha)}

        def loss(params: dict) -> Any:
            out = model.apply({"params": params}, ids[:, :-1], first=start, method="features")
            total, each = refinement_loss(
                out["refined"], ids[:, 1:], truncate=model.truncate, soften=soften
            )
            contrast = 0.0
            if contrasts:
                contrast = contrasted(model, params, ids, out["energy"][:, -1], certain)
            return factor * total + share * contrast, (out, each, contrast)

        grads, (out, each, contrast) = jax.jit(jax.grad(loss, has_aux=True))(params)
        total = loss(params)[0]
        found = {"loss": total, "initial_loss": each[0], "final_step_loss": each[-1]}
        found["contrastive_loss"] = contrast
        found["initial_final_pred_energies_gap"] = (
            out["energy"][:, 0] - out["energy"][:, -1]
        ).mean()
        found["perplexity"] = jnp.exp(each[-1])
        for k in range(out["refined"].shape[1]):
            found[f"logits_{k + 1}"] = out["refined"][:, k]
            found[f"energy_{k}"] = out["energy"][:, k].reshape(-1, 1)
        found["dloss_dalpha"] = grads["alpha"]
        for i in range(model.depth):
            wq = grads["transformer"][f"layers_{i}"]["attention"]["query"]["kernel"]
            found[f"dloss_dwq{i}"] = wq.T
        return found

    return model, run


def contrasted(model: EBT, params: dict, ids: np.ndarray, refined: Any, certain: float) -> Any:
    """The contrastive loss, with the energies of the true next tokens at the last step.

    Args:
      model: the language model.
      params: its parameters.
      ids: tokens, with the next ones.
      refined: energies of the candidates at the last step.
      certain: logit of the true token, its negative that of others; 0: it alone has a share.
    """
    body = EnergyTransformer(
        model.embed_dim, model.depth, model.num_heads, model.mlp_ratio, model.conditioning,
        model.max_steps or model.steps, model.norm, model.activation,
    )  # fmt: skip
    table = params["embedding" if model.embeds_by_table else "candidate_kernel"]
    truth = jax.nn.one_hot(ids[:, 1:], len(table))
    if certain:
        truth = certain * (2 * truth - 1)
        truth = truth if model.normalise == "never" else jax.nn.softmax(truth)
    words, answers = params["embedding"][ids[:, :-1]], truth @ table
    true = body.apply({"params": params["transformer"]}, words, answers, model.steps - 1)
    return contrastive_loss(true, refined, ids[:, 1:])


def made_by(case: golden.Case) -> bool:
    """Whether the header names the repository."""
    return "alexiglad/EBT" in case.source
