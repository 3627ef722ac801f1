"""Variant names and where they live; creating a model from its name.

A model file under `zoo/models` ends in `SYSTEM` (see `zoo.system`). `SYSTEMS` below says which
names a file may define, so that asking for one name imports one file.
"""

import fnmatch
import importlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from zoo.system import System, Variant, closest, of, wrapped

if TYPE_CHECKING:
    import flax.linen as nn

    from zoo.checkpoints.ruleset import Rules

SYSTEMS: dict[str, tuple[str, ...]] = {
    "zoo.models.vision.swin": ("swin_*_patch4_*", "swin_test"),
    "zoo.models.vision.dinat": ("dinat_*", "nat_*", "vitrpb_*"),
    "zoo.models.vision.cswin": ("CSWin_*", "cswin_*"),
    "zoo.models.vision.favit": ("favit_*",),
    "zoo.models.vision.sret": ("SReT_*", "sret_*"),
    "zoo.models.vision.t2t_vit": ("t2t_vit_*",),
    "zoo.models.vision.activator": ("activator_*",),
    "zoo.models.vision.svt": ("svt_*",),
    "zoo.models.vision.gmm_vit": ("gmm_vit*",),
    "zoo.models.vision.gmm_hosts": ("gmm_[!vpt]*",),
    "zoo.models.vision.gmm_pyramids": ("gmm_pit*", "gmm_t2t*"),
    "zoo.models.vision.fmvit": ("fmvit_*",),
    "zoo.models.vision.vsa": ("ViTAEv2_VSA_*", "vitaev2_vsa_*"),
    "zoo.models.vision.vsa_swin": ("swin_vsa_*",),
    "zoo.models.vision.vit": ("vit_*", "deit_*"),
    "zoo.models.video.predformer": ("PredFormer_*", "predformer_*"),
    "zoo.models.video.vdt": ("VDT-*", "vdt_*"),
    "zoo.models.video.magic_1_for_1": ("Magic_141_*", "magic_1_for_1_*"),
    "zoo.models.video.video_swin": ("swin_*_patch244_*", "video_swin_*"),
    "zoo.models.imaging.pt_dit": ("PT-DiT_*", "pt_dit_*"),
    "zoo.models.imaging.styleswin": ("StyleSwin_*", "styleswin_*"),
    "zoo.models.imaging.topnet": ("topnet_*",),
    "zoo.models.imaging.hat": ("HAT*", "Real_HAT_*", "hat_*"),
    "zoo.models.imaging.autoencoder_kl": ("sd*_vae*", "flux_vae", "autoencoder_kl_*"),
    "zoo.models.language.bert": ("bert_*", "minilm_*"),
    "zoo.models.language.albert": ("albert_*", "distilbert_*"),
    "zoo.models.language.gpt2": ("gpt2", "gpt2_*", "distilgpt2"),
    "zoo.models.language.opt": ("opt_*",),
    "zoo.models.language.llama": ("llama*", "stories*", "mistral_*"),
    "zoo.models.language.liger": ("liger_*",),
    "zoo.models.language.gla": ("gla_*",),
    "zoo.models.language.mamba2": ("mamba2_*", "mamba2attn_*"),
    "zoo.models.language.deltanet": ("deltanet_*",),
    "zoo.models.language.longformer": ("longformer_*",),
    "zoo.models.language.linformer": ("linformer_*",),
    "zoo.models.language.performer": ("performer_*",),
    "zoo.models.language.reformer": ("reformer_*",),
    "zoo.models.language.routing_transformer": ("routing_transformer_*",),
    "zoo.models.language.sigmoid_attention": ("sigmoid_attention_*",),
    "zoo.models.language.urpe": ("urpe_*",),
    "zoo.models.language.byte_transformer": ("byte_transformer_*",),
    "zoo.models.language.nprf": ("nprf_*",),
    "zoo.models.language.combiner": ("combiner_*",),
    "zoo.models.language.extractors": ("extractors_*",),
    "zoo.models.control.decision_transformer": ("decision_transformer_*",),
    "zoo.models.control.gtrxl": ("gtrxl_*",),
    "zoo.models.incontext.algoformer": ("algoformer_*", "looped_*"),
    "zoo.models.incontext.icl_boolean": ("icl_boolean_*",),
    "zoo.models.incontext.icl_sequential": ("icl_sequential_*",),
    "zoo.models.incontext.icl_uncertainty": ("icl_uncertainty_*",),
    "zoo.models.incontext.icl_linear": ("icl_linear_*",),
    "zoo.models.timeseries.ltsf_linear": ("ltsf_*", "dlinear_*", "nlinear_*"),
    "zoo.models.timeseries.itransformer": ("itransformer_*",),
    "zoo.models.timeseries.t2": ("t2_*",),
    "zoo.models.timeseries.informer": ("informer_*",),
    "zoo.models.timeseries.autoformer": ("autoformer_*",),
    "zoo.models.timeseries.tempo": ("tempo_*",),
    "zoo.models.timeseries.s_mamba": ("s_mamba_*",),
    "zoo.models.timeseries.gateformer": ("gateformer_*",),
    "zoo.models.timeseries.patchtst": ("patchtst_*",),
    "zoo.models.timeseries.patchtst_original": ("original_patchtst_*",),
    "zoo.models.timeseries.patchtst_transformers": ("transformers_patchtst_*",),
    "zoo.models.control.ebwm": ("ebt_*",),
    "zoo.models.graph.graphgps": ("graphgps_*",),
    "zoo.models.graph.gps": ("gps_*",),
    "zoo.models.graph.graphtrans": ("graphtrans_*",),
    "zoo.models.graph.graphormer": ("graphormer_*",),
    "zoo.models.motion.story_to_motion": ("story_to_motion_*",),
    "zoo.models.signal.lmuformer": ("lmuformer_*",),
    "zoo.models.signal.spiking": ("slmu_rnn_*", "attn_ms_*", "spiking_*"),
    "zoo.models.signal.dynamicformer": ("dynamicformer_*",),
    "zoo.models.signal.dynamic_mlp": ("dra_mlp_*",),
}


