"""No broken hook and no foreign part may end in a dense server that calls itself spherical."""

from __future__ import annotations

import gc
import inspect
import pkgutil
import weakref
from functools import partial
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from seam_tools import load_plugin, parse, write_model
from sglang.srt.layers.radix_attention import RadixAttention
from triton.runtime.errors import OutOfResources

from sglang_spherical import engagement
from sglang_spherical.attention import compile_ahead, kernel_backend
from sglang_spherical.attention import factory as attention
from sglang_spherical.config import SphericalConfig
from sglang_spherical.engagement import Parts, check_parts
from sglang_spherical.errors import EXIT_CODE, StartupError
from sglang_spherical.pool.kv_pool import SphericalKVPool
from spherical_patches import kv_pool, startup
from spherical_patches.ledger import PATCHES, Patch


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def broken(request, monkeypatch):
    """SGLang's own function back in place of one patched target."""
    load_plugin()
    patch: Patch = request.param
    path, name = patch.target.rsplit(".", 1)
    owner = pkgutil.resolve_name(path)
    static = inspect.getattr_static(owner, name)
    original = inspect.unwrap(getattr(static, "__func__", static))
    kind = type(static) if isinstance(static, staticmethod | classmethod) else lambda f: f
    monkeypatch.setattr(owner, name, kind(original))
    return patch


every_hook = pytest.mark.parametrize("broken", PATCHES, indirect=True, ids=lambda p: p.target)


