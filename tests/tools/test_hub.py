"""The package as a kernel of the Hugging Face Hub: it imports itself only, and computes what the package does."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest
import torch

import dpo_kernels
from tests.tools import hub

SHARED = {"torch", "triton", "deepspeed"}  # the last two only where a caller has chosen them
MODULES = sorted(Path(dpo_kernels.__file__).parent.glob("_C*.so"))
has_kernels = pytest.mark.skipif(importlib.util.find_spec("kernels") is None, reason="kernels is not installed")
has_checker = pytest.mark.skipif(
    importlib.util.find_spec("kernel_abi_check") is None, reason="kernel-abi-check is not installed"
)

# Each prelude leaves two builds of the package. The rest compares them with the one that is installed.
BY_HAND = """if True:
    import importlib.util, json, sys
    from pathlib import Path
    def loaded(folder):
        name = json.loads((folder / "metadata.json").read_text())["id"]
        spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    builds = [loaded(Path(sys.argv[1]) / "build" / f"torch-{backend}") for backend in ("cpu", "cuda")]
"""
BY_KERNELS = """if True:
    import sys
    from pathlib import Path
    import kernels
    folder = Path(sys.argv[1])
    builds = [kernels.get_local_kernel(folder, backend="cpu")]
    builds.append(kernels.get_local_kernel(folder / "build" / "torch-cuda"))
    from kernels._rust import Build, Digest, DigestAlgorithm
    import json
    assert sorted(map(str, Build.open(folder).general.backends)) == ["cpu", "cuda"]
    for variant in sorted((folder / "build").iterdir()):
        actual = Digest.hash_variant(DigestAlgorithm.SHA256, variant).files
        actual = {name: value for name, value in actual.items() if not name.endswith(".pyc")}
        assert actual == json.loads((variant / "metadata.json").read_text())["digest"]["files"]
"""
OLD_LAYOUT = """if True:
    import importlib, sys
    sys.path.insert(0, f"{sys.argv[1]}/build/torch-cpu")
    first = importlib.import_module("dpo_kernels")
    sys.path.pop(0)
    del sys.modules["dpo_kernels"]
    sys.path.insert(0, f"{sys.argv[1]}/build/torch-cuda")
    builds = [first, importlib.import_module("dpo_kernels")]
    sys.path.pop(0)
    del sys.modules["dpo_kernels"]
    importlib.invalidate_caches()
"""
COMPARE = """if True:
    import torch
    assert not any(name.split(".")[0] == "dpo_kernels" for name in sys.modules), "a build imports the package"
    sys.path.insert(0, sys.argv[2])
    import dpo_kernels
    results = []
    for package in (dpo_kernels, *builds):
        assert sorted(package.__all__) == sorted(dpo_kernels.__all__)
        g = torch.Generator().manual_seed(0)
        hidden = torch.randn(4, 3, 8, generator=g).requires_grad_()
        weight = torch.randn(16, 8, generator=g).requires_grad_()
        labels = torch.randint(16, (4, 3), generator=g)
        def loss(hidden, weight):
            return package.fused_dpo_loss(hidden, weight, labels, reference_free=True, backend="torch").loss
        for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
            results.append((call(hidden, weight), *torch.autograd.grad(call(hidden, weight), (hidden, weight))))
    for result in results[2:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[len(results) % 2], strict=True))
    names = {name.split("::")[0] for name in torch._C._dispatch_get_all_op_names() if "::logps" in name}
    print(len({build.fused_dpo_loss for build in builds}), sorted(names))
