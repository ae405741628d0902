"""Fast null basis + thin projected initialisation against two full SVDs, and against float64 eigh.

    python benchmarks/null_space.py [--json PATH] [--threads 1] [--widths 4096 8192] [--wide-baseline]

For every spectrum, activations are drawn with that covariance, a float32 Gram is summed over calibration tokens, and
every basis is judged by its leak on held-out activations drawn in float64. Timed in one run, side by side:

- baseline: full SVD of the Gram, then full SVD of the d_out × d_in matrix W U Uᵀ (how the method was published);
- eigh: float64 eigh of the Gram + projected_init;  fast: null_basis(method="fast") + projected_init.

`null_space_speedup_4096` (baseline / fast) is the lowest over the spectra, `null_space_leak_ratio_4096`
(fast / eigh) the highest. Compare ratios, not seconds. On a machine shared with other work, run with --threads 1
(threads that wait for each other distort small kernels most) and look at the ratios of processor time as well
(`..._cpu`), from which waiting for others is left out.
Above 4096 the baseline takes minutes and is left out unless --wide-baseline is given.
"""

from typing import Any

import torch
from _common import median_seconds, median_wall_and_cpu, parser, write_result
from torch import Tensor

from nslora_dist.null_space import NullBasis, null_basis, projected_init, random_leak

SPECTRA = ("slow_decay", "eight_decades_outliers", "rank_deficient")
TOKENS_PER_BATCH = 2048


