"""How two processes share the tests (``pytest -n 2``): by files, which stay whole as their fixtures do."""

from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

ONE_RUN = frozenset(
    f"tests/parity/test_{name}.py" for name in ("engines_agree", "export_peft", "interference", "null_lora_trained")
)
"""Files with the fixture ``found`` of ``tests/parity``, one long run of every engine, which two would run twice."""


class _ByFile(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return "one run" if file in ONE_RUN else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """Instead of xdist's own way, marks of groups, which get lost with this pytest."""
    return _ByFile(config, log)
