"""Graphormer of microsoft/Graphormer, preprocessing included."""

import re
from collections.abc import Callable
from typing import Any

import golden
import jax
import numpy as np

import zoo
from zoo.data.graphs import Graph, graphormer_inputs


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The model, on graphs that are given raw; what the reference made of them must be the same."""
    config = case.config
    fields = config.rename(
        num_nodes="num_atoms",
        num_in_degree="num_in_degree",
        num_out_degree="num_out_degree",
        num_edges="num_edges",
        num_spatial="num_spatial",
        num_edge_dis="num_edge_dis",
        max_hops="multi_hop_max_dist",
        max_distance="spatial_pos_max",
        depth="encoder_layers",
        embed_dim="encoder_embed_dim",
        mlp_dim="encoder_ffn_embed_dim",
        num_heads="encoder_attention_heads",
        pre_norm="pre_layernorm",
        norm_input="encoder_normalize_before",
        activation="activation_fn",
        num_classes="num_classes",
        node_features="nx",
        edge_features="ne",
    )
    multi_hop = config.take("edge_type", "multi_hop") == "multi_hop"
    fields["edge_type"] = "multi_hop" if multi_hop else "simple"
    config.expect(
        apply_graphormer_init=(True, False),
        share_encoder_input_output_embed=False,
        no_token_positional_embeddings=(True, False),
        remove_head=False,
    )
    training = "dropout attention_dropout act_dropout activation_dropout q_noise arch task flag_m"
    config.ignore("vx", "ve", "class", "max_nodes", "pretrained_model_name", *training.split())
    config.ignore("flag_step_size", "flag_mag", "load_pretrained_model_output_layer")
    count = 1 + max(int(m[1]) for name in case.names if (m := re.fullmatch(r"g(\d+)\.x", name)))
    graphs = [
        Graph(*(case.input(f"g{i}.{part}") for part in ("x", "edge_index", "edge_attr")))
        for i in range(count)
    ]
    inputs = graphormer_inputs(graphs, fields.get("max_hops", 5), multi_hop)
    for theirs, ours in (("spatial_pos", "distance"), ("in_degree", "degree")):
        if theirs in case.inputs and not np.array_equal(case.input(theirs), inputs[ours]):
            raise golden.Unsupported(f"the preprocessing gives another {theirs}")
    model = zoo.info("graphormer_test").create(
        **{"num_classes": 1, "max_nodes": inputs["nodes"].shape[1], **fields}
    )
    run = jax.jit(lambda variables: model.apply(variables, **inputs, method="features"))

    def outputs(variables: dict) -> golden.Outputs:
        out = run(variables)
        bias = np.where(np.asarray(hidden(model, inputs)), 0, np.asarray(out["bias"]))
        return {
            "logits_graph_token": out["logits"],
            "logits_all_tokens": out["token_logits"],
            "attn_bias_finite": bias,
        }

    return model, outputs


def hidden(model: Any, inputs: dict[str, np.ndarray]) -> Any:
    """Where the reference's bias is minus infinity."""
    return model._hidden(inputs["nodes"], inputs["distance"])[:, None]


def made_by(case: golden.Case) -> bool:
    """Whether the header names the repository."""
    return "microsoft/Graphormer" in case.source
