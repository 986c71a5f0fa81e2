"""The C++/CUDA extension; everything else is described by pyproject.toml.

Environment:
    DPO_KERNELS_BUILD: ``auto`` (the default: what can be built is built, and the reason is printed where something
        cannot), ``cpu`` or ``cuda`` (not getting it is an error), ``none`` (a pure Python package).
    DPO_KERNELS_SANITIZE: sanitizers for the C++ part, as after ``-fsanitize=`` (a build for tests, without speed).
    TORCH_CUDA_ARCH_LIST: architectures of the CUDA part; by default sm_80 and sm_90, sm_100 where nvcc knows it, and
        PTX of the last.

torch must be importable: ``pip install --no-build-isolation .``. Whether a GPU is visible decides nothing.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools import setup

MODES = ("auto", "cpu", "cuda", "none")
CSRC = Path("csrc")
OLDEST_TORCH = (2, 11)
KNOWS_SM_100 = (12, 8)  # the first CUDA whose nvcc does
HOW = "pip install torch ninja 'setuptools>=77', then: pip install --no-build-isolation ."


def note(text):
    print(f"dpo_kernels: {text}", file=sys.stderr, flush=True)


def version_of(text):
    """Leading numbers of a version; "2.13.0+cpu" gives (2, 13, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+(?:\.\d+)*", text)[0].split("."))


def mode():
    chosen = os.environ.get("DPO_KERNELS_BUILD", "auto")
    if chosen not in MODES:
        raise SystemExit(f"dpo_kernels: DPO_KERNELS_BUILD={chosen!r}; known: {', '.join(MODES)}")
    return chosen


def without_extension(reason):
    """Go on as a pure Python package, or stop where more was asked for."""
    if mode() != "auto":
        raise SystemExit(f"dpo_kernels: DPO_KERNELS_BUILD={mode()}, but {reason}")
    note(f"building without the C++/CUDA extension: {reason}. To get it: {HOW}")


def why_no_cuda(torch, cuda_home):
    """Why the CUDA part is left out; None where it is built."""
    if mode() == "cpu":
        return "DPO_KERNELS_BUILD=cpu"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    if cuda_home is None:
        return "no CUDA toolkit was found (CUDA_HOME)"
    try:
        found = nvcc_version(cuda_home)
    except (OSError, subprocess.CalledProcessError, IndexError, TypeError) as error:
        return f"nvcc of {cuda_home} does not run ({error})"
    if found[0] != version_of(torch.version.cuda)[0]:
        return f"nvcc is of CUDA {'.'.join(map(str, found))}, torch of CUDA {torch.version.cuda}"
    return None


def nvcc_version(cuda_home):
    said = subprocess.run([f"{cuda_home}/bin/nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    return version_of(said.split("release ")[1])


def flags():
    """(compiling, linking) the C++ part."""
    sanitizers = os.environ.get("DPO_KERNELS_SANITIZE")
    if sys.platform == "win32":
        return ["/O2", "/openmp", "/fp:precise"], []
    # Without openmp at::parallel_for is serial. Where traps could be seen, loops with exp stay scalar.
    compiling = ["-fno-trapping-math", "-fno-math-errno", "-fvisibility=hidden", "-Wall"]
    linking = []
    if sanitizers:
        # Python's own flags carry -fwrapv, which hides overflow.
        compiling += ["-O1", "-g", "-fno-omit-frame-pointer", "-fno-wrapv", f"-fsanitize={sanitizers}"]
        compiling += ["-fno-sanitize-recover=undefined"]
        linking += [f"-fsanitize={sanitizers}"]
    else:
        compiling += ["-O3", "-g0"]
    if sys.platform == "linux":
        compiling.append("-fopenmp")
        linking.append("-fopenmp")
    else:
        compiling.append("-fopenmp-simd")  # vector loops, without a second OpenMP runtime beside torch's: one thread
    return compiling, linking


def extension():
    """Arguments of ``setup`` that build the extension, none where it is not built."""
    if mode() == "none":
        note("building without the C++/CUDA extension: DPO_KERNELS_BUILD=none")
        return {}
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
    except ImportError as error:
        without_extension(f"torch is not importable in the build environment ({error})")
        return {}
    if version_of(torch.__version__)[:2] < OLDEST_TORCH:
        without_extension(f"torch {torch.__version__} is older than {'.'.join(map(str, OLDEST_TORCH))}")
        return {}

    class Build(BuildExtension):
        """A compiler that fails is one line and a package without the extension, unless more was asked for."""

        def run(self):
            self.force = True  # neither a header that changed nor another torch shows in the dates of the sources
            asked = self.compiler  # type: ignore[has-type]
            reason = self.why_not()
            if reason is not None and made is not without_cuda and mode() == "auto":
                note(f"building the C++ part of the extension alone: the CUDA part does not compile ({reason})")
                vars(made).update(vars(without_cuda))
                self.compiler = asked
                reason = self.why_not()
            if reason is not None:
                without_extension(f"it does not compile ({reason})")
                self.extensions = self.distribution.ext_modules = []

        def why_not(self):
            """Build; the first line of what went wrong, if anything did."""
            try:
                super().run()
            except Exception as error:  # noqa: BLE001 - whatever the compilers' drivers raise
                return (str(error).strip() or type(error).__name__).splitlines()[0]
            return None

    compiling, linking = flags()
    sources = ["ops.cpp", "cpu/ops_cpu.cpp", "cpu/matmul.cpp", "cpu/memory.cpp"]
    sources += ["cpu/rows_base.cpp", "cpu/rows_avx2.cpp", "cpu/rows_avx512.cpp"]
    made = without_cuda = CppExtension(
        "dpo_kernels._C",
        [str(CSRC / name) for name in sources],
        extra_compile_args={"cxx": compiling},
        extra_link_args=linking,
    )
    reason = why_no_cuda(torch, CUDA_HOME)
    if reason is not None:
        if mode() == "cuda":
            raise SystemExit(f"dpo_kernels: DPO_KERNELS_BUILD=cuda, but {reason}")
        note(f"building the C++ part of the extension for torch {torch.__version__}, not the CUDA part: {reason}")
    else:
        latest = ";10.0" if nvcc_version(CUDA_HOME) >= KNOWS_SM_100 else ""
        architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", f"8.0;9.0{latest}+PTX")
        note(f"building the C++ and CUDA parts of the extension for torch {torch.__version__}, {architectures}")
        sources += ["cuda/ops_cuda.cpp", "cuda/launch.cu"]
        made = CUDAExtension(
            "dpo_kernels._C",
            [str(CSRC / name) for name in sources],
            define_macros=[("DPO_WITH_CUDA", "1")],
            extra_compile_args={"cxx": compiling, "nvcc": ["-O3", "--expt-relaxed-constexpr"]},
            extra_link_args=linking,
        )
    return {"ext_modules": [made], "cmdclass": {"build_ext": Build}}


setup(**extension())
