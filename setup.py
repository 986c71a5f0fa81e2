"""The C++/CUDA extension; everything else is described by pyproject.toml.

Environment:
    DPO_KERNELS_BUILD: ``auto`` (the default: the C++ part, and the CUDA part where torch has CUDA and a toolkit is
        there), ``cpu`` (the C++ part alone), ``cuda`` (both, or an error) or ``none`` (a pure Python package).
    DPO_KERNELS_SANITIZE: sanitizers for the C++ part, as after ``-fsanitize=`` (a build for tests, without speed).
    TORCH_CUDA_ARCH_LIST: architectures of the CUDA part; by default sm_80 and sm_90, sm_100 where nvcc knows it, and
        PTX of the last.

Each part is a module of its own on torch's stable ABI and Python's limited API. What was built with one torch and one
Python runs with every torch from ``OLDEST_TORCH`` and every Python from 3.10 on. torch is needed for its headers alone;
``build_backend.py`` names the one that an isolated build gets.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools.command.build_ext import build_ext

MODES = ("auto", "cpu", "cuda", "none")
CSRC = Path("csrc")
OLDEST_SETUPTOOLS = 77  # as pyproject.toml says, which a build without isolation does not enforce
OLDEST_TORCH = (2, 11)
OLDEST_PYTHON = "cp310"
KNOWS_SM_100 = (12, 8)  # the first CUDA whose nvcc does
PURE = "DPO_KERNELS_BUILD=none installs the package without its C++ extension"


def note(text):
    print(f"dpo_kernels: {text}", file=sys.stderr, flush=True)


def version_of(text):
    """Leading numbers of a version; "2.13.0+cpu" gives (2, 13, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+(?:\.\d+)*", text)[0].split("."))


def mode():
    chosen = os.environ.get("DPO_KERNELS_BUILD") or "auto"
    if chosen not in MODES:
        raise SystemExit(f"dpo_kernels: DPO_KERNELS_BUILD={chosen!r}; known: {', '.join(MODES)}")
    return chosen


def find_nvcc():
    """The compiler of the CUDA toolkit: of CUDA_HOME, of the PATH, or where it is installed by itself; else None."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return f"{home}/bin/nvcc"
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def why_no_cuda(torch, nvcc):
    """Why the CUDA part is left out; None where it is built."""
    if mode() == "cpu":
        return "DPO_KERNELS_BUILD=cpu"
    if torch.version.cuda is None and mode() != "cuda":
        return f"torch {torch.__version__} has no CUDA"
    if nvcc is None:
        return "no nvcc was found (CUDA_HOME)"
    try:
        found = nvcc_version(nvcc)
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        return f"{nvcc} does not run ({error})"
    if torch.version.cuda is not None and found[0] != version_of(torch.version.cuda)[0]:
        return f"nvcc is of CUDA {'.'.join(map(str, found))}, torch of CUDA {torch.version.cuda}"
    return None


def nvcc_version(nvcc):
    said = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    return version_of(said.split("release ")[1])


def architectures(nvcc):
    """nvcc's options for TORCH_CUDA_ARCH_LIST, such as "8.0;9.0+PTX"."""
    latest = ";10.0" if nvcc_version(nvcc) >= KNOWS_SM_100 else ""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") or f"8.0;9.0{latest}+PTX"
    options = []
    for entry in re.split(r"[;,\s]+", wanted.strip()):
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", entry)
        if match is None:
            raise SystemExit(f"dpo_kernels: TORCH_CUDA_ARCH_LIST={wanted!r}: {entry!r} is not such as 9.0 or 9.0+PTX")
        number = "".join(match.group(1, 2, 3))
        kinds = [f"sm_{number}", f"compute_{number}"] if match[4] else [f"sm_{number}"]
        options += [f"-gencode=arch=compute_{number},code={kind}" for kind in kinds]
    return options


def libraries_of(nvcc):
    """Folders of the toolkit's libraries."""
    said = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True, check=True)
    home = next(line.partition("TOP=")[2].strip() for line in said.stderr.splitlines() if "TOP=" in line)
    return [f"{home}/lib64", f"{home}/lib", f"{home}/targets/{platform.machine()}-linux/lib"]


def flags(headers):
    """(compiling, linking) the C++ part, with torch's headers in a folder."""
    sanitizers = os.environ.get("DPO_KERNELS_SANITIZE")
    if sys.platform == "win32":
        return ["/O2", "/fp:precise", "/std:c++17"], []
    # Where traps could be seen, loops with exp stay scalar. Threads are torch's, so there is no OpenMP runtime.
    compiling = ["-std=c++17", "-fno-trapping-math", "-fno-math-errno", "-fvisibility=hidden", "-fopenmp-simd", "-Wall"]
    linking = []
    if sanitizers:
        # Python's own flags carry -fwrapv, which hides overflow.
        compiling += ["-O1", "-g", "-fno-omit-frame-pointer", "-fno-wrapv", f"-fsanitize={sanitizers}"]
        compiling += ["-fno-sanitize-recover=undefined"]
        linking += [f"-fsanitize={sanitizers}"]
    else:
        # Neither where the sources lie nor where an isolated build finds torch makes other bytes.
        compiling += ["-O3", "-g0", f"-ffile-prefix-map={headers}=.", f"-ffile-prefix-map={Path.cwd()}=."]
    if sys.platform == "linux":
        linking.append("-Wl,-z,now")  # what a torch lacks is said at the import, not in the middle of a call
    return compiling, linking