@every_hook
def test_a_missing_hook_stops_the_command_line(broken, model, capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--model-path", model, "--kv-format", "spherical")
    assert stop.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    if broken.target.endswith("add_cli_args"):
        assert "unrecognized arguments: --kv-format spherical" in message
    else:
        assert message.startswith("error: --kv-format spherical: SGLang did not take the hook on")
        assert broken.target in message


@every_hook
def test_a_missing_hook_stops_the_engine(broken, model):
    from sglang.srt.server_args import ServerArgs

    kind = TypeError if broken.target.endswith("ServerArgs.__init__") else StartupError
    with pytest.raises(kind, match=r"kv.format"):
        ServerArgs(model_path=model, kv_format="spherical")


@every_hook
@pytest.mark.parametrize("factory", [kv_pool.build_tree, kv_pool.build_backend])
def test_a_missing_hook_stops_a_worker(broken, factory):
    """The two factories are called by SGLang's registries, whatever became of the hooks."""
    server_args = SimpleNamespace(_spherical=SphericalConfig(kv_format="spherical"))
    with pytest.raises(StartupError, match=broken.target):
        factory(SimpleNamespace(server_args=server_args))


@pytest.mark.parametrize("factory", [kv_pool.build_tree, kv_pool.build_backend])
def test_a_lost_configuration_stops_a_worker(factory):
    with pytest.raises(StartupError, match="works only inside --kv-format spherical"):
        factory(SimpleNamespace(server_args=SimpleNamespace()))


@pytest.mark.parametrize("registry", ["attention", "radix"])
def test_a_plugin_that_registers_nothing_stops_a_worker(registry, monkeypatch):
    """What SGLang does with the names that the launching process has put into the arguments."""
    load_plugin()
    if registry == "attention":
        from sglang.srt.model_executor.model_runner_components import attention_backend_setup

        monkeypatch.delitem(attention_backend_setup.ATTENTION_BACKENDS, "spherical")
        with pytest.raises(ValueError, match="Invalid attention backend: spherical"):
            attention_backend_setup._build_full_attention_backend_from_str(
                model_runner=SimpleNamespace(), backend_str="spherical", init_new_workspace=False
            )
    else:
        from sglang.srt.mem_cache import registry as radix

        monkeypatch.delitem(radix._RADIX_CACHE_REGISTRY, "spherical")
        server_args = SimpleNamespace(radix_cache_backend="spherical")
        with pytest.raises(ValueError, match="'spherical' is not registered"):
            radix.create_tree_cache(SimpleNamespace(server_args=server_args))


def _bare(cls, **attributes):
    part = object.__new__(cls)
    part.__dict__.update(attributes)
    return part


def spherical_parts(tree_class=None) -> Parts:
    """The four parts as verify sees them, built without memory."""
    from sglang_spherical.attention.backend import SphericalAttnBackend
    from sglang_spherical.pool.allocator import SphericalAllocator
    from sglang_spherical.pool.kv_pool import SphericalKVPool
    from sglang_spherical.radix.tree import SphericalRadixCache

    pool = _bare(SphericalKVPool)
    allocator = _bare(SphericalAllocator, _kvcache=pool)
    tree = _bare(tree_class or SphericalRadixCache, token_to_kv_pool_allocator=allocator)
    return Parts(pool, allocator, tree, _bare(SphericalAttnBackend))


def test_spherical_parts_pass():
    check_parts(spherical_parts(), radix_disabled=False)


def test_without_a_radix_cache_sglang_s_chunk_cache_is_the_tree():
    from sglang.srt.mem_cache.chunk_cache import ChunkCache

    check_parts(spherical_parts(ChunkCache), radix_disabled=True)
    with pytest.raises(StartupError, match="radix tree: it is a ChunkCache"):
        check_parts(spherical_parts(ChunkCache), radix_disabled=False)
    with pytest.raises(StartupError, match="radix tree: it is a SphericalRadixCache"):
        check_parts(spherical_parts(), radix_disabled=True)


def _dense_classes():
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
    from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
    from sglang.srt.mem_cache.radix_cache import RadixCache

    return {
        "pool": MHATokenToKVPool,
        "allocator": PagedTokenToKVPoolAllocator,
        "tree": RadixCache,
        "backend": TorchNativeAttnBackend,
    }


@pytest.mark.parametrize("role", ["pool", "allocator", "tree", "backend"])
def test_a_dense_part_is_refused(role):
    dense = _dense_classes()[role]
    parts = Parts(**{**vars(spherical_parts()), role: _bare(dense)})
    with pytest.raises(StartupError, match=f"not in effect: .*it is a {dense.__name__}"):
        check_parts(parts, radix_disabled=False)


def test_parts_of_two_caches_are_refused():
    one, other = spherical_parts(), spherical_parts()
    with pytest.raises(StartupError, match="allocator: it hands out pages of another pool"):
        check_parts(Parts(other.pool, one.allocator, one.tree, one.backend), radix_disabled=False)
    with pytest.raises(StartupError, match="radix tree: it frees into another allocator"):
        check_parts(Parts(one.pool, one.allocator, other.tree, one.backend), radix_disabled=False)


class Ended(BaseException):
    """Stands for the end of a worker's process."""


def _leave(monkeypatch, server_args, message) -> int:
    def end(code):
        raise Ended(code)

    monkeypatch.setattr(startup.os, "_exit", end)
    with pytest.raises(Ended) as ended:
        startup.leave(server_args, StartupError(message))
    return ended.value.args[0]


def _arguments(**attributes):
    config = SphericalConfig(kv_format="spherical")
    return SimpleNamespace(_spherical=config, tp_size=1, dp_size=1, **attributes)


def test_a_worker_s_error_is_printed_once_and_raised_in_the_launching_process(monkeypatch, capsys):
    server_args = _arguments()

    def two_workers_fail(cls, args):
        assert _leave(monkeypatch, args, "too little\nmemory") == EXIT_CODE
        assert _leave(monkeypatch, args, "too little memory, says the other") == EXIT_CODE
        raise RuntimeError("Rank 0 scheduler died")

    with pytest.raises(StartupError, match=r"^too little memory$"):
        startup.launch(two_workers_fail, None, server_args)
    assert capsys.readouterr().err == "error: too little memory\n"


def test_a_command_line_ends_without_saying_it_again(monkeypatch, capsys):
    server_args = _arguments(_spherical_from_command_line=True)

    def worker_fails(cls, args):
        _leave(monkeypatch, args, "too little memory")
        raise RuntimeError("Rank 0 scheduler died")

    with pytest.raises(SystemExit) as stop:
        startup.launch(worker_fails, None, server_args)
    assert stop.value.code == EXIT_CODE
    assert capsys.readouterr().err == "error: too little memory\n"


def test_other_failures_stay_sglang_s():
    def fails(cls, args):
        raise RuntimeError("out of ports")

    with pytest.raises(RuntimeError, match="out of ports"):
        startup.launch(fails, None, _arguments())


def test_a_worker_is_verified_once_built(monkeypatch, capsys):
    def verify(scheduler):
        raise StartupError("not in effect")

    def end(code):
        raise Ended(code)

    monkeypatch.setattr(engagement, "verify", verify)
    monkeypatch.setattr(startup.os, "_exit", end)
    load_plugin()
    built = []
    with pytest.raises(Ended):
        startup.build_scheduler(lambda *args: built.append(args), "self", _arguments(), "ports")
    assert len(built) == 1
    assert capsys.readouterr().err == "error: not in effect\n"


class Rubbish:
    itself: Rubbish


@pytest.fixture
def thawed():
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("thawed")
def test_what_a_worker_starts_with_is_not_collected_again(monkeypatch):
    monkeypatch.setattr(engagement, "verify", lambda scheduler: None)
    load_plugin()
    from sglang.srt.managers.io_struct import FreezeGCReq
    from sglang.srt.managers.scheduler import Scheduler

    rubbish = Rubbish()
    rubbish.itself = rubbish
    gone = weakref.finalize(rubbish, lambda: None)
    del rubbish
    told = []
    scheduler = SimpleNamespace(
        ipc_channels=SimpleNamespace(
            send_to_detokenizer=SimpleNamespace(send_output=lambda *args: told.append(args))
        )
    )
    scheduler.handle_freeze_gc = partial(Scheduler.handle_freeze_gc, scheduler)
    startup.build_scheduler(lambda *args: None, scheduler, _arguments(), "ports")
    assert not gone.alive
    assert gc.get_freeze_count() > 10_000
    assert [type(request) for request in told[0]] == [FreezeGCReq] * 2, "the detokenizer too"


@pytest.mark.usefixtures("thawed")
@pytest.mark.parametrize("from_command_line", [True, False])
def test_a_launching_process_is_frozen_where_it_is_nobody_s_own(from_command_line):
    server_args = _arguments(_spherical_from_command_line=from_command_line)
    assert startup.launch(lambda cls, args: "launched", None, server_args) == "launched"
    assert (gc.get_freeze_count() > 10_000) == from_command_line


@pytest.mark.parametrize(
    ("capability", "head_dim", "page_size", "message"),
    [
        ((7, 5), 128, 64, "need an NVIDIA GPU of compute capability 8.0"),
        ((9, 0), 32, 64, "heads of dimension 32: the GPU kernels .* serve 64, 80, 96, 128, 256"),
        ((9, 0), 80, 32, "--page-size 32 with heads of dimension 80.* use --page-size 64"),
        ((9, 0), 64, 16, "--page-size 16 with heads of dimension 64.* use --page-size 32"),
    ],
)
def test_what_the_kernels_cannot_read_is_refused_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    head_dim: int,
    page_size: int,
    message: str,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    with pytest.raises(StartupError, match=message):
        attention._check_gpu(torch.device("cuda"), head_dim, page_size)


def test_a_gpu_with_too_little_for_the_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_kernels(*_: object) -> None:
        raise OutOfResources(197664, 166912, "shared memory")

    gpu = torch.device("cuda", 0)
    pool = object.__new__(SphericalKVPool)
    pool.arena = SimpleNamespace(device=gpu, layout=SimpleNamespace(head_dim=256, page_size=64))
    monkeypatch.setattr(attention, "_check_gpu", lambda *_: None)
    monkeypatch.setattr(compile_ahead, "compile_kernels", compile_kernels)
    monkeypatch.setattr(kernel_backend, "KernelAttnBackend", lambda *_: MagicMock())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(attention, "_check_layer", lambda *_: None)
    layer = MagicMock(spec=RadixAttention, tp_q_head_num=8)
    model = SimpleNamespace(named_modules=lambda: [("layer", layer)])
    runner = SimpleNamespace(token_to_kv_pool=pool, model=model, dtype=torch.bfloat16)
    with pytest.raises(
        StartupError, match=r"dimension 256: .* than a GPU has .*197664.*--device cpu"
    ):
        attention.build_backend(runner)