def activation_factor(width: int, spectrum: str, generator: torch.Generator) -> Tensor:
    """M (width, width), float64: activations are rows of Z M with Z standard normal."""
    place = torch.arange(width, dtype=torch.float64)
    channels = torch.ones(width, dtype=torch.float64)
    if spectrum == "eight_decades_outliers":
        energy = 10 ** (-8 * place / (width - 1))
        channels[torch.randperm(width, generator=generator)[: width // 256]] = 300.0
    else:
        energy = 1 / (place + 1)
        if spectrum == "rank_deficient":
            energy[width * 3 // 4 :] = 0
    # Two rounds of a random Kronecker rotation mix every channel with every other at a small part of a full QR's cost.
    high = next(divisor for divisor in range(int(width**0.5), 0, -1) if width % divisor == 0)
    mixing = torch.diag(energy.sqrt())
    for _ in range(2):
        outer, inner = (random_rotation(size, generator) for size in (high, width // high))
        mixing = (outer.mT @ (mixing.view(width, high, -1) @ inner)).reshape(width, width)
        mixing = mixing[:, torch.randperm(width, generator=generator)]
    return mixing * channels


def random_rotation(size: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


def activations(factor: Tensor, tokens: int, generator: torch.Generator) -> Tensor:
    return torch.randn(tokens, factor.shape[0], generator=generator, dtype=factor.dtype) @ factor


def full_svds(gram: Tensor, weight: Tensor, rank: int) -> None:
    basis = torch.linalg.svd(gram)[0][:, -rank:]
    torch.linalg.svd(weight @ (basis @ basis.mT))


def held_out_leak(held_out: Tensor, basis: Tensor) -> float:
    return float((held_out @ basis.double()).square().sum() / held_out.square().sum())


def measure(width: int, spectrum: str, *, rank: int, repeats: int, baseline: bool, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    factor = activation_factor(width, spectrum, generator)
    gram = torch.zeros(width, width)
    single = factor.float()
    for _ in range(max(1, 2 * width // TOKENS_PER_BATCH)):
        batch = activations(single, TOKENS_PER_BATCH, generator)
        gram.addmm_(batch.mT, batch)
    held_out = activations(factor, 1024, generator)
    del factor, single
    weight = torch.randn(width, width, generator=generator) / width**0.5
    found: dict[str, NullBasis] = {}

    def solve(method: Any) -> None:
        found[method] = null_basis(gram, rank=rank, method=method)
        projected_init(weight, found[method].basis)

    times = {"fast": median_wall_and_cpu(lambda: solve("fast"), repeats)}
    times["eigh"] = median_wall_and_cpu(lambda: solve("eigh"), 1)
    if baseline:
        times["baseline"] = median_wall_and_cpu(lambda: full_svds(gram, weight, rank), 1)
    seconds, cpu = ({name: pair[place] for name, pair in times.items()} for place in (0, 1))
    leaks = {method: held_out_leak(held_out, each.basis) for method, each in found.items()}
    key = f"{spectrum}_{width}"
    figures: dict[str, Any] = {f"seconds_{name}_{key}": round(value, 3) for name, value in seconds.items()}
    figures |= {f"cpu_seconds_{name}_{key}": round(value, 3) for name, value in cpu.items()}
    figures |= {f"leak_held_out_{name}_{key}": value for name, value in leaks.items()}
    figures |= {
        f"leak_random_{key}": random_leak(gram, rank=rank, seed=seed),
        f"leak_ratio_{key}": round(leaks["fast"] / leaks["eigh"], 4),
        f"speedup_over_eigh_{key}": round(seconds["eigh"] / seconds["fast"], 2),
        f"speedup_over_eigh_cpu_{key}": round(cpu["eigh"] / cpu["fast"], 2),
        f"method_{key}": found["fast"].method,
        f"iterations_{key}": found["fast"].iterations,
    }
    if baseline:
        figures[f"speedup_{key}"] = round(seconds["baseline"] / seconds["fast"], 2)
        figures[f"speedup_cpu_{key}"] = round(cpu["baseline"] / cpu["fast"], 2)
    return figures


def measure_shape(d_out: int, d_in: int, *, rank: int, repeats: int, seed: int, baseline: bool) -> dict[str, Any]:
    """Projected initialisation alone: thin against the full SVD of W U Uᵀ."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(d_out, d_in, generator=generator)
    basis = torch.linalg.qr(torch.randn(d_in, rank, generator=generator))[0]
    thin = median_seconds(lambda: projected_init(weight, basis), repeats)
    a0, b0 = projected_init(weight, basis)
    target = (weight.double() @ basis.double()) @ basis.double().mT
    key = f"{d_out}x{d_in}"
    error = float((b0.double() @ a0.double() - target).norm() / target.norm())
    figures: dict[str, Any] = {f"seconds_init_{key}": round(thin, 4), f"relative_error_init_{key}": error}
    if baseline:
        full = median_seconds(lambda: torch.linalg.svd(weight @ (basis @ basis.mT)), 1)
        figures |= {f"seconds_init_full_svd_{key}": round(full, 3), f"speedup_init_{key}": round(full / thin, 1)}
    return figures


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("--widths", type=int, nargs="+", default=[4096, 8192])
    cli.add_argument("--spectra", nargs="+", choices=SPECTRA, default=list(SPECTRA))
    cli.add_argument("--wide-spectra", nargs="+", choices=SPECTRA, default=list(SPECTRA), help="above 4096")
    cli.add_argument("--rank", type=int, default=64)
    cli.add_argument("--repeats", type=int, default=3, help="of the fast path; the slow ones run once")
    cli.add_argument("--wide-baseline", action="store_true", help="run the two full SVDs above 4096 as well (minutes)")
    args = cli.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    figures: dict[str, Any] = {}
    settings = {name: value for name, value in vars(args).items() if name != "json"} | {"seed": 0}

    def add(new: dict[str, Any]) -> None:
        figures.update(new)
        for name, value in new.items():
            print(f"{name:58s} {value}", flush=True)
        write_result(args.json, figures, settings)  # after every case, so that an interrupted run keeps what it has

    torch.linalg.eigh(torch.eye(64))  # the first call loads the library
    for d_out, d_in in ((1024, 4096), (11008, 4096), (4096, 11008)):  # a key projection, gate or up, down
        full = max(d_out, d_in) <= 4096 or args.wide_baseline
        add(measure_shape(d_out, d_in, rank=args.rank, repeats=args.repeats, seed=0, baseline=full))
    for width in sorted(args.widths):
        wide = width > 4096
        baseline = not wide or args.wide_baseline
        spectra = args.wide_spectra if wide else args.spectra
        for spectrum in spectra:
            repeats = 1 if wide else args.repeats
            add(measure(width, spectrum, rank=args.rank, repeats=repeats, baseline=baseline, seed=0))

        def over_spectra(choose: Any, figure: str, width: int = width, spectra: list[str] = spectra) -> Any:
            return choose(figures[f"{figure}_{each}_{width}"] for each in spectra)

        summary = {
            f"null_space_leak_ratio_{width}": over_spectra(max, "leak_ratio"),
            f"null_space_speedup_over_eigh_{width}": over_spectra(min, "speedup_over_eigh"),
        }
        if baseline:
            summary[f"null_space_speedup_{width}"] = over_spectra(min, "speedup")
            summary[f"null_space_speedup_cpu_{width}"] = over_spectra(min, "speedup_cpu")
        add(summary)


if __name__ == "__main__":
    main()
