"""The recipe's ``adapter``: which update is trained, where it starts, what of it stays frozen."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from nslora_dist.recipe_types import Count, Names, Positive, Section

LINEAR_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NULL_DIM = 256
"""Most null directions of a weight kept a side: four times a rank of 64, of the 20,480 that a 70B down_proj has."""
NULL_THRESHOLD = 0.1
"""σ / σ_max up to which a direction of a weight counts as null: it passes 1% of the energy that the strongest does.

The short side of a trained rectangular matrix is well-conditioned: in ``recipes/tiny/base`` no more than 0 to 5
directions of gate, up, down, k and v have σ ≤ 0.05 σ_max, and 8 to 80 have σ ≤ 0.1 σ_max.
"""

BudgetOver = Literal["module", "total"]

METHODS_OWN = ("form", "freeze_a", "a_init", "null_dim", "null_threshold", "interference_budget", "budget_over")
"""Of ``adapter``, what is one method's own: a baseline of another method does not take it over."""


class AdapterSection(Section):
    """The low-rank update ΔW = alpha/rank · B A of every target module."""

    method: Literal["lora_null", "lora", "null_lora"] = "lora_null"
    """``lora_null``: A from the null space of the calibration activations (docs/methods.md §1); ``lora``: plain LoRA, A
    random; ``null_lora``: ΔW in the null space of the weights, one half of A and of B frozen (docs/methods.md §2)."""
    form: Literal["delta", "residual"] = "delta"
    """``delta`` trains B from zero on the untouched base; ``residual``, for ``lora_null`` alone, starts from W's own
    part in the null space and takes it off again: LoRA-Null v1 with ``freeze_a: false``, else v2."""
    rank: Count
    """r, at most the width of the narrowest input; in ``null_lora`` even, and half of it trains."""
    alpha: Positive | None = None
    """The update is multiplied by alpha / rank; null takes the rank, which makes that 1."""
    target_modules: Names = LINEAR_TARGETS
    """The linears that are adapted, by the last part of their names, in every block."""
    freeze_a: bool | None = None
    """Whether A stays as it starts; null: true for ``lora_null``, whose delta form takes nothing else, false for
    ``lora``. Not for ``null_lora``."""
    a_init: Literal["projected", "orthonormal"] = "projected"
    """How ``lora_null`` starts A: from W's projection onto the null space, which ``form: residual`` needs, or with the
    null space's orthonormal basis itself."""
    null_dim: Count = NULL_DIM
    """For ``null_lora`` alone: null directions of a weight kept a side, at least the rank; more cost memory."""
    null_threshold: Annotated[float, Field(ge=1e-6, lt=1.0)] = NULL_THRESHOLD
    """For ``null_lora`` alone: σ / σ_max up to which a direction of a weight counts as null."""
    interference_budget: Annotated[float, Field(ge=1e-6)] | None = None
    """The most that ‖ΔW X‖ / ‖W X‖ may come to on the mixture of all calibration sources: B is scaled back to it after
    every step (docs/methods.md §1e). For a frozen A and a B from zero: ``lora_null`` in delta form, ``lora`` with
    ``freeze_a: true``."""
    budget_over: BudgetOver = "module"
    """``module``: every module keeps within the budget; ``total``: the root mean square over modules does, and all B
    are scaled by one factor."""

    @property
    def scale(self) -> float:
        """alpha / rank; alpha defaults to the rank, which makes it 1."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def a_is_frozen(self) -> bool:
        """Whether A stays as initialised: by default for lora_null, not for lora."""
        return self.method == "lora_null" if self.freeze_a is None else self.freeze_a

    @property
    def measures_a(self) -> bool:
        """Whether training starts with a pass over the calibration texts, to know a random A's A G Aᵀ."""
        return self.method == "lora" and self.interference_budget is not None

    @model_validator(mode="after")
    def _form(self) -> "AdapterSection":
        if self.method == "lora" and self.form == "residual":
            raise ValueError("form 'residual' needs method 'lora_null'; plain LoRA starts at zero: use form: delta")
        if self.method == "lora_null" and self.form == "delta" and self.freeze_a is False:
            raise ValueError(
                "the delta form equals LoRA-Null only while A is frozen: set freeze_a: true, or form: residual for v1"
            )
        if self.form == "residual" and self.a_init == "orthonormal":
            raise ValueError("form 'residual' starts from B0 A0 = W U Uᵀ and needs a_init: projected")
        return self

    @model_validator(mode="after")
    def _budget(self) -> "AdapterSection":
        if self.interference_budget is None:
            if self.budget_over != "module":
                raise ValueError("budget_over says what interference_budget is over: set that too, or leave both out")
        elif self.method == "null_lora" or self.form != "delta" or not self.a_is_frozen:
            here = f"form '{self.form}'" if self.method == "lora_null" else f"method '{self.method}'"
            here += " with A trained" if self.method == "lora" else ""
            raise ValueError(
                f"interference_budget needs an A that stays as it was and a B that starts from zero, and {here} has "
                "not: set method: lora_null and form: delta, or method: lora and freeze_a: true, or "
                "interference_budget: null"
            )
        return self

    @model_validator(mode="after")
    def _null_lora(self) -> "AdapterSection":
        if self.method != "null_lora":
            for key, default in (("null_dim", NULL_DIM), ("null_threshold", NULL_THRESHOLD)):
                if getattr(self, key) != default:
                    raise ValueError(f"{key} is for method 'null_lora': leave it out, or set method: null_lora")
            return self
        if self.form == "residual" or self.a_init == "orthonormal" or self.freeze_a is not None:
            raise ValueError(
                "method 'null_lora' freezes one half of A and of B and trains the other from zero: "
                "leave form, a_init and freeze_a out"
            )
        if self.rank % 2:
            raise ValueError(
                f"method 'null_lora' halves the rank, and {self.rank} is odd: use rank: {self.rank + 1} "
                f"for the parameters of a LoRA of rank {(self.rank + 1) // 2}"
            )
        if self.null_dim < self.rank:
            raise ValueError(f"null_dim {self.null_dim} leaves no room for rank {self.rank}: set null_dim: {self.rank}")
        return self
