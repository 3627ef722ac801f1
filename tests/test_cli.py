import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import zoo
from zoo import cli, verify
from zoo.checkpoints import files
from zoo.models.vision import swin
from zoo.shapes import shapes

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A file in timm's names, and its contents."""
    model = zoo.create("swin_test")
    variables = verify.fill(shapes(model)[0])
    state = zoo.export(model, variables, "timm")
    path = tmp_path_factory.mktemp("published") / "timm.safetensors"
    files.save_safetensors(path, state)
    return path, state


def run(capsys, *arguments):
    """Exit status, standard output and standard error of a command."""
    status = cli.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def refused(capsys, *arguments):
    """The message of a command that must fail: one line, nothing on standard output."""
    status, out, err = run(capsys, *arguments)
    assert status == 2 and out == ""
    assert err.startswith("zoo: ") and err.rstrip().endswith(".") and "Traceback" not in err
    return err.removeprefix("zoo: ").rstrip()


# --------------------------------------------------------------------------- list and show


def test_list_has_what_a_reader_needs_to_choose(capsys):
    status, out, _ = run(capsys, "list", "swin_tiny_patch4_window7_224*")
    head, first, *rest = out.splitlines()
    assert status == 0 and len(rest) == 2
    assert head.split() == "name task parameters FLOPs input source licence".split()
    assert first.split("  ")[0] == "swin_tiny_patch4_window7_224"
    for fact in ("28.29 M", "4.49 G", "224x224x3", "microsoft/Swin-Transformer", "MIT"):
        assert fact in first


def test_list_keeps_to_a_task(capsys):
    _, out, _ = run(capsys, "list", "--task", "image_classification", "--json")
    rows = json.loads(out)
    assert {row["task"] for row in rows} == {"image_classification"}
    assert [row["name"] for row in rows] == zoo.list_models(task="image_classification")


def test_a_terminal_gets_a_table_of_the_same_facts(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    status, out, _ = run(capsys, "list", "swin_test")
    assert status == 0 and "swin_test" in out and "32x32x3" in out


def test_show_counts_parameters_and_gives_the_shape_of_every_feature(capsys):
    _, out, _ = run(capsys, "show", "swin_tiny_patch4_window7_224", "--json")
    facts = json.loads(out)
    assert facts["parameters"] == facts["published parameters"] == 28_288_354
    assert facts["features"]["stage4"] == [1, 7, 7, 768]
    assert list(facts["features"])[-1] == "logits"
    assert facts["preprocessing"]["mean"] == [0.485, 0.456, 0.406]
    assert list(facts["files"]) == ["swin_tiny_patch4_window7_224.pth"]


def test_show_takes_fields_and_prints_lines(capsys):
    status, out, _ = run(capsys, "show", "swin_test", "--set", "num_classes=3", "--set",
                         "image_size=(32, 64)")  # fmt: skip
    lines = dict(line.split(maxsplit=1) for line in out.splitlines() if not line.startswith("feat"))
    assert status == 0 and lines["input"] == "images: 1x32x64x3"
    assert "feature logits" in out and "1x3" in out


# -------------------------------------------------------------------------------- convert


def test_convert_rewrites_a_file_in_another_layout(capsys, tmp_path, published):
    path, state = published
    out = tmp_path / "new" / "official.safetensors"
    status, text, _ = run(capsys, "convert", "swin_test", path, out, "--layout", "official")
    assert status == 0 and str(out) in text
    assert "layers.0.downsample.norm.weight" in files.open_checkpoint(out)
    back = tmp_path / "timm.safetensors"
    run(capsys, "convert", "swin_test", out, back, "--layout", "timm")
    got = files.open_checkpoint(back)
    assert set(got) == set(state)
    for name, value in state.items():
        assert got[name].read().tobytes() == np.ascontiguousarray(value).tobytes(), name


def test_convert_adapts_when_asked_to(capsys, tmp_path, published):
    path, _ = published
    out = tmp_path / "three.safetensors"
    message = refused(capsys, "convert", "swin_test", path, out, "--set", "num_classes=3")
    assert "head.fc.weight" in message and "adapt=True" in message and not out.exists()
    status, *_ = run(capsys, "convert", "swin_test", path, out, "--set", "num_classes=3", "--adapt")
    assert status == 0
    assert files.open_checkpoint(out)["head.weight"].shape == (3, 48)


def test_an_orbax_directory_loads_again(capsys, tmp_path, published):
    path, state = published
    out = tmp_path / "orbax"
    status, *_ = run(capsys, "convert", "swin_test", path, out)
    assert status == 0 and sorted(p.name for p in tmp_path.iterdir()) == ["orbax"]
    model, variables = zoo.load("swin_test", out)
    for name, value in zoo.export(model, variables, "timm").items():
        np.testing.assert_array_equal(value, state[name])
    _, adapted = zoo.load("swin_test", out, adapt=True, num_classes=7)
    assert adapted["params"].pop("head")["kernel"].shape[-1] == 7
    variables["params"].pop("head")
    jax.tree.map(np.testing.assert_array_equal, adapted, variables)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["{bad}", "{new}.safetensors"], "broken"),
        (["{nowhere}", "{new}.safetensors"], "There is no checkpoint '.*nowhere'"),
        (["{good}", "{new}.safetensors", "--layout", "caffe"], "no layout 'caffe'; it has officia"),
        (["{good}", "{new}.pth"], "is no name to write to"),
        (["{good}", "{new}", "--layout", "timm"], "A layout is for a .safetensors file"),
        (["{good}", "{folder}"], "exists already"),
        (["{good}", "{new}.safetensors", "--set", "depths=3"], "depths as tuple"),
        (["{good}", "{file}/{name}.safetensors"], "Cannot read or write"),
    ],
)
def test_what_cannot_be_converted_leaves_nothing_behind(
    capsys, tmp_path, published, arguments, sentence
):
    (tmp_path / "bad").write_bytes(published[0].read_bytes()[:5000])
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    places = {k: tmp_path / k for k in ("bad", "nowhere", "new", "folder", "file")}
    arguments = [a.format(**places, good=published[0], name="x") for a in arguments]
    message = refused(capsys, "convert", "swin_test", *arguments)
    if sentence == "broken":
        assert str(tmp_path / "bad") in message
    else:
        assert re.search(sentence, message), message
    assert sorted(tmp_path.rglob("*")) == before


