"""The docstrings: every example runs, and those of public names say everything that a caller must know."""

import doctest
import importlib
import inspect
import io
import re
from pathlib import Path

import pytest

import dpo_kernels
from dpo_kernels import reference

PACKAGE = Path(dpo_kernels.__file__).parent
OPTIONAL = r"transformers|trl|peft|datasets|accelerate|safetensors|tqdm|triton"  # packages that need not be installed
IMPORTS_ONE = re.compile(rf"^ *(?:from|import) (?:{OPTIONAL})\b", re.MULTILINE)

# --- examples ---------------------------------------------------------------------------------------------------------


def modules_with_examples():
    """Names of the modules whose source holds an example and imports no optional package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        if ">>> " in source and not IMPORTS_ONE.search(source):
            parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    for name in modules_with_examples():
        yield from finder.find(importlib.import_module(name), name)


EXAMPLES = {found.name: found for found in examples() if found.examples}


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_an_example_gives_what_it_says(name):
    said = io.StringIO()
    failed, tried = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS).run(
        EXAMPLES[name], out=said.write
    )
    assert tried, name
    assert not failed, said.getvalue()


# --- what a public docstring says -------------------------------------------------------------------------------------

PUBLIC = {name: getattr(dpo_kernels, name) for name in dpo_kernels.__all__ if callable(getattr(dpo_kernels, name))}
PUBLIC |= {f"reference.{name}": value for name, value in vars(reference).items() if name.endswith("_reference")}
METHODS = {
    "DPOLossOutput.metrics": dpo_kernels.DPOLossOutput.metrics,
    "FusedDPOLoss.forward": dpo_kernels.FusedDPOLoss.forward,
}
SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Source|Example):$", re.MULTILINE)
LONGEST_SENTENCE = 25  # words

# What stands behind ``**options`` of these functions: keyword arguments of fused_dpo_loss.
OF_DPO = [
    name
    for name, parameter in inspect.signature(dpo_kernels.fused_dpo_loss).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
]
OF_PAIRS_ONLY = ("loss_type", "beta", "label_smoothing", "pairs", "token_denominator")
BEHIND_STARS = {
    "explain": OF_DPO,
    "fused_kto_loss": [name for name in OF_DPO if name not in OF_PAIRS_ONLY],
    "fused_group_loss": [name for name in OF_DPO if name not in OF_PAIRS_ONLY],
    "reference.sequence_logps_reference": ["bias", "shift", "ignore_index", "logit_scale", "softcap"],
}


def sections(text):
    """Summary and sections of a docstring by name."""
    summary, *pieces = SECTION.split(inspect.cleandoc(text))
    return {"": summary} | {name: body for name, body in zip(pieces[::2], pieces[1::2], strict=True)}


def parameters(value):
    """Names of what a function or a class takes, with their stars."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    taken = inspect.signature(value).parameters.values()
    return [stars.get(each.kind, "") + each.name for each in taken if each.name != "self"]


def sentences(text):
    """Sentences of prose: without examples, displayed formulas and code, one argument's text apart from the next's."""
    text = re.sub(r"^ *>>> .*(?:\n.+)*", "", text, flags=re.MULTILINE)
    text = re.sub(r"::\n\n(?: {4,}.*\n)+", ".\n", text)
    text = re.sub(r"``[^`]+``", "code", text)
    text = re.sub(r"\n\s*\n|\n(?= {4}\*{0,2}\w+: )", "\n\n", text)
    for paragraph in text.split("\n\n"):
        yield from re.split(r"(?<=[.:;!?])\s+", " ".join(paragraph.split()))


@pytest.mark.parametrize("name", [*PUBLIC, *METHODS])
def test_a_public_docstring_is_complete(name):
    value = (PUBLIC | METHODS)[name]
    text = inspect.getdoc(value)
    found = sections(text)
    fields = hasattr(value, "_fields")  # a NamedTuple: what it holds is what it takes
    described = re.findall(r"^ {4}(\*{0,2}\w+): ", found.get("Args", found.get("Attributes", "")), re.MULTILINE)
    wanted = [*parameters(value), *BEHIND_STARS.get(name, ())]
    missing = sorted(set(wanted) - set(described))
    assert not missing, f"{name} does not describe {missing}"
    assert len(set(described)) == len(described), f"{name} describes an argument twice"
    needed = set() if fields else {"Raises"} if inspect.isclass(value) else {"Returns", "Raises"}
    needed |= set() if name in METHODS else {"Example"}
    missing = sorted(needed - found.keys())
    assert not missing, f"{name} lacks {missing}"
    assert name in METHODS or ">>> " in found["Example"], f"the example of {name} is no doctest"


@pytest.mark.parametrize("name", [*PUBLIC, *METHODS])
def test_a_public_docstring_is_plain(name):
    text = inspect.getdoc((PUBLIC | METHODS)[name])
    assert re.match(r"[A-Z].*\.$", text.split("\n", 1)[0]), f"the first line of {name} is not one sentence"
    assert not re.search(r"\b[Aa]s (?:in|for) ``", text), f"{name} sends the reader elsewhere"
    long = [sentence for sentence in sentences(text) if len(sentence.split()) > LONGEST_SENTENCE]
    assert not long, long


def test_every_option_of_every_loss_is_described():
    text = dpo_kernels.fused_dpo_loss.__doc__
    for name, spec in dpo_kernels.LOSSES.items():
        for option in spec.options:
            assert f"``{option}``" in text or f" {option}: " in text, (name, option)
