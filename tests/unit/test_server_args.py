"""What `--kv-format` does to ServerArgs, and that dense does nothing."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
from seam_tools import load_plugin, parse, write_model

from sglang_spherical.config import SphericalConfig
from sglang_spherical.errors import StartupError
from spherical_patches import kv_pool, pool_sizing, startup
from spherical_patches.server_args import spherical_config


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("llama"))


def test_defaults_are_filled_in(model):
    server_args = parse("--model-path", model, "--kv-format", "spherical")
    assert server_args.attention_backend == "spherical"
    assert server_args.radix_cache_backend == "spherical"
    assert server_args.page_size == 64
    assert server_args.kv_cache_dtype == "bf16"
    assert server_args.device == "cpu"
    assert server_args.cuda_graph_config.decode.backend == "disabled"
    assert server_args.cuda_graph_config.prefill.backend == "disabled"
    assert server_args.chunked_prefill_size % 64 == 0


@pytest.mark.parametrize("page_size", [16, 32, 64])
def test_page_size_given_is_kept(model, page_size):
    argv = ["--model-path", model, "--kv-format", "spherical", "--page-size", str(page_size)]
    assert parse(*argv).page_size == page_size


def test_the_configuration_travels_to_the_workers(model):
    server_args = parse("--model-path", model, "--kv-format", "spherical")
    for copied in (pickle.loads(pickle.dumps(server_args)), copy.deepcopy(server_args)):
        assert spherical_config(copied) == SphericalConfig(kv_format="spherical")


def test_a_copy_that_loses_the_configuration_is_refused(model):
    """`dataclasses.replace` carries fields only: the names of our backends, no configuration."""
    server_args = parse("--model-path", model, "--kv-format", "spherical")
    with pytest.raises(StartupError, match="works only inside --kv-format spherical"):
        dataclasses.replace(server_args, device="cpu")


def test_keyword_arguments_do_what_flags_do(model):
    load_plugin()
    from sglang.srt.entrypoints.engine import Engine

    server_args = Engine.server_args_class(
        model_path=model, kv_format="spherical", spherical_warm_bits=3, page_size=16
    )
    assert server_args._spherical == SphericalConfig(kv_format="spherical", warm_bits=3)
    assert server_args.page_size == 16
    assert server_args.attention_backend == "spherical"


def test_engine_raises_and_does_not_exit(model):
    load_plugin()
    import sglang

    with pytest.raises(ValueError, match="--enable-lmcache: LMCache does not work"):
        sglang.Engine(model_path=model, kv_format="spherical", enable_lmcache=True)


_COMPARE = """
import json, sys
from sglang.srt.server_args import prepare_server_args

def fields():
    server_args = prepare_server_args(sys.argv[1:])
    return {key: repr(value) for key, value in vars(server_args).items() if key != "model_config"}

before = fields()
from sglang.srt.plugins import load_plugins
load_plugins()
after = fields()
sys.argv += ["--kv-format", "dense"]
print(json.dumps([before, after, fields()]))
"""


@pytest.mark.slow
def test_dense_is_untouched_field_by_field(model):
    """Every attribute of ServerArgs: without the plugin, with it, and with --kv-format dense."""
    argv = ["--model-path", model, "--device", "cpu", "--attention-backend", "torch_native"]
    command = [sys.executable, "-c", _COMPARE, *argv, "--random-seed", "7"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    before, after, explicit = json.loads(result.stdout.splitlines()[-1])
    assert len(before) > 300
    assert after == before
    assert explicit == before


def test_dense_hooks_return_what_the_original_returns():
    dense = SimpleNamespace()
    configurator = SimpleNamespace(server_args=dense)
    marker = object()

    def original(*args, **kwargs):
        return marker, args, kwargs

    calls = [
        (pool_sizing.cell_size, ("self", configurator, 2), {}),
        (pool_sizing.available_bytes, (configurator, 5), {}),
        (kv_pool.build_pool, (configurator,), {"max_total_num_tokens": 64, "mha_pool_class": int}),
        (kv_pool.build_allocator, (configurator,), {"sizes": 1, "token_to_kv_pool": 2}),
        (startup.launch, ("cls", dense, 1, 2), {"port_args": 3}),
        (startup.build_scheduler, ("self", dense, 1), {"tp_rank": 0}),
    ]
    for hook, args, kwargs in calls:
        assert hook(original, *args, **kwargs) == (marker, args, kwargs)


def _configurator(**config):
    return SimpleNamespace(
        server_args=SimpleNamespace(
            _spherical=SphericalConfig(kv_format="spherical", **config), page_size=64
        ),
        device="cpu",
        gpu_id=0,
        layer_info=SimpleNamespace(num_effective_layers=2),
    )


@pytest.fixture
def hundred_bytes_per_token(monkeypatch):
    load_plugin()
    from sglang_spherical.pool import sizing

    monkeypatch.setattr(sizing, "hot_bytes_per_token", lambda kvc, layers, config: 100)


def test_pool_bytes_are_taken_exactly_or_refused(monkeypatch, hundred_bytes_per_token):
    configurator = _configurator(kv_bytes=1_000_000)
    monkeypatch.setattr(pool_sizing, "_free_bytes", lambda device, gpu_id: 1_000_000)
    # a page of 64 tokens at 100 bytes is the padding sink's
    assert pool_sizing.available_bytes(None, configurator, 0) == 1_000_000 - 6400
    monkeypatch.setattr(pool_sizing, "_free_bytes", lambda device, gpu_id: 999_999)
    with pytest.raises(StartupError, match="--spherical-kv-bytes 1000000: cpu has 999999 bytes"):
        pool_sizing.available_bytes(None, configurator, 0)


def test_less_than_a_page_is_refused(monkeypatch, hundred_bytes_per_token):
    def profile(configurator, memory):
        return memory

    assert pool_sizing.available_bytes(profile, _configurator(), 12800) == 6400
    with pytest.raises(StartupError, match=r"--mem-fraction-static: 12799 bytes .* take 12800"):
        pool_sizing.available_bytes(profile, _configurator(), 12799)
    monkeypatch.setattr(pool_sizing, "_free_bytes", lambda device, gpu_id: 1_000_000)
    with pytest.raises(StartupError, match=r"--spherical-kv-bytes: 6399 bytes .* take 12800"):
        pool_sizing.available_bytes(profile, _configurator(kv_bytes=6399), 0)


def test_weights_that_leave_nothing_are_one_line_too(hundred_bytes_per_token):
    def profile(configurator, memory):
        raise ValueError("Loaded weights leave no GPU memory")

    with pytest.raises(StartupError, match="Loaded weights leave no GPU memory"):
        pool_sizing.available_bytes(profile, _configurator(), 0)
