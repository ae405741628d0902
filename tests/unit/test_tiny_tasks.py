"""The tasks to merge are reproducible, correct, and new to the shipped base in words it knows."""

import pytest

from nslora_dist import tiny_tasks, tiny_world

TASKS = ("difference", "minimum", "new_facts")


@pytest.fixture(scope="module")
def world() -> tiny_world.World:
    return tiny_world.make_world(0)


@pytest.fixture(scope="module")
def tasks(world: tiny_world.World) -> dict[str, tiny_tasks.TaskRows]:
    return tiny_tasks.merge_tasks(world)


def test_a_seed_decides_everything(world: tiny_world.World, tasks: dict[str, tiny_tasks.TaskRows]) -> None:
    assert tuple(tasks) == TASKS
    assert tiny_tasks.merge_tasks(tiny_world.make_world(0)) == tasks
    other = tiny_tasks.merge_tasks(world, 1)
    assert all(other[name].train != tasks[name].train for name in TASKS)


def test_every_word_is_in_the_vocabulary_and_no_row_in_pretraining(
    world: tiny_world.World, tasks: dict[str, tiny_tasks.TaskRows]
) -> None:
    known = {row["prompt"] for rows in world.pretraining.values() for row in rows}
    for rows in tasks.values():
        for row in (*rows.train, *rows.test):
            assert set(tiny_world.text_of(row).split(" ")) <= set(world.vocabulary)
            assert row["prompt"] not in known


def test_minima_are_right_and_asked_of_pairs_not_trained_on(tasks: dict[str, tiny_tasks.TaskRows]) -> None:
    rows = tasks["minimum"]
    assert (len(rows.train), len(rows.test)) == (3000, 256)
    assert {row["prompt"] for row in rows.train}.isdisjoint(row["prompt"] for row in rows.test)
    for row in (*rows.train, *rows.test):
        digits = "".join(word for word in row["prompt"].split() if word.isdigit())
        assert min(int(digits[:2]), int(digits[2:])) == int(row["response"].replace(" ", "")[::-1])


def test_differences_are_the_world_s_own(world: tiny_world.World, tasks: dict[str, tiny_tasks.TaskRows]) -> None:
    def ordered(rows: list[dict[str, str]]) -> list[str]:
        return sorted(map(tiny_world.text_of, rows))

    assert ordered(tasks["difference"].train) == ordered(world.task_train)
    assert ordered(tasks["difference"].test) == ordered(world.task_test)


def test_new_people_are_new_and_each_fact_is_asked_once(
    world: tiny_world.World, tasks: dict[str, tiny_tasks.TaskRows]
) -> None:
    names = {name for name, _, _ in world.facts}
    rows = tasks["new_facts"]
    assert (len(rows.train), len(rows.test)) == (20 * 6 * 3, 20 * 6)
    shown = [tiny_world.text_of(row) for row in rows.train]
    assert len(set(shown)) == len(shown)
    assert set(shown).issuperset(tiny_world.text_of(row) for row in rows.test)
    people = {tuple(word for word in row["prompt"].split() if word[0].isupper()) for row in rows.train}
    assert len(people) == 20
    assert {" ".join(person) for person in people}.isdisjoint(names)
    assert {part for person in people for part in person} <= {part for name in names for part in name.split()}


def test_files_hold_the_rows(tasks: dict[str, tiny_tasks.TaskRows], tmp_path) -> None:
    tiny_tasks.write_tasks(tasks, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{name}_{part}.jsonl" for name in TASKS for part in ("train", "test")
    )
    text = (tmp_path / "minimum_test.jsonl").read_text(encoding="utf-8")
    assert text == tiny_world.to_jsonl(tasks["minimum"].test)


@pytest.mark.parametrize("too_many", [{"people": 500}, {"train_rows": 8000}, {"test_rows": 300}])
def test_asking_for_more_than_there_is_names_the_argument(world: tiny_world.World, too_many: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(too_many))):
        tiny_tasks.merge_tasks(world, **too_many)
