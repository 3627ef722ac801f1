"""GraphTrans of ucbrise/graphtrans."""

from collections.abc import Callable
from typing import Any

import golden
import jax
import numpy as np
from golden_systems._graphs import padded

import zoo
from zoo.layers.graph import ATOM_NUMBERS, BOND_NUMBERS


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The network, from the arguments of its scripts."""
    config = case.config
    fields = config.rename(
        virtual_node="gnn_virtual_node",
        gnn_depth="gnn_num_layer",
        gnn_dim="gnn_emb_dim",
        jump="gnn_JK",
        residual="gnn_residual",
        gnn="gnn_type",
        positions="pos_encoder",
        embed_dim="d_model",
        num_heads="nhead",
        mlp_dim="dim_feedforward",
        activation="transformer_activation",
        depth="num_encoder_layers",
        norm_input="transformer_norm_input",
        pool="graph_pooling",
        num_classes="num_tasks",
    )
    fields["num_heads_out"] = config.take("max_seq_len") or 0
    config.expect(
        pretrained_gnn=None, freeze_gnn=None, num_encoder_layers_masked=0,
        transformer_prenorm=(False, True), node_encoder=("mol", "tud", "ast", "code", "code2"),
    )  # fmt: skip
    config.ignore("gnn_dropout", "transformer_dropout", "class", "sizes")
    inputs, real = padded(case)
    fields["max_tokens"] = int(config.take("max_input_len", 1000))
    encoder = config.take("node_encoder", "mol")
    if encoder not in ("mol", "tud"):  # a type, an attribute and a depth; real numbers of edges
        tables = ("type", "attribute", "depth")
        fields["node_numbers"] = tuple(
            case.shapes[f"gnn_node.node_encoder.{name}_encoder.weight"][0] for name in tables
        )
        if inputs["nodes"].shape[-1] == 2:
            depth = np.zeros((*inputs["nodes"].shape[:2], 1), np.int32)
            depth[real] = case.input("node_depth").reshape(-1, 1)
            inputs["nodes"] = np.concatenate([inputs["nodes"], depth], -1)
        deepest = fields["node_numbers"][2] - 1
        inputs["nodes"][..., 2] = np.minimum(inputs["nodes"][..., 2], deepest)
        fields["edge_dim"] = inputs["edge_features"].shape[-1]
        inputs["edge_features"] = inputs["edge_features"].astype(np.float32)
    elif encoder == "mol":
        bond = "gnn_node.convs.0.edge_encoder.bond_embedding_list.{}.weight"
        atom = "gnn_node.node_encoder.atom_embedding_list.{}.weight"
        fields["node_numbers"] = tuple(
            case.shapes[atom.format(k)][0] for k in range(len(ATOM_NUMBERS))
        )
        fields["edge_numbers"] = tuple(
            case.shapes[bond.format(k)][0] for k in range(len(BOND_NUMBERS))
        )
    else:
        fields |= {"node_numbers": (), "node_features": inputs["nodes"].shape[-1]}
        inputs["nodes"] = inputs["nodes"].astype(np.float32)
        inputs["edge_features"] = np.zeros((*inputs["edges"].shape[:2], 1), np.int32)
    model = zoo.info("graphtrans_nci1").create(
        **fields, max_nodes=inputs["nodes"].shape[1], max_edges=inputs["edges"].shape[1]
    )
    run = jax.jit(lambda variables: model.apply(variables, **inputs, method="features"))

    def outputs(variables: dict) -> golden.Outputs:
        out = run(variables)
        return {"y": out["logits"], "gnn_node": np.asarray(out["nodes"])[real]}

    return model, outputs


def made_by(case: golden.Case) -> bool:
    """Whether the header names the repository."""
    return "ucbrise/graphtrans" in case.source
