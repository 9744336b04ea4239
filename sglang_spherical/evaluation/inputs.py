"""A model directory and a text, checked, as a model and windows of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WINDOW_TOKENS = 2048
DTYPES = ("float32", "bfloat16")


def require_model(model: Path) -> None:
    """Raises ValueError unless `model` is a Hugging Face model directory."""
    if not (model / "config.json").is_file():
        raise ValueError(f"--model {model}: expected a model directory with a config.json")


def load_windows(model: Path, text: Path, window_tokens: int | None = None) -> torch.Tensor:
    """The text in consecutive windows of tokens: int64 [windows, window_tokens], without a rest.

    Raises ValueError when a window cannot be filled, or the model has no tokenizer.
    """
    from transformers import AutoTokenizer

    size = WINDOW_TOKENS if window_tokens is None else window_tokens
    if not text.is_file():
        raise ValueError(f"--text {text}: no such file")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, TypeError, KeyError):
        raise ValueError(
            f"--model {model}: no tokenizer that transformers can load: the directory needs the "
            "tokenizer files of its model"
        ) from None
    words = text.read_text(encoding="utf-8", errors="replace")
    ids = torch.tensor(tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"])
    if len(ids) < size:
        raise ValueError(
            f"--text {text}: {len(ids)} tokens, shorter than a window of {size}: use a longer text"
        )
    return ids[: len(ids) // size * size].view(-1, size).long()


def usable_device(name: str) -> torch.device:
    """A device to work on: `with` it, tensors are made there. Raises ValueError without it."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {name}: not usable here: use cpu") from None
    return device


def load_model(model: Path, dtype: str, device: str = "cpu") -> Any:
    """The causal language model of a directory, for inference."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    return loaded.to(device).eval()


def cache_shape(model: Any) -> tuple[int, int, int]:
    """(layers, KV heads, head dimension) of a loaded model."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or heads, head_dim
