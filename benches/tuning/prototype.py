"""The prototype of tuning on the bundled model that made the table in docs/tuning.md.

    python benches/tuning/prototype.py draw OUT
    python benches/tuning/prototype.py train OUT CONTAINER --share 0.3 --steps 150 --rate 0.003

`draw` draws 600 prompts to learn from and, of other names, 34 to choose by and 96 to judge by with the dense UNet, 30 Euler steps at
guidance 4, and keeps every call. `train` tunes a container (`unet.squeezed.safetensors`) and prints the judgement. Run it at the top of the
project. Needs torch, diffusers, transformers and numpy.
"""

import argparse
import json
import math
import pathlib
import random
import sys

import numpy as np
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

sys.path.insert(0, "tests/golden")
from make_container import DTYPES, read_safetensors, unpack  # noqa: E402

MODEL = "models/emoji-sdxl"
STEPS, GUIDANCE, CALLS = 30, 4.0, 16
scheduler = EulerDiscreteScheduler.from_pretrained(MODEL + "/scheduler")
scheduler.set_timesteps(STEPS)
TIMES, SIGMAS = scheduler.timesteps.clone(), scheduler.sigmas.clone().double()
IDS = torch.tensor([64.0, 64, 0, 0, 64, 64])


def call(unet, x, t, states, pooled):
    """Both predictions for latents x: without and with the prompt."""
    n = x.shape[0]
    t = torch.cat([t, t]) if t.dim() else t
    added = {"text_embeds": torch.cat([0 * pooled, pooled]), "time_ids": IDS.expand(2 * n, 6)}
    both = unet(torch.cat([x, x]), t, torch.cat([0 * states, states]), added_cond_kwargs=added, return_dict=False)[0]
    return both.chunk(2)


def guided(negative, positive):
    return negative + GUIDANCE * (positive - negative)


@torch.no_grad()
def draw(unet, noise, states, pooled, keep=None):
    """The final latents; keep(step, rows, input, negative, positive) is called in each step."""
    finals = []
    for begin in range(0, len(noise), 48):
        rows = slice(begin, begin + 48)
        x = noise[rows] * float(scheduler.init_noise_sigma)
        for step, t in enumerate(TIMES):
            scaled = x / math.sqrt(float(SIGMAS[step]) ** 2 + 1)
            negative, positive = call(unet, scaled, t, states[rows], pooled[rows])
            if keep:
                keep(step, rows, scaled, negative, positive)
            x = x + guided(negative, positive) * float(SIGMAS[step + 1] - SIGMAS[step])
        finals.append(x)
    return torch.cat(finals)


def dense_unet():
    return UNet2DConditionModel.from_pretrained(MODEL + "/unet").float().eval().requires_grad_(False)


def draw_all(out):
    random.seed(5)
    lines = [line.strip() for line in open("calibration/emoji-captions.txt") if not line.startswith("#")]
    starts = ("an emoji of a ", "an emoji of an ", "a picture of a ", "a picture of an ", "an emoji of ", "a picture of ")

    def name(line):
        return next((line[len(start) :] for start in starts if line.startswith(start)), line)

    names = sorted({name(line) for line in lines})
    random.shuffle(names)
    test, chosen_by = names[:96], names[96:130]
    pick = lambda of: random.choice([line for line in lines if name(line) == of])
    sets = {"test": [pick(of) for of in test], "val": [pick(of) for of in chosen_by]}
    rest = [line for line in lines if name(line) not in {*test, *chosen_by}]
    random.shuffle(rest)
    sets["train"] = rest[:600]
    pipe, unet = StableDiffusionXLPipeline.from_pretrained(MODEL).to(torch.float32), dense_unet()
    for seed, (key, prompts) in enumerate(sets.items(), 1):
        with torch.no_grad():
            encoded = [pipe.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False) for prompt in prompts]
        states, pooled = torch.cat([one[0] for one in encoded]), torch.cat([one[2] for one in encoded])
        noise = torch.randn(len(prompts), 4, 16, 16, generator=torch.Generator().manual_seed(seed))
        x, u, e = (torch.zeros(STEPS, len(prompts), 4, 16, 16) for _ in range(3))

        def keep(step, rows, scaled, negative, positive):
            x[step, rows], u[step, rows], e[step, rows] = scaled, negative, positive

        final = draw(unet, noise, states, pooled, keep)
        save_file({"ctx": states, "pooled": pooled, "noise": noise, "x": x, "u": u, "e": e, "x0": final}, out / f"{key}.safetensors")


class Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table, index, shape):
        ctx.save_for_backward(index)
        ctx.n = table.numel()
        return torch.cat([table, table.new_zeros(1)])[index].view(shape)

    @staticmethod
    def backward(ctx, gradient):
        sums = torch.bincount(ctx.saved_tensors[0], weights=gradient.reshape(-1).double(), minlength=ctx.n + 1)
        return sums[: ctx.n].float(), None, None


class Tuned:
    """A container whose palettes and vectors are `masters`."""

    def __init__(self, path):
        metadata, table, data = read_safetensors(path)

        def content(name):
            begin, end = table[name]["data_offsets"]
            array = np.frombuffer(data[begin:end], DTYPES[table[name]["dtype"]])
            return array.reshape(table.pop(name)["shape"])

        self.tables, self.masters = {}, {}
        for name, row in json.loads(metadata["weights"]).items():
            shape, numel = row["shape"], math.prod(row["shape"])
            keep = unpack(content(name + ".mask").tobytes(), 1, numel).astype(bool) if row["masked"] else np.ones(numel, bool)
            indices = unpack(content(name + ".indices").tobytes(), row["bits"], row["kept"])
            palettes, place = content(name + ".palettes").astype(np.float32), np.nonzero(keep)[0]
            group = np.unravel_index(place, shape)[row["axis"]] // row["group_size"]
            index = np.full(numel, palettes.size, np.int64)
            index[place] = group * palettes.shape[1] + indices
            self.tables[name] = (torch.tensor(index), shape)
            self.masters[name] = torch.tensor(palettes.reshape(-1)).requires_grad_()
        for name in list(table):
            value = torch.tensor(content(name).astype(np.float32))
            self.masters[name] = value.requires_grad_(value.dim() == 1)
        self.unet, self.slots = dense_unet(), []
        for path, module in self.unet.named_modules():
            for leaf in [leaf for leaf, value in module._parameters.items() if value is not None]:
                self.slots.append((module, leaf, f"{path}.{leaf}" if path else leaf))
        for module, leaf, _ in self.slots:
            del module._parameters[leaf]

    def place(self, masters=None, half=False):
        for module, leaf, name in self.slots:
            value = (masters or self.masters)[name]
            value = value.half().float() if half else value
            module.__dict__[leaf] = Gather.apply(value, *self.tables[name]) if name in self.tables else value
        return self.unet


def effects(net, train, probes=8):
    """By step: the square of the final latents' error for a square of 1 of the prediction's (of the compressed network's own errors)."""
    dense, states, pooled = dense_unet(), train["ctx"][:probes], train["pooled"][:probes]
    reached, live = torch.zeros(STEPS, dtype=torch.double), []
    with torch.no_grad():
        unet, errors = net.place(half=True), []
        for step in range(STEPS):
            width = float(SIGMAS[step + 1] - SIGMAS[step])
            moved = []
            for x in live:
                scaled = x / math.sqrt(float(SIGMAS[step]) ** 2 + 1)
                moved.append(x + guided(*call(dense, scaled, TIMES[step], states, pooled)) * width)
            error = guided(*call(unet, train["x"][step, :probes], TIMES[step], states, pooled))
            error = error - guided(train["u"][step, :probes], train["e"][step, :probes])
            last = step + 1 == STEPS
            after = train["x0"][:probes] if last else train["x"][step + 1, :probes] * math.sqrt(float(SIGMAS[step + 1]) ** 2 + 1)
            errors.append(float((error**2).sum()))
            live = [*moved, after + error * width]
    for step, x in enumerate(live):
        reached[step] = float(((x - train["x0"][:probes]) ** 2).sum()) / errors[step]
    return reached


