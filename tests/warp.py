"""A warp in numpy: runs compiled PTX of one-warp kernels where there is no GPU.

The interpreter runs a kernel's Triton, not what the compiler makes of it: inline PTX, and what it
assumes about where the compiler keeps a tensor's elements, it never sees. Every register is an
array of 32 lanes. Branches are taken by all lanes. Asynchronous copies arrive as late as the
program allows, when it waits for them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

LANES = np.arange(32)
ROW, QUAD = LANES // 4, LANES % 4
Array = np.ndarray[Any, Any]
Values = list[Array]
DTYPES: dict[str, Any] = {
    "f16": np.float16, "f32": np.float32, "b8": np.uint8, "b16": np.uint16, "b32": np.uint32,
    "b64": np.uint64, "u8": np.uint8, "u16": np.uint16, "u32": np.uint32, "u64": np.uint64,
    "s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64,
}  # fmt: skip
RAW: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal,
}  # fmt: skip


def statements(ptx: str) -> list[str]:
    """Statements and labels of the entry function's body, blocks of inline assembly undone."""
    body = ptx[ptx.index("{", ptx.index(".entry")) + 1 :]
    found = []
    for line in re.sub(r"//.*", "", body).splitlines():
        if line.strip().startswith((".loc", ".section", ".file")):
            continue
        for part in re.split(r"(?<=;)|(?<=:)(?=\s*$)", line):
            text = part.strip()
            while text[:1] in ("{", "}"):
                text = text[1:].strip()
            text = text.removesuffix(";").strip()
            if text and not text.startswith((".reg", ".")):
                found.append(text)
    return found


def float_pair(words: Array) -> tuple[Array, Array]:
    halves = np.ascontiguousarray(words).view(np.uint16).view(np.float16).reshape(32, 2)
    return halves[:, 0], halves[:, 1]


def word_of(low: Array, high: Array) -> Array:
    pair = np.stack([low, high], 1).astype(np.float16)
    return pair.view(np.uint32).reshape(32)


