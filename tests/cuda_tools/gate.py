"""The CUDA kernels compiled by nvcc for GPUs that are not here, and held to rules.

``python -m tests.cuda_tools.gate`` (a part of ``make kernels-check``) needs nvcc and no GPU. It prints a line for each
kernel and target, and exits with 1 and the reasons where a rule of ``broken_rules`` is broken. What was measured is
kept with what the gate of the Triton kernels keeps, so that a run without news takes seconds.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from tests.triton_tools.gate import ROOT, _cache_folder, shortened

KERNELS = ROOT / "csrc" / "cuda"
TARGETS = ("sm_80", "sm_90", "sm_100")
FLAGS = ("-O3", "-std=c++17", "--expt-relaxed-constexpr")  # those of the build
REGISTERS = 65536  # of a multiprocessor, on every target
MOST_THREADS = 1024  # of a block, where the kernel does not say
WIDE = 128  # bits of the accesses that a kernel over rows must make
MUST_STORE = ("dlogits_rows", "apply_bias_scale_cap")
MUST_LOAD = ("reduce_rows", *MUST_STORE)


@dataclass(frozen=True)
class Measured:
    """Static facts about one kernel for one target; widths in bits, None where nothing disassembles."""

    name: str
    target: str
    threads: int  # of the largest block
    registers: int  # a thread's
    stack_bytes: int  # a thread's
    spilled_bytes: int  # a thread's, stores and loads
    shared_bytes: int  # a block's
    widest_load: int | None
    widest_store: int | None


def broken_rules(kernel: Measured) -> list[str]:
    """Why a kernel may not be launched; empty where it may."""
    reasons = []
    if kernel.spilled_bytes:
        reasons.append(f"{kernel.spilled_bytes} bytes spilled")
    elif kernel.stack_bytes:
        reasons.append(f"{kernel.stack_bytes} bytes of stack")
    # Two blocks on a multiprocessor, so that one computes while the other waits for memory.
    allowed = REGISTERS // (2 * kernel.threads)
    if kernel.registers > allowed:
        reasons.append(f"{kernel.registers} registers, two blocks of {kernel.threads} threads leave {allowed}")
    base = kernel.name.partition("<")[0]
    for what, widest, named in (
        ("load", kernel.widest_load, MUST_LOAD),
        ("store", kernel.widest_store, MUST_STORE),
    ):
        if base in named and widest is not None and widest < WIDE:
            reasons.append(f"the widest {what} has {widest} bits, not {WIDE}")
    return reasons


# --- tools --------------------------------------------------------------------------------------------------


def find_nvcc() -> str | None:
    """The compiler on the PATH or of ``CUDA_HOME``."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc") or (shutil.which("nvcc", path=str(Path(home, "bin"))) if home else None)


def find_disassembler(nvcc: str) -> str | None:
    """CUDA's nvdisasm, or the one in Triton's wheel."""
    places = [Path(nvcc).resolve().parent]
    spec = importlib.util.find_spec("triton")  # found, not imported
    if spec is not None and spec.submodule_search_locations:
        places += [Path(place, "backends", "nvidia", "bin") for place in spec.submodule_search_locations]
    found = [shutil.which("nvdisasm"), *(shutil.which("nvdisasm", path=str(place)) for place in places)]
    return next((tool for tool in found if tool), None)


