"""YAML that somebody wrote, read as plain data: no objects, no bombs, no key twice; and ``1e-4`` is a number."""

import re
from pathlib import Path
from typing import Any

import yaml

from nslora_dist.errors import UserError

MOST_BYTES = 1 << 20
"""Of a file; a recipe has a few thousand."""
MOST_NODES = 20_000
"""Values in a file, those that an alias repeats counted each time: aliases of aliases multiply."""
MOST_DEPTH = 50
"""Levels of nesting."""


def read_yaml(path: Path) -> Any:
    """Reads a YAML file.

    Raises:
        UserError: it is unreadable, no YAML, or not plain data; in one line.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path}: {path.stat().st_size:,} bytes, which is no recipe")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not readable as YAML: {error}") from error
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise UserError(f"{path}: not readable as YAML: {error}") from error


def parse_yaml(text: str) -> Any:
    """The value that a YAML text stands for.

    Raises:
        ValueError: no YAML, or not plain data; in one line.
    """
    try:
        value = yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader with rules of its own)
        _check_texts(value)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError, TypeError, KeyError, AttributeError) as error:
        # PyYAML hands on whatever int(), float() and datetime() say of a tag's text, and trips over some tags itself.
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            said if isinstance(error, yaml.YAMLError | ValueError) else f"a value is malformed ({said})"
        ) from error
    return value


class _Loader(yaml.SafeLoader):
    """PyYAML reads ``1e-4`` as text, after YAML 1.1; people mean a number."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._sizes: dict[int, int] = {}
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A node; refuses what would take more memory than it has letters, before anything is built from it."""
        event = self.peek_event()
        self._depth += 1
        if self._depth > MOST_DEPTH:
            raise _refused(f"nested more than {MOST_DEPTH} deep", event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._sizes:
                raise _refused("a value holds itself", event)
            return node
        size = 1
        if isinstance(node, yaml.MappingNode):
            size += sum(self._sizes[id(part)] for pair in node.value for part in pair)
            keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if len(set(keys)) < len(keys):
                twice = next(text for tag, text in keys if keys.count((tag, text)) > 1)
                raise _refused(f"the key '{twice}' stands there twice", event)
        elif isinstance(node, yaml.SequenceNode):
            size += sum(self._sizes[id(part)] for part in node.value)
        if size > MOST_NODES:
            raise _refused(f"more than {MOST_NODES:,} values", event)
        self._sizes[id(node)] = size
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)$"), list("-+0123456789.")
)


def _refused(why: str, event: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=why, problem_mark=event.start_mark)


def _check_texts(value: Any) -> None:
    """Refuses texts that no path and no file can hold."""
    if isinstance(value, str):
        if "\0" in value:
            raise ValueError("a text holds a zero byte")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError("a text holds half of a surrogate pair, which is no character") from error
    elif isinstance(value, dict):
        for key, inner in value.items():
            _check_texts(key)
            _check_texts(inner)
    elif isinstance(value, list | tuple | set):
        for inner in value:
            _check_texts(inner)
