"""Values that break readers, and mutations of real files that put them where they hurt."""

import copy
import json
from typing import Any

from hypothesis import strategies as st

TEXTS = [
    "",
    " ",
    "\0",
    "\ud800",
    "a" * 5000,
    "../../escape",
    "/etc/passwd",
    "~nobody_of_that_name/x",
    "..",
    ".",
    "-",
    "{prompt}",
    "a\nb",
    "__class__",
    "[key]",
    "null",
    "(((((a+)+)+)+)+)$",
    "*",
    "model.layers.0.self_attn.q_proj",
]
NUMBERS = [0, -1, 1, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400, 0.0, -0.0, 1e-320, 1e308, float("inf"), float("nan")]
DEEP: Any = []
for _ in range(60):
    DEEP = [DEEP]

# Copies: what was sampled is the same object every time, and mutations change it in place.
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.sampled_from(TEXTS),
    st.text(max_size=8),
    st.integers(-3, 300),
    st.floats(),
    st.sampled_from([[], {}, [[]], [None], {"a": 1}, DEEP, [0, 8], ["q_proj"], [1, 1], "F32", "I64", "F4", "BF16"]),
).map(copy.deepcopy)
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner))


@st.composite
def mutated(draw: st.DrawFn, tree: Any) -> Any:
    """``tree`` with one to three of its values replaced, taken out, renamed or joined by another."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        at, parent, key = tree, None, None
        while isinstance(at, dict | list) and at and (parent is None or draw(st.integers(0, 4))):
            parent = at
            key = (
                draw(st.sampled_from(sorted(at, key=str)))
                if isinstance(at, dict)
                else draw(st.integers(0, len(at) - 1))
            )
            at = at[key]
        if parent is None:
            return draw(values)
        action = draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename", "add"]))
        if action == "replace":
            parent[key] = draw(values)
        elif action == "remove":
            del parent[key]
        elif isinstance(parent, list):
            parent.append(draw(values))
        elif action == "rename":
            parent[draw(st.sampled_from(TEXTS))] = parent.pop(key)
        else:
            parent[draw(st.sampled_from(TEXTS) | st.text(max_size=4))] = draw(values)
    return tree


@st.composite
def spoiled(draw: st.DrawFn, text: str, fragments: list[str]) -> str:
    """``text`` with one to three pieces of it cut out or replaced by a fragment."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.sampled_from([0, 0, 1, 5, 40])))
        text = text[:start] + draw(st.sampled_from(fragments) | st.text(max_size=6) | st.just("")) + text[end:]
    return text


def as_json(value: Any) -> str:
    """JSON as another writer could have it: NaN, infinities and surrogates too; of keys that are no texts nothing."""
    return json.dumps(value, skipkeys=True)


def safetensors_file(header: Any, data: bytes, *, length: int | None = None) -> bytes:
    """A safetensors file with any header and any length stated for it."""
    text = (header if isinstance(header, str) else as_json(header)).encode("utf-8", "surrogatepass")
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data
