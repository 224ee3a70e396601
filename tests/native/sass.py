"""What the machine code of a kernel does on every path: whether asynchronous copies and the reads
of what they bring stay on their sides of the barriers.

The emulator runs the C++ and proves nothing about what ptxas makes of it: a wrapper whose asm lacks
a memory clobber, or a barrier that is not one, shows here alone.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

INSTRUCTION = re.compile(
    r"^\s*/\*(?P<at>[0-9a-f]+)\*/\s+(?P<guard>@!?U?P\w+ )?\s*(?P<text>[^;]*\S)\s*;"
)
LABEL = re.compile(r"^(\.L_\w+):")
TARGET = re.compile(r"`\((\.L_\w+)\)")

BLOCK_BARRIER = re.compile(r"BAR\.(SYNC|RED)")
# __syncwarp. Lanes that have not diverged pass by it: sm_80 has BRA.CONV over a call, sm_90 a NOP
# behind BRA.DIV to a WARPSYNC (a shuffle has the same branch before a SHFL, and orders no memory).
WARP_BARRIER = re.compile(r"BAR\.(SYNC|RED)|WARPSYNC|BRA\.CONV|BRA\.DIV .*\[NOP\]")


@dataclass(frozen=True)
class Instruction:
    at: str  # hexadecimal
    text: str
    next: tuple[int, ...]  # which instructions may follow

    @property
    def name(self) -> str:
        return self.text.split()[0]


def instructions(code: str) -> list[Instruction]:
    """A kernel's instructions and its control flow. Calls of the compiler's own functions return;
    calls of labels are jumps."""
    labels: dict[str, int] = {}
    found: list[tuple[str, bool, str]] = []
    for line in code.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(found)
        elif match := INSTRUCTION.match(line):
            found.append((match["at"], match["guard"] is not None, " ".join(match["text"].split())))
    result = []
    for i, (at, guarded, text) in enumerate(found):
        if text.startswith("BRA.DIV") and found[i + 1][2] == "NOP":
            text += " [NOP]"
        name, target = text.split()[0], TARGET.search(text)
        jumps = name.startswith(("BRA", "CALL", "WARPSYNC.COLLECTIVE")) and target is not None
        always = (
            name in ("EXIT", "RET.REL.NODEC")
            or (name == "BRA" and re.match(r"BRA `", text) is not None)
            or (name.startswith("CALL") and jumps)
        )
        following = [] if always and not guarded else [i + 1]
        if jumps and target is not None:
            following.append(labels[target[1]])
        result.append(Instruction(at, text, tuple(n for n in following if n < len(found))))
    return result


def copy_violations(code: str, barrier: re.Pattern[str]) -> Iterator[str]:
    """Paths on which a copy or a read crosses a barrier:

    - a copy (LDGSTS) is not in a group (LDGDEPBAR) when groups are waited for, or at the end;
    - ldmatrix (LDSM) reads behind a wait (DEPBAR) without a barrier, which other threads' copies
      need;
    - a copy begins behind an ldmatrix without a barrier: others may still read what it overwrites.
    """
    program = instructions(code)
    # Of each instruction, what may be true before it.
    before: list[set[str]] = [set() for _ in program]
    queue, seen = [0], {0}
    violations: dict[str, None] = {}
    while queue:
        i = queue.pop()
        instruction, state = program[i], set(before[i])
        name = instruction.name
        if barrier.match(instruction.text):
            state -= {"waited", "read"}
        elif name.startswith("LDGSTS"):
            if "read" in state:
                violations[f"{instruction.at}: a copy follows ldmatrix with no barrier"] = None
            state.add("open")
        elif name == "LDGDEPBAR":
            state.discard("open")
        elif instruction.text.startswith("DEPBAR.LE SB0"):
            if "open" in state:
                violations[f"{instruction.at}: a wait while copies are in no group"] = None
            state.add("waited")
        elif name.startswith("LDSM"):
            if "waited" in state:
                violations[f"{instruction.at}: ldmatrix follows a wait with no barrier"] = None
            state.add("read")
        elif name == "EXIT" and "open" in state:
            violations[f"{instruction.at}: the end while copies are in no group"] = None
        for following in instruction.next:
            if following not in seen or not state <= before[following]:
                seen.add(following)
                before[following] |= state
                queue.append(following)
    yield from violations
