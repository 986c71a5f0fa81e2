"""Edits of the project's own source, each of which a test must notice: ``make mutants``.

An entry is one ``Mutant`` in one of this folder's tables. To add one, plant the edit by hand, see that the suite stays
green, write the test that goes red, and enter both. ``records.py`` says what an entry is, ``runner.py`` how to try it.
"""

from tests.mutants.around import AROUND
from tests.mutants.core import CORE
from tests.mutants.divergence import DIVERGENCE
from tests.mutants.gpu import GPU
from tests.mutants.kernels import KERNELS
from tests.mutants.memory import MEMORY
from tests.mutants.paths import PATHS
from tests.mutants.records import Mutant
from tests.mutants.sampled import SAMPLED
from tests.mutants.sharded import SHARDED
from tests.mutants.stacks import STACKS
from tests.mutants.tensor_parallel import TENSOR_PARALLEL
from tests.mutants.trl_engines import TRL_ENGINES

MUTANTS: tuple[Mutant, ...] = (
    *(*CORE, *KERNELS, *AROUND, *PATHS, *SAMPLED),
    *(*TENSOR_PARALLEL, *SHARDED, *TRL_ENGINES, *STACKS, *GPU, *MEMORY, *DIVERGENCE),
)
