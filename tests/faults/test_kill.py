"""Kill it anywhere: the others end with one message, and the same command finishes as if nothing had happened."""

import pytest

from faults.conftest import FULL, outcomes
from faults.kill import Case, Range, all_cases, check, short_cases


@pytest.mark.parametrize("case", all_cases() if FULL else short_cases(), ids=lambda case: case.name)
def test_killed_and_continued(case: Case, killing: Range) -> None:
    outcome = killing.run(case)
    outcomes.append(outcome)
    check(outcome)
