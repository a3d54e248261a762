"""What a Taylor polynomial explains of the gradient of a U-Net of 2 million parameters on MNIST.

For single draws of the training set and of t, several noises each, it takes the gradient g of the
plain loss and c of the loss of the polynomial of order k around the clean sample
(``lightning_vr/estimators/taylor/terms.py``). With the coefficient fitted on other samples at like
noise levels, β = Cov(g, c) / Var(c), the variance of g - β (c - E c) follows from covariances over
the noise alone. The mean of c of order 2 is not known in so many dimensions; what is measured here
is what it would gain if it were.
Source: Jeha et al. 2024, arXiv 2408.12270: on MNIST 1.4 times less variance with k = 2.
"""

import torch
from diffusers import UNet2DModel
from digits_models import BATCH, LEARNING_RATE
from study import Study, bootstrap, interval, markdown
from torch import Tensor

from lightning_vr import Diffusion
from lightning_vr.core.rng import generator
from lightning_vr.core.types import Noised
from lightning_vr.data import ImageFolder
from lightning_vr.estimators.taylor.forward_mode import forward_mode
from lightning_vr.process.schedules import expand

ORDERS, BINS, NOISES = (0, 1, 2), 3, 4
LEVELS = (0.002, 0.02, 0.1, 0.3)


def run(study: Study) -> None:
    images = mnist(study)
    if images is None:
        return
    steps, count, channels = (1, 2), 6, [8, 8, 16]
    if not study.is_quick:
        steps, count, channels = (50, 200), 48, [16, 32, 128]
    torch.manual_seed(0)
    found = Diffusion(unet(channels), sigma_data=0.6)
    print(f"{sum(p.numel() for p in found.parameters()):,} parameters")
    rows = []
    for step in steps:
        path = study.folder / f"taylor_mnist_{step}.pt"
        if not path.exists():
            study.check_time()
            found.load_state_dict(weights(found, step, images, study))
            torch.save(measure(found, images, count), path)
        rows += summary(step, torch.load(path, weights_only=True))
    header = ("step", "order", *(f"noise, s from {name}" for name in ("low", "middle", "high")))
    print(markdown((*header, "whole gradient"), rows))
    found.load_state_dict(weights(found, steps[-1], images, study))
    print(polynomial_errors(found, images))


def mnist(study: Study) -> Tensor | None:
    """Return images ``(N, 1, 28, 28)`` in [-1, 1]."""
    path = study.images("mnist")
    if path is None:
        return None
    rows = ImageFolder(path, 28, channels=1).build_datasets()[0]
    return torch.stack([rows[i]["image"] for i in range(len(rows))])


def unet(widths: list[int], size: int = 28, channels: int = 1) -> UNet2DModel:
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=["DownBlock2D"] * 3,
        up_block_types=["UpBlock2D"] * 3,
    )