# --------------------------------------------------------------------------------- verify


def test_verify_fills_a_batch_norm_with_variances_that_have_a_root():
    filled = verify.fill(shapes(zoo.create("patchtst_test"))[0])
    assert filled["batch_stats"]["norm"]["var"].min() > 0


@pytest.fixture
def one_case(monkeypatch):
    case = ROOT / "tests" / "golden" / "vit" / "tiny_rect_dim48.npz"
    monkeypatch.setattr(verify, "reference_cases", lambda model: (ROOT / "tests/golden.py", [case]))


def test_verify_checks_rules_gradients_and_goldens(capsys, one_case):
    status, out, _ = run(capsys, "verify", "vit_test", "--json")
    checks = {check["check"]: check["passed"] for check in json.loads(out)}
    assert status == 0 and checks.pop("parameters") is None
    assert {"layout timm", "layout google", "gradient", "golden vit/tiny_rect_dim48"} <= set(checks)
    assert all(checks.values())


def test_verify_fails_where_the_count_is_not_the_published_one(capsys, monkeypatch):
    wrong = dataclasses.replace(swin.VARIANTS["swin_test"], params=77_327)
    monkeypatch.setitem(swin.VARIANTS, "swin_test", wrong)
    monkeypatch.setattr(verify, "check_layouts", lambda *_: [])
    monkeypatch.setattr(
        verify, "check_gradient", lambda *_: verify.Check("gradient", True, "finite")
    )
    monkeypatch.setattr(verify, "check_goldens", lambda *_: [])
    status, out, _ = run(capsys, "verify", "swin_test")
    assert status == 1
    assert "FAILED   parameters" in out and "77,326, published 77,327" in out
    assert "ok       gradient" in out and "1 of 2 checks failed" in out


def test_verify_finds_rules_that_lose_a_leaf(monkeypatch):
    model = zoo.create("swin_test")
    rules = swin.LAYOUTS["timm"]
    kept = tuple(rule for rule in rules.rules if rule.target != "head/bias")
    lossy = {"timm": dataclasses.replace(rules, rules=kept)}
    monkeypatch.setattr(swin, "SYSTEM", dataclasses.replace(swin.SYSTEM, layouts=lossy))
    (check,) = verify.check_layouts(model, verify.fill(shapes(model)[0]))
    assert check.passed is False and "timm" in check.detail


# --------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["show", "swin_tst"], "There is no model 'swin_tst'; did you mean swin_test"),
        (["show", "swin_test", "--set", "depth=3"], "Swin has no field 'depth'; did you mean dep"),
        (["show", "swin_test", "--set", "depths=3"], "Swin takes depths as tuple[int, ...], not 3"),
        (["show", "swin_test", "--set", "depths"], "--set takes FIELD=VALUE, not 'depths'"),
        (
            ["show", "swin_test", "--set", "depths=(2,)"],
            "num_heads=(2, 4) and depths=(2,): give one",
        ),
        (["show", "swin_test", "--set", "window_size=0"], "window_size=0: give 1 or more"),
        (["show", "vit_test", "--set", "num_classes=-1"], "num_classes=-1: give 0 or more"),
        (["show", "vit_test", "--set", "drop_path=2.0"], "drop_path=2.0: give a share from 0 to 1"),
        (["show", "vit_test", "--set", "dtype=int32"], "dtype='int32' is no floating type"),
        (["show", "patchtst_test", "--set", "stride=0"], "stride=0: give 1 or more"),
        (["verify", "vit_test", "--weights", "none.pth"], "There are no weights 'none.pth'"),
        (["plan", "README.md", "--topology", "v5e:2x2"], "'README.md' is no config file"),
        (
            ["export", "vit_test", "out", "--weights", "w", "--platforms", "gpu"],
            "no platform 'gpu'",
        ),
        (["predict", "vit_test", "w", "x.png", "--out", "x.xlsx"], "'x.xlsx' is no place to write"),
        (["predict", "vit_test", "w", "x.png", "--batch-size", "0"], "must be at least 1"),
        (["predict", "vit_test", "w", ""], "An input is empty"),
        (
            ["predict", "vit_test", "w", "x.png", "--step", "3"],
            "--step is of a run, and 'vit_test'",
        ),
        (["convert", "vit_test", "w", "o.safetensors", "--rename", "=x"], "--rename takes OLD=NEW"),
        (["list", "resnet*"], "No model matches 'resnet*'"),
        (["list", "--task", "cooking"], "No model matches '*' of task 'cooking'"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        (["show"], "The following arguments are required: name"),
        ([], "The following arguments are required: COMMAND"),
    ],
)
def test_mistakes_are_one_sentence(capsys, arguments, sentence):
    message = refused(capsys, *arguments)
    assert sentence in message and "\n" not in message


def test_it_is_a_program(tmp_path):
    command = [sys.executable, "-m", "zoo.cli"]
    done = subprocess.run([*command, "show", "nothing"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("zoo: There is no model 'nothing'")
    done = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("list", "show", "convert", "verify"))
