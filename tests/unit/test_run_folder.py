"""Whose a run folder is: a calibration may be trained on with other settings, a begun training goes on as it was."""

from pathlib import Path
from typing import Any

import pytest

from helpers.world import make_recipe
from nslora_dist.errors import UserError
from nslora_dist.recipe import Recipe
from nslora_dist.run_folder import BEGUN, claim_folder
from nslora_dist.yaml_file import read_yaml

LATER: list[dict[str, Any]] = [
    {"train": {"learning_rate": 2e-2}},
    {"train": {"max_steps": None, "epochs": 1.0}, "name": "other"},
    {"data": {"samples": 7}},
    {"evaluation": {"baselines": {"lora": {"adapter": {"method": "lora"}}}}},
    {"adapter": {"alpha": 3.0, "interference_budget": 0.05, "budget_over": "total"}},
]


def recipe(folder: Path, **changes: Any) -> Recipe:
    return make_recipe(folder, folder / "base", folder / "run", **changes)


@pytest.fixture
def calibrated(tmp_path: Path) -> Path:
    """The folder of a calibration, one with an unfinished part of another pass."""
    claim_folder(recipe(tmp_path))
    for name in ("null_space", "calibration/activations/block-0", "weight_null_space"):
        (tmp_path / "run" / name).mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize("changes", LATER)
def test_a_calibration_is_used_by_a_recipe_that_differs_in_what_comes_later(
    calibrated: Path, changes: dict[str, Any]
) -> None:
    other = recipe(calibrated, **changes)
    claim_folder(other)
    assert Recipe.model_validate(read_yaml(calibrated / "run" / "recipe.yaml")) == other
    claim_folder(other)  # ended before its training began: the same command, and the first one, go on
    claim_folder(recipe(calibrated))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"calibration": {"samples": 19}}, "calibration.samples"),
        ({"base_model": {"dtype": "bfloat16"}}, "base_model.dtype"),
        ({"adapter": {"rank": 4}, "train": {"learning_rate": 2e-2}}, "adapter.rank"),
        ({"adapter": {"method": "lora"}}, "adapter.method"),
        ({"adapter": {"target_modules": ["q_proj"]}}, "adapter.target_modules"),
    ],
)
def test_a_calibration_is_not_overwritten_by_another_one(calibrated: Path, changes: dict[str, Any], key: str) -> None:
    before = (calibrated / "run" / "recipe.yaml").read_bytes()
    with pytest.raises(UserError, match=rf"holds another recipe's calibration \({key} differ\)"):
        claim_folder(recipe(calibrated, **changes))
    assert (calibrated / "run" / "recipe.yaml").read_bytes() == before


@pytest.mark.parametrize("left", BEGUN)
def test_a_training_that_has_begun_is_left_alone(calibrated: Path, left: str) -> None:
    (calibrated / "run" / left).mkdir()
    with pytest.raises(UserError, match=r"holds another recipe's run \(train.learning_rate differ\)"):
        claim_folder(recipe(calibrated, train={"learning_rate": 2e-2}))
    claim_folder(recipe(calibrated))
    with pytest.raises(UserError, match=f"resume never: .* holds this recipe's run \\({left}\\)"):
        claim_folder(recipe(calibrated, resume="never"))
