"""Time to trigger 5,000 images in one vectorised pass against one image at a time; and the floor, a copy of the images.

5,000 colour images of 32x32 as float tensors, chosen, triggered and rounded to eight bits by `poison`. The peer does what code for poisoned data
sets usually does: every image becomes a PIL image, the trigger is applied in numpy (or, for the warp, by `grid_sample` on the
one image), and the result goes through PIL back to a tensor. Both give the same images up to a rounding, which is checked first.

    python benchmarks/bench_backdoor.py [--images 5000] [--rounds 5]

Measured with 1,000 images on one thread of a small cloud CPU that did other work too (torch 2.13), time over that of the
vectorised pass, median and quartiles of 5 rounds:

    patch   one at a time  7.5 (6.6-8.3)    copy 0.07
    blend   one at a time  8.9 (4.4-9.4)    copy 0.05
    warp    one at a time 11.7 (10.0-13.0)  copy 0.02
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from torchfolio.backdoor import AllToOne, BlendTrigger, PatchTrigger, Trigger, WarpTrigger, poison
from torchfolio.measure import alternate

SHAPE = (3, 32, 32)


def whole(trigger: Trigger, x: Tensor) -> Tensor:
    """All images at once."""
    y = torch.ones(len(x), dtype=torch.int64)
    return poison((x, y), trigger, AllToOne(0, 2), rate=1.0, seed=0).block()


def singly(apply: Callable[[np.ndarray], np.ndarray], x: Tensor) -> Tensor:
    """One image after the other, through PIL."""
    made = []
    for image in x:
        picture = Image.fromarray((255 * image).round().to(torch.uint8).permute(1, 2, 0).numpy())
        values = apply(np.asarray(picture).astype(np.float32) / 255)
        picture = Image.fromarray((255 * values).round().astype(np.uint8))
        made.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255)
    return torch.stack(made)


def pasted(image: np.ndarray, pattern: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return image + mask * (pattern - image)


def warped(image: np.ndarray, trigger: Trigger) -> np.ndarray:
    with torch.no_grad():
        return trigger(torch.from_numpy(image).permute(2, 0, 1)[None])[0].permute(1, 2, 0).numpy()


def last(values: Tensor) -> np.ndarray:
    """Channels last, and a mask of one channel as it is."""
    return (values if values.dim() == 3 else values[None]).permute(1, 2, 0).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    x = (255 * torch.rand(options.images, *SHAPE)).round() / 255
    patch, blend, warp = PatchTrigger.checkerboard(SHAPE), BlendTrigger.noise(SHAPE, alpha=0.2), WarpTrigger()
    peers: dict[str, tuple[Trigger, Callable[[np.ndarray], np.ndarray]]] = {
        "patch": (patch, partial(pasted, pattern=last(patch.pattern), mask=last(patch.mask))),
        "blend": (blend, partial(pasted, pattern=last(blend.pattern), mask=np.full(1, 0.2, np.float32))),
        "warp": (warp, partial(warped, trigger=warp)),
    }
    for name, (trigger, apply) in peers.items():
        # Where a value lies between two bytes the orders of summation may round to either.
        torch.testing.assert_close(singly(apply, x[:50]), whole(trigger, x[:50]), atol=1.01 / 255, rtol=0)
        calls = {"whole": partial(whole, trigger, x), "singly": partial(singly, apply, x), "copy": x.clone}
        print(name, alternate(**calls, repeats=options.rounds), sep="\n")


if __name__ == "__main__":
    main()
