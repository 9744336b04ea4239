"""Gluon kernels in plain PyTorch, on a CPU: what they compute, not in which lanes.

Every role of a program is a thread of Python, barriers are Condition objects. Threads pause at
random where they meet, so that each is at times far ahead of the others. Asynchronous products are
worked out when they are waited for, at the latest moment that the hardware may read their operands.
Shared memory starts as NaN. Layouts are ignored: a reinterpreted buffer is taken to be the same
bytes in row-major order.

It runs what the source says, which is not always what Triton makes of it (loop_carries.py).
"""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

TIMEOUT = 60.0  # seconds, of a wait
PAUSES = 0.1, 0.01  # how many of the meetings a thread comes late to, and at most by how much


class Value:
    """A tensor or a scalar of a kernel."""

    def __init__(self, data: Any) -> None:
        self.t = data if isinstance(data, torch.Tensor) else torch.tensor(data)

    @property
    def shape(self) -> list[int]:
        return list(self.t.shape)

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Value:
        return Value(self.t.contiguous().view(dtype) if bitcast else self.t.to(dtype))

    def __getitem__(self, index: Any) -> Value:
        return Value(self.t[index])

    def __index__(self) -> int:
        return int(self.t)

    def __bool__(self) -> bool:
        return bool(self.t)

    def __neg__(self) -> Value:
        return Value(-self.t)


def raw(value: Any) -> Any:
    return value.t if isinstance(value, Value) else value


def _operator(name: str) -> Callable[[Value, Any], Any]:
    def apply(self: Value, other: Any) -> Any:
        if isinstance(other, Pointer):
            return NotImplemented
        other = raw(other)
        if isinstance(other, float) and not self.t.is_floating_point():
            other = torch.tensor(other, dtype=torch.float32)
        return Value(getattr(self.t, name)(other))

    return apply


_NAMES = """
add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv mod lshift
rshift and or xor rand ror lt le gt ge eq ne
"""
for _name in _NAMES.split():
    setattr(Value, f"__{_name}__", _operator(f"__{_name}__"))


class Pointer:
    """Elements of a flat tensor at some places."""

    def __init__(self, data: torch.Tensor, at: Any = 0) -> None:
        self.data, self.at = data, at

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.data, self.at + raw(other))

    def to(self, dtype: torch.dtype, bitcast: bool) -> Pointer:
        assert bitcast and isinstance(self.at, int)
        return Pointer(self.data.view(dtype), self.at)


