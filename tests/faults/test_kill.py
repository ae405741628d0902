"""Kill it anywhere: the others end with one message, and the same command finishes as if nothing had happened."""

import pytest

from faults.kill import FULL, Case, Range, all_cases, check, keep, short_cases


@pytest.mark.parametrize("case", all_cases() if FULL else short_cases(), ids=lambda case: case.name)
def test_killed_and_continued(case: Case, killing: Range) -> None:
    outcome = killing.run(case)
    keep(outcome)
    check(outcome)
