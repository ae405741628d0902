"""A toy world and the launch scripts as a user calls them."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from helpers.launching import ROOT, TIMEOUT, Ended, World, environment, free_port
from helpers.world import make_base, make_recipe, make_texts


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    make_base(folder / "base")
    make_texts(folder)
    task = {"path": str(folder / "task.jsonl"), "samples": 20}
    recipe = make_recipe(
        folder,
        folder / "base",
        folder / "unused",
        adapter={"interference_budget": 0.005},
        train={"max_steps": 6},
        evaluation={
            "adaptation": task,
            "retention": {"kept": task},
            "baselines": {"lora": {"adapter": {"method": "lora"}, "train": {"learning_rate": 1e-3}}},
        },
    )
    tree = yaml.safe_load(recipe.to_yaml())
    del tree["output_dir"]
    (folder / "toy.yaml").write_text(yaml.safe_dump(tree))
    return World(folder, folder / "toy.yaml")


@pytest.fixture(scope="session")
def launch(world: World) -> Callable[..., Ended]:
    """Starts a command line from the clone's root, as the README writes it, and waits for its end."""

    def start(*command: str) -> Ended:
        whole = [*command, "--recipe", str(world.recipe)] if "--recipe" not in command else list(command)
        done = subprocess.run(
            whole,
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            stdin=subprocess.DEVNULL,
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    return start


@pytest.fixture(scope="session")
def launch_ranks(world: World) -> Callable[..., list[Ended]]:
    """Starts two ranks of a script with what a launcher would tell each, so that each one's own end can be seen."""

    def start(script: str, *overrides: str) -> list[Ended]:
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        command = [sys.executable, script, "--recipe", str(world.recipe), *overrides]
        ranks = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **shared),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                stdin=subprocess.DEVNULL,
            )
            for rank in range(2)
        ]
        try:
            said = [rank.communicate(timeout=TIMEOUT) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        return [Ended(rank.returncode, *texts) for rank, texts in zip(ranks, said, strict=True)]

    return start


@pytest.fixture(scope="session")
def single_run(world: World, launch: Callable[..., Ended]) -> Path:
    """The folder of a finished run in one process."""
    folder = world.folder / "single"
    ended = launch(sys.executable, "launch/train.py", "engine.name=single", f"output_dir={folder}")
    assert ended.status == 0, ended.errors
    (world.folder / "single.log").write_text(ended.output)
    return folder