"""


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    hub.write(folder)
    return folder


def said(prelude, layout):
    root = str(Path(dpo_kernels.__file__).parents[1])
    command = [
        sys.executable,
        "-P" if sys.version_info >= (3, 11) else "-I",
        "-c",
        prelude + COMPARE,
        str(layout),
        root,
    ]
    done = subprocess.run(command, cwd=layout, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def names_of(layout):
    return [f"_dpo_kernels_{backend}_{hub._fingerprint(hub.view())}" for backend in hub.BACKENDS]


# --- the layout -------------------------------------------------------------------------------------------------------


def test_a_kernel_imports_the_standard_library_and_torch_only(layout):
    for variant in (layout / "build").iterdir():
        files = {path.relative_to(variant) for path in variant.rglob("*.py")}
        assert len(files) > 50
        for file in files:
            for node in ast.walk(ast.parse((variant / file).read_text("utf-8"))):
                if isinstance(node, ast.Import):
                    roots = {alias.name.split(".")[0] for alias in node.names}
                    assert roots <= SHARED | sys.stdlib_module_names, f"{file}:{node.lineno}"
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    assert node.module.split(".")[0] in SHARED | sys.stdlib_module_names, f"{file}:{node.lineno}"
                elif isinstance(node, ast.ImportFrom):
                    base = file.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                    here = [base / "__init__.py", base.parent / f"{base.name}.py"]
                    assert any(path in files for path in here), f"{file}:{node.lineno}: no such module"


def test_integrations_and_the_command_line_stay_out(layout):
    for folder in (layout / "torch-ext" / "dpo_kernels", layout / "build" / "torch-cpu"):
        assert (folder / "api").is_dir()
        assert not (folder / "integrations").exists()
        assert not (folder / "__main__.py").exists()
        assert not list(folder.rglob("*.so"))


def test_equal_sources_give_equal_bytes(layout, tmp_path):
    hub.write(tmp_path)
    (tmp_path / "build" / "torch-cpu" / "left.py").touch()
    hub.write(tmp_path)
    files = sorted(path.relative_to(layout) for path in layout.rglob("*") if path.suffix not in ("", ".pyc"))
    assert files == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.suffix != "")
    assert all((layout / file).read_bytes() == (tmp_path / file).read_bytes() for file in files)


@pytest.mark.parametrize(
    ("path", "text", "wanted"),
    [
        ("a/b.py", "from dpo_kernels.c.d import e\n", "from ..c.d import e\n"),
        ("a.py", "def f():\n    from dpo_kernels import e\n", "def f():\n    from . import e\n"),
        (
            "a/b.py",
            'from dpo_kernels import c\nx = torch.ops.dpo_kernels.y\nf("dpo_kernels::z")\n',
            "from .._ops import add_op_namespace_prefix, ops\nfrom .. import c\nx = ops.y\n"
            'f(add_op_namespace_prefix("z"))\n',
        ),
        ("a/b.py", 'load("dpo_kernels._C")\n', 'load(__package__.rsplit(".", 1)[0] + "._C")\n'),
        ("a/b.py", 'find(f"dpo_kernels.{name}")\n', 'find(__package__.rsplit(".", 1)[0] + "." + name)\n'),
        ("a.py", '"""Of dpo_kernels._C."""\nraise ValueError("dpo_kernels: no")\n', None),
    ],
)
def test_what_becomes_of_a_module(path, text, wanted):
    assert hub.relative(text, PurePosixPath(path)) == (text if wanted is None else wanted)


@pytest.mark.parametrize(
    "text",
    [
        "import dpo_kernels\n",
        "import dpo_kernels.api as a\n",
        "from dpo_kernels.a import b; from dpo_kernels.a import c\n",
        "ops = torch.ops\nx = ops.dpo_kernels.y\n",
        "f('dpo_kernels::z')\n",
        'f("dpo_kernels." + name)\n',
        'importlib.import_module("dpo_kernels.kernels.cpp")\n',
        'importlib.import_module("dpo_kernels.kernels")\n',
        'importlib.import_module(f"dpo_kernels.kernels.{name}")\n',
    ],
)
def test_what_would_still_be_the_installed_package_is_refused(text):
    with pytest.raises(ValueError, match=r"a/b\.py:"):
        hub.relative(text, PurePosixPath("a/b.py"))


# --- what it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prelude", [BY_HAND, OLD_LAYOUT], ids=["by hand", "old layout"])
def test_two_builds_beside_the_package_compute_the_same(layout, prelude):
    """Eager and compiled. Each has registered its operators under its own name."""
    assert said(prelude, layout) == f"2 {sorted([*names_of(layout), 'dpo_kernels'])}\n"


@has_kernels
def test_kernels_loads_it(layout):
    assert said(BY_KERNELS, layout) == f"2 {sorted([*names_of(layout), 'dpo_kernels'])}\n"


# --- the extension ----------------------------------------------------------------------------------------------------


@has_checker
@pytest.mark.skipif(not MODULES, reason="there is no extension")
@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.name)
def test_the_hubs_check_of_the_binary_interface_passes(module):
    """Its requirements of a compiled kernel on Linux, with its own checker."""
    import kernel_abi_check

    binary = kernel_abi_check.ObjectFile(str(module))
    assert binary.check_python_abi("3.9") == []
    if module.name == "_C.abi3.so":  # CUDA's own library is linked into the other
        assert binary.check_manylinux("manylinux_2_28") == []


@has_checker
def test_the_checker_can_fail():
    import kernel_abi_check

    library = Path(torch.__file__).parent / "lib" / "libtorch_python.so"
    assert kernel_abi_check.ObjectFile(str(library)).check_python_abi("3.9")
