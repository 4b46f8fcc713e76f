"""Orders of convergence of the ODE solvers on an analytic score: a mixture of Gaussians, diffused exactly.

    python -m benchmarks.studies.solvers --figure docs/figures/solvers.png

Draws the error of the state at the smallest noise (λ of timestep 0), against DPM-Solver++(2M) at ``--reference`` steps, over
the number of steps, on uniform log-SNR and on respaced integer timesteps. float64 on a CPU; nothing is timed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.speed import measure
from ditkernels.diffusion import create_diffusion
from ditkernels.diffusion.schedule import half_log_snr

MEANS = torch.tensor([[-1.2, 0.4], [0.9, 1.1], [0.2, -1.0]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
VARIANCE = 0.3**2
SOLVERS = {"DDIM": "ddim", "DPM-Solver++(2M)": "dpm_solver"}
SPACINGS = {"uniform log-SNR": "logsnr{}", "respaced timesteps": "{}"}
POINTS = 256


class GaussianMixture:
    """The exact noise prediction for data from a mixture of Gaussians: −σ times the score of the diffused mixture.

    x: (B, 2) float64, t: (B,) timesteps of the linear schedule, fractions allowed.
    """

    def __init__(self) -> None:
        self.half = half_log_snr(create_diffusion("").alphas_cumprod)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        at = np.interp(t.double().numpy(), np.arange(len(self.half)), self.half)
        half = torch.from_numpy(at).view(-1, 1)
        alpha, sigma = torch.sigmoid(2 * half).sqrt(), torch.sigmoid(-2 * half).sqrt()
        variance = alpha**2 * VARIANCE + sigma**2
        apart = x.unsqueeze(1) - alpha.unsqueeze(1) * MEANS
        log_density = WEIGHTS.log() - apart.square().sum(2) / (2 * variance)
        nearness = log_density.softmax(1).unsqueeze(2)
        return sigma * (nearness * apart).sum(1) / variance


def state_at_the_smallest_noise(solver: str, respacing: str) -> Tensor:
    """Where trajectories (POINTS, 2) stand at timestep 0, one step before the last, which is not the ODE's."""
    diffusion = create_diffusion(respacing, learn_sigma=False)
    noise = torch.randn(POINTS, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    loop = getattr(diffusion, f"{solver}_sample_loop_progressive")
    return list(loop(GaussianMixture(), noise.shape, noise, clip_denoised=False))[-2]["sample"]


def slope(steps: list[int], errors: list[float]) -> float:
    """The order of convergence: minus the slope of log error over log of the number of intervals."""
    return float(-np.polyfit(np.log(np.array(steps) - 1), np.log(errors), 1)[0])


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--steps", type=measure.numbers, default=[17, 33, 65, 129, 257, 513])
    parser.add_argument("--reference", type=measure.positive, default=4097, help="steps of the reference")
    parser.add_argument("--figure", type=Path, metavar="FILE")
    args = parser.parse_args()
    rows = []
    for spacing, respacing in SPACINGS.items():
        exact = state_at_the_smallest_noise("dpm_solver", SPACINGS["uniform log-SNR"].format(args.reference))
        for name, solver in SOLVERS.items():
            errors = [
                (state_at_the_smallest_noise(solver, respacing.format(n)) - exact).square().mean().sqrt().item() for n in args.steps
            ]
            order = slope(args.steps, errors)
            rows.append({"solver": name, "spacing": spacing, "order": order, "steps": args.steps, "errors": errors})
    measure.report("solvers", args, rows, ["solver", "spacing", "order"])
    if args.figure is not None:
        draw(rows, args.figure)


def draw(rows: list[dict], path: Path) -> None:
    """Error over steps, both axes logarithmic, the fitted orders in the legend."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for row in rows:
        style = "-" if row["spacing"] == "uniform log-SNR" else "--"
        colour = "tab:blue" if row["solver"] == "DDIM" else "tab:orange"
        label = f"{row['solver']}, {row['spacing']}: order {row['order']:.2f}"
        axes.loglog(row["steps"], row["errors"], style, marker="o", markersize=3, color=colour, label=label)
    axes.set(xlabel="steps", ylabel="error (root mean square)", title="Solvers on the score of a Gaussian mixture")
    axes.grid(which="both", alpha=0.2)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Software": None})


if __name__ == "__main__":
    main()