def tune(out, container, share, steps, rate):
    train, val, test = (load_file(out / f"{key}.safetensors") for key in ("train", "val", "test"))
    net = Tuned(container)
    vae = AutoencoderKL.from_pretrained(MODEL + "/vae").float().eval().requires_grad_(False)

    def pictures(x):
        with torch.no_grad():
            return ((vae.decode(x / vae.config.scaling_factor, return_dict=False)[0].clamp(-1, 1) / 2 + 0.5) * 255).round()

    def judge(masters, data, n):
        x = draw(net.place(masters, half=True), data["noise"][:n], data["ctx"][:n], data["pooled"][:n])
        return x, float(((x - data["x0"][:n]) ** 2).sum() / (data["x0"][:n] ** 2).sum())

    def psnr(masters, n=64):
        error = (pictures(judge(masters, test, n)[0]) - pictures(test["x0"][:n])) ** 2
        return (10 * torch.log10(255**2 / error.flatten(1).mean(1))).numpy()

    errors = torch.zeros(STEPS, dtype=torch.double)
    with torch.no_grad():
        unet = net.place(half=True)
        for step in range(STEPS):
            rows = torch.arange(step % 3, len(val["noise"]), 3)
            off = guided(*call(unet, val["x"][step, rows], TIMES[step], val["ctx"][rows], val["pooled"][rows]))
            off = off - guided(val["u"][step, rows], val["e"][step, rows])
            errors[step] = float((off**2).sum()) / len(rows)
    reached = effects(net, train)
    print("squared error by step", errors.tolist(), "\nits effect", reached.tolist())
    weights = (1 - share) * reached / (reached * errors).sum() + share / (STEPS * errors)
    chances = 0.9 * weights * errors + 0.1 / STEPS
    factors = weights / chances

    before = psnr(None)
    learned = {name: value for name, value in net.masters.items() if value.requires_grad}
    sizes = {name: float(value.detach().abs().mean()) for name, value in learned.items()}
    first, second = ({name: torch.zeros_like(value) for name, value in learned.items()} for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for k in range(steps):
        step = torch.multinomial(chances, CALLS, replacement=True, generator=generator)
        row = torch.randint(0, len(train["noise"]), (CALLS,), generator=generator)
        off = guided(*call(net.place(), train["x"][step, row], TIMES[step], train["ctx"][row], train["pooled"][row]))
        off = off - guided(train["u"][step, row], train["e"][step, row])
        loss = (factors[step] * (off**2).flatten(1).sum(1)).mean()
        loss.backward()
        height = min(1, (k + 1) / max(1, steps * 0.05)) * (0.5 + 0.5 * math.cos(math.pi * k / steps))
        with torch.no_grad():
            for name, value in learned.items():
                first[name].mul_(0.9).add_(value.grad, alpha=0.1)
                second[name].mul_(0.99).addcmul_(value.grad, value.grad, value=0.01)
                mean, square = first[name] / (1 - 0.9 ** (k + 1)), second[name] / (1 - 0.99 ** (k + 1))
                value -= rate * height * sizes[name] * mean / (square.sqrt() + 1e-12)
                value.grad = None
        if (k + 1) % max(1, steps // 4) == 0:
            print(f"{k + 1}: loss {float(loss):.3f}, held-out latents {judge(None, val, 16)[1]:.5f}", flush=True)
    difference = psnr(None) - before
    rng = np.random.default_rng(0)
    means = np.sort([difference[rng.integers(0, len(difference), len(difference))].mean() for _ in range(2000)])
    print(f"{before.mean():.2f} dB, then {difference.mean():+.2f} [{means[50]:+.2f}, {means[1950]:+.2f}]")


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("what", choices=("draw", "train"))
parser.add_argument("out", type=pathlib.Path)
parser.add_argument("container", nargs="?")
parser.add_argument("--share", type=float, default=0.3)
parser.add_argument("--steps", type=int, default=150)
parser.add_argument("--rate", type=float, default=0.003)
args = parser.parse_args()
if args.what == "draw":
    args.out.mkdir(parents=True, exist_ok=True)
    draw_all(args.out)
else:
    tune(args.out, args.container, args.share, args.steps, args.rate)