def weights(found: Diffusion, step: int, images: Tensor, study: Study) -> dict[str, Tensor]:
    """Return the weights after so many steps, from the last ones kept."""
    path = study.folder / "taylor_mnist_weights.pt"
    kept = torch.load(path, weights_only=True) if path.exists() else {"step": 0}
    optimizer = torch.optim.AdamW(found.parameters(), lr=LEARNING_RATE)
    if kept["step"]:
        found.load_state_dict(kept["weights"])
        optimizer.load_state_dict(kept["optimizer"])
    for now in range(kept["step"], step):
        rows = torch.randint(len(images), (BATCH // 2,), generator=generator("mnist", now))
        loss = found.loss(images[rows], generator("mnist", "train", now)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (now + 1) % 50 == 0 or now + 1 == step:
            state = {"step": now + 1, "weights": found.state_dict()}
            torch.save(state | {"optimizer": optimizer.state_dict()}, path)
    return found.state_dict()


def measure(found: Diffusion, images: Tensor, count: int) -> dict[str, Tensor]:
    """Return covariances over the noise of each sample, and products of mean gradients.

    Returns:
        level ``(n,)``; own ``(n,)``, the trace of Cov(g); cross ``(n, 3)``, that of Cov(g, c);
        square ``(n, 3)``, that of Cov(c); second ``(n,)``, mean of ``‖g‖²``; gram ``(n, n)``.
    """
    t = found.objective.times(count).float()
    rows = torch.randperm(len(images), generator=generator("mnist", "rows"))[:count]
    kept: dict[str, list[Tensor]] = {"own": [], "cross": [], "square": [], "second": []}
    means = []
    for i in range(count):
        own = images[rows[i : i + 1]], t[i : i + 1]
        terms = [each_gradient(found, *own, z) for z in range(NOISES)]
        stacked = torch.stack(terms)  # (noises, 1 + orders, parameters)
        centred = stacked - stacked.mean(dim=0)
        covariance = torch.einsum("zap,zbp->ab", centred, centred).double() / (NOISES - 1)
        kept["own"].append(covariance[0, 0])
        kept["cross"].append(covariance[0, 1:])
        kept["square"].append(covariance.diagonal()[1:])
        kept["second"].append(stacked[:, 0].square().sum(dim=1).mean().double())
        means.append(stacked[:, 0].mean(dim=0))
    mean = torch.stack(means)
    result = {name: torch.stack(values) for name, values in kept.items()}
    level = found.schedule.noise_level(t)
    return result | {"gram": (mean @ mean.T).double(), "level": level}


def each_gradient(found: Diffusion, x0: Tensor, t: Tensor, number: int) -> Tensor:
    """Return the gradients of the loss and of the loss of each polynomial ``(1 + orders, P)``."""
    noise = torch.randn(x0.shape, generator=generator("mnist", "noise", float(t), number))
    coefficients = found.objective.coefficients(t)
    wanted = expand(coefficients.p, x0) * x0 + expand(coefficients.q, x0) * noise
    weight = found.objective.weight(t)
    parameters = list(found.network.parameters())
    gradients = []
    for output in outputs(found, x0, t, noise):
        loss = (weight * (output - wanted).flatten(1).square().mean(dim=1)).sum()
        taken = torch.autograd.grad(loss, parameters, retain_graph=True)
        gradients.append(torch.cat([each.flatten() for each in taken]))
    return torch.stack(gradients)


def outputs(found: Diffusion, x0: Tensor, t: Tensor, noise: Tensor) -> list[Tensor]:
    """Return the network at the noised samples, and its polynomials of orders 0, 1 and 2 there."""
    alpha, sigma = found.schedule.alpha(t), found.schedule.sigma(t)
    xt = expand(alpha, x0) * x0 + expand(sigma, x0) * noise
    noised = Noised(xt, x0, noise, t, alpha, sigma, torch.ones_like(t))
    scale = expand(found.objective.coefficients(t).input_scale, x0)
    along = scale * expand(sigma, x0) * noise

    def network(u: Tensor) -> Tensor:
        return found.predict(u, noised)

    def slope(u: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(network, (u,), (along,))

    with forward_mode(x0.device):
        start = scale * expand(alpha, x0) * x0
        (value, first), (_, second) = torch.func.jvp(slope, (start,), (along,))
    return [network(scale * xt), value, value + first, value + first + 0.5 * second]


def polynomial_errors(found: Diffusion, images: Tensor) -> str:
    """Return the error of the polynomials of orders 1 and 2, over that of order 0."""
    x0, rows = images[: 2 * BINS], []
    noise = torch.randn(x0.shape, generator=generator("mnist", "errors"))
    for level in LEVELS:
        t = found.schedule.time(torch.full((len(x0),), level))
        exact, *others = (each.detach() for each in outputs(found, x0, t, noise))
        errors = [(each - exact).flatten(1).norm(dim=1) for each in others]
        cells = (interval((each / errors[0]).tolist()) for each in errors[1:])
        rows.append((f"{level:g}", *cells))
    header = ("noise level", "error of order 1 over order 0", "order 2 over order 0")
    return markdown(header, rows)


def summary(step: int, kept: dict[str, Tensor]) -> list[tuple]:
    """Return for each order by which factor the variance falls, with 95 % over samples."""
    count = len(kept["own"])
    bins = (torch.arange(count) * BINS // count).clamp(max=BINS - 1)
    rows = []
    for order in ORDERS:
        cells = []
        for b in range(BINS):
            inside = (bins == b).nonzero().flatten()
            found = bootstrap(lambda r, i=inside, k=order: factor(kept, k, i[r]), len(inside))
            low, high = (float(kept["level"][inside[j]]) for j in (0, -1))
            cells.append(f"{low:.2g} to {high:.2g}: {written(found)}")
        found = bootstrap(lambda r, k=order: whole(kept, k, r, bins), count)
        rows.append((step, order, *cells, written(found)))
    return rows


def written(found: tuple[float, float, float]) -> str:
    return "{:.2f} ({:.2f} to {:.2f})".format(*found)


def removed(kept: dict[str, Tensor], order: int, rows: Tensor) -> Tensor:
    """Return what is removed of the variance by the noise, each half by the other's coefficient."""
    total = torch.zeros((), dtype=torch.float64)
    halves = rows[rows % 2 == 0], rows[rows % 2 == 1]
    for fitted, judged in (halves, halves[::-1]):
        beta = kept["cross"][fitted, order].sum() / kept["square"][fitted, order].sum()
        cross, square = (kept[name][judged, order].sum() for name in ("cross", "square"))
        total += 2 * beta * cross - beta**2 * square
    return torch.nan_to_num(total)  # a half without samples in a drawn set


def factor(kept: dict[str, Tensor], order: int, rows: Tensor) -> float:
    """Return by which factor the variance by the noise falls."""
    own = kept["own"][rows].sum()
    return float(own / (own - removed(kept, order, rows)))


def whole(kept: dict[str, Tensor], order: int, rows: Tensor, bins: Tensor) -> float:
    """Return by which factor the variance of the gradient of one draw falls, of all sources."""
    gram = kept["gram"][rows][:, rows]
    different = rows[:, None] != rows[None, :]
    total = kept["second"][rows].mean() - gram[different].mean()
    less = sum(removed(kept, order, rows[bins[rows] == b]) for b in range(BINS)) / len(rows)
    return float(total / (total - less))
