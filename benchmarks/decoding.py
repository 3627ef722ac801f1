"""Greedy decoding by `zoo.inference.generate` against transformers' `generate` in PyTorch.

    pip install -e . torch transformers
    python benchmarks/decoding.py                  # GPT-2 124M, stories15M's shape; batch 1, 8
    python benchmarks/decoding.py --models gpt2 --batches 1 --rounds 3
    python benchmarks/decoding.py --speculate      # drafts by the first layers; no torch

Both run in this process on the same cores with the same random weights (torch's, through
`zoo.convert`), in turn: torch, zoo, torch, zoo, ... Each continues random prompts of `--prompt`
tokens by `--steps`, with a cache, in float32. Reported are medians of new tokens a second over the
batch (the prompt's pass included), the ratio zoo / torch (above 1 the zoo is faster), the share of
tokens that are the same (random weights have near ties, after which texts part), and the seconds
of the first call, which compiles.

`--speculate` decodes a Mamba-2 of 12 layers, plainly and with drafts by its first two, by a chain
and by STree's tree, and prints new tokens a pass and seconds. Its other layers are made to write
little, so that drafts often hold; how often says nothing of trained drafters.
"""

import argparse
import os
import platform
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)

MODELS = ("gpt2", "stories15m")


def torch_model(name: str):
    """A transformers model of this shape with random weights."""
    import torch
    import transformers

    torch.manual_seed(0)
    if name == "gpt2":
        config = transformers.GPT2Config(attn_implementation="sdpa")
        return transformers.GPT2LMHeadModel(config).eval()
    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=288,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=6,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    return transformers.LlamaForCausalLM(config).eval()


def compare(name: str, batch: int, args: argparse.Namespace) -> None:
    """Print one row."""
    import jax
    import numpy as np
    import torch

    import zoo
    from zoo.inference import generate

    torch.set_num_threads(args.threads)
    reference = torch_model(name)
    model = zoo.create(name)
    state = {k: v.detach().numpy().copy() for k, v in reference.state_dict().items()}
    state.pop("lm_head.weight")  # the embedding
    variables = zoo.convert(model, state)
    prompt = np.random.default_rng(0).integers(0, model.vocab_size, (batch, args.prompt))
    ids = torch.from_numpy(prompt)

    def by_torch():
        with torch.no_grad():
            out = reference.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=args.steps,
                min_new_tokens=args.steps,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
            )
        return out[:, args.prompt :].numpy()

    def by_zoo():
        tokens = generate(model, variables, prompt.astype(np.int32), steps=args.steps)
        return np.asarray(jax.block_until_ready(tokens))

    start = time.perf_counter()
    ours = by_zoo()
    first = time.perf_counter() - start
    same = float((ours == by_torch()).mean())
    seconds = {"torch": [], "zoo": []}
    for _ in range(args.rounds):
        for key, run in (("torch", by_torch), ("zoo", by_zoo)):
            start = time.perf_counter()
            run()
            seconds[key].append(time.perf_counter() - start)
    speed = {k: batch * args.steps / statistics.median(v) for k, v in seconds.items()}
    print(
        f"{name:12} {batch:5} {speed['torch']:12.1f} {speed['zoo']:12.1f} "
        f"{speed['zoo'] / speed['torch']:9.2f} {same:9.0%} {first:11.1f}",
        flush=True,
    )


def speculation(args: argparse.Namespace) -> None:
    """Print what drafts bring a small Mamba-2."""
    import jax
    import numpy as np

    import zoo
    from zoo.inference import STREE, chain, generate, speculate

    model = zoo.create("mamba2_130m", vocab_size=1024, embed_dim=512, depth=12)
    drafter = model.clone(depth=2)
    prompt = np.random.default_rng(0).integers(0, 1024, (1, args.prompt)).astype(np.int32)
    variables = jax.jit(model.init)(jax.random.key(0), prompt)
    # The other ten layers write little, so that a drafter of the first two is often right.
    quiet = {
        k: jax.tree.map(lambda p: p * 0.3, v) if k.startswith("layers_") and int(k[7:]) > 1 else v
        for k, v in variables["params"].items()
    }
    few = {k: v for k, v in quiet.items() if not k.startswith("layers_") or int(k[7:]) < 2}
    both = (model, {"params": quiet}, drafter, {"params": few})
    print(f"{'drafts':12} {'tokens/pass':>12} {'seconds':>9}")
    for name, tree in (("none", None), ("chain of 4", chain(4)), ("STree's", STREE)):
        seconds = []
        for _ in range(args.rounds + 1):  # the first compiles
            start = time.perf_counter()
            if tree is None:
                jax.block_until_ready(generate(*both[:2], prompt, steps=args.steps))
                passes = args.steps
            else:
                out = jax.block_until_ready(speculate(*both, prompt, steps=args.steps, tree=tree))
                passes = int(out.passes[0])
            seconds.append(time.perf_counter() - start)
        print(
            f"{name:12} {args.steps / passes:12.2f} {statistics.median(seconds[1:]):9.3f}",
            flush=True,
        )


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--batches", nargs="+", type=int, default=(1, 8))
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--speculate", action="store_true")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    print(f"{platform.processor() or platform.machine()}, {args.threads} threads, load {load:.1f}")
    if args.speculate:
        speculation(args)
        return
    head = f"{'model':12} {'batch':>5} {'torch tok/s':>12} {'zoo tok/s':>12} {'zoo/torch':>9}"
    print(f"{head} {'same':>9} first call s")
    for name in args.models:
        for batch in args.batches:
            compare(name, batch, args)


if __name__ == "__main__":
    main()
