"""Edits of the project's own source, each of which a test must notice: ``make mutants``.

An entry is one ``Mutant`` in ``core.py``, ``kernels.py``, ``around.py``, ``paths.py``, ``sharded.py`` or
``trl_engines.py``. To add one, plant the edit by hand, see that the suite stays green, write the test that goes red,
and enter both. ``records.py`` says what an entry is, ``runner.py`` how it is tried.
"""

from tests.mutants.around import AROUND
from tests.mutants.core import CORE
from tests.mutants.kernels import KERNELS
from tests.mutants.paths import PATHS
from tests.mutants.records import Mutant
from tests.mutants.sharded import SHARDED
from tests.mutants.trl_engines import TRL_ENGINES

MUTANTS: tuple[Mutant, ...] = (*CORE, *KERNELS, *AROUND, *PATHS, *SHARDED, *TRL_ENGINES)