class Warp:
    """Memory, and one program of a kernel after the other."""

    def __init__(self, ptx: str, memory: Array, shared_bytes: int) -> None:
        self.code = [self._parse(text) for text in statements(ptx)]
        self.labels = {op: i for i, (_, op, _) in enumerate(self.code) if op.endswith(":")}
        names = re.findall(r"\.param[^,)]*?(\w+_param_\d+)", ptx[: ptx.index("{", ptx.index("("))])
        self.param_names = names
        self.memory, self.shared = memory, np.zeros(shared_bytes, np.uint8)

    @staticmethod
    def _parse(text: str) -> tuple[str, str, list[str]]:
        guard = ""
        if text.startswith("@"):
            guard, text = text.split(None, 1)
        if text.endswith(":"):
            return "", text, []
        op, _, rest = text.partition(" " if " " in text else "\t")
        arguments = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s|]+", rest)
        return guard, op.strip(), arguments

    def run(self, params: list[int], block: tuple[int, int, int]) -> None:
        """One program; `params` are the kernel's arguments, pointers as places in `memory`."""
        self.registers: dict[str, Array] = {}
        self.params = dict(zip(self.param_names, params))
        self.special = {f"%ctaid.{axis}": i for axis, i in zip("xyz", block)}
        self.copies: list[list[tuple[Array, Array, int]]] = [[]]
        self.shared[:] = 0xFF
        at = 0
        with np.errstate(all="ignore"):
            while at < len(self.code):
                guard, op, arguments = self.code[at]
                at += 1
                if op.endswith(":"):
                    continue
                active = np.ones(32, bool)
                if guard:
                    active = self.registers[guard.lstrip("@!")].astype(bool)
                    active = ~active if "!" in guard else active
                if op.startswith("bra"):
                    assert active.all() or not active.any(), "lanes part ways"
                    if active.any():
                        at = self.labels[arguments[0] + ":"]
                elif op == "ret":
                    if active.all():
                        return
                elif active.any():
                    self.step(op, arguments, active)

    # registers

    def get(self, name: str, kind: str) -> Array:
        """The operand's 32 lanes as `kind`."""
        dtype = np.dtype(DTYPES[kind])
        if name in self.registers:
            raw = self.registers[name]
            if raw.dtype.itemsize != dtype.itemsize:
                raw = raw.astype(RAW[dtype.itemsize])
            return raw.view(dtype)
        if name in ("%tid.x", "%laneid"):
            return LANES.astype(dtype)
        if name in self.special:
            return np.full(32, self.special[name], dtype)
        if name.startswith("global_smem"):
            return np.zeros(32, dtype)
        if name.startswith("0f"):
            return np.full(32, int(name[2:], 16), np.uint32).view(dtype)
        bits = int(name.removesuffix("U"), 0) & ((1 << 8 * dtype.itemsize) - 1)
        return np.full(32, bits, RAW[dtype.itemsize]).view(dtype)

    def put(self, name: str, value: Array, active: Array) -> None:
        raw = np.ascontiguousarray(value)
        raw = raw.astype(np.uint8) if raw.dtype == bool else raw.view(RAW[raw.dtype.itemsize])
        if not active.all() and name in self.registers:
            raw = np.where(active, raw, self.registers[name])
        self.registers[name] = raw

    def address(self, text: str) -> Array:
        base, _, offset = text.strip("[] ").partition("+")
        base = base.strip()
        start = self.get(base, "s64" if base.startswith("%rd") else "u32").astype(np.int64)
        return start + int(offset or 0)

    def read(self, space: Array, at: Array, size: int, active: Array) -> Array:
        at = np.where(active, at, 0)
        raw = space[at[:, None] + np.arange(size)]
        return np.ascontiguousarray(raw).view(RAW[size]).reshape(32)

    # instructions

    def step(self, op: str, a: list[str], active: Array) -> None:
        parts = op.split(".")
        name, kind = parts[0], parts[-1]
        if name in ("bar", "griddepcontrol", "fence", "membar", "prefetch"):
            return
        method = getattr(self, "op_" + name, None)
        if method is not None:
            method(parts, a, active)
            return
        if "f16x2" in parts:
            pairs = [float_pair(self.get(x, "b32")) for x in a[1:]]
            wide = [[half.astype(np.float64) for half in pair] for pair in pairs]
            return self.put(a[0], word_of(*(ARITHMETIC[name](*x) for x in zip(*wide))), active)
        kind = "u8" if kind == "pred" else kind
        inputs = [self.get(x, kind) for x in a[1:]]
        if "wide" in parts:  # the third operand is as wide as the result
            wider = kind[0] + str(2 * int(kind[1:]))
            inputs = [x.astype(DTYPES[wider]) for x in inputs[:2]]
            inputs += [self.get(x, wider) for x in a[3:]]
            kind = wider
        if "hi" in parts:
            x, y = (x.astype(DTYPES[kind[0] + "64"]) for x in inputs)
            result = (x * y >> (8 * inputs[0].dtype.itemsize)).astype(DTYPES[kind])
        elif kind in ("f32", "f16"):
            wide = [self.flush(x, parts).astype(np.float64) for x in inputs]
            result = self.flush(ARITHMETIC[name](*wide).astype(DTYPES[kind]), parts)
        else:
            result = ARITHMETIC[name](*inputs).astype(DTYPES[kind])
        self.put(a[0], result, active)

    @staticmethod
    def flush(x: Array, parts: list[str]) -> Array:
        """Zero for subnormal numbers, where the instruction asks for it."""
        if "ftz" not in parts or x.dtype != np.float32:
            return x
        return np.where(np.abs(x) < np.float32(2.0**-126), np.float32(0), x)

    def op_mov(self, parts: list[str], a: list[str], active: Array) -> None:
        if a[0].startswith("{"):  # a word into its halves
            names = [x.strip() for x in a[0].strip("{}").split(",")]
            raw = np.ascontiguousarray(self.get(a[1], parts[-1])).view(np.uint8)
            for x, half in zip(names, np.split(raw.reshape(32, -1), len(names), axis=1)):
                half = np.ascontiguousarray(half)
                self.put(x, half.view(RAW[half.shape[1]]).reshape(32), active)
        elif a[1].startswith("{"):
            names = [x.strip() for x in a[1].strip("{}").split(",")]
            size = np.dtype(DTYPES[parts[-1]]).itemsize // len(names)
            halves = [self.get(x, f"b{8 * size}") for x in names]
            raw = np.stack(halves, 1)
            self.put(a[0], raw.view(DTYPES[parts[-1]]).reshape(32), active)
        else:
            kind = "u8" if parts[-1] == "pred" else parts[-1]
            self.put(a[0], self.get(a[1], kind), active)

    def op_cvt(self, parts: list[str], a: list[str], active: Array) -> None:
        if "f16x2" in parts:
            high, low = (self.get(x, "f32") for x in a[1:])
            return self.put(a[0], word_of(low, high), active)
        target, source = parts[-2:]
        x = self.get(a[1], source)
        if source.startswith("f") and (not target.startswith("f") or "rmi" in parts):
            x = np.floor(x) if "rmi" in parts else np.trunc(x)
        self.put(a[0], x.astype(DTYPES[target]), active)

    def op_lop3(self, parts: list[str], a: list[str], active: Array) -> None:
        inputs, table = [self.get(x, "b32") for x in a[1:4]], int(a[4], 0)
        found = np.zeros(32, np.uint32)
        for row in range(8):  # of the truth table, where the inputs have its bits
            if table >> row & 1:
                bits = [x if row >> (2 - i) & 1 else ~x for i, x in enumerate(inputs)]
                found |= bits[0] & bits[1] & bits[2]
        self.put(a[0], found, active)

    def op_ld(self, parts: list[str], a: list[str], active: Array) -> None:
        size = np.dtype(DTYPES[parts[-1]]).itemsize
        if parts[1] == "param":
            value = self.params[a[1].strip("[] ")]
            return self.put(a[0], np.full(32, value, np.int64).astype(RAW[size]), active)
        space = self.shared if parts[1] == "shared" else self.memory
        for i, name in enumerate(a[0].strip("{}").split(",")):
            value = self.read(space, self.address(a[1]) + i * size, size, active)
            self.put(name.strip(), value, active)

    def op_st(self, parts: list[str], a: list[str], active: Array) -> None:
        size = np.dtype(DTYPES[parts[-1]]).itemsize
        space = self.shared if parts[1] == "shared" else self.memory
        for i, name in enumerate(a[1].strip("{}").split(",")):
            raw = np.ascontiguousarray(self.get(name.strip(), parts[-1])).view(np.uint8)
            at = self.address(a[0])[:, None] + i * size + np.arange(size)
            space[at[active]] = raw.reshape(32, size)[active]

    def op_cp(self, parts: list[str], a: list[str], active: Array) -> None:
        if parts[2] == "commit_group":
            self.copies.append([])
        elif parts[2].startswith("wait"):
            while len(self.copies) - 1 > int(a[0] if a else 0):
                for target, value, size in self.copies.pop(0):
                    self.shared[target[:, None] + np.arange(size)] = value
        else:
            size = int(a[2], 0)
            given = self.get(a[3], "u32") if len(a) > 3 else np.full(32, size)
            at = np.where(active & (given > 0), self.address(a[1]), 0)[:, None] + np.arange(size)
            value = np.where(np.arange(size) < given[:, None], self.memory[at], 0)
            self.copies[-1].append((self.address(a[0])[active], value[active], size))

    def op_setp(self, parts: list[str], a: list[str], active: Array) -> None:
        x, y = (self.get(name, parts[-1]) for name in a[1:3])
        self.put(a[0], COMPARE[parts[1].removesuffix("u")](x, y), active)

    def op_not(self, parts: list[str], a: list[str], active: Array) -> None:
        if parts[-1] == "pred":
            self.put(a[0], ~self.registers[a[1]].astype(bool), active)
        else:
            self.put(a[0], ~self.get(a[1], parts[-1]), active)

    def op_selp(self, parts: list[str], a: list[str], active: Array) -> None:
        chosen = self.registers[a[3]].astype(bool)
        x, y = (self.get(name, parts[-1]) for name in a[1:3])
        self.put(a[0], np.where(chosen, x, y), active)

    def op_prmt(self, parts: list[str], a: list[str], active: Array) -> None:
        raw = [
            np.ascontiguousarray(self.get(x, "b32")).view(np.uint8).reshape(32, 4) for x in a[1:3]
        ]
        table, selector = np.concatenate(raw, 1), self.get(a[3], "u32")
        found = np.zeros((32, 4), np.uint8)
        for i in range(4):
            nibble = selector >> np.uint32(4 * i) & np.uint32(15)
            byte = table[LANES, nibble & 7]
            found[:, i] = np.where(nibble & 8, np.where(byte & 0x80, 0xFF, 0), byte)
        self.put(a[0], found.view(np.uint32).reshape(32), active)

    def op_shfl(self, parts: list[str], a: list[str], active: Array) -> None:
        assert active.all()
        by = self.get(a[-3], "s32")
        source = LANES ^ by if "bfly" in parts else by & 31
        self.put(a[0], self.get(a[-4], "b32")[source], active)

    def op_redux(self, parts: list[str], a: list[str], active: Array) -> None:
        self.put(a[0], np.full(32, self.get(a[1], parts[-1]).max()), active)

    # matrices

    def op_ldmatrix(self, parts: list[str], a: list[str], active: Array) -> None:
        at = self.address(a[1])
        for i, name in enumerate(a[0].strip("{}").split(",")):
            rows = at[8 * i : 8 * i + 8, None] + np.arange(16)
            matrix = np.ascontiguousarray(self.shared[rows]).view(np.uint16)
            self.put(name.strip(), to_lanes(matrix.T if "trans" in parts else matrix), active)

    def op_stmatrix(self, parts: list[str], a: list[str], active: Array) -> None:
        at = self.address(a[0])
        for i, name in enumerate(a[1].strip("{}").split(",")):
            matrix = from_lanes(self.get(name.strip(), "b32"))
            matrix = np.ascontiguousarray(matrix.T if "trans" in parts else matrix)
            rows = at[8 * i : 8 * i + 8, None] + np.arange(16)
            self.shared[rows] = matrix.view(np.uint8)

    def op_movmatrix(self, parts: list[str], a: list[str], active: Array) -> None:
        assert active.all()
        self.put(a[0], to_lanes(from_lanes(self.get(a[1], "b32")).T), active)

    def op_mma(self, parts: list[str], a: list[str], active: Array) -> None:
        assert active.all()
        names = [[x.strip() for x in group.strip("{}").split(",")] for group in a]
        whole = "s8" in parts
        kind, accumulator = (np.int8, "s32") if whole else (np.float16, "f32")
        per_word = 4 if whole else 2
        regs = [
            np.stack([np.ascontiguousarray(self.get(x, "b32")).view(kind) for x in group])
            for group in names[1:3]
        ]
        k = per_word * QUAD[:, None] + np.arange(per_word)
        left, right = np.zeros((16, 8 * per_word)), np.zeros((8 * per_word, 8))
        for i in range(4):
            values = regs[0][i].reshape(32, per_word)
            left[(ROW + 8 * (i % 2))[:, None], k + 4 * per_word * (i // 2)] = values
        for i in range(2):
            right[k + 4 * per_word * i, ROW[:, None]] = regs[1][i].reshape(32, per_word)
        product = left @ right
        for i, (target, start) in enumerate(zip(names[0], names[3])):
            sums = product[ROW + 8 * (i // 2), 2 * QUAD + i % 2]
            sums = sums + self.get(start, accumulator)
            self.put(target, sums.astype(DTYPES[accumulator]), active)


def to_lanes(matrix: Array) -> Array:
    """8 x 8 of 16 bits -> a word of every lane."""
    return np.ascontiguousarray(matrix).view(np.uint32).reshape(32)


def from_lanes(words: Array) -> Array:
    return np.ascontiguousarray(words).view(np.uint16).reshape(8, 8)


def extract(x: Array, start: Array, length: Array) -> Array:
    """Bits of x, whose top one is the sign's where x has a sign."""
    up = (32 - start.astype(np.int64) - length.astype(np.int64)).astype(np.uint32)
    moved = (x.view(np.uint32) << up).view(x.dtype)
    return moved >> (32 - length.astype(np.int64)).astype(x.dtype)


def shift_left(x: Array, by: Array) -> Array:
    wide = by.astype(np.int64)
    return np.where(wide < 8 * x.dtype.itemsize, x << (wide & 63).astype(x.dtype), 0).astype(
        x.dtype
    )


def shift_right(x: Array, by: Array) -> Array:
    most = 8 * x.dtype.itemsize - 1
    wide = by.astype(np.int64) & 0xFFFFFFFF
    signed = np.issubdtype(x.dtype, np.signedinteger)
    moved = x >> np.minimum(wide, most).astype(x.dtype)
    return moved if signed else np.where(wide > most, 0, moved).astype(x.dtype)


def funnel(low: Array, high: Array, by: Array) -> Array:
    wide = high.astype(np.uint64) << np.uint64(32) | low.astype(np.uint64)
    return (wide << (by & 31).astype(np.uint64) >> np.uint64(32)).astype(np.uint32)


ARITHMETIC: dict[str, Callable[..., Array]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "max": np.fmax, "min": np.fmin,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "neg": np.negative,
    "abs": np.abs, "fma": lambda x, y, z: x * y + z, "mad": lambda x, y, z: x * y + z,
    "div": np.divide, "ex2": np.exp2, "lg2": np.log2, "rcp": np.reciprocal, "shl": shift_left,
    "shr": shift_right, "bfe": extract, "shf": funnel,
}  # fmt: skip
