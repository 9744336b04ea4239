"""Everything that is refused, through SGLang's own parser: flag, value and remedy in one line."""

from __future__ import annotations

import dataclasses

import pytest
from seam_tools import parse, refused, write_model

from sglang_spherical.config import SphericalConfig
from sglang_spherical.errors import StartupError
from spherical_patches import refusals

CONFIG = SphericalConfig(kv_format="spherical")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("llama"))


COMMAND_LINES = [
    "--enable-hierarchical-cache",
    "--hicache-storage-backend file",
    "--enable-lmcache",
    "--enable-flexkv",
    "--enable-unified-memory",
    "--enable-page-major-kv-layout",
    "--enable-hisparse",
    "--prefill-only-disable-kv-cache",
    "--radix-cache-backend flexkv",
    "--radix-eviction-policy lfu",
    "--radix-eviction-policy priority",
    "--kv-cache-dtype fp8_e4m3",
    "--kv-cache-dtype fp8_e5m2",
    "--kv-canary log",
    "--attention-backend triton",
    "--attention-backend torch_native",
    "--prefill-attention-backend fa3",
    "--decode-attention-backend flashinfer",
    "--enable-two-batch-overlap",
    "--enable-mis",
    "--enable-deterministic-inference",
    "--rl-on-policy-target fsdp",
    "--enable-torch-compile",
    "--cuda-graph-backend-prefill full",
    "--cuda-graph-backend-prefill tc_piecewise",
    "--cuda-graph-backend-decode breakable",
    "--debug-cuda-graph",
    "--speculative-algorithm EAGLE",
    "--decoupled-spec-role verifier",
    "--dllm-algorithm LowConfidence",
    "--enable-mixed-chunk",
    "--enable-pdmux",
    "--disaggregation-mode prefill",
    "--disaggregation-mode decode",
    "--encoder-only",
    "--enable-streaming-session",
    "--enable-session-radix-cache",
    "--use-ray",
    "--pp-size 2",
    "--dcp-size 2",
    "--attn-cp-size 2",
    "--enable-prefill-cp",
    "--enable-dp-attention",
    "--page-size 1",
    "--page-size 128",
    "--chunked-prefill-size 100",
    "--max-total-tokens 63",
    "--device xpu",
]


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_command_line_is_refused_with_flag_value_and_remedy(model, capsys, line):
    argv = ["--model-path", model, "--kv-format", "spherical", *line.split()]
    message = refused(capsys, *argv)
    assert message.startswith(f"{line}:")
    assert "use " in message or "leave the flag out" in message


def test_every_refusal_has_a_command_line():
    covered = {line.split()[0] for line in COMMAND_LINES}
    assert {refusal.flag for refusal in refusals.REFUSALS} <= covered


def test_every_refusal_serves_the_default_of_an_existing_field():
    from sglang.srt.server_args import ServerArgs

    defaults = {field.name: field.default for field in dataclasses.fields(ServerArgs)}
    for refusal in refusals.REFUSALS:
        assert defaults[refusal.field] in refusal.served, refusal.field
    for field in ("cuda_graph_config", "page_size", "chunked_prefill_size", "max_total_tokens"):
        assert defaults[field] is None


@pytest.mark.parametrize("variable", list(refusals.ENVIRONMENT))
def test_environment_is_refused(model, capsys, monkeypatch, variable):
    from sglang.srt.environ import envs

    assert hasattr(envs, variable)
    monkeypatch.setenv(variable, "true")
    message = refused(capsys, "--model-path", model, "--kv-format", "spherical")
    assert message.startswith(f"{variable}=true:")
    assert "unset" in message


@pytest.mark.parametrize(
    "graphs", ['{"prefill": {"backend": "full"}}', '{"decode": {"backend": "breakable"}}']
)
def test_a_graph_inside_the_json_is_refused(model, capsys, graphs):
    argv = ["--model-path", model, "--kv-format", "spherical", "--cuda-graph-config", graphs]
    assert refused(capsys, *argv).startswith(f"--cuda-graph-config {graphs}:")


def test_two_sizes_for_one_pool_are_refused(model, capsys):
    argv = ["--model-path", model, "--kv-format", "spherical", "--max-total-tokens", "4096"]
    message = refused(capsys, *argv, "--spherical-kv-bytes", "1000000")
    assert message.startswith("--max-total-tokens 4096: --spherical-kv-bytes 1000000 already")


@pytest.mark.parametrize(
    "line",
    ["--attention-backend spherical", "--radix-cache-backend spherical"],
)
def test_our_backends_need_the_format(model, capsys, line):
    argv = ["--model-path", model, "--device", "cpu", *line.split()]
    assert "works only inside --kv-format spherical" in refused(capsys, *argv)


def test_what_sglang_resolves_is_checked_too():
    with pytest.raises(StartupError, match="--page-size 256"):
        refusals.check({"page_size": 256}, CONFIG, {})
    with pytest.raises(StartupError, match="--device xpu:0"):
        refusals.check({"device": "xpu:0"}, CONFIG, {})
    refusals.check({"device": "cuda:0"}, CONFIG, {})


MODELS = [
    ("MLA", {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}),
    ("sliding-window", {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}),
    ("sliding-window", {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"}),
    ("linear attention", {"architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next"}),
    ("state-space", {"architectures": ["FalconH1ForCausalLM"], "model_type": "falcon_h1"}),
    ("encoder-decoder", {"architectures": ["MllamaForConditionalGeneration"]}),
    ("attention sinks", {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss"}),
    ("value heads 32", {"head_dim": 16, "v_head_dim": 32}),
    ("head dimension 24", {"head_dim": 24}),
]
_SHAPES = {
    "deepseek_v3": dict.fromkeys(
        ["kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"], 16
    ),
    "gemma3_text": {"sliding_window": 128, "head_dim": 32, "num_hidden_layers": 6},
    "gemma2": {"sliding_window": 128, "head_dim": 32},
    "gpt_oss": {"sliding_window": 128, "num_local_experts": 4, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize(("trait", "changes"), MODELS, ids=[m[0] + str(m[1]) for m in MODELS])
def test_model_is_refused_before_sglang_resolves_anything_for_it(tmp_path, capsys, trait, changes):
    if changes.get("architectures") == ["MllamaForConditionalGeneration"]:
        changes = changes | {"model_type": "mllama", "text_config": {}}
    path = write_model(tmp_path, **_SHAPES.get(changes.get("model_type"), {}), **changes)
    message = refused(capsys, "--model-path", path, "--kv-format", "spherical")
    assert message.startswith(f"--model-path {path}: ")
    assert trait in message
    assert "--kv-format dense" in message


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False},
        {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128},
        {"architectures": ["MistralForCausalLM"], "model_type": "mistral"},
        {"head_dim": 80},
        {"head_dim": 96},
    ],
)
def test_plain_mha_and_gqa_models_are_served(tmp_path, changes):
    path = write_model(tmp_path, **changes)
    assert parse("--model-path", path, "--kv-format", "spherical")._spherical == CONFIG