class Shared:
    """A buffer in shared memory."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data

    def index(self, i: Any) -> Shared:
        return Shared(self.data[int(i)])

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.data.permute(order))

    def _reinterpret(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
        return Shared(self.data.view(dtype).view(shape))

    def load(self, layout: Any) -> Value:
        return Value(self.data.clone())

    def store(self, value: Value) -> None:
        assert self.data.dtype == value.t.dtype, (self.data.dtype, value.t.dtype)
        self.data.copy_(value.t.expand(self.data.shape))


class Barrier:
    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.count = self.pending = self.phase = 0


class Barriers:
    """Buffers of barriers; those of one program are in `of_one`."""

    def __init__(self, n: int) -> None:
        self.all = [Barrier() for _ in range(n)]

    def index(self, i: Any) -> Barrier:
        return self.all[int(i)]


def init(barrier: Barrier, count: int) -> None:
    barrier.count = barrier.pending = count


def pause() -> None:
    often, seconds = PAUSES
    if random.random() < often:
        time.sleep(seconds * random.random())


def arrive(barrier: Barrier, count: int = 1) -> None:
    pause()
    with barrier.condition:
        barrier.pending -= count
        assert barrier.pending >= 0, "more arrivals than a phase has"
        if barrier.pending == 0:
            barrier.pending, barrier.phase = barrier.count, barrier.phase + 1
            barrier.condition.notify_all()


def wait(barrier: Barrier, phase: Any) -> None:
    """Until the phase of this parity has ended."""
    pause()
    parity = int(phase)
    with barrier.condition:
        done = barrier.condition.wait_for(lambda: barrier.phase & 1 != parity, TIMEOUT)
    assert done, "waits forever"


class Product:
    def __init__(self, a: Any, b: Shared, acc: Any, use_acc: bool) -> None:
        self.a, self.b, self.acc, self.use_acc = a, b, acc, use_acc

    def value(self) -> Value:
        a = self.a.data if isinstance(self.a, Shared) else self.a.t
        assert a.dtype == self.b.data.dtype == torch.float16
        out = a.float() @ self.b.data.float()
        return Value(out + resolved(self.acc).t if self.use_acc else out)


def resolved(value: Any) -> Value:
    return value.value() if isinstance(value, Product) else value


def warpgroup_mma(
    a: Any, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool = False
) -> Any:
    product = Product(a, b, acc, use_acc)
    return product if is_async else product.value()


def warpgroup_mma_wait(num_outstanding: int = 0, deps: list[Any] | None = None) -> Any:
    assert deps is not None
    found = tuple(resolved(value) for value in deps)
    return found[0] if len(found) == 1 else found


def run_roles(functions_and_args: list[tuple[Any, tuple[Any, ...]]], warps: list[int]) -> None:
    errors: list[BaseException] = []

    def work(function: Any, args: tuple[Any, ...]) -> None:
        try:
            function(*args)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in functions_and_args]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def assembled(asm: str, constraints: str, args: list[Value], dtype: Any, pure: bool, pack: int):
    """The few PTX instructions that these kernels contain, on whole tensors."""
    outputs = len(dtype) if isinstance(dtype, tuple) else 1
    tensors = torch.broadcast_tensors(*(arg.t for arg in args))
    registers: dict[str, torch.Tensor] = {
        f"${outputs + i}": tensor for i, tensor in enumerate(tensors)
    }

    def get(name: str) -> Any:
        return int(name) if re.fullmatch(r"-?\d+", name) else registers[name]

    def half(name: str) -> torch.Tensor:
        value = get(name)
        if isinstance(value, int):
            value = torch.full_like(tensors[0], value)
        return value.contiguous().view(torch.float16).double()

    def packed(value: torch.Tensor) -> torch.Tensor:
        return value.half().view(torch.int32)

    for line in re.sub(r"\.reg[^;]*;", "", asm.strip().strip("{}")).split(";"):
        line = line.strip()
        if not line:
            continue
        op, rest = line.split(None, 1)
        names = [name.strip() for name in re.findall(r"\{[^}]*\}|[^,{}]+", rest) if name.strip()]
        to, sources = names[0], names[1:]
        if op == "mov.b32" and to.startswith("{"):
            pair = get(sources[0]).contiguous().view(torch.int16).unflatten(-1, (-1, 2))
            for i, name in enumerate(to.strip("{}").split(",")):
                registers[name.strip()] = pair[..., i].contiguous()
        elif op == "mov.b32" and sources[0].startswith("{"):
            low, high = (registers[n.strip()] for n in sources[0].strip("{}").split(","))
            registers[to] = torch.stack([low, high], -1).view(torch.int32).squeeze(-1)
        elif op == "mov.b32":
            value = get(sources[0])
            if isinstance(value, int):
                value = torch.full_like(tensors[0], value)
            registers[to] = value
        elif op in ("shr.b32", "shl.b32"):
            value = get(sources[0]).long() & 0xFFFFFFFF
            n = int(sources[1])
            value = value >> n if op == "shr.b32" else value << n
            registers[to] = value.int() if value.max() < 2**31 else wrapped(value)
        elif op == "and.b32":
            registers[to] = wrapped((get(sources[0]).long() & 0xFFFFFFFF) & get(sources[1]))
        elif op == "or.b32":
            registers[to] = get(sources[0]) | get(sources[1])
        elif op == "fma.rn.f16x2":
            registers[to] = packed(half(sources[0]) * half(sources[1]) + half(sources[2]))
        elif op == "mul.rn.f16x2":
            registers[to] = packed(half(sources[0]) * half(sources[1]))
        elif op == "cvt.rn.f16x2.f32":
            low, high = get(sources[1]).half(), get(sources[0]).half()
            registers[to] = torch.stack([low, high], -1).view(torch.int32).squeeze(-1)
        elif op == "cvt.f32.f16":
            registers[to] = get(sources[0]).view(torch.float16).float()
        elif op == "cvt.rn.f16.f32":
            registers[to] = get(sources[0]).half().view(torch.int16)
        elif op == "mul.rn.f32":
            registers[to] = get(sources[0]) * get(sources[1])
        elif op == "sub.rn.f32":
            registers[to] = get(sources[0]) - get(sources[1])
        elif op == "lg2.approx.ftz.f32":
            registers[to] = get(sources[0]).log2()
        else:
            raise NotImplementedError(line)
    found = tuple(Value(registers[f"${i}"]) for i in range(outputs))
    return found if isinstance(dtype, tuple) else found[0]


def wrapped(value: torch.Tensor) -> torch.Tensor:
    value = value & 0xFFFFFFFF
    return torch.where(value >= 2**31, value - 2**32, value).int()


def load(pointer: Pointer, mask: Any = None, other: Any = None) -> Value:
    at = torch.as_tensor(pointer.at)
    if mask is None:
        return Value(pointer.data[at])
    mask, at = torch.broadcast_tensors(torch.as_tensor(raw(mask)), at)
    found = pointer.data[torch.where(mask, at, 0)]
    return Value(torch.where(mask, found, torch.tensor(other, dtype=found.dtype)))


def store(pointer: Pointer, value: Value) -> None:
    pointer.data[torch.as_tensor(pointer.at)] = value.t


def full(shape: list[int], value: Any, dtype: torch.dtype, layout: Any = None) -> Value:
    value = raw(value)
    number = value.item() if isinstance(value, torch.Tensor) else value
    return Value(torch.full(shape, number, dtype=dtype))


def allocate(dtype: torch.dtype, shape: list[int], layout: Any) -> Any:
    if dtype == torch.int64:
        return Barriers(shape[0])
    return Shared(torch.full(shape, torch.nan, dtype=dtype))


def two(function: Any) -> Any:
    def apply(a: Any, b: Any) -> Value:
        return Value(function(torch.as_tensor(raw(a)), torch.as_tensor(raw(b))))

    return apply


def broadcast(a: Value, b: Value) -> tuple[Value, Value]:
    first, second = torch.broadcast_tensors(a.t, b.t)
    return Value(first), Value(second)


def where(condition: Any, a: Any, b: Any) -> Value:
    values = [raw(x) for x in (a, b)]
    dtype = next((x.dtype for x in values if isinstance(x, torch.Tensor)), None)
    values = [torch.as_tensor(x, dtype=dtype) for x in values]
    return Value(torch.where(torch.as_tensor(raw(condition)), *values))


def static_assert(condition: bool, message: str = "") -> None:
    assert condition, message


class Any_:
    """A layout."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass


def language(program: tuple[int, int], programs: tuple[int, int]) -> SimpleNamespace:
    """What stands for `gl` in one program."""
    return SimpleNamespace(
        program_id=lambda axis: Value(program[axis]), num_programs=lambda axis: programs[axis],
        load=load, store=store, where=where, full=full, broadcast=broadcast,
        arange=lambda a, b, layout=None: Value(torch.arange(a, b, dtype=torch.int32)),
        zeros=lambda shape, dtype, layout=None: Value(torch.zeros(shape, dtype=dtype)),
        zeros_like=lambda x: Value(torch.zeros_like(x.t)),
        full_like=lambda x, v, dtype=None: Value(torch.full_like(x.t, v, dtype=dtype)),
        minimum=two(torch.minimum), maximum=two(torch.maximum),
        max=lambda x, axis: Value(x.t.amax(axis)), sum=lambda x, axis: Value(x.t.sum(axis)),
        exp2=lambda x: Value(torch.exp2(raw(x))), log2=lambda x: Value(torch.log2(raw(x))),
        join=lambda a, b: Value(torch.stack([a.t, b.t], -1)),
        reshape=lambda x, shape: Value(x.t.reshape(shape)),
        convert_layout=lambda x, layout: x, multiple_of=lambda x, n: x,
        static_range=range, thread_barrier=lambda: None,
        static_assert=static_assert, inline_asm_elementwise=assembled,
        allocate_shared_memory=allocate, constexpr=lambda x: x, pointer_type=lambda x: x,
        float16=torch.float16, float32=torch.float32, int16=torch.int16, int32=torch.int32,
        int64=torch.int64, SliceLayout=Any_, BlockedLayout=Any_, DotOperandLayout=Any_,
        NVMMADistributedLayout=Any_, NVMMASharedLayout=Any_, SwizzledSharedLayout=Any_,
        DistributedLinearLayout=Any_,
    )  # fmt: skip


BARRIERS = SimpleNamespace(init=init, arrive=arrive, wait=wait, MBarrierLayout=Any_)


def emulate(
    modules: list[ModuleType], kernel: Any, grid: tuple[int, ...], args: list[Any],
    constants: dict[str, Any],
) -> None:  # fmt: skip
    """Runs a kernel of Gluon functions that lie in `modules`; tensors among `args` are pointers."""
    plain: dict[str, dict[str, Any]] = {module.__name__: {} for module in modules}
    for module in modules:
        for name, value in vars(module).items():
            inner = getattr(value, "fn", None)
            if inner is not None and hasattr(value, "is_gluon"):
                plain[module.__name__][name] = inner
            elif type(value).__name__ == "constexpr":
                plain[module.__name__][name] = value.value
    saved = [dict(vars(module)) for module in modules]
    try:
        for head in range(grid[1]):
            for item in range(grid[0]):
                gl = language((item, head), (grid[0], grid[1]))
                for module in modules:
                    vars(module).update(plain[module.__name__])
                    for name, stand_in in {
                        "gl": gl, "mbarrier": BARRIERS, "fence_async_shared": lambda: None,
                        "warpgroup_mma": warpgroup_mma, "warpgroup_mma_wait": warpgroup_mma_wait,
                        "run_roles": run_roles,
                    }.items():  # fmt: skip
                        if name in vars(module):
                            setattr(module, name, stand_in)
                given = [Pointer(a.view(-1)) if isinstance(a, torch.Tensor) else a for a in args]
                kernel.fn(*given, **constants)
    finally:
        for module, before in zip(modules, saved):
            vars(module).clear()
            vars(module).update(before)
