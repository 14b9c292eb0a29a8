"""What Apple's samplers must be given in the place of a UNet's prediction, by diffusers."""

import numpy as np
from swift_pipeline import schedule


def own_timesteps(model):
    """The timestep of the model's schedule with the noise of each of Apple's, and the model's sampler."""
    from diffusers import EulerDiscreteScheduler

    euler = EulerDiscreteScheduler.from_pretrained(model / "scheduler")
    own, apples = euler.alphas_cumprod.double().numpy(), schedule().astype(np.float64)
    logs = lambda signal: 0.5 * np.log((1 - signal) / signal)
    if np.abs(logs(own) - logs(apples)).max() < 1e-3:
        return np.arange(1000.0), euler
    return np.interp(logs(apples), logs(own), np.arange(len(own))), euler


def noise_of(euler, prediction, sample, timestep):
    """The noise in `sample` by a prediction, as diffusers makes it on Apple's schedule."""
    from diffusers import DPMSolverMultistepScheduler

    dpm = DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", algorithm_type="dpmsolver", final_sigmas_type="sigma_min",
        prediction_type=euler.config.prediction_type,
    )  # fmt: skip
    dpm.set_timesteps(1000)
    dpm._step_index = dpm.timesteps.tolist().index(timestep)
    return dpm.convert_model_output(prediction, sample=sample)
