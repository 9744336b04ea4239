"""What the tests of SGLang's seams share: the loaded plugin, and models that are a config.json."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 128,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@functools.cache
def load_plugin() -> None:
    """Let SGLang load the plugin as it does at every start. Its hooks stay for the process."""
    from sglang.srt.plugins import load_plugins

    load_plugins()


def write_model(folder: Path, **changes: Any) -> str:
    """A model folder with nothing but a config.json: enough for arguments, not for weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA | changes))
    return str(folder)


def parse(*argv: str) -> Any:
    """The ServerArgs of a command line, through SGLang's own parser and the plugin's hooks."""
    load_plugin()
    from sglang.srt.server_args import prepare_server_args

    return prepare_server_args(list(argv))


def refused(capsys: Any, *argv: str) -> str:
    """The one line with which a command line is refused, after checking how it is."""
    import pytest

    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")
