"""The command line `zoo`, also as `python -m zoo.cli`.

    zoo list "swin*"                                    names, parameters, FLOPs, source, licence
    zoo show minilm_l6_v2                               everything known of one variant
    zoo convert bert_base_uncased OLD.bin NEW.safetensors --layout huggingface
    zoo export gpt2 served --weights gpt2_folder        a program that runs without the zoo
    zoo predict runs/photos new/ --out answers.csv      labels with probabilities; forecasts; scores
    zoo verify swin_test                                counts, checkpoint rules, goldens, gradients
    zoo plan configs/vision/vit_l16_imagenet.py --topology v5e:16x16    the train step on a TPU pod
    zoo methods "vit*"                                  which methods work on it, and what they do
    zoo objectives                                      what models learn from, and which systems do

Tables are drawn on a terminal and are plain columns in a pipe; `--json` gives the same facts to
programs. The exit status is 0; 1 where a check of `verify` failed; 2 for a request that cannot be
served, with one message on standard error.
"""

from zoo.cli.program import main

__all__ = ["main"]
