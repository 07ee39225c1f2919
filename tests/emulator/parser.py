"""PTX text as data: entry functions, their parameters, shared variables and instructions.

Written from "Parallel Thread Execution ISA", NVIDIA. Names inside `{ ... }` are local to it, so
they get a suffix; `.loc` lines give every instruction its place in the source.
"""

from __future__ import annotations

import bisect
import dataclasses
import re
import struct


@dataclasses.dataclass(frozen=True)
class Register:
    name: str
    negated: bool = False  # of a predicate: !%p


@dataclasses.dataclass(frozen=True)
class Immediate:
    value: int  # integers as they are, floats by their bits
    float_bits: int = 0  # 32 or 64 for 0f... and 0d..., else 0


@dataclasses.dataclass(frozen=True)
class Name:
    """A variable, a label, a special register such as %tid.x, or `_`."""

    name: str


@dataclasses.dataclass(frozen=True)
class Vector:
    items: tuple


@dataclasses.dataclass(frozen=True)
class Address:
    """[base + offset], or [base, {coordinates}] of a tensor."""

    base: Register | Name | Immediate
    offset: int = 0
    coordinates: tuple = ()


@dataclasses.dataclass(frozen=True)
class Pair:
    """d|p: two results of one instruction."""

    first: Register | Name
    second: Register | Name


@dataclasses.dataclass
class Instruction:
    op: str  # with all its modifiers
    operands: list
    guard: Register | None
    line: int  # in the PTX
    source: str  # file:line of the kernel's source
    text: str
    index: int = 0
    used: int | None = None  # leading bytes of a load's result that are used, where it is said

    def __post_init__(self):
        self.parts = tuple(self.op.replace("::", "__").split("."))
        self.base = self.parts[0]

    def has(self, modifier: str) -> bool:
        return modifier.replace("::", "__") in self.parts

    @property
    def type(self) -> str:
        return self.parts[-1]

    def __str__(self) -> str:
        place = f" ({self.source})" if self.source else ""
        return f"line {self.line}: {self.text}{place}"


@dataclasses.dataclass(frozen=True)
class Variable:
    """A parameter or a variable: bytes, alignment, and type of an element."""

    name: str
    size: int
    align: int
    type: str


@dataclasses.dataclass
class Kernel:
    name: str
    target: str
    params: list[Variable]
    registers: dict[str, str]  # name -> type
    shared: list[Variable]
    instructions: list[Instruction]
    labels: dict[str, int]  # -> index of the instruction that follows
    tables: dict[str, list[str]]  # .branchtargets
    threads: int | None


SIZES = {
    "pred": 1, "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2,
    "b32": 4, "u32": 4, "s32": 4, "f32": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8,
    "f16x2": 4, "bf16x2": 4, "tf32": 4, "s16x2": 4, "u16x2": 4, "b128": 16,
}  # fmt: skip
_LOC = re.compile(r"\.loc[ \t][^\n]*?(?://[ \t]*([\w./<>-]+:\d+):\d+[^\n]*)?\n")
_ENTRY = re.compile(r"(?:\.visible\s+)?\.entry\s+(\S+?)\s*\((.*?)\)(.*?)\{", re.S)


class Unreadable(ValueError):
    pass


def parse(text: str) -> dict[str, Kernel]:
    """The entry functions of a module, by name."""
    target = re.search(r"\.target\s+(\w+)", text)[1]
    kernels = {}
    module_shared = _shared_variables(text[: _first_entry(text)])
    for entry in _ENTRY.finditer(text):
        end = _closing(text, entry.end())
        first_line = text.count("\n", 0, entry.end()) + 1
        kernel = _parse_body(entry[1], target, text[entry.end() : end], first_line)
        kernel.params = [_variable(p) for p in entry[2].split(",") if p.strip()]
        threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", entry[3])
        kernel.threads = int(threads[1]) if threads else None
        kernel.shared = module_shared + kernel.shared
        kernels[entry[1]] = kernel
    return kernels


@dataclasses.dataclass
class _Scopes:
    """Names as they are unique in the whole body. `declared` is the text of its registers."""

    scopes: list[dict[str, str]]
    registers: dict[str, str]
    declared: str = ""

    def __call__(self, word: str) -> str:
        return next((names[word] for names in reversed(self.scopes) if word in names), word)


