"""Under which prefix, in which layout, a file's names are those of a model.

People wrap a model before they save it: Lightning (`model.`), DistributedDataParallel (`module.`),
`torch.compile` (`_orig_mod.`), a detector (`backbone.`), sentence-transformers (`0.auto_model.`), a
Flax training state (`params/`, `opt/target/`), in any nesting. `find` strips the prefix under which
a layout knows most names, and says what it left aside: the tensors outside of it, and tensors that
no model reads (`LEFTOVERS`).
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from zoo.checkpoints.leaves import Leaves
from zoo.checkpoints.patterns import compile_pattern
from zoo.checkpoints.plan import fits, match
from zoo.checkpoints.ruleset import LazyTensor, Rules, matches
from zoo.checkpoints.sets import choose_set, kind_of, set_note

LEFTOVERS = (  # counters of profilers, heads and queues of a pretraining that is over
    "total_ops", "total_params", "*.total_ops", "*.total_params", "mask_token", "*.mask_token",
    "num_batches_tracked", "n_averaged", "queue*", "criterion*", "loss*", "*_loss.*", "metric*",
    "*_metric.*", "*_acc.*", "decoder_*", "decoder.*", "projector*", "projection_head.*",
    "predictor.*", "prototypes.*", "dino_head.*", "ibot_head.*", "decode_head.*",
    "auxiliary_head.*", "aux_head.*", "bbox_head.*", "rpn_head.*", "roi_head.*", "discriminator.*",
    "logit_scale", "*position_ids", "*rotary_emb.inv_freq", "*.num_batches_tracked", "score.*",
    "classifier.*", "qa_outputs.*", "multiple_choice_head.*", "optimizer*", "ema_*",
    "teacher.*", "student.*",
)  # fmt: skip
"""Names that may stand beside a model's and that it never reads, where no layout knows them."""

_WRAPPERS = re.compile(
    r"(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|_forward_module)\."
)
_FLAT = re.compile(r"(?:^|(?<=\.))(layers|stages|levels|blocks)_(\d+)(?=\.)")
_PARTS = re.compile(r"[^./]*[./]?")
_OLD_NORM = re.compile(r"(.*LayerNorm\.)(gamma|beta)")
_MOST = 6  # prefixes that are tried in each layout


@dataclass(frozen=True)
class Naming:
    """How a file's names are read.

    Attributes:
      layout: the layout that knows them.
      prefix: what was stripped of them.
      tensors: the tensors under the names that the layout knows.
      original: these names -> the names of the file.
      aside: names of the file that are left aside.
      notes: sentences on what was chosen.
    """

    layout: str
    prefix: str
    tensors: Mapping[str, LazyTensor]
    original: Mapping[str, str]
    aside: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())


