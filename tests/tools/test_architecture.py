"""The arrows hold, and the checker that says so sees every way of breaking them."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture import MAY_IMPORT, violations

ROOT = Path(__file__).resolve().parents[2]

# One file of every kind, with imports that are all allowed.
CLEAN = {
    "dpo_kernels/__init__.py": "from dpo_kernels.api.pairs import fused\nfrom .outputs import Output\n",
    "dpo_kernels/api/__init__.py": "",
    "dpo_kernels/api/pairs.py": "from .. import checks, engine, inputs, losses, planning\nfrom ..shapes import Head\n",
    "dpo_kernels/engine/__init__.py": "",
    "dpo_kernels/engine/run.py": "from dpo_kernels.planning import plan\nfrom ..segments import to_token\n",
    "dpo_kernels/inputs/__init__.py": "",
    "dpo_kernels/inputs/packing.py": "from ..checks import check_number\nfrom ..problem import Problem\n",
    "dpo_kernels/planning/__init__.py": "",
    "dpo_kernels/planning/tables.py": (
        "from importlib import import_module\n"
        "from importlib.util import find_spec\n"
        "from ..kernels import torch_kernels\n"
        "from ..strategies import chunked\n"
        "def load(name):\n"
        "    import dpo_kernels.kernels.triton.backend\n"
        "    find_spec('triton')\n"
        "    return import_module(name)\n"
    ),
    "dpo_kernels/checks.py": "import torch\nfrom .shapes import Head\n",
    "dpo_kernels/shapes.py": "import torch\nfrom typing import NamedTuple\n",
    "dpo_kernels/outputs.py": "from typing import NamedTuple\n",
    "dpo_kernels/problem.py": "from .loss_interface import SequenceLoss\nfrom .shapes import Head\n",
    "dpo_kernels/loss_interface.py": "from typing import Protocol\n",
    "dpo_kernels/kernel_interface.py": "from .loss_interface import SequenceLoss\nfrom .segments import segment_sum\n",
    "dpo_kernels/device_specs.py": "import torch\n",
    "dpo_kernels/losses.py": "import torch.nn.functional as F\nfrom .loss_interface import LossInputs\n",
    "dpo_kernels/segments.py": "from .shapes import sum_dtype\n",
    "dpo_kernels/naive.py": "import torch\n",
    "dpo_kernels/distributed.py": "import torch.distributed as dist\nfrom .problem import VocabShard\n",
    "dpo_kernels/reference.py": "import math\nimport torch\n",
    "dpo_kernels/strategies/__init__.py": "",
    "dpo_kernels/strategies/chunked.py": "from ..segments import to_token\nfrom . import recompute\n",
    "dpo_kernels/strategies/recompute.py": "from ..kernel_interface import RowKernels\n",
    "dpo_kernels/kernels/__init__.py": "",
    "dpo_kernels/kernels/torch_kernels.py": "from ..kernel_interface import RowKernels\nfrom ..shapes import Head\n",
    "dpo_kernels/kernels/extension.py": "def load():\n    from dpo_kernels import _C\n    return _C\n",
    "dpo_kernels/kernels/triton/__init__.py": "",
    "dpo_kernels/kernels/triton/configs.py": "import triton\n",
    "dpo_kernels/kernels/triton/backend.py": "import triton.language as tl\nfrom . import configs\n",
    "dpo_kernels/integrations/__init__.py": "",
    "dpo_kernels/integrations/trl.py": "import trl\nfrom peft import PeftModel\nfrom dpo_kernels import fused\n",
    "dpo_kernels/integrations/transformers.py": "import transformers\nfrom .. import losses\n",
    "csrc/checks.h": "#include <torch/library.h>\n",
    "csrc/cuda/rows.cuh": "#include <cuda_bf16.h>\n#include \"vec.cuh\"\n// #include <torch/all.h>\n",
    "csrc/cuda/vec.cuh": "#pragma once\n#include \"rows.cuh\"\n/*\n#include <ATen/ATen.h>\n*/\n",
    "csrc/cuda/rows.cu": "#include <torch/library.h>\n#include \"../checks.h\"\n",
    "tests/test_api.py": "import triton, transformers, dpo_kernels.kernels\n",
}  # fmt: skip

# What must never be imported, written out again rather than read from the checker's table.
FORBIDDEN = """
kernels -> losses inputs strategies planning engine api problem integrations
losses -> kernels strategies inputs segments problem planning engine integrations
segments -> kernels strategies losses problem
shapes -> kernels strategies losses segments inputs problem checks
strategies -> kernels losses inputs planning engine api device_specs
reference -> shapes losses segments inputs kernels api naive
naive -> shapes losses reference api
inputs -> strategies planning engine api
planning -> losses inputs engine api
engine -> kernels strategies api
checks -> inputs losses kernels
problem -> losses kernels inputs planning distributed
distributed -> inputs engine api losses kernels strategies
loss_interface -> losses kernels problem
kernel_interface -> kernels losses problem
device_specs -> planning kernels
api -> kernels strategies integrations
public -> strategies engine inputs integrations
"""
ARROWS = [
    (layer, target)
    for layer, targets in (line.split(" -> ") for line in FORBIDDEN.strip().splitlines())
    for target in targets.split()
]
FILE_OF = {
    "public": "dpo_kernels/__init__.py",
    "api": "dpo_kernels/api/pairs.py",
    "engine": "dpo_kernels/engine/run.py",
    "inputs": "dpo_kernels/inputs/packing.py",
    "planning": "dpo_kernels/planning/tables.py",
    "kernels": "dpo_kernels/kernels/torch_kernels.py",
    "strategies": "dpo_kernels/strategies/chunked.py",
    "integrations": "dpo_kernels/integrations/trl.py",
}


def plant(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def reports(root: Path, planted: str, text: str) -> list[str]:
    """What is reported of a clean tree whose file ``planted`` begins with ``text``."""
    plant(root, CLEAN | {planted: text + CLEAN.get(planted, "")})
    return [str(violation) for violation in violations(root)]


def test_the_real_tree_keeps_the_arrows() -> None:
    assert [str(violation) for violation in violations(ROOT)] == []


def test_a_clean_tree_passes(tmp_path: Path) -> None:
    assert reports(tmp_path, "dpo_kernels/api/pairs.py", "") == []


def test_a_tree_without_the_package_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="dpo_kernels"):
        violations(tmp_path)


def test_the_table_has_no_cycle() -> None:
    done: set[str] = set()
    while ready := {layer for layer, below in MAY_IMPORT.items() if layer not in done and below <= done}:
        done |= ready
    assert done == set(MAY_IMPORT)


@pytest.mark.parametrize(("layer", "target"), ARROWS)
def test_a_forbidden_arrow_is_reported(tmp_path: Path, layer: str, target: str) -> None:
    path = FILE_OF.get(layer, f"dpo_kernels/{layer}.py")
    assert path in CLEAN
    (report,) = reports(tmp_path, path, f"import math\nimport dpo_kernels.{target}\n")
    assert report.startswith(f"{path}:2: {layer} must not import {target} (dpo_kernels.{target}); ")


@pytest.mark.parametrize(
    ("statement", "line", "target"),
    [
        ("from dpo_kernels.losses import dpo", 1, "losses"),
        ("from dpo_kernels import losses", 1, "losses"),
        ("from dpo_kernels import shapes, losses as family", 1, "losses"),
        ("from ..losses import dpo", 1, "losses"),
        ("from .. import losses", 1, "losses"),
        ("from .. import __version__", 1, "public"),
        ("import dpo_kernels", 1, "public"),
        ("import math, dpo_kernels.losses as family", 1, "losses"),
        ("def f():\n    from ..losses import dpo", 2, "losses"),
        ("async def f():\n    from ..losses import dpo", 2, "losses"),
        ("class A:\n    def f(self):\n        import dpo_kernels.losses", 3, "losses"),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..losses import Spec", 3, "losses"),
        ("try:\n    from ..losses import dpo\nexcept ImportError:\n    pass", 2, "losses"),
        ("import importlib\nimportlib.import_module('dpo_kernels.losses')", 2, "losses"),
        ("import importlib as il\nf = lambda: il.import_module(name='dpo_kernels.losses')", 2, "losses"),
        ("from importlib import import_module as load\nload('dpo_kernels.losses')", 2, "losses"),
        ("import importlib\nimportlib.import_module('..losses', __package__)", 2, "losses"),
        ("__import__('dpo_kernels.losses')", 1, "losses"),
    ],
)
def test_every_form_of_import_is_seen(tmp_path: Path, statement: str, line: int, target: str) -> None:
    path = "dpo_kernels/kernels/torch_kernels.py"
    (report,) = reports(tmp_path, path, statement + "\n")
    assert report.startswith(f"{path}:{line}: kernels must not import {target} ")


def test_relative_names_of_a_package_start_at_the_package(tmp_path: Path) -> None:
    (report,) = reports(
        tmp_path, "dpo_kernels/kernels/__init__.py", "from ..losses import dpo\nfrom . import configs_\n"
    )
    assert report.startswith("dpo_kernels/kernels/__init__.py:1: kernels must not import losses")


@pytest.mark.parametrize(
    ("path", "text", "words"),
    [
        ("dpo_kernels/kernels/torch_kernels.py", "import triton", "triton must not be imported outside"),
        ("dpo_kernels/planning/tables.py", "def f():\n    import triton.language as tl", "triton must not be imported"),
        ("dpo_kernels/losses.py", "from triton import jit", "triton must not be imported outside"),
        ("dpo_kernels/api/pairs.py", "import torch.distributed as dist", "torch.distributed must not be imported"),
        ("dpo_kernels/inputs/packing.py", "from torch import distributed", "torch.distributed must not be imported"),
        ("dpo_kernels/inputs/packing.py", "from torch.distributed.tensor import DTensor", "torch.distributed must not"),
        ("dpo_kernels/inputs/packing.py", "import torch as th\nth.distributed.get_rank()", "torch.distributed must"),
        ("dpo_kernels/integrations/trl.py", "import torch.distributed", "torch.distributed must not be"),
        ("dpo_kernels/api/pairs.py", "import transformers", "transformers must not be imported outside"),
        ("dpo_kernels/api/pairs.py", "from trl import DPOTrainer", "trl must not be imported outside"),
        ("dpo_kernels/api/pairs.py", "import peft.utils", "peft must not be imported outside"),
        ("dpo_kernels/api/pairs.py", "from tests.cases import CASES", "the package must not import tests"),
        ("dpo_kernels/api/pairs.py", "import benchmarks", "the package must not import benchmarks"),
        ("dpo_kernels/api/pairs.py", "from demo import run", "the package must not import demo"),
        ("dpo_kernels/reference.py", "import numpy as np", "reference must not import numpy"),
        ("dpo_kernels/losses.py", "from dpo_kernels import _C", "losses must not import kernels (dpo_kernels._C)"),
        ("dpo_kernels/planning/tables.py", "from ..kernels.triton import logprob", "imported inside a function"),
        ("dpo_kernels/planning/tables.py", "import dpo_kernels.kernels.triton", "must be imported inside a function"),
        ("dpo_kernels/planning/tables.py", "def f(x=__import__('dpo_kernels.kernels.triton')): 1", "inside a function"),
        ("dpo_kernels/losses.py", "import importlib\nimportlib.import_module(f'dpo_kernels.{x}')", "literally"),
        ("dpo_kernels/losses.py", "from .. import tests", "cannot be followed"),
        ("dpo_kernels/helpers.py", "", "dpo_kernels.helpers belongs to no layer"),
        ("csrc/cuda/rows.cuh", "#include <torch/extension.h>", "must not include torch headers: torch/ext"),
        ("csrc/cuda/rows.cuh", "/* two\nlines */\n  #  include \"ATen/ATen.h\"", "torch headers: ATen/ATen.h"),
        ("csrc/cuda/rows.cuh", "#include <c10/cuda/CUDAStream.h>", "torch headers: c10/cuda/CUDAStream.h"),
        ("csrc/cuda/rows.cuh", "#include \"../checks.h\"", "torch/library.h through csrc/checks.h"),
    ],
)  # fmt: skip
def test_a_broken_rule_is_reported_where_it_is_broken(tmp_path: Path, path: str, text: str, words: str) -> None:
    first, *others = reports(tmp_path, path, text + "\n")
    assert first.startswith(f"{path}:{text.count(chr(10)) + 1}: ")
    assert words in first
    # A header that includes a bad header is bad too; nothing else may be reported.
    assert all(path.endswith(".cuh") and "vec.cuh:2:" in other for other in others)


IMPORT_ALONE = """
import sys, warnings

class Missing:
    asked = []
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"triton", "transformers", "trl", "peft"}:
            self.asked.append(name)
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import torch
Missing.asked.clear()  # torch may look for triton itself
threads = torch.get_num_threads()
warnings.simplefilter("error")
import dpo_kernels
assert not Missing.asked, f"importing dpo_kernels asks for {Missing.asked}"
assert not torch.cuda.is_initialized()
assert torch.get_num_threads() == threads
assert "dpo_kernels.kernels.triton" not in sys.modules
"""


def test_importing_the_package_needs_no_optional_package_and_says_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALONE], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
