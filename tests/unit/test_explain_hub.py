"""What the hub refuses is said with its reason and a remedy, not as a bare status."""

from nslora_dist.explain import hub_reason


def test_a_gated_base_is_told_with_its_remedy() -> None:
    said = hub_reason(
        OSError(
            "403 Client Error. (Request ID: x)\n\nCannot access gated repo for url https://hub/a.\n"
            "Access to model a is restricted."
        )
    )
    assert "Cannot access gated repo" in said and "hf auth login" in said and "\n" not in said


def test_anything_else_is_its_own_words() -> None:
    assert hub_reason(OSError("offline mode is enabled")) == "offline mode is enabled"
    assert hub_reason(ValueError()) == "ValueError"
    assert len(hub_reason(OSError("word " * 1000))) < 310
