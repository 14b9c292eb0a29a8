"""The steps of apple/ml-stable-diffusion's Swift pipeline for SDXL over the packages of a bundle, which mil_torch.py evaluates.

Written after `StableDiffusionXLPipeline.swift`, `TextEncoderXL.swift`, `BPETokenizer.swift`, `Unet.swift`, `Scheduler.swift`,
`DPMSolverMultistepScheduler.swift` and `Decoder.swift`; numbers are fp32 where Swift's are `Float`. The first noise is given: Swift's
random numbers are not drawn here.
"""

import json
import pathlib

import numpy as np
import torch
from mil_torch import Package, evaluate


class Tokenizer:
    """`BPETokenizer.swift` and `BPETokenizer+Reading.swift`: works on characters, and splits at spaces alone."""

    BEGIN, END = "<|startoftext|>", "<|endoftext|>"

    def __init__(self, folder, pad=END):
        self.pad = pad
        self.vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        # The last line is dropped if it has no end.
        lines = (folder / "merges.txt").read_bytes().split(b"\n")[:-1]
        self.ranks = {}
        for rank, line in enumerate(lines):
            if line and not line.startswith(b"#"):
                first, second = line.split(b" ")
                self.ranks[first.decode(), second.decode()] = rank

    def ids(self, text, length):
        words = [word for word in text.strip().lower().split(" ") if word]
        tokens = [self.BEGIN, *(token for word in words for token in self.encode(word)), self.END]
        tokens += [self.pad] * (length - len(tokens))
        # What is too long loses its end token too.
        tokens = tokens[:length]
        return [self.vocabulary.get(token, self.vocabulary[self.END]) for token in tokens]

    def encode(self, word):
        tokens = list(word)
        tokens[-1] += "</w>"
        while True:
            pairs = [pair for pair in zip(tokens, tokens[1:]) if pair in self.ranks]
            if not pairs:
                return tokens
            best = min(pairs, key=self.ranks.get)
            merged, at = [], 0
            while at < len(tokens):
                if tuple(tokens[at : at + 2]) == best:
                    merged.append("".join(best))
                    at += 2
                else:
                    merged.append(tokens[at])
                    at += 1
            tokens = merged


TRAIN_STEPS = 1000


def schedule():
    """`alphasCumProd` of `.scaledLinear` betas from 0.00085 to 0.012, in `Float`."""
    start, end = np.float32(0.00085) ** np.float32(0.5), np.float32(0.012) ** np.float32(0.5)
    roots = np.arange(TRAIN_STEPS, dtype=np.float32) * ((end - start) / np.float32(TRAIN_STEPS - 1)) + start
    return np.cumprod(np.float32(1) - roots * roots, dtype=np.float32)


def weighted_sum(weights, values):
    total = values[0] * np.float32(weights[0])
    for weight, value in zip(weights[1:], values[1:]):
        total = total + value * np.float32(weight)
    return total


