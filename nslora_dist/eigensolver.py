"""The r smallest eigenpairs of a large Gram matrix, without its full spectrum (docs/methods.md §1.2 and §6).

A Cholesky factor of G + shift·I drives a block Krylov search (inverse iteration that keeps every iterate, each step a
Rayleigh-Ritz projection in float64), after which a few correction steps clean the result. Four facts shape it:

- The factor only proposes directions, from residuals Gv − θv taken in float64: a float32 factor still leads to the
  eigenvectors of G and not to those of the rounded factor, and the factor can be exchanged in mid-search.
- Rounding gives a Gram slightly negative eigenvalues, so the shift starts at a multiple of the rounding of a typical
  diagonal entry and grows until the factorisation succeeds. The *median* entry is taken because the rounding in a huge
  outlier channel stays in that channel's row and column, where the channel's own size makes it harmless.
- A float32 factor needs a larger shift than a float64 one, and eigenvalues far below the shift look alike to it. Where
  the wanted ones turn out to lie there, the search goes on with a float64 factor.
- Rayleigh-Ritz minimises vᵀGv, rounding included: inside the null space it would trade negative rounding against a
  real leak. The last step is therefore a plain correction V − (G + shift)⁻¹(GV − VΘ), which damps whatever lies along
  a large eigenvalue λ by about shift/λ.

Block Krylov iteration needs no spectral gap to come within a factor of the best subspace (Musco and Musco 2015,
arXiv 1504.05477), and that is what a small leak asks for.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_SHIFT_START = 16.0  # times the rounding of the median diagonal entry; below it a float32 factor nearly always fails
_SHARP_SHIFT = (
    2.0  # the same for the float64 factor of a float32 Gram, which only has to exceed the Gram's own rounding
)
_SHIFT_GROWTH = (1.0, 8.0, 64.0, 4096.0, 2.0**24)  # slow while a little more may do, then in leaps
_MAX_STEPS = 8  # Krylov blocks before the corrections
_MAX_CORRECTIONS = 4
_CACHED_ENTRIES = 2**26  # up to this size (8192²) a float64 copy is kept; past it rows are converted as they are used


@dataclass(frozen=True)
class Eigenpairs:
    """Smallest eigenpairs of a symmetric matrix.

    Attributes:
        vectors: (d, r) float64, orthonormal columns.
        values: (r,) float64, ascending.
        iterations: Block steps spent, each of them one product with G and one solve.
        residual: ‖G V − V Θ‖_F / ‖G‖_F.
    """

    vectors: Tensor
    values: Tensor
    iterations: int
    residual: float


def product(gram: Tensor, block: Tensor) -> Tensor:
    """G @ block in the block's precision, converting G by rows so that no second matrix of its size is held.

    Args:
        gram: (d, d), any float dtype.
        block: (d, p).

    Returns:
        (d, p) in the block's dtype.
    """
    if gram.dtype == block.dtype:
        return gram @ block
    out = torch.empty(gram.shape[0], block.shape[1], dtype=block.dtype, device=block.device)
    rows = max(1, 2**22 // gram.shape[1])
    for start in range(0, gram.shape[0], rows):
        torch.mm(gram[start : start + rows].to(block.dtype), block, out=out[start : start + rows])
    return out


def block_size(rank: int) -> int:
    """Columns iterated for `rank` wanted ones; the surplus speeds up the last wanted ones."""
    return rank + max(16, rank // 4)


def smallest_eigenpairs(gram: Tensor, *, rank: int, tolerance: float) -> Eigenpairs | None:
    """Finds the `rank` smallest eigenpairs by shifted Cholesky and block Krylov iteration.

    Accepted is a result that passed two bounds, otherwise the search is repeated from where it stands with a float64
    factor, and given up after that.

    - Backward error: V is exactly invariant for a matrix within 2‖GV − VΘ‖ of G; the root mean square residual must
      stay below the shift (rounding) or below the largest wanted eigenvalue.
    - Leak: by how it fell, Σθ is at most `tolerance` of itself above its limit; or all wanted eigenvalues lie within
      the rounding band around zero, where one null vector is as good as another.

    Args:
        gram: (d, d) symmetric, positive semi-definite up to rounding, float32 or float64, d ≥ 10 · block_size(rank).
        rank: Eigenpairs wanted.
        tolerance: Part of Σθ by which it may still be too high, judged from how it fell.

    Returns:
        The eigenpairs, or None where no factorisation succeeded or a bound was missed: use a full `eigh` then.
    """
    diagonal = gram.diagonal().double()
    typical = float(diagonal.median()) or float(diagonal.mean())
    if typical <= 0.0:
        return None
    return _Search(gram, rank=rank, tolerance=tolerance, typical=typical).run()


class _Search:
    """State of one search: the Krylov space so far, its image under G, and the factor in use."""

    def __init__(self, gram: Tensor, *, rank: int, tolerance: float, typical: float) -> None:
        self.gram, self.rank, self.tolerance = gram, rank, tolerance
        self.exact = gram.double() if gram.numel() <= _CACHED_ENTRIES else gram
        self.scale = 1.0 / typical  # the factor is that of scale·G, so that float32 neither over- nor underflows
        self.unit = typical * torch.finfo(gram.dtype).eps / 2
        self.floor = 4 * torch.finfo(torch.float64).eps * float(gram.diagonal().double().sum())  # of the projections
        self.noise = 0.0  # how far below zero the Ritz values reach
        self.before = self.drop = float("inf")  # the last Σθ, and by how much it had fallen
        self.steps = 0
        self.shift = 0.0
        self.factor: Tensor | None = None
        self.vectors = torch.empty(0)
        empty = torch.empty(gram.shape[0], 0, dtype=torch.float64, device=gram.device)
        self.space, self.image = empty, empty

    def run(self) -> Eigenpairs | None:
        if not self._refactor(self.gram.dtype, _SHIFT_START * self.unit):
            return None
        start = torch.randn(self.gram.shape[0], block_size(self.rank), generator=torch.Generator().manual_seed(0))
        block = self._solve(torch.linalg.qr(self._solve(start.to(self.gram.device, torch.float64)))[0])
        found = self._correct(self._expand(block))
        if found is None and self._sharpen():
            self.space, self.image = self.space[:, :0], self.image[:, :0]
            found = self._correct(self._expand(self._solve(self.vectors)))
        return found

    def _refactor(self, dtype: torch.dtype, shift: float) -> bool:
        """Factors G + shift·I, growing the shift until it succeeds. On failure nothing changes and False returns."""
        for growth in _SHIFT_GROWTH:
            if self.factor is not None and shift * growth > self.shift / 2:
                return False  # no better than the one in use
            source = self.exact if dtype == self.exact.dtype else self.gram
            shifted = source.to(dtype, copy=True).mul_(self.scale)
            shifted.diagonal().add_(shift * growth * self.scale)
            factor, info = torch.linalg.cholesky_ex(shifted)
            if int(info) == 0 and bool(torch.isfinite(factor.diagonal()).all()):
                self.factor, self.shift = factor, shift * growth
                return True
        return False

    def _sharpen(self) -> bool:
        """Exchanges a float32 factor for a float64 one with a smaller shift. False where there is nothing to gain."""
        if self.factor is None or self.factor.dtype == torch.float64:
            return False
        return self._refactor(torch.float64, max(2 * self.noise, _SHARP_SHIFT * self.unit))

    def _solve(self, block: Tensor) -> Tensor:
        """(G + shift·I)⁻¹ block: (d, p) float64 → same. Unit columns on the way, so that tiny ones survive float32."""
        assert self.factor is not None
        length = block.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
        half = torch.linalg.solve_triangular(self.factor, (block / length).to(self.factor.dtype), upper=False)
        return torch.linalg.solve_triangular(self.factor.mT, half, upper=True).double() * (length * self.scale)

    def _settled(self, values: Tensor, tolerance: float) -> bool:
        """True where Σθ is still too high by a small part of itself only, or all wanted values are rounding."""
        now = float(values[: self.rank].sum())
        drop, last_drop = max(self.before - now, 0.0), self.drop
        self.before, self.drop = now, drop
        # Drops shrink about geometrically, so what is left to gain is the geometric tail of the last two.
        excess = drop * drop / (last_drop - drop) if drop < last_drop < float("inf") else drop
        self.noise = max(0.0, -float(values[0]))
        band = max(self.noise, self.floor)
        return float(values[self.rank - 1]) <= band or excess <= tolerance * (now + self.rank * band)

    def _expand(self, block: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Grows the Krylov space until the wanted Ritz values settle: (d, p) vectors, (p,) values, (d, p) residual."""
        self.before = self.drop = float("inf")
        for step in range(_MAX_STEPS):
            self.steps += 1
            for _ in range(2):  # twice is enough to be orthonormal to rounding
                block = torch.linalg.qr(block - self.space @ (self.space.mT @ block))[0]
            self.space = torch.cat([self.space, block], dim=1)
            self.image = torch.cat([self.image, product(self.exact, block)], dim=1)
            values, rotation = _ritz(self.space, self.image)
            values, rotation = values[: block.shape[1]], rotation[:, : block.shape[1]]
            vectors = self.space @ rotation
            residual = self.image @ rotation - vectors * values
            # Twice the tolerance, because the correction that follows at least halves the excess, and is judged itself.
            if self._settled(values, 2 * self.tolerance) or step == _MAX_STEPS - 1:
                break
            if float(values[self.rank - 1]) < self.shift:
                self._sharpen()
            block = self._solve(residual)
        return vectors, values, residual

    def _correct(self, ritz: tuple[Tensor, Tensor, Tensor]) -> Eigenpairs | None:
        """Corrections V − (G + shift)⁻¹(GV − VΘ) until both bounds hold; None where they never do."""
        self.vectors, values, residual = ritz
        for _ in range(_MAX_CORRECTIONS):
            self.steps += 1
            self.vectors, values, residual = self._rotate(self.vectors - self._solve(residual))
            error = float(residual[:, : self.rank].norm())
            invariant = error <= self.rank**0.5 * max(self.shift, float(values[self.rank - 1]))
            if self._settled(values, self.tolerance) and invariant:
                relative = error / float(torch.linalg.vector_norm(self.exact, dtype=torch.float64))
                return Eigenpairs(self.vectors[:, : self.rank], values[: self.rank], self.steps, relative)
        return None

    def _rotate(self, block: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rayleigh-Ritz inside the block's own span: (vectors, values, residual), float64."""
        block = torch.linalg.qr(block)[0]
        image = product(self.exact, block)
        values, rotation = _ritz(block, image)
        vectors = block @ rotation
        return vectors, values, image @ rotation - vectors * values


def _ritz(space: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    projected = space.mT @ image
    values, rotation = torch.linalg.eigh((projected + projected.mT) / 2)
    return values, rotation


def check_gram(gram: Tensor) -> None:
    """Raises ValueError unless the Gram is square, float32 or float64, finite and (on a sample of rows) symmetric."""
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or gram.shape[0] == 0:
        raise ValueError(f"gram has shape {tuple(gram.shape)}: expected a square (d_in, d_in) matrix.")
    if gram.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"gram has dtype {gram.dtype}: accumulate it in float32 or float64.")
    low, high = torch.aminmax(gram)  # carries NaN along and needs no matrix of booleans
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise ValueError(
            f"gram holds values that are not finite (range {float(low)}..{float(high)}): overflow in fp16?"
        )
    sample = torch.linspace(0, gram.shape[0] - 1, 8, device=gram.device).long()
    size = gram.diagonal().double().abs().sqrt()
    gap = (gram[sample] - gram[:, sample].mT).double().abs()
    if bool((gap > 1e-3 * size[sample, None] * size).any()):
        raise ValueError("gram is not symmetric: mirror or unpack its triangle first.")


def column_signs(columns: Tensor) -> Tensor:
    """(d, r) → (r,): the sign of each column's entry of largest magnitude, 1 for a zero column."""
    largest = columns.gather(0, columns.abs().argmax(dim=0, keepdim=True))[0]
    return torch.where(largest < 0, -torch.ones_like(largest), torch.ones_like(largest))


def fix_signs(columns: Tensor) -> Tensor:
    """The columns, each with the sign that makes its entry of largest magnitude positive."""
    return columns * column_signs(columns)