def _first_entry(text: str) -> int:
    match = _ENTRY.search(text)
    return match.start() if match else len(text)


def _closing(text: str, start: int) -> int:
    depth = 1
    for match in re.finditer(r"//[^\n]*|[{}]", text[start:]):
        if match[0] == "{":
            depth += 1
        elif match[0] == "}":
            depth -= 1
        if depth == 0:
            return start + match.start()
    raise Unreadable("a body without its closing brace")


def _variable(text: str) -> Variable:
    """`.param .align 64 .b8 name[128]`, `.shared .align 4 .u32 name`."""
    words = re.findall(r"[.\w$]+|\[\d*\]", text)
    align = int(words[words.index(".align") + 1]) if ".align" in words else 0
    kind = next(w[1:] for w in words if w[1:] in SIZES)
    dims = [w for w in words if w.startswith("[")]
    names = [w for w in words if not w.startswith((".", "[")) and not w.isdigit()]
    count = 1
    for dim in dims:
        count *= int(dim[1:-1] or 0)
    if ".param" in words:
        align = align if dims else SIZES[kind]
    return Variable(names[-1], SIZES[kind] * count, align or SIZES[kind], kind)


def _shared_variables(text: str) -> list[Variable]:
    found = re.findall(r"(?:\.extern\s+)?\.shared\s[^;]*;", re.sub(r"//[^\n]*", "", text))
    return [_variable(v.rstrip(";")) for v in found]


def _parse_body(name: str, target: str, body: str, first_line: int) -> Kernel:
    kernel = Kernel(name, target, [], {}, [], [], {}, {}, None)
    source = ""
    scopes: list[dict[str, str]] = []
    position, count = 0, 0
    spaces = re.compile(r"(?:\s+|//[^\n]*|/\*.*?\*/)+", re.S)
    label = re.compile(r"([\w$%]+)\s*:(?!:)")
    table = re.compile(r"\.branchtargets\s+([^;]*);")
    waiting_table = None
    used_bytes = re.compile(r'\.pragma\s+"used_bytes_mask (0x[0-9a-f]+)";')
    used = None

    local = _Scopes(scopes, kernel.registers)

    newlines = [match.start() for match in re.finditer("\n", body)]

    def line() -> int:
        return first_line + bisect.bisect(newlines, position - 1)

    while position < len(body):
        if space := spaces.match(body, position):
            position = space.end()
            continue
        if loc := _LOC.match(body, position):
            source = loc[1] or source
            position = loc.end()
            continue
        if mask := used_bytes.match(body, position):  # LLVM widens a load, and says by how much
            used = int(mask[1], 16).bit_length()
            position = mask.end()
            continue
        if body.startswith((".file", ".section", ".pragma"), position):
            position = min(x for x in (body.find("\n", position), len(body)) if x >= 0)
            continue
        if body[position] == "{":
            count += 1
            scopes.append(_scope_names(body, position + 1, f"@{count}"))
            position += 1
            continue
        if body[position] == "}":
            scopes.pop()
            position += 1
            continue
        if at := label.match(body, position):
            kernel.labels[local(at[1])] = len(kernel.instructions)
            waiting_table = at[1]
            position = at.end()
            continue
        if targets := table.match(body, position):
            kernel.tables[waiting_table] = [x.strip() for x in targets[1].split(",")]
            position = targets.end()
            continue
        end = body.index(";", position)
        statement = " ".join(body[position:end].split())
        if statement.startswith(".reg"):
            _declare(statement, kernel.registers, local)
            if not scopes:
                local.declared += statement
        elif ".shared" in statement.split(" ")[0:2]:
            kernel.shared.append(_variable(statement))
        elif statement.startswith(".local") or statement.startswith(".param"):
            raise NotImplementedError(f"line {line()}: {statement}")
        elif statement:
            instruction = _instruction(statement, line(), source, local)
            instruction.used, used = used, None
            kernel.instructions.append(instruction)
        position = end + 1
    for index, instruction in enumerate(kernel.instructions):
        instruction.index = index
    return kernel


def _scope_names(body: str, start: int, suffix: str) -> dict[str, str]:
    """Registers and labels that a nested scope declares, with their names for the whole body."""
    inside = body[start : _closing(body, start)]
    inside = re.sub(r"//[^\n]*", "", inside)
    names = {}
    for declared in re.findall(r"\.reg\s+\.\w+\s+([^;]+);", inside):
        names |= {x.strip(): x.strip() + suffix for x in declared.split(",")}
    for declared in re.findall(r"^\s*([A-Za-z_]\w*)\s*:", inside, re.M):
        names[declared] = declared + suffix
    return names