def find(
    layouts: Mapping[str, Rules],
    tensors: Mapping[str, LazyTensor],
    leaves: Leaves,
    weights: str | None = None,
) -> Naming:
    """The layout and prefix that know most of these names; of equals, those that fit best.

    Two layouts may have the same names for matrices that one of them keeps transposed.

    Args:
      layouts: layout name -> rules.
      tensors: name in the file -> tensor.
      leaves: of the model.
      weights: which set, where the names of several begin differently (`student.`, `teacher.`).

    Raises:
      ValueError: if `weights` names a set that the file does not hold, or names none where there
        are several models beside each other.
    """
    tensors = _unstacked(tensors)
    plain, scores = _scored(layouts, tensors, leaves)
    most = max((score[1] for score in scores.values()), default=0)
    if 2 * most < len(leaves.unrolled) and any(name.endswith("/kernel") for name in tensors):
        torch_tensors = _as_torch(tensors)  # Flax files of models that PyTorch's names are known of
        others = _scored(layouts, torch_tensors, leaves)
        if max((score[1] for score in others[1].values()), default=0) > most:
            tensors, (plain, scores) = torch_tensors, others
    notes: list[str] = []
    if 2 * most < len(leaves.unrolled):  # a trunk that was saved by itself
        for lead in _leads(layouts):
            longer = {n: _View(lead + n, t.shape, t.dtype, t.read) for n, t in tensors.items()}
            others = _scored(layouts, longer, leaves)
            filled = max((score[1] for score in others[1].values()), default=0)
            if filled > max(most, len(leaves.unrolled) // 2):
                most, tensors, (plain, scores) = filled, longer, others
                notes = [f"The names lack the prefix {lead!r}, which was added."]
    best = max(scores.values(), default=(0, 0, 0))
    if 2 * best[1] < len(leaves.unrolled):  # too few names for a prefix to mean anything
        scores = {key: score for key, score in scores.items() if not key[1]}
        best = max(scores.values(), default=(0, 0, 0))
    equals = [key for key, score in scores.items() if score[0] >= 0.9 * best[0] and best[0]]
    if not equals:
        return Naming(next(iter(layouts)), "", dict(tensors), {name: name for name in tensors})
    layout, prefix = min(
        (key for key in equals if scores[key] == best), key=lambda key: (key[1] != "", len(key[1]))
    )
    kinds = {p: kind_of(p) for _, p in equals}
    if len(set(kinds.values())) > 1:
        prefix = choose_set(kinds, weights)
        layout = max((key for key in equals if key[1] == prefix), key=lambda key: scores[key])[0]
        notes.append(set_note(kinds, prefix))
    elif apart := _apart([p for (_, p), score in scores.items() if score[1] == best[1]]):
        if weights is None:
            raise ValueError(
                f"The file holds several models of this kind, {' and '.join(map(repr, apart))}; "
                f"weights={apart[0].rstrip('./')!r} takes one."
            )
        prefix = choose_set(dict.fromkeys(apart, "raw"), weights)
        layout = max((key for key in equals if key[1] == prefix), key=lambda key: scores[key])[0]
    elif weights is not None:
        choose_set(kinds, weights)
    return _naming(layouts, layout, prefix, plain, tensors, notes)


def _apart(prefixes: Sequence[str]) -> list[str]:
    """Prefixes of several models beside each other; none where one is within another."""
    found = sorted(set(prefixes))
    nested = any(a != b and b.startswith(a) for a in found for b in found)
    return found if len(found) > 1 and not nested else []


def _scored(
    layouts: Mapping[str, Rules], tensors: Mapping[str, LazyTensor], leaves: Leaves
) -> tuple[dict[str, str], dict[tuple[str, str], tuple[int, int, int]]]:
    """Plain names -> names of the file, and what each layout and prefix explains of them."""
    plain = {_plain(getattr(tensors[name], "name", name), layouts): name for name in tensors}
    if len(plain) < len(tensors):
        plain = {name: name for name in tensors}
    return plain, {
        (layout, prefix): _score(layouts[layout], under, leaves)
        for layout, prefix, under in _candidates(layouts, plain, tensors)
    }


def _leads(layouts: Mapping[str, Rules]) -> list[str]:
    """First parts that most names of a layout have."""
    leads: dict[str, None] = {}
    for rules in layouts.values():
        sources = [p.text for rule in rules.rules for p in rule.sources]
        first = Counter(f"{text.partition('.')[0]}." for text in sources if "." in text)
        for lead, count in first.most_common(1):
            if 2 * count > len(sources) and "{" not in lead:
                leads[lead] = None
    return list(leads)


@dataclass(frozen=True)
class _View:
    """A tensor of the file under another name, changed when it is read."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


_STACKED = re.compile(r"(.*Transformer/)encoderblock(/.*)")


def _unstacked(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """big_vision's scanned blocks as single ones."""
    result: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        found = _STACKED.fullmatch(name)
        if found is None:
            result[name] = tensor
            continue
        for i in range(tensor.shape[0]):
            row = f"{found[1]}encoderblock_{i}{found[2]}"
            read = partial(lambda t, i: t.read()[i], tensor, i)
            result[f"{name}[{i}]"] = _View(row, tuple(tensor.shape[1:]), tensor.dtype, read)
    return result


def _as_torch(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Flax's names and layouts as PyTorch's: `a/kernel [in, out]` is `a.weight [out, in]`."""
    result: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        stem, _, leaf = getattr(tensor, "name", name).rpartition("/")
        axes = tuple(range(len(tensor.shape)))
        if leaf == "kernel" and len(axes) >= 2:
            axes = (axes[-1], axes[-2], *axes[:-2])
        ours = {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(leaf, leaf)
        result[name] = _View(
            f"{stem}/{ours}".replace("/", "."),
            tuple(tensor.shape[i] for i in axes),
            tensor.dtype,
            partial(lambda t, axes: np.transpose(t.read(), axes), tensor, axes),
        )
    return result


def _naming(
    layouts: Mapping[str, Rules],
    layout: str,
    prefix: str,
    plain: Mapping[str, str],
    tensors: Mapping[str, LazyTensor],
    notes: Sequence[str],
) -> Naming:
    rules = layouts[layout]
    original = {n.removeprefix(prefix): plain[n] for n in plain if n.startswith(prefix)}
    outside = [n for n in plain if not n.startswith(prefix)]
    sources = [p for rule in rules.rules for p in rule.sources]
    for ancestor in _ancestors(prefix):  # a head that stands beside the wrapped trunk
        for name in [n for n in outside if n.startswith(ancestor)]:
            rest = name.removeprefix(ancestor)
            if rest not in original and any(p.match(rest) is not None for p in sources):
                original[rest] = plain[name]
                outside.remove(name)
    known = [p for r in layouts.values() for rule in r.rules for p in rule.sources]
    aside = [plain[n] for n in outside]
    for name in list(original):
        if matches(LEFTOVERS, name) and not rules.is_ignored(name):
            if not any(p.match(name) is not None for p in known):
                aside.append(original.pop(name))
    return Naming(
        layout,
        prefix,
        {name: tensors[there] for name, there in original.items()},
        original,
        tuple(aside),
        tuple(notes),
    )


def _score(rules: Rules, tensors: Mapping[str, LazyTensor], leaves: Leaves) -> tuple[int, int, int]:
    """Names known, leaves filled, steps whose shapes fit."""
    steps, _ = match(rules, tensors, leaves)
    used = {source for step in steps for source in step.sources}
    derived = sum(matches(rules.derived, name) for name in tensors if name not in used)
    filled = sum(len(step.targets) for step in steps)
    return len(used) + derived, filled, sum(fits(s, tensors, leaves) for s in steps)


def _candidates(
    layouts: Mapping[str, Rules], plain: Mapping[str, str], tensors: Mapping[str, LazyTensor]
) -> Iterator[tuple[str, str, dict[str, LazyTensor]]]:
    """Layouts and prefixes worth a closer look, with the tensors as they would be named."""
    counts: dict[tuple[str, str], int] = {}
    stems: dict[str, list[str]] = {}
    for layout, rules in layouts.items():
        texts = [p.text for rule in rules.rules for p in rule.sources]
        texts += [t for t in rules.derived if not compile_pattern(t).wild]
        for stem in {re.sub(r"\{[^}]*\}|\d+", "#", text) for text in texts}:
            stems.setdefault(stem, []).append(layout)
    found: Counter[tuple[str, str]] = Counter()
    for name in plain:
        parts = [part for part in _PARTS.findall(name) if part]
        stem_parts = [re.sub(r"\d+", "#", part) for part in parts]
        for cut in range(len(parts)):
            for layout in stems.get("".join(stem_parts[cut:]), ()):
                found["".join(parts[:cut]), layout] += 1
    for layout in layouts:
        prefixes = [(n, p) for (p, where), n in found.items() if where == layout]
        prefixes.sort(key=lambda pair: (-pair[0], len(pair[1])))
        for count, prefix in prefixes[:_MOST]:
            counts[layout, prefix] = count
    most = max(counts.values(), default=0)
    for (layout, prefix), count in counts.items():
        if 2 * count >= most:
            under = {
                n.removeprefix(prefix): tensors[there]
                for n, there in plain.items()
                if n.startswith(prefix)
            }
            yield layout, prefix, under


def _plain(name: str, layouts: Mapping[str, Rules]) -> str:
    """A name without wrappers that say nothing, and with the present names of norms and stages."""
    name = _WRAPPERS.sub("", name)
    texts = (p.text for rules in layouts.values() for rule in rules.rules for p in rule.sources)
    if _FLAT.search(name) and not any("s_{" in text for text in texts):
        name = _FLAT.sub(r"\1.\2", name)  # timm's features_only
    old = _OLD_NORM.fullmatch(name)
    if old is not None and not any(
        p.text.endswith(f"LayerNorm.{old[2]}")
        for rules in layouts.values()
        for rule in rules.rules
        for p in rule.sources
    ):
        return old[1] + ("weight" if old[2] == "gamma" else "bias")
    return name


def _ancestors(prefix: str) -> Iterator[str]:
    """The prefixes that are shorter by one part and more, down to none."""
    parts = [part for part in _PARTS.findall(prefix) if part]
    for count in range(len(parts) - 1, -1, -1):
        yield "".join(parts[:count])
