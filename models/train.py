"""Trains a convolutional variational autoencoder, or an autoencoder, on the normal images of a table, and writes a model package of it.

    train.py PIPELINE.toml --where "split = 'fit'" --to OUT

PIPELINE.toml is the pipeline file of `lookalike run`: its source table is read. What is written is what its [model] package may be.

The network has two paths side by side, from the image to the latents and back. One is linear, the closed form of probabilistic PCA on
the training images, and stays as it is; the other is convolutional, begins at zero and learns what the linear one leaves. So training
starts at the best linear VAE, which gradient descent would hardly find from a few hundred images, and goes on from there.

    vae          maximizes the ELBO, with the divergence weighted by --beta; sigma of p(x|z) = N(reconstruction, sigma²) is learned
    autoencoder  the mean of the latents alone, without noise and without divergence
    denoising    the same, of images with noise on them (--noise), whose reconstruction is to have none

Training stops when the negative ELBO of held-out images, an eighth chosen by the hash of their keys, has not become smaller for a
while; the weights, averaged over the last thousand steps, are those of its minimum. Killed, it goes on from its checkpoint beside OUT,
to the same weights: the random numbers of a step depend on the seed and the step alone. On one machine, with as many threads, the same
package comes out each time.

D. P. Kingma and M. Welling, Auto-Encoding Variational Bayes, 2014; I. Higgins et al., beta-VAE, 2017; M. E. Tipping and C. M. Bishop,
Probabilistic Principal Component Analysis, 1999; O. Rybkin et al., Simple and Effective VAE Training with Calibrated Decoders, 2021.
"""

import argparse
import copy
import dataclasses
import math
import os
import sys
import time
from pathlib import Path

# Before CUDA starts: without it, products of matrices are not the same each time.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from torch import nn

from image_table import Pictures, TableError, read
from lookalike_export import FILTERS, FITS, Preprocessing, export_torch

KINDS = ("vae", "autoencoder", "denoising")

# Each of the convolutional path's steps halves height and width.
HALVINGS = 4

# Groups of channels that are normalized together.
GROUPS = 8

# Images at least: fewer teach nothing about what is normal.
MIN_IMAGES = 32

# Of the images, so many are held out.
HELD_OUT = 1 / 8

# Samples of the latents of each held-out image, always the same ones.
ELBO_SAMPLES = 8

# Steps between two looks at the held-out images; a checkpoint is written then.
STEPS_A_LOOK = 50

# The divergence gets its weight bit by bit, over this share of the steps: with all of it from the start, the convolutional path learns
# to switch latents off before it has learned what they are good for.
WARM_UP = 0.75

# Rounding to 256 levels alone has this variance.
LEAST_VARIANCE = 1 / 255**2 / 12

# Numbers of the matrix that components are taken from, at most: 1 GiB.
MAX_MATRIX_VALUES = 1 << 27

# Logarithms of variances are kept in these bounds, so that no step of training can end in infinities.
LOGVAR_BOUNDS = (-14.0, 4.0)


