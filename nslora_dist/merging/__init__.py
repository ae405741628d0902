"""Several LoRA adapters of one base into one: factors in, factors out, no dense ΔW (docs/methods.md §3, §4)."""