def _declare(statement: str, registers: dict[str, str], local) -> None:
    """`.reg .b32 %r<10>;` or `.reg .pred complete;`"""
    _, kind, names = statement.split(" ", 2)
    for name in names.split(","):
        name = name.strip()
        if many := re.fullmatch(r"(%\w+)<(\d+)>", name):
            registers |= {f"{many[1]}{n}": kind[1:] for n in range(int(many[2]))}
        else:
            registers[local(name)] = kind[1:]


_TOKEN = re.compile(
    r"\{|\}|\[|\]|,|\||!|\+|-?0[fF][0-9a-fA-F]{8}|-?0[dD][0-9a-fA-F]{16}|"
    r"-?0x[0-9a-fA-F]+U?|-?\d+U?|[%$\w.]+"
)


_GUARD = re.compile(r"@(!?)\s*([%\w]+)\s+(.*)")


_KNOWN: dict[tuple[str, str], tuple] = {}


def _instruction(statement: str, line: int, source: str, local) -> Instruction:
    """The same text among the same registers, as in a kernel with a planted fault, is read once."""
    key = statement, local.declared
    parts = None if local.scopes else _KNOWN.get(key)
    if parts is None:
        parts = _read(statement, line, local)
        if not local.scopes:
            _KNOWN[key] = parts
    op, operands, guard = parts
    return Instruction(op, operands, guard, line, source, statement)


def _read(statement: str, line: int, local) -> tuple[str, list, Register | None]:
    """Opcode, operands and guard of a statement."""
    guard, rest = None, statement
    if match := _GUARD.match(statement):
        guard, rest = Register(local(match[2]), bool(match[1])), match[3]
    op, _, tail = rest.partition(" ")
    tokens = _TOKEN.findall(tail)
    operands, position = [], 0
    while position < len(tokens):
        operand, position = _operand(tokens, position, local)
        operands.append(operand)
        if position < len(tokens):
            if tokens[position] != ",":
                raise Unreadable(f"line {line}: cannot read {statement}")
            position += 1
    return op, operands, guard


def _operand(tokens: list[str], at: int, local):
    token = tokens[at]
    if token == "{":
        items, at = [], at + 1
        while tokens[at] != "}":
            item, at = _operand(tokens, at, local)
            items.append(item)
            if tokens[at] == ",":
                at += 1
        return Vector(tuple(items)), at + 1
    if token == "[":
        base, at = _operand(tokens, at + 1, local)
        offset, coordinates = 0, ()
        while tokens[at] != "]":
            if tokens[at] == "+":
                offset, at = offset + _integer(tokens[at + 1]), at + 2
            elif tokens[at] == ",":
                inner, at = _operand(tokens, at + 1, local)
                coordinates = inner.items
            else:  # [%r1-16]
                offset, at = offset + _integer(tokens[at]), at + 1
        return Address(base, offset, coordinates), at + 1
    if token == "!":
        inner, at = _operand(tokens, at + 1, local)
        return Register(inner.name, True), at
    value = _atom(token, local)
    if at + 1 < len(tokens) and tokens[at + 1] == "|":
        return Pair(value, _atom(tokens[at + 2], local)), at + 3
    return value, at + 1


def _integer(token: str) -> int:
    return int(token.rstrip("U"), 0)


_NUMBER = re.compile(r"-?(?:0([fF][0-9a-fA-F]{8}|[dD][0-9a-fA-F]{16})|(?:0x[0-9a-fA-F]+|\d+)U?)")


def _atom(token: str, local):
    if token[0] in "-0123456789" and (number := _NUMBER.fullmatch(token)):
        if bits := number[1]:
            return Immediate(int(bits[1:], 16), 4 * len(bits) - 4)
        return Immediate(_integer(token))
    name = local(token)
    return Register(name) if name in local.registers else Name(name)


def float_of(immediate: Immediate) -> float:
    form, bits = ("<f", "<I") if immediate.float_bits == 32 else ("<d", "<Q")
    return struct.unpack(form, struct.pack(bits, immediate.value))[0]
