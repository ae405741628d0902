"""Which tests one process runs after another where several share the work (``pytest -n 2 --dist loadgroup``)."""

import pytest


@pytest.hookimpl(tryfirst=True)  # before the plugin reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files stay whole; those that look at the one long run of every engine stay together, or it would run twice."""
    for item in items:
        shared = "found" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group("found" if shared else item.nodeid.split("::")[0]))
