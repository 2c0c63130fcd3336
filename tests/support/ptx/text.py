"""PTX as text: kernels, their registers, labels and instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

ENTRY = re.compile(r"\.entry\s+(\w+)\s*\(([^)]*)\)")
PARAMETER = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.\w*?(\d+)\s+(\w+)(?:\[(\d+)\])?")
LABEL = re.compile(r"(\$?\w+):\s*")
INSTRUCTION = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.]*)\s*(.*)")
RANGE = re.compile(r"(%\w+)<(\d+)>")
REGISTER = re.compile(r"%\w+")


@dataclass
class Instruction:
    """One of them: ``@!guard opcode operands``."""

    opcode: list[str]  # split at the dots
    operands: list[str]
    guard: str | None
    negated: bool
    line: int
    text: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}"


@dataclass
class Kernel:
    """An entry: what can be launched."""

    name: str
    parameters: dict[str, tuple[int, int]]  # where each begins, and its bytes
    shared: list[str]  # names of the dynamic shared memory
    registers: dict[str, str] = field(default_factory=dict)  # type of each, by its name
    labels: dict[str, int] = field(default_factory=dict)  # the instruction that follows
    instructions: list[Instruction] = field(default_factory=list)


def split_operands(text: str) -> list[str]:
    """At the commas outside of braces and brackets."""
    parts = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text)
    return [part.strip() for part in parts if part.strip()]


def _parameters(text: str) -> dict[str, tuple[int, int]]:
    """As a struct lays them out."""
    found, offset = {}, 0
    for alignment, bits, name, count in PARAMETER.findall(text):
        size = int(bits) // 8
        align = int(alignment or size)
        offset = -(-offset // align) * align
        found[name] = (offset, size * int(count or 1))
        offset += size * int(count or 1)
    return found


class _Body:
    """Reads the lines of one kernel."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        # Names in an inner scope, which inline assembly opens, and what they are called outside.
        self.scopes: list[dict[str, str]] = []

    def declare(self, line: str) -> None:
        kind, names = re.findall(r"\.reg\s+\.(\w+)\s+(.*);", line)[0]
        for name in split_operands(names):
            found = RANGE.fullmatch(name)
            every = [f"{found[1]}{i}" for i in range(int(found[2]))] if found else [name]
            for register in every:
                if len(self.scopes) > 1:
                    inner = f"{register}_inner{len(self.kernel.registers)}"
                    self.scopes[-1][register] = inner
                    self.kernel.registers[inner] = kind
                else:
                    self.kernel.registers[register] = kind

    def outer_name(self, register: re.Match[str]) -> str:
        for scope in reversed(self.scopes):
            if register[0] in scope:
                return scope[register[0]]
        return register[0]

    def read(self, line: str, number: int) -> bool:
        """False after the last line."""
        if line == "{":
            self.scopes.append({})
        elif line == "}":
            self.scopes.pop()
        elif line.startswith(".reg"):
            self.declare(line)
        elif self.scopes and line and not line.startswith("."):
            if found := LABEL.match(line):
                self.kernel.labels[found[1]] = len(self.kernel.instructions)
                line = line[found.end() :]
            if line:
                self.add(REGISTER.sub(self.outer_name, line.rstrip(";")), number)
        return bool(self.scopes) or not self.kernel.instructions

    def add(self, line: str, number: int) -> None:
        found = INSTRUCTION.fullmatch(line)
        if not found:
            raise ValueError(f"line {number} is no PTX: {line}")
        operands = split_operands(found[4])
        self.kernel.instructions.append(
            Instruction(found[3].split("."), operands, found[2], found[1] == "!", number, line)
        )


def kernels(text: str) -> dict[str, Kernel]:
    """Of a module, by their mangled names."""
    text = re.sub(r"//[^\n]*", "", text)
    shared = re.findall(r"\.extern\s+\.shared[^;]*\s(\w+)\[\];", text)
    found: dict[str, Kernel] = {}
    lines = text.split("\n")
    for entry in ENTRY.finditer(text):
        kernel = found[entry[1]] = Kernel(entry[1], _parameters(entry[2]), shared)
        body = _Body(kernel)
        number = text.count("\n", 0, entry.end())
        while body.read(lines[number].strip() if number else "", number + 1):
            number += 1
    return found
