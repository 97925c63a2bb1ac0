"""Three kinds of weather of the common corruptions (Hendrycks & Dietterich 2019): snow, frost, fog."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmdefend.attacks.corruptions._filters import motion_blurred, zoomed
from vlmdefend.rng import ImageRng
from vlmdefend.types import per_image

GREY = (0.299, 0.587, 0.114)
ICE = (0.86, 0.95, 1.0)


def snow(images: Tensor, rng: ImageRng, mean: float, std: float, size: float, least: float, *rest: float) -> Tensor:
    """Flakes: enlarged normal noise where it exceeds ``least``, trailing down; the picture pales to a grey.

    ``rest``: radius and sigma of the trail, and the weight of the picture's own colours.
    """
    radius, sigma, own = rest
    flakes = zoomed(mean + std * rng.normal((1, *images.shape[2:])).to(images.device), size)
    flakes = flakes.where(flakes >= least, 0.0).clamp(0.0, 1.0)
    flakes = motion_blurred(flakes, radius, sigma, rng.uniform((1,), -135.0, -45.0)[:, 0])
    grey = (images * images.new_tensor(GREY)[:, None, None]).sum(dim=1, keepdim=True)
    pale = own * images + (1 - own) * images.maximum(1.5 * grey + 0.5)
    return pale + flakes + flakes.rot90(2, (2, 3))


def frost(images: Tensor, rng: ImageRng, own: float, ice: float) -> Tensor:
    """The picture behind ice, of another making than the published one, which adds photographs of frosted glass.

    Here it is drawn: fronds where fractal noise passes its middle, at two scales, on patches that are iced over, in a
    pale blue. The weights are the published ones, the texture is not: numbers for frost compare with each other, not
    with published ones.
    """
    height, width = images.shape[2:]
    covered = ((plasma(rng.child("patches"), height, width, 2.5) - 0.25) / 0.4).clamp(0.0, 1.0)
    brightness = 0.1 + 0.25 * covered
    for decay, strength in ((1.7, 0.35), (1.3, 0.3)):
        ridge = 1 - (2 * plasma(rng.child(f"fronds {decay}"), height, width, decay) - 1).abs()
        brightness = brightness + strength * ridge**6 * (0.3 + 0.7 * covered)
    ice_colour = images.new_tensor(ICE)[:, None, None]
    return own * images + ice * brightness.clamp(0.0, 1.0).to(images.device) * ice_colour


def fog(images: Tensor, rng: ImageRng, thickness: float, decay: float) -> Tensor:
    """Fractal noise on top, then less contrast, so that the brightest pixel keeps its value."""
    height, width = images.shape[2:]
    highest = per_image(images.flatten(1).amax(dim=1), images)
    clouds = plasma(rng, height, width, decay).to(images.device)
    return (images + thickness * clouds) * highest / (highest + thickness)


def plasma(rng: ImageRng, height: int, width: int, decay: float) -> Tensor:
    """(B, 1, H, W) fractal noise in [0, 1], on the CPU: diamonds and squares on a torus, halved until they are pixels.

    Each halving of the step divides the amplitude by ``decay`` and, as in the published code, the noise by its square.
    """
    size = 1 << (max(height, width) - 1).bit_length()
    field = torch.zeros(len(rng), size, size)
    step, wobble = size, 100.0
    while step >= 2:
        half = step // 2

        def moved(corners: Tensor, wobble: float = wobble) -> Tensor:
            noise = rng.uniform(corners.shape[1:], -wobble, wobble)
            return corners / 4 + wobble * noise

        corners = field[:, ::step, ::step]
        down = corners + corners.roll(-1, 1)
        field[:, half::step, half::step] = moved(down + down.roll(-1, 2))
        centres = field[:, half::step, half::step]
        field[:, ::step, half::step] = moved(centres + centres.roll(1, 1) + corners + corners.roll(-1, 2))
        field[:, half::step, ::step] = moved(centres + centres.roll(1, 2) + corners + corners.roll(-1, 1))
        step, wobble = half, wobble / decay
    field -= field.amin(dim=(1, 2), keepdim=True)
    field /= field.amax(dim=(1, 2), keepdim=True).clamp_min(1e-12)
    return field[:, None, :height, :width]
