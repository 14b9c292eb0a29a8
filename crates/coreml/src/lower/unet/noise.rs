//! From what a UNet predicts to noise, in fp32 (diffusers' `DDIMScheduler.step`).

use squeeze_base::error::{Error, Result};

use super::super::Network;
use crate::noise_output::{NoiseOutput, Predicted};
use crate::program::Var;

/// All tables by timestep.
const TABLES: [&str; 3] = [OWN_TIMESTEPS, PREDICTED_FACTORS, LATENT_FACTORS];
/// The UNet's own timesteps, which the input block reads.
const OWN_TIMESTEPS: &str = "own_timesteps";
/// The factors of what the UNet predicts and of the noisy latents, whose sum is the noise.
const PREDICTED_FACTORS: &str = "predicted_factors";
const LATENT_FACTORS: &str = "latent_factors";

/// The names of the tables that the program of some parts can have: parts that begin the UNet or
/// end it.
pub(crate) fn tables(begins: bool, ends: bool) -> &'static [&'static str] {
    &TABLES[usize::from(!begins)..if ends { TABLES.len() } else { 1 }]
}

/// The sampler's timesteps [b] as positions in the tables. They are whole numbers, which fp16
/// holds up to 2,048.
pub(super) fn positions(net: &mut Network, timestep: &Var) -> Result<Var> {
    net.cast("timestep.position", timestep, "int32")
}

/// The UNet's own timesteps [b] in fp32.
pub(super) fn own_timesteps(net: &mut Network, timesteps: &[f32], positions: &Var) -> Result<Var> {
    let table = net.program.floats(OWN_TIMESTEPS, &[timesteps.len() as u64], timesteps)?;
    net.gather("timestep.own", &table, positions, 0)
}

/// The program's output `out` in fp32, noise [b, c, h, w], from the `prediction` in fp32 and the
/// noisy latents `sample`.
pub(super) fn noise(
    net: &mut Network,
    out: &str,
    output: &NoiseOutput,
    positions: &Var,
    prediction: &Var,
    sample: &Var,
) -> Result<Var> {
    let picture = |signal: f64| signal.sqrt();
    let noise = |signal: f64| (1.0 - signal).sqrt();
    let [predicted_factors, latent_factors]: [Vec<f32>; 2] = match output.predicted {
        Predicted::Noise => return Err(Error::internal("noise is made of noise")),
        Predicted::Velocity => [output.table(picture), output.table(noise)],
        // noise = (latents - √ᾱ·picture) / √(1-ᾱ)
        Predicted::Picture => {
            [output.table(|signal| -picture(signal) / noise(signal)), output.table(|signal| 1.0 / noise(signal))]
        }
    };
    let wide = net.cast("sample.fp32", sample, "fp32")?;
    let mut product = |name: &str, table: &str, values: &[f32], x: &Var| -> Result<Var> {
        let table = net.program.floats(table, &[values.len() as u64], values)?;
        let factors = net.gather(&format!("{name}.factors"), &table, positions, 0)?;
        let batch = factors.shape().to_vec();
        let factors = net.reshape(&format!("{name}.rows"), &factors, &[&batch[..], &[1, 1, 1]].concat())?;
        net.binary("mul", name, x, &factors)
    };
    let predicted = product("noise.predicted", PREDICTED_FACTORS, &predicted_factors, prediction)?;
    let latents = product("noise.latents", LATENT_FACTORS, &latent_factors, &wide)?;
    net.binary("add", out, &predicted, &latents)
}