def part(name, sources, *libraries):
    """One module. It links libtorch_cpu, whose C functions it calls, without a version."""
    from torch.utils.cpp_extension import CppExtension, include_paths

    compiling, linking = flags(include_paths()[0])
    compilers = {"cxx": compiling}
    paths = [str(CSRC / source) for source in sources]
    made = CppExtension(
        f"dpo_kernels.{name}", paths, extra_compile_args=compilers, extra_link_args=linking, py_limited_api=True
    )
    made.libraries = ["torch_cpu", *libraries]
    return made


def cuda_part(torch):
    """The CUDA module, whose runtime is linked statically; None where it is left out."""
    nvcc = find_nvcc()
    reason = why_no_cuda(torch, nvcc)
    if reason is not None:
        if mode() == "cuda":
            raise SystemExit(f"dpo_kernels: DPO_KERNELS_BUILD=cuda, but {reason}")
        note(f"building the C++ part of the extension, not the CUDA part: {reason}")
        return None
    note(f"building the C++ and CUDA parts of the extension: {' '.join(architectures(nvcc))}")
    sources = ["cuda/module.cpp", "old_system.cpp", "cuda/ops_cuda.cpp"]
    return part("_C_cuda", sources, "cudart_static", "rt", "dl", "pthread")


def add_kernels(module, folder):
    """Compile the kernels, which include no header of torch's, and let a module link them."""
    nvcc, made = find_nvcc(), Path(folder) / "launch.o"
    made.parent.mkdir(parents=True, exist_ok=True)
    options = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "--threads=0", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    source = str(CSRC / "cuda/launch.cu")
    subprocess.run([nvcc, *options, *architectures(nvcc), "-c", source, "-o", str(made)], check=True)
    module.extra_objects = [str(made)]
    module.library_dirs += libraries_of(nvcc)


def without(reason):
    """Arguments of ``setup`` for an environment that cannot build: metadata can be had, and building says why not."""

    class Build(build_ext):
        def run(self):
            raise SystemExit(f"dpo_kernels: the C++ extension cannot be built: {reason}. {PURE}.")

    return {"ext_modules": [setuptools.Extension("dpo_kernels._C", [])], "cmdclass": {"build_ext": Build}}


def extension():
    """Arguments of ``setup`` that build the extension, none where it is not wanted."""
    if mode() == "none":
        note("building without the C++/CUDA extension: DPO_KERNELS_BUILD=none")
        return {}
    from setuptools.command.bdist_wheel import bdist_wheel

    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension
    except ImportError as error:
        how = "pip install torch ninja 'setuptools>=77', or leave out --no-build-isolation"
        return without(f"torch, whose headers it needs, cannot be imported ({error}): {how}")
    if version_of(torch.__version__)[:2] < OLDEST_TORCH:
        return without(f"torch {torch.__version__} is older than {'.'.join(map(str, OLDEST_TORCH))}")

    class Build(BuildExtension):
        """A compiler that fails is one sentence. In a build that did not ask for CUDA its part may fail."""

        def run(self):
            self.force = True  # neither a header that changed nor another torch shows in the dates of the sources
            if self.inplace:  # Python would take a build for one of its versions, as there once were, before these
                for old in Path("dpo_kernels").glob("_C.cpython-*.so"):
                    old.unlink()
            asked = self.compiler  # type: ignore[has-type]
            reason = self.why_not()
            if reason is not None and len(self.extensions) > 1 and mode() == "auto":
                note(f"building the C++ part of the extension alone: the CUDA part does not compile ({reason})")
                del self.extensions[1:]
                self.compiler = asked
                reason = self.why_not()
            if reason is not None:
                raise SystemExit(f"dpo_kernels: the extension does not compile ({reason}). {PURE}.")

        def why_not(self):
            """Build; the first line of what went wrong, if anything did."""
            try:
                for cuda in self.extensions[1:]:
                    add_kernels(cuda, self.build_temp)
                super().run()
            except Exception as error:  # noqa: BLE001 - whatever the compilers' drivers raise
                return (str(error).strip() or type(error).__name__).splitlines()[0]
            return None

    class Wheel(bdist_wheel):
        """A wheel for every Python from the oldest one on."""

        def finalize_options(self):
            if self.distribution.has_ext_modules():
                self.py_limited_api = OLDEST_PYTHON
            super().finalize_options()

    sources = ["ops.cpp", "old_system.cpp", "cpu/ops_cpu.cpp", "cpu/memory.cpp", "cpu/sparse.cpp"]
    sources += ["cpu/products.cpp", "cpu/matmul.cpp", "cpu/linear.cpp"]
    sources += ["cpu/rows_base.cpp", "cpu/rows_avx2.cpp", "cpu/rows_avx512.cpp"]
    sources += ["cpu/packing_base.cpp", "cpu/blocks_avx512.cpp", "cpu/blocks_amx.cpp"]
    cuda = cuda_part(torch)
    modules = [part("_C", sources), *([] if cuda is None else [cuda])]
    return {"ext_modules": modules, "cmdclass": {"build_ext": Build, "bdist_wheel": Wheel}}


def arguments():
    """Arguments of ``setup``."""
    if version_of(setuptools.__version__)[0] < OLDEST_SETUPTOOLS:
        how = f"pip install 'setuptools>={OLDEST_SETUPTOOLS}', or leave out --no-build-isolation"
        raise SystemExit(f"dpo_kernels: setuptools {setuptools.__version__} is older than {OLDEST_SETUPTOOLS}: {how}")
    from setuptools.command.build import build

    class Afresh(build):
        """pip packs the whole folder: what was built from other sources, or for another Python, must not be there."""

        def run(self):
            shutil.rmtree(Path(self.build_lib) / "dpo_kernels", ignore_errors=True)
            super().run()

    chosen = extension()
    return chosen | {"cmdclass": chosen.get("cmdclass", {}) | {"build": Afresh}}


setuptools.setup(**arguments())