class Doubled(nn.Module):
    """Height and width doubled, each pixel repeated; other than nn.Upsample's, its gradient is the same each time on a GPU too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.pixel_shuffle(x.unsqueeze(2).expand(-1, -1, 4, -1, -1).flatten(1, 2), 2)


class Autoencoder(nn.Module):
    """Image (N x C x H x W, values 0 to 1) to mean and log-variance of the latents, and latents to image."""

    def __init__(self, shape: tuple[int, int, int], latent_dim: int, channels: int, is_variational: bool):
        super().__init__()
        self.shape, self.is_variational = shape, is_variational
        c, (depth, height, width) = channels, shape
        bottom = (4 * c, height >> HALVINGS, width >> HALVINGS)
        num_bottom = math.prod(bottom)

        def down(inputs: int, outputs: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.GroupNorm(GROUPS, outputs), nn.SiLU()]

        def up(inputs: int, outputs: int) -> list[nn.Module]:
            return [Doubled(), nn.Conv2d(inputs, outputs, 3, 1, 1), nn.GroupNorm(GROUPS, outputs), nn.SiLU()]

        self.encoder = nn.Sequential(*down(depth, c), *down(c, 2 * c), *down(2 * c, 4 * c), *down(4 * c, 4 * c), nn.Flatten())
        self.head = nn.Linear(num_bottom, 2 * latent_dim if is_variational else latent_dim)
        self.decoder = nn.Sequential(
            *(nn.Linear(latent_dim, num_bottom), nn.SiLU(), nn.Unflatten(1, bottom)),
            *(*up(4 * c, 4 * c), *up(4 * c, 2 * c), *up(2 * c, c), nn.Conv2d(c, c, 3, 1, 1), nn.SiLU()),
        )
        self.last = nn.Conv2d(c, 4 * depth, 3, 1, 1)
        for layer in (self.head, self.last):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        # The linear path; see start_at().
        num_values = math.prod(shape)
        self.register_buffer("mean", torch.zeros(num_values))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("to_latents", torch.zeros(latent_dim, num_values))
        self.register_buffer("from_latents", torch.zeros(latent_dim, num_values))
        self.logvar = nn.Parameter(torch.zeros(latent_dim))
        self.log_sigma = nn.Parameter(torch.zeros(()))

    def start_at(self, images: torch.Tensor) -> None:
        """Makes the linear path that of probabilistic PCA on images (N x C x H x W).

        With the components v of variance λ and the mean variance s of all others, x | z ~ N(Σ v sqrt(λ - s) z, s I), and the posterior
        of z has the mean sqrt(λ - s) / λ vᵀ(x - m) and the variance s / λ. Without the noise of a posterior, s is 0.
        """
        count, latent_dim = len(images), len(self.logvar)
        rows = images.flatten(1).double()
        mean = rows.mean(0)
        rows = rows - mean
        num_values = rows.shape[1]
        if count <= num_values:
            values, vectors = torch.linalg.eigh(rows @ rows.T / count)
            vectors = vectors.T @ rows / (values.clamp_min(1e-12) * count).sqrt()[:, None]
        else:
            values, vectors = torch.linalg.eigh(rows.T @ rows / count)
            vectors = vectors.T
        values, vectors = values.flip(0)[:latent_dim], vectors.flip(0)[:latent_dim]
        rest = (rows.square().sum() / count - values.sum()) / (num_values - latent_dim)
        rest = rest.clamp_min(LEAST_VARIANCE)
        values = torch.maximum(values, rest * 1.001)
        pulled = (values - rest) if self.is_variational else values
        self.mean.copy_(mean)
        self.scale.copy_(rows.square().mean().sqrt())
        self.to_latents.copy_(vectors * (pulled.sqrt() / values)[:, None])
        self.from_latents.copy_(vectors * pulled.sqrt()[:, None])
        with torch.no_grad():
            self.logvar.copy_((rest / values).log())
            self.log_sigma.copy_(0.5 * rest.log())

    def encode(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rest = image.flatten(1) - self.mean
        found = self.head(self.encoder((rest / self.scale).unflatten(1, self.shape)))
        linear = rest @ self.to_latents.T
        if not self.is_variational:
            return linear + found, None
        mu, logvar = found.chunk(2, 1)
        return linear + mu, (self.logvar + logvar).clamp(*LOGVAR_BOUNDS)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        found = nn.functional.pixel_shuffle(self.last(self.decoder(z)), 2)
        return found * self.scale + (z @ self.from_latents + self.mean).unflatten(1, self.shape)

    def negative_elbo(self, image: torch.Tensor, clean: torch.Tensor, noise: torch.Tensor, beta: float) -> torch.Tensor:
        """-log p(clean|z) + beta KL, in nats, for each image, with z drawn by `noise`; without a posterior, -log p(clean|z) alone."""
        mu, logvar = self.encode(image)
        z = mu + noise * (0.5 * logvar).exp() if self.is_variational else mu
        squared = (self.decode(z) - clean).square().flatten(1)
        loss = squared.sum(1) / 2 * (-2 * self.log_sigma).exp() + squared.shape[1] * (self.log_sigma + 0.5 * math.log(2 * math.pi))
        if self.is_variational:
            loss = loss - 0.5 * beta * (1 + logvar - mu.square() - logvar.exp()).sum(1)
        return loss


class Whole(nn.Module):
    """The main graph of a package."""

    def __init__(self, network: Autoencoder):
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        mu, logvar = self.network.encode(image)
        reconstruction = self.network.decode(mu)
        return (mu, reconstruction) if logvar is None else (mu, logvar, reconstruction)


class Decoder(nn.Module):
    """The decoder of a package."""

    def __init__(self, network: Autoencoder):
        super().__init__()
        self.network = network

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.network.decode(z)


@dataclasses.dataclass
class Random:
    """Random numbers that depend on the seed and a number alone. They come from the CPU, so that a GPU has the same."""

    seed: int

    def at(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed << 32) + number)


def augment(images: torch.Tensor, options: argparse.Namespace, random: torch.Generator) -> torch.Tensor:
    """The same things as other pictures of them would show them: mirrored, a little aside, a little brighter."""
    count, _, height, width = images.shape
    chance = lambda: torch.rand(count, 1, 1, 1, generator=random) < 0.5  # noqa: E731
    if options.flip in ("horizontal", "both"):
        images = torch.where(chance(), images.flip(3), images)
    if options.flip in ("vertical", "both"):
        images = torch.where(chance(), images.flip(2), images)
    if options.shift:
        down, right = torch.randint(0, 2 * options.shift + 1, (2,), generator=random).tolist()
        images = nn.functional.pad(images, (options.shift,) * 4, mode="replicate")[:, :, down : down + height, right : right + width]
    return images * (1 + options.brightness * torch.randn(count, 1, 1, 1, generator=random))


def mirrored(images: torch.Tensor, flip: str) -> torch.Tensor:
    """Images and all their mirror images."""
    for axis in {"none": (), "horizontal": (3,), "vertical": (2,), "both": (2, 3)}[flip]:
        images = torch.cat([images, images.flip(axis)])
    return images


def held_out_loss(network: Autoencoder, images: torch.Tensor, options: argparse.Namespace) -> tuple[float, float]:
    """The negative ELBO of images in nats, and their mean squared error at the mean of the latents."""
    device, losses, errors = network.mean.device, [], []
    network.eval()
    with torch.no_grad():
        for number, batch in enumerate(images.split(options.batch_size)):
            random = Random(options.seed).at((1 << 31) + number)
            batch = batch.to(device)
            for _ in range(ELBO_SAMPLES if network.is_variational else 1):
                noise = torch.randn(len(batch), len(network.logvar), generator=random).to(device)
                losses.append(network.negative_elbo(batch, batch, noise, 1.0).double().sum())
            errors.append((network.decode(network.encode(batch)[0]) - batch).double().square().mean((1, 2, 3)).sum())
    samples = ELBO_SAMPLES if network.is_variational else 1
    return (torch.stack(losses).sum() / samples / len(images)).item(), (torch.stack(errors).sum() / len(images)).item()


def to_images(pixels, preprocessing: Preprocessing) -> torch.Tensor:
    return torch.from_numpy(preprocessing.tensor(pixels).copy())


def loss_name(options: argparse.Namespace) -> str:
    return "negative ELBO" if options.kind == "vae" else "negative log-likelihood"


def duration(secs: float) -> str:
    return f"{secs:.0f} s" if secs < 100 else f"{secs / 60:.0f} min"


def train(pictures: Pictures, preprocessing: Preprocessing, options: argparse.Namespace) -> tuple[Autoencoder, float]:
    """The network with the smallest held-out loss, and that loss."""
    device = options.device
    # Keys come in the order of their hashes, so the first ones are a sample, which stays the same when a table is written anew.
    num_held_out = math.ceil(HELD_OUT * len(pictures.keys))
    held_out = to_images(pictures.pixels[:num_held_out], preprocessing)
    pixels = pictures.pixels[num_held_out:]

    random = Random(options.seed)

    def batch(step: int, size: int) -> tuple[torch.Tensor, ...]:
        """What the network sees at a step, what it is to make of it, and the noise of the latents."""
        draw = random.at(step)
        chosen = torch.randint(len(pixels), (size,), generator=draw)
        clean = augment(to_images(pixels[chosen.numpy()], preprocessing), options, draw)
        seen = clean + options.noise * torch.randn(clean.shape, generator=draw)
        return seen, clean, torch.randn(size, options.latent_dim, generator=draw)

    torch.manual_seed(options.seed)
    network = Autoencoder(preprocessing.shape, options.latent_dim, options.channels, options.kind == "vae")
    average = copy.deepcopy(network).to(device)
    network.to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=options.learning_rate, betas=(0.9, 0.99))
    settings = {key: str(value) for key, value in vars(options).items() if key not in ("pipeline", "to", "where", "patience")}
    settings |= {"pictures": pictures.sha256, "torch": str(torch.__version__), "threads": str(torch.get_num_threads())}
    state = {"step": 0, "best": math.inf, "best_step": 0, "best_weights": None}
    checkpoint = options.to.with_name(options.to.name + ".checkpoint")
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        if saved["settings"] != settings:
            differing = [key for key in settings if settings[key] != saved["settings"].get(key)]
            raise TableError(f"{checkpoint} is of a training with another {', '.join(differing)}: remove it to begin anew")
        network.load_state_dict(saved["network"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        state = saved["state"]
        print(f"going on from step {state['step']}", flush=True)
    else:
        few = max(1, MAX_MATRIX_VALUES // math.prod(preprocessing.shape) // len(mirrored(held_out[:1], options.flip)))
        start = mirrored(to_images(pixels[:few], preprocessing), options.flip)
        network.start_at(start)
        average.load_state_dict(network.state_dict())

    def look(step: int) -> None:
        loss, error = held_out_loss(average, held_out, options)
        if not math.isfinite(loss):
            raise TableError(f"training diverged at step {step}: try a smaller --learning-rate")
        if loss < state["best"]:
            weights = {name: value.clone() for name, value in average.state_dict().items()}
            state.update(best=loss, best_step=step, best_weights=weights)
        pace = (time.monotonic() - started) / max(1, step - first)
        left = f", at most {duration(pace * (options.steps - step))} to go" if step > first else ""
        print(
            f"step {step:5} of {options.steps}  held-out {loss_name(options)} {loss:.0f} nats (least {state['best']:.0f})  "
            f"mean squared error {error:.3g}  {duration(time.monotonic() - started)}{left}",
            flush=True,
        )

    def save(step: int) -> None:
        state["step"] = step
        parts = {"network": network.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
        temporary = checkpoint.with_name(checkpoint.name + ".tmp")
        with temporary.open("wb") as file:
            torch.save({"settings": settings, "state": state, **parts}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(checkpoint)

    first, started = state["step"], time.monotonic()
    if first == 0:
        look(0)
    for step in range(first, options.steps):
        if step - state["best_step"] >= options.patience * STEPS_A_LOOK:
            print(f"no better since step {state['best_step']}", flush=True)
            break
        progress = (step + 1) / options.steps
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * progress))
        network.train()
        seen, clean, noise = (values.to(device) for values in batch(step, options.batch_size))
        beta = options.beta * min(1, progress / WARM_UP)
        loss = network.negative_elbo(seen, clean, noise, beta).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            # At first over few steps, later over a thousand.
            keep = min(0.999, (step + 1) / (step + 10))
            for averaged, weight in zip(average.parameters(), network.parameters(), strict=True):
                averaged.lerp_(weight, 1 - keep)
        if (step + 1) % STEPS_A_LOOK == 0 or step + 1 == options.steps:
            look(step + 1)
            save(step + 1)
    average.load_state_dict(state["best_weights"])
    return average, state["best"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("pipeline", type=Path, help="pipeline file, whose source table is read")
    add("--to", type=Path, required=True, metavar="OUT", help="folder of the model package")
    add("--where", metavar="SQL", help="rows taken as normal, in place of the pipeline file's `where`")
    add("--kind", choices=KINDS, default="vae")
    add("--name", help="name of the model (default: the pipeline's, with the kind and the number of latents)")
    add("--latent-dim", type=int, metavar="K", help="number of latents (default: 128, or half of the images if that is fewer)")
    add("--height", type=int, default=64, metavar="PIXELS", help="of the model's input, a multiple of 16 (default: 64)")
    add("--width", type=int, default=64, metavar="PIXELS", help="of the model's input, a multiple of 16 (default: 64)")
    add("--color", choices=("gray", "rgb"), default="rgb")
    add("--filter", choices=FILTERS, default="bilinear", help="how pixels are resampled (default: bilinear)")
    add("--fit", choices=FITS, default="stretch", help="how images of another shape are fitted (default: stretch)")
    add("--flip", choices=("none", "horizontal", "vertical", "both"), default="none", help="mirror images that are as good (default: none)")
    add(
        "--shift",
        type=int,
        default=0,
        metavar="PIXELS",
        help="move images by up to so much (default: 0, for what always lies in its place)",
    )
    add("--brightness", type=float, default=0.05, metavar="SHARE", help="deviation of a random factor on all values (default: 0.05)")
    add("--noise", type=float, metavar="SIGMA", help="deviation of noise on what the network sees (default: 0.02; denoising: 0.1)")
    add("--channels", type=int, default=16, metavar="N", help="of the first convolution, a multiple of 8 (default: 16)")
    add("--beta", type=float, default=1.0, help="weight of the divergence (default: 1, the ELBO itself)")
    add("--steps", type=int, default=600, metavar="N", help="at most (default: 600)")
    add("--batch-size", type=int, default=32, metavar="N")
    add("--learning-rate", type=float, default=1e-3, metavar="RATE", help="at first; it ends at zero by a half cosine (default: 0.001)")
    add("--patience", type=int, default=8, metavar="N", help=f"looks without progress, one every {STEPS_A_LOOK} steps (default: 8)")
    add("--seed", type=int, default=0)
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU where there is one (default)")
    add("--threads", type=int, metavar="N", help="of the CPU (default: as many as there are cores; the last digits depend on it)")
    options = parser.parse_args()
    if options.height % (1 << HALVINGS) or options.width % (1 << HALVINGS) or min(options.height, options.width) < 1:
        parser.error(f"--height and --width must be multiples of {1 << HALVINGS}")
    if options.channels < GROUPS or options.channels % GROUPS:
        parser.error(f"--channels must be a multiple of {GROUPS}")
    for name in ("steps", "batch_size", "patience", "latent_dim", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("shift", "brightness", "beta", "seed"):
        if getattr(options, name) < 0:
            parser.error(f"--{name} must be at least 0")
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    elif options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch finds no GPU")
    if options.noise is None:
        options.noise = 0.1 if options.kind == "denoising" else 0.02
    return options


def main() -> None:
    options = arguments()
    started = time.monotonic()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    # Products of float32 as a CPU computes them.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    preprocessing = Preprocessing(options.height, options.width, options.color, filter=options.filter, fit=options.fit)
    pictures = read(options.pipeline, options.where, preprocessing)
    count = len(pictures.keys)
    num_training = count - math.ceil(HELD_OUT * count)
    if count < MIN_IMAGES:
        raise TableError(f"{count} images are too few to train on: {MIN_IMAGES} are the least, and some hundred are better")
    if options.latent_dim is None:
        options.latent_dim = min(128, num_training // 2)
    if options.latent_dim >= num_training:
        raise TableError(f"--latent-dim {options.latent_dim} needs more than {num_training} images to learn from")
    name = options.name or f"{pictures.pipeline}-{options.kind}-{options.latent_dim}"
    print(
        f"{count} images ({pictures.num_rejected} rejected), {count - num_training} of them held out; "
        f"{options.kind} of {options.latent_dim} latents on {options.device}, seed {options.seed}",
        flush=True,
    )
    options.to.parent.mkdir(parents=True, exist_ok=True)
    network, loss = train(pictures, preprocessing, options)
    roles = ("mu", "logvar", "reconstruction") if options.kind == "vae" else ("mu", "reconstruction")
    sha256 = export_torch(
        options.to,
        Whole(network),
        preprocessing,
        roles,
        decoder=Decoder(network),
        latent_dim=options.latent_dim,
        likelihood={"kind": "gaussian", "sigma": math.exp(network.log_sigma.item())} if options.kind == "vae" else None,
        images=pictures.golden,
        name=name,
    )
    options.to.with_name(options.to.name + ".checkpoint").unlink(missing_ok=True)
    took = duration(time.monotonic() - started)
    print(f"{name}: held-out {loss_name(options)} {loss:.0f} nats, after {took}; package {options.to}, sha256 {sha256}")


if __name__ == "__main__":
    try:
        main()
    except (TableError, OSError) as error:
        sys.exit(f"error: {error}")