def variants(pattern: str = "*", task: str | None = None) -> dict[str, Variant]:
    """The variants whose names match a shell wildcard (`swin*`) and, if given, a task, by name."""
    literal = _literal(pattern)
    found = {}
    for path, globs in SYSTEMS.items():
        stems = [_literal(g) for g in globs]
        if any(stem.startswith(literal) or literal.startswith(stem) for stem in stems):
            for name, variant in importlib.import_module(path).SYSTEM.variants.items():
                if fnmatch.fnmatchcase(name, pattern) and task in (None, variant.task):
                    found[name] = variant
    return dict(sorted(found.items()))


def list_models(pattern: str = "*", task: str | None = None) -> list[str]:
    """Names of all variants that match a shell wildcard (`swin*`) and, if given, a task, sorted."""
    return list(variants(pattern, task))


def _literal(pattern: str) -> str:
    """What every match of a shell wildcard begins with."""
    return pattern.split("*")[0].split("?")[0].split("[")[0]


def info(name: str) -> Variant:
    """What is known of a variant: configuration, source, licence, published figures.

    Raises:
      ValueError: if there is no such variant; the sentence gives the closest names.
    """
    return system(name).variants[canonical(name)]


_ALIASES = {  # names that rules of `canonical` do not reach
    "vit_b_16": "vit_base_patch16_224",
    "vit_b_32": "vit_base_patch32_224",
    "vit_l_16": "vit_large_patch16_224",
    "swin_t": "swin_tiny_patch4_window7_224",
    "swin_s": "swin_small_patch4_window7_224",
    "swin_b": "swin_base_patch4_window7_224",
    "swin3d_t": "swin_tiny_patch244_window877_kinetics400_1k",
    "swin3d_s": "swin_small_patch244_window877_kinetics400_1k",
    "swin3d_b": "swin_base_patch244_window877_kinetics400_1k",
    "all_minilm_l6_v2": "minilm_l6_v2",
    "all_minilm_l12_v2": "minilm_l12_v2",
    "bert_tiny": "bert_tiny_uncased",
    "bert_mini": "bert_mini_uncased",
    "bert_small": "bert_small_uncased",
    "bert_medium": "bert_medium_uncased",
    "bert_uncased_l_2_h_128_a_2": "bert_tiny_uncased",
    "bert_uncased_l_4_h_256_a_4": "bert_mini_uncased",
    "bert_uncased_l_4_h_512_a_8": "bert_small_uncased",
    "bert_uncased_l_8_h_512_a_8": "bert_medium_uncased",
    "llama_2_7b": "llama2_7b",
    "llama_2_13b": "llama2_13b",
    "llama_2_70b": "llama2_70b",
    "meta_llama_3_8b": "llama3_8b",
    "meta_llama_3_70b": "llama3_70b",
    "llama_3.1_8b": "llama3.1_8b",
    "llama_3.2_1b": "llama3.2_1b",
    "llama_3.2_3b": "llama3.2_3b",
    "tinyllama_1.1b": "llama_tiny_1.1b",
    "mistral_7b_v0.1": "mistral_7b",
}


