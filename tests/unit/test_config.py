"""From flags and keyword arguments to SphericalConfig."""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys

import pytest
from seam_tools import load_plugin, parse, refused, write_model

from sglang_spherical.config import TIERS, SphericalConfig
from spherical_patches import flags


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("llama"))


def test_every_field_has_a_flag_and_a_help_text_with_its_default():
    parser = argparse.ArgumentParser()
    flags.add_arguments(parser)
    for field in dataclasses.fields(SphericalConfig):
        action = next(a for a in parser._actions if flags.option(field.name) in a.option_strings)
        assert action.help
        if field.default is not None:
            assert f"Default: {field.default}." in action.help


def test_flags_not_given_leave_no_trace_in_the_namespace():
    parser = argparse.ArgumentParser()
    flags.add_arguments(parser)
    assert vars(parser.parse_args([])) == {}


def test_all_flags_reach_the_configuration(model, tmp_path):
    frames = tmp_path / "frames"
    frames.write_bytes(b"")
    server_args = parse(
        *("--model-path", model, "--kv-format", "spherical", "--spherical-hot-bits", "8"),
        *("--spherical-warm-bits", "3", "--spherical-cold-bits", "2", "--spherical-budget", "cold"),
        *("--spherical-watermark", "0.5", "--spherical-frames", str(frames)),
        *("--spherical-high-watermark", "0.9", "--spherical-settle-pages", "32"),
        *("--spherical-recent-tokens", "128", "--spherical-kv-bytes", "1000000"),
    )
    assert server_args._spherical == SphericalConfig(
        kv_format="spherical",
        hot_bits=8,
        warm_bits=3,
        cold_bits=2,
        budget="cold",
        watermark=0.5,
        high_watermark=0.9,
        settle_pages=32,
        frames=str(frames),
        recent_tokens=128,
        kv_bytes=1_000_000,
    )


def test_defaults_are_those_of_the_configuration(model):
    server_args = parse("--model-path", model, "--kv-format", "spherical")
    assert server_args._spherical == SphericalConfig(kv_format="spherical")


def test_a_yaml_file_may_set_the_flags(model, tmp_path):
    pytest.importorskip("yaml")
    file = tmp_path / "server.yaml"
    file.write_text(f"model-path: {model}\nkv-format: spherical\nspherical-warm-bits: 3\n")
    assert parse("--config", str(file))._spherical.warm_bits == 3


@pytest.mark.parametrize(
    ("flag", "value", "remedy"),
    [
        ("--kv-format", "sphercal", "expected one of dense, spherical"),
        ("--spherical-hot-bits", "five", "expected a whole number"),
        ("--spherical-hot-bits", "5", "expected one of 4, 8"),
        ("--spherical-warm-bits", "8", "expected one of 3, 4"),
        ("--spherical-cold-bits", "4", "expected one of 2, 3"),
        ("--spherical-budget", "tepid", "expected one of hot, warm, cool, cold, frozen"),
        ("--spherical-watermark", "2", "expected a fraction"),
        ("--spherical-watermark", "half", "expected a number"),
        ("--spherical-high-watermark", "1.5", "expected a fraction from --spherical-watermark 0.0"),
        ("--spherical-settle-pages", "0", "expected 1 or more pages"),
        ("--spherical-recent-tokens", "-1", "expected 0 or more"),
        ("--spherical-kv-bytes", "0", "expected a positive byte count"),
        ("--spherical-kv-bytes", "2G", "expected a whole number"),
        ("--spherical-frames", "nowhere.bin", "no such file"),
    ],
)
def test_a_wrong_value_is_one_line_with_value_and_remedy(model, capsys, flag, value, remedy):
    argv = ["--model-path", model, "--kv-format", "spherical", flag, value]
    message = refused(capsys, *argv)
    assert message.startswith(f"{flag} {value}")
    assert remedy in message


def test_watermarks_must_be_ordered(model, capsys):
    argv = ["--model-path", model, "--kv-format", "spherical"]
    message = refused(
        capsys, *argv, "--spherical-watermark", "0.5", "--spherical-high-watermark", "0.25"
    )
    assert message.startswith("--spherical-high-watermark 0.25: expected a fraction from")
    assert "--spherical-watermark 0.5 to 1" in message


@pytest.mark.parametrize("tier", TIERS)
def test_every_tier_may_be_the_budget(model, tier):
    argv = ["--model-path", model, "--kv-format", "spherical", "--spherical-budget", tier]
    assert parse(*argv)._spherical.budget == tier


def test_tiers_must_be_ordered(model, capsys):
    argv = ["--model-path", model, "--kv-format", "spherical"]
    message = refused(capsys, *argv, "--spherical-warm-bits", "3", "--spherical-cold-bits", "3")
    assert "--spherical-warm-bits 3" in message


@pytest.mark.parametrize("explicit", [[], ["--kv-format", "dense"]])
def test_spherical_flags_without_the_format_are_refused(model, capsys, explicit):
    message = refused(capsys, "--model-path", model, *explicit, "--spherical-warm-bits", "3")
    assert message.startswith("--spherical-warm-bits 3: has no effect with --kv-format dense")


def test_an_unknown_keyword_of_engine_is_python_s_own_error():
    load_plugin()
    from sglang.srt.server_args import ServerArgs

    for kv_format in ("dense", "spherical"):
        with pytest.raises(TypeError, match=r"__init__\(\) got an unexpected keyword"):
            ServerArgs(model_path="dummy", kv_format=kv_format, spherical_warm_bit=4)


@pytest.mark.slow
def test_help_names_the_flags():
    command = [sys.executable, "-m", "sglang.launch_server", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for field in flags.FIELDS:
        assert flags.option(field) in text
