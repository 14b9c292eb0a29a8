"""LPIPS of random pictures with AlexNet of random weights, by the `lpips` package.

    pip install torch==2.11.0 torchvision==0.26.0 lpips==0.1.4
    python tests/golden/make_lpips.py    # writes lpips.json

The 2.5 million weights are not stored: both sides draw them with torch's generator, a seed for each
tensor.
"""

import json
from pathlib import Path

import lpips
import torch

SIZES = [(31, 31), (64, 64), (45, 70), (128, 96)]


def randn(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def picture(height, width, seed):
    return (randn((1, 3, height, width), seed) * 60 + 128).clamp(0, 255).round().to(torch.uint8)


def main():
    model = lpips.LPIPS(net="alex", version="0.1", pretrained=False, pnet_rand=True, verbose=False).eval()
    state, tensors = model.state_dict(), []
    for name in [name for name in state if not name.startswith(("lins.", "scaling_layer."))]:
        shape, seed = list(state[name].shape), 1000 + len(tensors)
        if name.startswith("lin"):
            values = randn(shape, seed).abs() * 0.1
        else:
            values = randn(shape, seed) * (1.4 / max(1, state[name][0].numel()) ** 0.5 if len(shape) > 1 else 0.1)
        state[name].copy_(values)
        tensors.append({"name": name, "shape": shape, "seed": seed, "mean": float(state[name].double().mean())})
    cases = []
    for number, (height, width) in enumerate(SIZES):
        a, b = picture(height, width, 2 * number), picture(height, width, 2 * number + 1)
        near = ((a.float() * 3 + b.float()) / 4).round().to(torch.uint8)
        unit = lambda x: x.float() / 255 * 2 - 1
        with torch.no_grad():
            values = [float(model(unit(a), unit(other))) for other in (b, near, a)]
        cases.append({"height": height, "width": width, "seeds": [2 * number, 2 * number + 1], "lpips": values})
    path = Path(__file__).parent / "lpips.json"
    path.write_text(json.dumps({"tensors": tensors, "cases": cases}, indent=1) + "\n")


main()