def canonical(name: str) -> str:
    """A variant's name from a hub id or a timm tag; any other name as it is.

    `google/vit-base-patch16-224` and `vit_base_patch16_224.augreg_in21k` are both variants here:
    the owner and the tag are dropped, `-` is `_`. A tag of ImageNet-21k's classes keeps them.

    >>> canonical("facebook/opt-125m"), canonical("vit_b_16")
    ('opt_125m', 'vit_base_patch16_224')
    """
    if _home(name):
        return name
    text = name.rpartition("/")[2].partition("@")[0].replace("-", "_")
    text = re.sub("_in22k$", "_22k", text)
    stem, _, tag = text.partition(".")
    large = bool(re.search(r"in2[12]k", tag)) and "ft_in1k" not in tag
    ends = ("_in21k", "_22k", "") if large else ("",)
    tried = [f"{stem}{end}" for end in ends] if tag else []
    for candidate in (text, *tried):
        for end in ("", "_hf", "_in1k_224", "_chat", "_instruct"):
            for form in (candidate, candidate.lower()):
                form = form.removesuffix(end)
                form = _ALIASES.get(form, form)
                if _home(form):
                    return form
    return name


def _home(name: str) -> str | None:
    """The dotted name of the file that defines a variant of this name, if one does."""
    for path, globs in SYSTEMS.items():
        if any(fnmatch.fnmatchcase(name, g) for g in globs):
            if name in importlib.import_module(path).SYSTEM.variants:
                return path
    return None


def file_of(name: str) -> str:
    """The dotted name of the file that defines a variant.

    Raises:
      ValueError: if there is no such variant; the sentence gives the closest names.
    """
    path = _home(canonical(name))
    if path is None:
        raise ValueError(
            f"There is no model {name!r}{closest(name, list_models())} "
            "zoo.list_models() gives all names; it takes wildcards such as 'swin*'."
        )
    return path


def create(name: str, **overrides: Any) -> "nn.Module":
    """A module by variant name, with some fields replaced.

    >>> import zoo
    >>> zoo.create("swin_test", num_classes=7).num_classes
    7

    Raises:
      ValueError: for an unknown name or an unknown field, with the closest ones.
    """
    return info(name).create(**overrides)


def system(model: "nn.Module | str") -> System:
    """The system of a module or of a variant's name.

    Raises:
      ValueError: for an unknown name, or a module that no model file defines or wraps.
    """
    if isinstance(model, str):
        return importlib.import_module(file_of(model)).SYSTEM
    found = of(model)
    if found is None:
        raise ValueError(
            f"{type(model).__name__} belongs to no system of the zoo: its file has no SYSTEM and "
            "it wraps no module that has one."
        )
    return found


def layouts(model: "nn.Module | str") -> "Mapping[str, Rules]":
    """The namings of the files that a module is loaded from, with what its methods add to them.

    Raises:
      ValueError: for an unknown name, or a module that no model file defines or wraps.
    """
    found = system(model).layouts
    if isinstance(model, str) or wrapped(model) is None:
        return found
    from zoo.methods.method import Intercepted

    for method in model.methods if isinstance(model, Intercepted) else ():
        found = method.layouts(found)
    return found
