"""What the tests of the attention backends share: prompts of a made-up model, and its runner."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from cache_tools import Layer, normal, read_pages, tiny_pool
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_spherical.attention import decode_plan
from sglang_spherical.attention.backend import SphericalAttnBackend
from sglang_spherical.attention.kernel_backend import KernelAttnBackend
from sglang_spherical.pool.allocator import SphericalAllocator
from sglang_spherical.pool.arena import KEYS, VALUES
from spherical_kernels.testing import poison

PAGE, DIM = (32, 64) if torch.cuda.is_available() else (16, 32)  # a GPU serves nothing smaller
LAYERS, HEADS, GROUP = 2, 2, 2
if not torch.cuda.is_available():
    # a plan for few multiprocessors: interpreted programs take their time, those without pages too
    decode_plan.MULTIPROCESSORS = 4
LONGEST = 13 * PAGE


class Prompt:
    """Queries, keys and values [layers, tokens, heads, d] of one request of a made-up model."""

    def __init__(self, slot: int, seed: int) -> None:
        self.slot, self.length = slot, 0
        self.ids = torch.arange(LONGEST) % (2 * PAGE + 1)  # every token comes again
        mean = 2 * normal(2, LAYERS, 1, HEADS, DIM, seed=5)
        self.q = normal(LAYERS, LONGEST, HEADS * GROUP, DIM, seed=seed)
        self.k = mean[0] + normal(LAYERS, LONGEST, HEADS, DIM, seed=seed + 1000)
        self.v = mean[1] + normal(LAYERS, LONGEST, HEADS, DIM, seed=seed + 2000)


class Runner:
    """Stands for SGLang's model runner: places tokens, plans, and runs every layer."""

    def __init__(
        self,
        pages: int = 60,
        dtype: torch.dtype = torch.float32,
        kernels: bool = False,
        device: str = "cpu",
        unlike: bool = False,
    ) -> None:
        self.dtype, self.device = dtype, device
        self.pool = tiny_pool(pages, device, unlike, page_size=PAGE, head_dim=DIM)
        self.pool.kernels = kernels
        poison(self.pool.arena.bytes)
        self.allocator = SphericalAllocator(self.pool)
        self.req_to_token = torch.zeros(9, LONGEST + PAGE, dtype=torch.int32, device=device)
        model_runner = SimpleNamespace(
            token_to_kv_pool=self.pool,
            token_to_kv_pool_allocator=self.allocator,
            req_to_token_pool=SimpleNamespace(req_to_token=self.req_to_token),
        )
        self.backend: SphericalAttnBackend
        if kernels:
            self.backend = KernelAttnBackend(model_runner, HEADS * GROUP)
        else:
            self.backend = SphericalAttnBackend(model_runner)

    def extend(self, *chunks: tuple[Prompt, int]) -> list[torch.Tensor]:
        """The next tokens of some prompts: outputs [layers, tokens, q_heads, d] of each."""
        prompts = [prompt for prompt, _ in chunks]
        before = torch.tensor([prompt.length for prompt in prompts])
        after = before + torch.tensor([count for _, count in chunks])
        last = [int(self.req_to_token[p.slot, p.length - 1]) if p.length else -1 for p in prompts]
        total = int((after - before).sum())
        starts, ends, last_loc = self.put(before, after, torch.tensor(last))
        loc = self.allocator.alloc_extend(starts, before, ends, after, last_loc, total)
        positions = [torch.arange(a, b) for a, b in zip(before.tolist(), after.tolist())]
        ids = [p.ids[x] for p, x in zip(prompts, positions)]
        slots, positions, ids = self.put(
            torch.tensor([p.slot for p in prompts]), torch.cat(positions), torch.cat(ids)
        )
        batch = SimpleNamespace(
            forward_mode=ForwardMode.EXTEND,
            batch_size=len(prompts),
            req_pool_indices=slots,
            seq_lens=ends,
            extend_prefix_lens=starts.int(),
            extend_prefix_lens_cpu=before.tolist(),
            extend_seq_lens_cpu=(after - before).tolist(),
            positions=positions,
            input_ids=ids,
            out_cache_loc=loc,
        )
        return self._run(batch, prompts, after, (after - before).tolist(), "forward_extend")

    def decode(self, *prompts: Prompt, padding: int = 0) -> list[torch.Tensor]:
        """One token more of every prompt, beside rows that only pad the batch."""
        after = torch.tensor([prompt.length + 1 for prompt in prompts])
        last = torch.tensor([int(self.req_to_token[p.slot, p.length - 1]) for p in prompts])
        zeros = torch.zeros(padding, dtype=torch.int64)
        slots = torch.cat([torch.tensor([p.slot for p in prompts]), zeros])
        ends, last_loc, slots, zeros = self.put(after, last, slots, zeros)
        loc = self.allocator.alloc_decode(ends, after, last_loc)
        batch = SimpleNamespace(
            forward_mode=ForwardMode.DECODE,
            batch_size=len(slots),
            req_pool_indices=slots,
            seq_lens=torch.cat([ends, zeros + 1]),
            out_cache_loc=torch.cat([loc, zeros]),
        )
        return self._run(batch, prompts, after, [1] * len(prompts), "forward_decode", padding)

    def put(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        return [tensor.to(self.device) for tensor in tensors]

    def plan(self, batch) -> None:  # type: ignore[no-untyped-def]
        self.backend.init_forward_metadata(batch)

    def plan_for_graph(self, batch) -> None:  # type: ignore[no-untyped-def]
        """As SGLang does where a graph runs the decode steps."""
        if batch.forward_mode.is_decode():
            self.backend.init_forward_metadata_out_graph(batch)
        else:
            self.backend.init_forward_metadata(batch)

    def _run(self, batch, prompts, after, counts, forward, padding=0):  # type: ignore[no-untyped-def]
        starts = 0
        for prompt, end, count in zip(prompts, after.tolist(), counts):
            new = batch.out_cache_loc[starts : starts + count]
            self.req_to_token[prompt.slot, prompt.length : end] = new.int()
            starts += count
        self.plan(batch)
        outputs = []
        for index in range(LAYERS):
            q, k, v = (
                torch.cat(
                    [
                        *(getattr(p, x)[index, p.length : end] for p, end in zip(prompts, after)),
                        torch.zeros(padding, *getattr(prompts[0], x).shape[2:]),
                    ]
                )
                for x in "qkv"
            )
            layer = Layer(index, HEADS, GROUP, DIM)
            rows = (x.flatten(1).to(self.device, self.dtype) for x in (q, k, v))
            out = getattr(self.backend, forward)(*rows, layer, batch)
            assert out.dtype == self.dtype
            assert out.shape == (len(q), HEADS * GROUP * DIM)
            outputs.append(out.unflatten(1, (-1, DIM)).clone())  # the next layer may overwrite it
        for prompt, end in zip(prompts, after.tolist()):
            prompt.length = end
        whole = torch.stack(outputs).cpu()
        return list(whole[:, : whole.shape[1] - padding].split(counts, 1))

    def pages(self, prompt: Prompt) -> torch.Tensor:
        return self.req_to_token[prompt.slot, : prompt.length : PAGE].long() // PAGE

    def cached(self, prompt: Prompt) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [layers, tokens, kv_heads, d] as the pages of a prompt say them."""
        read = read_pages(self.pool, self.pages(prompt)).flatten(2, 3)[:, :, : prompt.length]
        return read[KEYS], read[VALUES]


def dense(prompt: Prompt, start: int, end: int, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of tokens [start, end) in float64: [layers, tokens, q_heads, d]."""
    q = prompt.q[:, start:end].double().transpose(1, 2)
    k, v = (x[:, :end].double().transpose(1, 2).repeat_interleave(GROUP, 1) for x in (k, v))
    mask = torch.ones(end - start, end).tril(start).bool()
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