def _said_by(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout


def demangled(names: list[str]) -> list[str]:
    """Kernels as ``name<arguments>``, without namespaces and parameters; as they are where nothing demangles."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not names:
        return names
    return [_bare(line) for line in _said_by(tool, *names).splitlines()]


def _bare(signature: str) -> str:
    """``void ns::f<float, ns::T>(int)`` is ``f<float, T>``."""
    signature = signature.replace("(anonymous namespace)::", "")
    signature = re.sub(r"\b\w+::", "", signature).removeprefix("void ")
    return signature.partition("(")[0]


# --- measuring ----------------------------------------------------------------------------------------------


def measure(nvcc: str, disassembler: str | None, source: Path, target: str) -> list[Measured] | str:
    """Every kernel of a file, or why it does not compile."""
    with tempfile.TemporaryDirectory(prefix="cuda-check-") as folder:
        scratch = Path(folder)
        code = f"arch={target.replace('sm', 'compute')},code={target}"
        command = [nvcc, *FLAGS, "-gencode", code, "-Xptxas", "-v", "-keep", "-keep-dir", scratch]
        command += ["-cubin", source, "-o", scratch / "out.cubin"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode != 0:
            return f"does not compile: {shortened(done.stderr + done.stdout)}"
        ptx = (scratch / f"{source.stem}.ptx").read_text(encoding="utf-8")
        sass = None if disassembler is None else _said_by(disassembler, "-c", scratch / "out.cubin")
    return _read(target, done.stderr + done.stdout, ptx, sass)


USED = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
MOST = re.compile(r"\.entry (\w+)\(.*?\)\s*(?:\.maxntid (\d+)(?:, (\d+), (\d+))?)?", re.DOTALL)
ACCESS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?(LDG|STG)\b([.\w]*)", re.MULTILINE)


def _read(target: str, said: str, ptx: str, sass: str | None) -> list[Measured]:
    """What ptxas says, the blocks' sizes from the PTX, and the accesses of the machine code."""
    threads = {name: int(x) * int(y or 1) * int(z or 1) if x else MOST_THREADS for name, x, y, z in MOST.findall(ptx)}
    widths = None if sass is None else _widths(sass)
    found = list(USED.finditer(said))
    names = demangled([use["name"] for use in found])
    measured = []
    for use, name in zip(found, names, strict=True):
        shared = re.search(r"(\d+) bytes smem", use["rest"])
        measured.append(
            Measured(
                name=name,
                target=target,
                threads=threads[use["name"]],
                registers=int(use["registers"]),
                stack_bytes=int(use["stack"]),
                spilled_bytes=int(use["stores"]) + int(use["loads"]),
                shared_bytes=int(shared[1]) if shared else 0,
                widest_load=None if widths is None else widths[use["name"]]["LDG"],
                widest_store=None if widths is None else widths[use["name"]]["STG"],
            )
        )
    return sorted(measured, key=lambda kernel: kernel.name)


def _widths(sass: str) -> dict[str, dict[str, int]]:
    """The widest global load and store of each kernel; 0 where there is none."""
    widest = {}
    _, *sections = re.split(r"^\.text\.(\w+):$", sass, flags=re.MULTILINE)
    for name, body in zip(sections[::2], sections[1::2], strict=True):
        widest[name] = {"LDG": 0, "STG": 0}
        for kind, modifiers in ACCESS.findall(body):
            # LDG.E.128.CONSTANT is 128 bits wide, STG.E.U16 16; a plain LDG.E 32.
            sizes = re.findall(r"\.[US]?(8|16|64|128|256)\b", modifiers)
            widest[name][kind] = max(widest[name][kind], int(sizes[0]) if sizes else 32)
    return widest


# --- what is known already ----------------------------------------------------------------------------------


def measured_or_why(nvcc: str, disassembler: str | None, source: Path, target: str) -> list[Measured] | str:
    """The same as ``measure``, from the cache where nothing has changed."""
    headers = sorted((*source.parent.glob("*.cuh"), *source.parent.glob("*.h"), source, Path(__file__)))
    parts = [source.name, target, *FLAGS, _said_by(nvcc, "--version")]
    parts.append("" if disassembler is None else _said_by(disassembler, "--version"))
    parts += [f"{path.name}\n{path.read_text(encoding='utf-8')}" for path in headers]
    path = _cache_folder() / f"cuda-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()}.json"
    try:
        return [Measured(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except (FileNotFoundError, TypeError, ValueError):  # unknown, or a damaged record
        measured = measure(nvcc, disassembler, source, target)
    if not isinstance(measured, str):
        beside = path.with_suffix(f".{os.getpid()}")
        beside.write_text(json.dumps([asdict(kernel) for kernel in measured]), encoding="utf-8")
        beside.replace(path)
    return measured


# --- the command --------------------------------------------------------------------------------------------

COLUMNS = "{:<8}{:>8}{:>10}{:>7}{:>7}{:>8}{:>6}{:>7}  {:<9}{}"
HEADER = ("target", "threads", "registers", "stack", "spills", "shared", "load", "store", "verdict", "kernel")
assert len(HEADER) == len(fields(Measured)) + 1


def line(kernel: Measured, reasons: list[str]) -> str:
    """A line of the table: stack, spills and shared memory in bytes, the widest accesses in bits."""
    widths = ["-" if width is None else width for width in (kernel.widest_load, kernel.widest_store)]
    cells = [kernel.threads, kernel.registers, kernel.stack_bytes, kernel.spilled_bytes, kernel.shared_bytes, *widths]
    return COLUMNS.format(kernel.target, *cells, "FAIL" if reasons else "ok", kernel.name)


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0 where every rule holds, or where there is no nvcc."""
    parser = argparse.ArgumentParser(prog="python -m tests.cuda_tools.gate", description=__doc__)
    parser.add_argument("--sources", nargs="+", type=Path, help="default: every .cu of csrc/cuda")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), help=f"default: {' '.join(TARGETS)}")
    parser.add_argument("--json", type=Path, help="write the table there as well")
    options = parser.parse_args(arguments)
    nvcc = find_nvcc()
    if nvcc is None:
        print("nvcc is not installed: not checked")
        return 0
    started, disassembler = time.perf_counter(), find_disassembler(nvcc)
    known = _said_by(nvcc, "--list-gpu-code").split()
    refused, table = [], []
    print(COLUMNS.format(*HEADER))
    for target in options.targets:
        if target not in known:
            print(f"{target:<8}skipped: this nvcc does not know it")
            continue
        for source in options.sources or sorted(KERNELS.glob("*.cu")):
            measured = measured_or_why(nvcc, disassembler, source.resolve(), target)
            if isinstance(measured, str):
                refused.append(f"{source.name} on {target}: {measured}")
                continue
            for kernel in measured:
                reasons = broken_rules(kernel)
                print(line(kernel, reasons), flush=True)
                table.append(asdict(kernel) | {"reasons": reasons})
                refused += [f"{kernel.name} on {target}: {'; '.join(reasons)}"] if reasons else []
    print("", *refused, sep="\n")
    if disassembler is None:
        print("nvdisasm is not installed: widths are not checked")
    version = re.search(r"release (\S+),", _said_by(nvcc, "--version"))
    took = time.perf_counter() - started
    print(
        f"nvcc {version[1] if version else '?'}: {len(table)} compiled or known, {len(refused)} refused, {took:.1f} s"
    )
    if options.json:
        options.json.write_text(json.dumps(table, indent=1), encoding="utf-8")
    return 1 if refused or not table else 0


if __name__ == "__main__":
    sys.exit(main())
