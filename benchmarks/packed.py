"""Padding-free BERT against the padded one, and against transformers in torch.

    python benchmarks/packed.py                          # BERT-base, 16 texts of up to 128 tokens
    python benchmarks/packed.py --variant minilm --length 256 --mean 0.4
    python benchmarks/packed.py --rounds 3

Lengths are log-normal with the mean that `--mean` says, in parts of the longest, as sentences are.
All forms run in turn, in one process, on the same random weights and tokens; the figure is the
median of `--rounds` and its ratio to transformers' padded time. Where torch or transformers is not
installed, its row is left out and ratios are to our padded form. The goal of the packed form is at
most 0.6 of torch's padded time at a mean of 0.4.
"""

import argparse
import os
import platform
import statistics
import time
from functools import partial

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

import zoo
from zoo.models.language.byte_transformer import rows_for

SIZES = {
    "base": ("bert_base_uncased", "byte_transformer_base"),
    "minilm": ("minilm_l6_h384_uncased", "byte_transformer_minilm_l6"),
}


def text_lengths(count: int, longest: int, mean: float, seed: int = 0) -> np.ndarray:
    """Log-normal lengths from 1 to `longest`, scaled to the mean."""
    draws = np.random.default_rng(seed).lognormal(sigma=0.6, size=count)
    low, high = 0.0, 10.0 * longest
    for _ in range(60):  # the scale whose clipped lengths have the mean
        scale = (low + high) / 2
        found = np.clip(np.round(draws * scale), 1, longest)
        low, high = (scale, high) if found.mean() < mean * longest else (low, scale)
    return found.astype(int)


def torch_bert(model, variables, inputs):
    """Transformers' BERT of the same weights as a function of nothing, or None."""
    try:
        import torch
        from transformers import BertConfig, BertModel
    except ImportError:
        return None
    config = BertConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.embed_dim,
        num_hidden_layers=model.depth,
        num_attention_heads=model.num_heads,
        intermediate_size=model.mlp_dim,
    )
    theirs = BertModel(config).eval()
    state = {
        name: torch.from_numpy(np.array(x)) for name, x in zoo.export(model, variables).items()
    }
    theirs.load_state_dict(state, strict=False)
    given = {"input_ids": inputs[0].astype(np.int64), "attention_mask": inputs[2].astype(np.int64)}
    given = {name: torch.from_numpy(x) for name, x in given.items()}

    def run():
        with torch.inference_mode():
            return theirs(**given).last_hidden_state.numpy()

    return run


def main() -> None:
    """Prints a row for each form."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--variant", choices=SIZES, default="base")
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--mean", type=float, default=0.4)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    lengths = text_lengths(options.texts, options.length, options.mean)
    mask = np.arange(options.length) < lengths[:, None]
    tokens = np.random.default_rng(1).integers(1000, 30000, mask.shape).astype(np.int32)
    inputs = (tokens, np.zeros_like(tokens), mask.astype(np.int32))
    padded, packed = (zoo.create(name) for name in SIZES[options.variant])
    variables = jax.jit(padded.init)(jax.random.key(0), *inputs)
    rows = rows_for(mask, 64)
    models = {
        "padded": padded,
        "packed, padded attention": packed.clone(rows=rows),
        "packed": packed.clone(rows=rows, packed=True),
    }
    # Arguments, as XLA would compute a program of constants when it compiles.
    calls = {name: jax.jit(model.apply) for name, model in models.items()}
    forms = {name: partial(call, variables, *inputs) for name, call in calls.items()}
    reference = torch_bert(padded, variables, inputs)
    if reference is not None:
        forms = {"transformers, padded": reference, **forms}
    outputs = {name: np.asarray(run()) for name, run in forms.items()}  # compiles, too
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(options.rounds):
        for name, run in forms.items():
            started = time.perf_counter()
            np.asarray(run())
            times[name].append(time.perf_counter() - started)
    first = next(iter(forms))
    base = statistics.median(times[first])
    print(f"{platform.processor() or platform.machine()}, JAX {jax.__version__}")
    print(
        f"{options.texts} texts of up to {options.length}, mean "
        f"{lengths.mean() / options.length:.2f}; {rows} rows of {mask.size}"
    )
    for name, each in times.items():
        apart = np.abs(outputs[name] - outputs[first])[mask].max()
        median = statistics.median(each)
        ratio = f"{median / base:5.2f} of {first}"
        print(f"{name:26} {median * 1e3:9.1f} ms   {ratio}   apart {apart:.1e}")


if __name__ == "__main__":
    main()
