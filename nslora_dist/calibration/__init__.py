"""The streamed Gram pass: recipe and checkpoint in, null space on disk out (docs/methods.md §1, §1c, §1d)."""
