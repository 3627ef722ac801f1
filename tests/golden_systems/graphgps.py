"""GraphGPS of rampasek/GraphGPS."""

from collections.abc import Callable
from typing import Any

import golden
import jax
import numpy as np
from golden_systems._graphs import padded

import zoo
from zoo.layers.graph import ATOM_NUMBERS, BOND_NUMBERS
from zoo.layers.graph_positions import return_chances

LOCAL = {
    "GINE": "gine", "GIN": "gin", "GCN": "gcn", "CustomGatedGCN": "gated", "GAT": "gat",
    "GENConv": "gen", "PNA": "pna", "None": "none",
}  # fmt: skip
ATTENTION = {
    "Transformer": "softmax", "Performer": "performer", "BigBird": "bigbird", "None": "none",
}  # fmt: skip


def bigbird_fields(config: golden.Config) -> dict[str, Any]:
    """Fields of the entries of `gt.bigbird`, in a dictionary of their own or among the others."""
    nested = config.take("bigbird") or config.take("bigbird_cfg") or {}
    names = {
        "block_size": "block_size", "num_random_blocks": "random_blocks",
        "use_bias": "bigbird_bias", "hidden_act": "bigbird_activation",
    }  # fmt: skip
    fixed = {
        "attention_type": "block_sparse", "is_decoder": False, "add_cross_attention": False,
        "layer_norm_eps": 1e-6,
    }  # fmt: skip
    free = ("chunk_size_feed_forward", "max_position_embeddings", "dim_hidden", "n_heads", "layers",
            "dropout")  # fmt: skip
    config.ignore(*free)
    config.expect(**fixed)
    fields = config.rename(**{ours: theirs for theirs, ours in names.items()})
    for name, value in nested.items():
        if name in names:
            fields[names[name]] = value
        elif value != fixed.get(name, value) or name not in (*fixed, *free):
            raise golden.Unsupported(f"its BigBird has {name}={value!r}")
    return fields


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The network; the positions it is given must be those that we compute."""
    config = case.config
    fields = config.rename(
        embed_dim="dim",
        depth="layers",
        num_heads="heads",
        num_classes="dim_out",
        pool="pool",
        activation="act",
    )
    config.ignore("layers_post_mp", "layers_pre_mp")  # which `san_graph` does not look at
    head = [n for n in case.shapes if ".FC_layers." in n and n.endswith("weight")]
    fields["head_layers"] = len(head) - 1
    local, _, attention = config.take("layer_type", "GINE+Transformer").partition("+")
    if local not in LOCAL or attention not in ATTENTION:
        raise golden.Unsupported(f"its layers are of {local} and {attention}")
    fields |= {"local": LOCAL[local], "attention": ATTENTION[attention]}
    fields |= bigbird_fields(config)
    fields |= {"degrees": tuple(config.take("pna_degrees") or ())}
    fields["position_norm"] = str(config.take("raw_norm_type", "BatchNorm")).lower() != "none"
    if str(config.take("pe_model", "Linear")).lower() == "mlp":
        fields["position_layers"] = config.take("pe_layers", 3)
    config.expect(pe_model=("Linear", "linear", "mlp", "MLP"))
    kinds = config.take("enc", "dict")
    config.expect(enc=("dict", "mol"))
    graph, batch = config.take("layer_norm", False), config.take("batch_norm", True)
    fields["norm"] = "graph" if graph else "batch" if batch else "none"
    numbers = (config.take("node_types", 28),), (config.take("edge_types", 4),)
    if kinds == "mol":
        numbers = tuple(
            tuple(case.shapes[f"encoder.{which}_encoder.{place}_embedding_list.{k}.weight"][0]
                  for k in range(len(sizes)))
            for which, place, sizes in (("node", "encoder1.atom", ATOM_NUMBERS),
                                        ("edge", "bond", BOND_NUMBERS))
        )  # fmt: skip
    fields |= {"node_numbers": numbers[0], "edge_numbers": numbers[1]}
    fields |= {"walk_steps": config.take("rw", 20), "position_dim": config.take("dim_pe", 28)}
    config.ignore("class", "sizes", "damp", "dropout", "attn_dropout", "max_freqs")
    inputs, real = padded(case)
    if "EigVecs" in case.names:
        eigen = np.stack([case.input("EigVecs"), case.input("EigVals").reshape(real.sum(), -1)], -1)
        inputs["eigen"] = np.full((*real.shape, *eigen.shape[1:]), np.nan, np.float32)
        inputs["eigen"][real] = eigen
        fields |= {"eigenvectors": eigen.shape[1], "eigen_layers": config.take("lap_layers", 2)}
        fields["eigen_dim"] = config.take("dim_lap", fields["position_dim"])
        if "pe" not in case.names:
            fields["walk_steps"] = 0
    if "eigvecs_sn" in case.names:
        signs, vectors = config.take("posenc_SignNet"), case.input("eigvecs_sn")
        eigen = np.stack([vectors, np.zeros_like(vectors)], -1)
        inputs["eigen"] = np.full((*real.shape, *eigen.shape[1:]), np.nan, np.float32)
        inputs["eigen"][real] = eigen
        case.unread("eigvals_sn")
        fields |= dict(
            eigenvectors=vectors.shape[1], eigen_dim=signs["dim_pe"],
            sign_layers=max(2, signs["layers"]), sign_width=signs["phi_hidden_dim"],
            sign_out=signs["phi_out_dim"], sign_post_layers=signs["post_layers"],
            sign_sum=signs["model"] == "DeepSet",
        )  # fmt: skip
        if "pe" not in case.names:
            fields["walk_steps"] = 0
    steps, largest = fields["walk_steps"], inputs["nodes"].shape[1]
    inputs["walks"] = np.zeros((*inputs["nodes"].shape[:2], steps), np.float32)
    for graph, edges in enumerate(inputs["edges"]):
        there = edges[edges[:, 1] < largest].T
        inputs["walks"][graph] = return_chances(there, largest, steps)
    if "pe" in case.names:
        given = case.input("pe")
        if not np.allclose(inputs["walks"][real], given, atol=1e-6):
            raise golden.Unsupported("its positions are not the chances of a random walk")
        inputs["walks"][real] = given
    model = zoo.info("graphgps_zinc").create(
        **fields, max_nodes=largest, max_edges=inputs["edges"].shape[1]
    )
    run = jax.jit(lambda variables: model.apply(variables, **inputs, method="features"))

    def outputs(variables: dict) -> golden.Outputs:
        out = run(variables)
        last = out[f"layer{model.depth - 1}"] if model.depth else out["embed"]
        return {"y": out["logits"], "nodes": np.asarray(last)[real]}

    return model, outputs


def made_by(case: golden.Case) -> bool:
    """Whether the header names the repository."""
    return "rampasek/GraphGPS" in case.source
