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
    "Transformer": "softmax", "BiasedTransformer": "biased", "Performer": "performer",
    "BigBird": "bigbird", "None": "none",
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


def eigen_fields(case: golden.Case) -> dict[str, Any]:
    """Fields of the entries of `posenc_EquivStableLapPE` or `posenc_LapPE`."""
    config = case.config
    stable = config.take("posenc_EquivStableLapPE")
    if stable is not None:
        normed = str(stable.get("raw_norm_type", "none")).lower() == "batchnorm"
        return {"eigen_stable": True, "eigen_norm": normed}
    lap = config.take("posenc_LapPE") or {}
    fields = {"eigen_layers": lap.get("layers", config.take("lap_layers", 2))}
    dim = lap.get("dim_pe", config.take("dim_lap"))
    if dim is not None:
        fields["eigen_dim"] = dim
    if str(lap.get("model", config.take("lap_model", "DeepSet"))) == "Transformer":
        fields["eigen_heads"] = lap.get("n_heads", config.take("lap_heads", 4))
    config.ignore("lap_heads")
    fields["eigen_norm"] = str(lap.get("raw_norm_type", "none")).lower() == "batchnorm"
    fields["eigen_post_layers"] = lap.get("post_layers", 0)
    return fields


def path_fields(case: golden.Case) -> dict[str, Any]:
    """Fields of `posenc_GraphormerBias`, from the shapes of its tables."""
    entries = case.config.take("posenc_GraphormerBias") or {}
    case.config.ignore(*entries, "graphormer")
    rows = {
        name: case.shapes[f"encoder.node_encoder.encoder2.{name}_encoder.weight"][0]
        for name in ("0.spatial", "1.in_degree", "1.out_degree")
    }
    return {
        "path_steps": rows["0.spatial"] - 1,
        "degree_numbers": (rows["1.in_degree"], rows["1.out_degree"]),
    }


def path_inputs(case: golden.Case, inputs: dict, real: np.ndarray) -> dict[str, np.ndarray]:
    """Hops and types of edges on paths as given; degrees must be those that the model counts."""
    hops, paths = case.input("spatial_types"), case.input("shortest_path_types")
    places = case.input("graph_index")
    sizes = real.sum(1)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    first = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    graph = owner[places[0]]
    at = (graph, *(places - first[graph]))
    size = real.shape[1]
    found = {
        "hops": np.zeros((len(sizes), size, size), np.int32),
        "paths": np.zeros((len(sizes), size, size, paths.shape[1]), np.int32),
    }
    found["hops"][at], found["paths"][at] = hops, paths
    for name, end in (("in_degrees", 1), ("out_degrees", 0)):
        counts = np.zeros((len(sizes), size + 1), int)
        for row, edges in zip(counts, inputs["edges"], strict=True):
            np.add.at(row, edges[:, end], 1)
        if name in case.names and (case.input(name) != counts[:, :-1][real]).any():
            raise golden.Unsupported(f"its {name} are not the numbers of edges")
    return found


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
        vectors = case.input("EigVecs")
        given = "EigVals" in case.names
        values = case.input("EigVals") if given else np.zeros_like(vectors)
        eigen = np.stack([vectors, values.reshape(vectors.shape)], -1)
        inputs["eigen"] = np.full((*real.shape, *eigen.shape[1:]), np.nan, np.float32)
        inputs["eigen"][real] = eigen
        fields |= eigen_fields(case) | {"eigenvectors": eigen.shape[1]}
        fields.setdefault("eigen_dim", fields["position_dim"])
        if "pe" not in case.names:
            fields["walk_steps"] = 0
    if "attn_bias" in case.names:
        shape = (len(real), -1, real.shape[1], real.shape[1])
        inputs["bias"] = case.input("attn_bias").reshape(shape)
    elif fields["attention"] == "biased":
        fields |= path_fields(case)
        inputs |= path_inputs(case, inputs, real)
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