class Pndm:
    """`PNDMScheduler`: the pseudo linear multistep method."""

    def __init__(self, steps):
        self.alphas = schedule()
        self.steps = steps
        forward = [int(round(i * float(TRAIN_STEPS // steps))) + 1 for i in range(steps)]
        self.timesteps = [*forward[:-1], forward[-2], forward[-1]][::-1]
        self.counter, self.ets, self.first, self.denoised = 0, [], None, None

    def step(self, output, timestep, sample):
        step = TRAIN_STEPS // self.steps
        before = timestep - step
        if self.counter != 1:
            self.ets = [*self.ets[-3:], output]
        else:
            before, timestep = timestep, timestep + step
        if self.counter == 0:
            self.first = sample
        elif self.counter == 1:
            output = weighted_sum([1 / 2, 1 / 2], [output, self.ets[-1]])
            sample = self.first
        elif len(self.ets) == 2:
            output = weighted_sum([3 / 2, -1 / 2], self.ets[::-1])
        elif len(self.ets) == 3:
            output = weighted_sum([23 / 12, -16 / 12, 5 / 12], self.ets[::-1])
        else:
            output = weighted_sum([55 / 24, -59 / 24, 37 / 24, -9 / 24], self.ets[::-1])
        self.counter += 1
        at, to = self.alphas[timestep], self.alphas[max(0, before)]
        self.denoised = (sample - output * np.sqrt(1 - at)) / np.sqrt(at)
        divisor = at * np.sqrt(1 - to) + np.sqrt(at * (1 - at) * to)
        return weighted_sum([np.sqrt(to / at), -(to - at) / divisor], [sample, output])


class DpmSolver:
    """`DPMSolverMultistepScheduler`: DPM-Solver++ of order 2."""

    def __init__(self, steps, spacing="linspace"):
        signal = schedule()
        self.by_index = spacing == "karras"
        if spacing == "linspace":
            spaced = np.arange(steps + 1, dtype=np.float32) * np.float32((TRAIN_STEPS - 1) / steps)
            self.timesteps = [int(np.floor(t + 0.5)) for t in spaced[1:][::-1]]
        elif spacing == "leading":
            ratio = (TRAIN_STEPS - 1) // (steps + 1)
            self.timesteps = [1 + i * ratio for i in range(steps + 1)][1:][::-1]
        else:
            sigmas = np.sqrt((1 - signal) / signal)
            ramp = np.linspace(0, 1, steps, dtype=np.float32)
            low, high = sigmas[0] ** np.float32(1 / 7), sigmas[-1] ** np.float32(1 / 7)
            karras = (high + ramp * (low - high)) ** np.float32(7)
            logs = np.log(sigmas)
            self.timesteps = [int(np.floor(np.interp(np.log(sigma), logs, np.arange(TRAIN_STEPS)) + 0.5)) for sigma in karras]
            karras = np.append(karras, karras[-1])
            signal = 1 / (1 + karras**2)
        self.alpha, self.sigma = np.sqrt(signal), np.sqrt(1 - signal)
        self.lambdas = np.log(self.alpha) - np.log(self.sigma)
        self.outputs, self.stepped = [], 0

    @property
    def denoised(self):
        return self.outputs[-1]

    def at(self, timestep):
        index = (self.timesteps.index(timestep) if timestep in self.timesteps else 0) if self.by_index else timestep
        return float(self.alpha[index]), float(self.sigma[index]), float(self.lambdas[index])

    def step(self, output, timestep, sample):
        index, count = self.timesteps.index(timestep), len(self.timesteps)
        before = 0 if index == count - 1 else self.timesteps[index + 1]
        lower = self.stepped < 1 or (index >= count - 2 and count < 15)
        (alpha, sigma, now), (alpha_to, sigma_to, then) = self.at(timestep), self.at(before)
        x0 = (sample - output * np.float32(sigma)) / np.float32(alpha)
        self.outputs = [*self.outputs[-1:], x0]
        self.stepped += 1
        h = then - now
        change = -alpha_to * (np.exp(-h) - 1)
        if lower:
            return weighted_sum([sigma_to / sigma, change], [sample, x0])
        ratio = (now - self.at(self.timesteps[index - 1])[2]) / h
        slope = weighted_sum([1 / ratio, -1 / ratio], [x0, self.outputs[-2]])
        return weighted_sum([sigma_to / sigma, change, 0.5 * change], [sample, x0, slope])


def array(values):
    return torch.from_numpy(np.asarray(values, np.float32))


class Pipeline:
    """`StableDiffusionXLPipeline` over the folder of a bundle."""

    def __init__(self, folder, half=False):
        self.folder, self.half = pathlib.Path(folder), half
        package = lambda name: Package(self.folder / f"{name}.mlpackage") if (self.folder / f"{name}.mlpackage").exists() else None
        self.first, self.second = package("TextEncoder"), package("TextEncoder2")
        self.unet, self.refiner, self.decoder = package("Unet"), package("UnetRefiner"), package("VAEDecoder")
        self.tokenizers = Tokenizer(self.folder), Tokenizer(self.folder, "!")

    def run(self, package, inputs):
        return {name: value.numpy() for name, value in evaluate(package, {name: array(x) for name, x in inputs.items()}, self.half).items()}

    def encode(self, text, for_refiner):
        """States [1, n, c] and pooled text [1, p]."""
        states = []
        for package, tokenizer in zip((self.first, self.second), self.tokenizers):
            if package is None or (for_refiner and package is self.first):
                continue
            length = package.inputs["input_ids"][1][-1]
            made = self.run(package, {"input_ids": [tokenizer.ids(text, length)]})
            states.append(made["hidden_embeds"])
        return np.concatenate(states, 2), made["pooled_outputs"]

    def conditioning(self, config, for_refiner):
        states, pooled = zip(*(self.encode(text, for_refiner) for text in (config["negative"], config["prompt"])))
        original, target = config.get("original_size", 1024), config.get("target_size", 1024)
        rows = [[original, original, 0, 0, target, target]] * 2
        if for_refiner:
            rows = [[original, original, 0, 0, score] for score in (2.5, 6.0)]
        states = np.concatenate(states, 0).transpose(0, 2, 1)[:, :, None, :]
        return {"encoder_hidden_states": states, "text_embeds": np.concatenate(pooled, 0), "time_ids": rows}

    def generate(self, config, noise):
        """The picture [h, w, 3] in bytes, and the last latents [1, c, h, w]: those that are decoded, and those of the last step."""
        is_refiner = self.unet.inputs["time_ids"][1][-1] == 5
        given = self.conditioning(config, is_refiner)
        refined = self.conditioning(config, True) if self.refiner else None
        scheduler = Pndm(config["steps"]) if config["scheduler"] == "pndm" else DpmSolver(config["steps"], config.get("spacing", "linspace"))
        latents = noise.astype(np.float32)
        start = int(np.float32(len(scheduler.timesteps)) * np.float32(config.get("refiner_start", 0.8)))
        unet = self.unet
        for step, timestep in enumerate(scheduler.timesteps):
            if self.refiner and step == start:
                unet, given = self.refiner, refined
            both = np.concatenate([latents, latents], 0)
            made = self.run(unet, {"sample": both, "timestep": [timestep] * 2, **given})
            (noise_pred,) = made.values()
            negative, positive = noise_pred[:1], noise_pred[1:]
            guided = negative + np.float32(config["guidance"]) * (positive - negative)
            latents = scheduler.step(guided, timestep, latents)
        denoised = scheduler.denoised
        made = self.run(self.decoder, {"z": denoised / np.float32(config.get("scale", 0.13025))})["image"]
        bytes_ = np.rint(np.clip(made[0].transpose(1, 2, 0) / 2 + 0.5, 0, 1) * 255).astype(np.uint8)
        return bytes_, denoised, latents
