"""Objectives, what they are made of here, and which systems learn from them.

After the surveys of Zhou et al., "A Comprehensive Survey on Pretrained Foundation Models", arXiv
2302.09419, and Islam et al., "A Comprehensive Survey on Applications of Transformers for Deep
Learning Tasks", arXiv 2306.07303. `table` joins `OBJECTIVES` with the registry: a system is in the
row of an objective whose `tasks` name the task of one of its variants. Objectives without a system
are losses alone, and their cells say so.
"""

import fnmatch
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

MODALITIES: Mapping[str, str] = {
    "image_*": "image",
    "super_resolution": "image",
    "object_placement": "image",
    "text_to_image": "image and text",
    "image_to_video": "video",
    "video_*": "video",
    "text_*": "text",
    "*language_modelling": "text",
    "question_answering": "text",
    "graph_*": "graph",
    "forecasting": "series",
    "series_classification": "series and sound",
    "control": "decisions",
    "motion_*": "motion",
    "in_context_*": "functions",
    "regression": "signals and numbers",
}
"""Task of a variant (wildcard) -> what it is about."""


@dataclass(frozen=True)
class Objective:
    """One row of the table.

    Attributes:
      what: in a few words.
      source: whose it is.
      made_of: the loss or task, as `module:name`.
      tasks: of variants that learn from it.
      required: whether it must have a system.
      learns: a config file, or a test, that shows it learn.
    """

    what: str
    source: str
    made_of: str
    tasks: tuple[str, ...] = ()
    required: bool = False
    learns: str = "tests/tasks/test_objectives_learn.py"


_LOSS = "zoo.tasks.objectives:"
_IMAGES = ("image_classification", "video_classification")

OBJECTIVES: Mapping[str, Objective] = {
    "mlm": Objective(
        "masked words", "BERT", "zoo.tasks:MaskedLanguageModelling",
        ("text_encoding", "masked_language_modelling"), True, "configs/language/bert_mlm_toy.py",
    ),
    "clm": Objective(
        "the next word", "GPT", "zoo.tasks:LanguageModelling", ("language_modelling",), True,
    ),
    "span": Objective("hidden spans, named by a decoder", "T5", _LOSS + "span_corruption"),
    "dae": Objective("a text from one with holes", "BART", _LOSS + "infilling"),
    "rtd": Objective("which words were replaced", "ELECTRA", _LOSS + "replaced"),
    "sop": Objective("the order of two segments", "ALBERT", _LOSS + "swapped"),
    "mae": Objective("pixels of hidden patches", "MAE", _LOSS + "mae"),
    "simclr": Objective("the other view of an image", "SimCLR", _LOSS + "simclr"),
    "moco": Objective("the same, among a queue", "MoCo", _LOSS + "moco"),
    "dino": Objective("a teacher's mean, sharpened", "DINO", _LOSS + "dino"),
    "clip": Objective("which text is whose image's", "CLIP", _LOSS + "clip"),
    "sup": Objective(
        "labels", "ViT, Swin", "zoo.tasks:Classification",
        (*_IMAGES, "series_classification"), True, "configs/default.py",
    ),
    "distillation": Objective(
        "a teacher's answers and insides", "DeiT, TinyBERT", "zoo.tasks:LayerDistillation",
        ("image_classification",), True, "configs/vision/deit_distilled_digits.py",
    ),
    "set": Objective("a set of boxes, matched", "DETR", _LOSS + "set_prediction"),
    "diffusion": Objective(
        "the noise in an image or clip", "DiT", "zoo.tasks:Denoising",
        ("text_to_image", "image_to_video", "video_diffusion"), True,
        "configs/video/vdt_moving_digits.py",
    ),
    "gan": Objective(
        "images that pass for real ones", "StyleSwin", "zoo.tasks:Adversarial",
        ("image_generation",), True, "configs/imaging/gan_ring.py",
    ),
    "placement": Objective(
        "where an object belongs", "TopNet", "zoo.tasks:ObjectPlacement", ("object_placement",),
        True, "configs/imaging/topnet_compositions.py",
    ),
    "restoration": Objective(
        "a sharp image from a small one", "HAT", "zoo.tasks:ImageRestoration",
        ("super_resolution",), True, "configs/imaging/hat_photos.py",
    ),
    "video": Objective(
        "the next frames", "PredFormer", "zoo.tasks:VideoPrediction", ("video_prediction",), True,
        "configs/video/predformer_moving_digits.py",
    ),
    "ctc": Objective("a text from sound, unaligned", "CTC", _LOSS + "ctc"),
    "ssl_audio": Objective("hidden latents of sound", "wav2vec 2.0", _LOSS + "contrast_in_time"),
    "ts": Objective(
        "a series' future", "Informer", "zoo.tasks:Forecasting", ("forecasting",), True,
        "configs/timeseries/itransformer.py",
    ),
    "light_curves": Objective(
        "classes of light curves", "t2", "zoo.tasks:Classification", ("series_classification",),
        True, "configs/timeseries/t2.py",
    ),
    "signal": Objective(
        "wireless signals and intersection numbers", "DynamicFormer", "zoo.tasks:Regression",
        ("regression",), True, "configs/signal/dynamicformer.py",
    ),
    "graph": Objective(
        "a property of a graph", "Graphormer", "zoo.tasks:Classification",
        ("graph_classification", "graph_regression"), True, "tests/models/test_graphs.py",
    ),
    "rl": Objective(
        "actions from returns, or policies with memory", "Decision Transformer, GTrXL",
        "zoo.tasks:ReturnConditioned", ("control",), True,
        "configs/control/decision_transformer_cart_pole.py",
    ),
    "in_context": Objective(
        "a function from its examples", "in-context learners", "zoo.tasks:InContext",
        ("in_context_*",), True, "configs/incontext/linear.py",
    ),
    "reward": Objective("which answer is better", "InstructGPT", _LOSS + "reward"),
    "dpo": Objective("the same, without a reward model", "DPO", _LOSS + "dpo"),
}  # fmt: skip
"""What is learnt from, by short name."""

NONE = "no published system"


def modality(task: str) -> str:
    """What a variant's task is about."""
    found = (name for pattern, name in MODALITIES.items() if fnmatch.fnmatchcase(task, pattern))
    return next(found, "other")


def resolve(reference: str) -> Callable:
    """The object of `module:name`."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def table() -> list[dict[str, Any]]:
    """One row an objective and modality: the systems that learn from it, or `NONE`."""
    import zoo

    tasks: dict[str, set[str]] = {}
    for name in zoo.list_models():
        system = zoo.registry.file_of(name).rpartition(".")[2]
        tasks.setdefault(zoo.info(name).task, set()).add(system)
    rows = []
    for name, objective in OBJECTIVES.items():
        by: dict[str, set[str]] = {}
        for task, systems in tasks.items():
            if any(fnmatch.fnmatchcase(task, pattern) for pattern in objective.tasks):
                by.setdefault(modality(task), set()).update(systems)
        for about, systems in sorted(by.items()) or [("", set())]:
            rows.append(
                {
                    "objective": name,
                    "what": objective.what,
                    "source": objective.source,
                    "modality": about,
                    "systems": sorted(systems) or [NONE],
                    "made_of": objective.made_of,
                    "required": objective.required,
                    "learns": objective.learns,
                }
            )
    return rows
