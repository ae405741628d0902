"""The streamed Gram pass: recipe and checkpoint in, null space on disk out (METHODS.md §1, §1c, §1d)."""
