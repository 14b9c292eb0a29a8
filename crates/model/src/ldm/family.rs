//! The family of a checkpoint, and what it implies of pipeline and sampler.

use std::fmt::{self, Display};

use serde_json::{Map, Value, json};
use squeeze_base::error::{Error, Result};
use squeeze_base::safetensors_file::SafetensorsFile;
use squeeze_numerics::device::Placement;
use tch::{Device, Kind};

use crate::checkpoint::read_tensor;

/// What a model predicts and how it is sampled, which tensors without weights mark.
#[derive(Debug, Clone, PartialEq)]
pub enum Prediction {
    /// The noise, as SDXL base does.
    Epsilon,
    /// v (Salimans and Ho 2022), marked by a tensor `v_pred`; with `ztsnr`, on a schedule that ends
    /// in pure noise.
    V {
        /// Whether the schedule ends in pure noise.
        zero_terminal_snr: bool,
    },
    /// Playground v2.5: EDM, with latents normalized by `edm_mean` and `edm_std`.
    Playground {
        /// The mean of each latent channel.
        mean: Vec<f64>,
        /// The standard deviation of each latent channel.
        std: Vec<f64>,
    },
    /// CosXL: v under EDM, marked by `edm_vpred.sigma_max` and `edm_vpred.sigma_min`.
    CosXl {
        /// The least sigma.
        sigma_min: f64,
        /// The largest sigma.
        sigma_max: f64,
    },
}

/// A model of the SDXL family.
#[derive(Debug, Clone, PartialEq)]
pub struct Family {
    /// Whether it is a refiner, which has OpenCLIP alone and is told an aesthetic score.
    pub is_refiner: bool,
    /// The UNet's input channels: 4, 9 for inpainting, 8 for editing.
    pub in_channels: i64,
    /// What it predicts.
    pub prediction: Prediction,
    /// Whether the UNet is told the guidance scale (`time_embedding.cond_proj`), as that of a
    /// latent consistency model (LCM) is.
    pub is_told_guidance: bool,
}

impl Prediction {
    /// Reads the markers of a checkpoint.
    ///
    /// # Errors
    /// If a marker with values is not readable.
    pub(super) fn of(file: &SafetensorsFile) -> Result<Self> {
        let has = |name: &str| file.entries().contains_key(name);
        if has("edm_mean") && has("edm_std") {
            return Ok(Prediction::Playground { mean: numbers(file, "edm_mean")?, std: numbers(file, "edm_std")? });
        }
        if has("edm_vpred.sigma_max") {
            let one = |name: &str, default: f64| match has(name) {
                true => Ok::<f64, Error>(numbers(file, name)?.first().copied().unwrap_or(default)),
                false => Ok(default),
            };
            let (sigma_min, sigma_max) = (one("edm_vpred.sigma_min", 0.002)?, one("edm_vpred.sigma_max", 120.0)?);
            return Ok(Prediction::CosXl { sigma_min, sigma_max });
        }
        Ok(if has("v_pred") { Prediction::V { zero_terminal_snr: has("ztsnr") } } else { Prediction::Epsilon })
    }

    /// `scheduler_config.json` as the model's publishers would write it; `None` for noise on the
    /// usual schedule, which any config describes.
    #[must_use]
    pub fn scheduler(&self) -> Option<Map<String, Value>> {
        let config = match self {
            Prediction::Epsilon => return None,
            Prediction::V { zero_terminal_snr } => {
                let mut config = euler("v_prediction");
                config.insert("rescale_betas_zero_snr".into(), json!(zero_terminal_snr));
                if *zero_terminal_snr {
                    // The schedule's first timestep is the one of pure noise.
                    config.insert("timestep_spacing".into(), json!("trailing"));
                }
                return Some(config);
            }
            // As `_legacy_load_scheduler` in diffusers' `loaders/single_file_utils.py`.
            Prediction::Playground { .. } => json!({
                "_class_name": "EDMDPMSolverMultistepScheduler",
                "algorithm_type": "dpmsolver++",
                "dynamic_thresholding_ratio": 0.995,
                "euler_at_final": false,
                "final_sigmas_type": "zero",
                "lower_order_final": true,
                "num_train_timesteps": 1000,
                "prediction_type": "epsilon",
                "rho": 7.0,
                "sample_max_value": 1.0,
                "sigma_data": 0.5,
                "sigma_max": 80.0,
                "sigma_min": 0.002,
                "solver_order": 2,
                "solver_type": "midpoint",
                "thresholding": false,
            }),
            // As diffusers' documentation sets it for CosXL.
            Prediction::CosXl { sigma_min, sigma_max } => json!({
                "_class_name": "EDMEulerScheduler",
                "num_train_timesteps": 1000,
                "prediction_type": "v_prediction",
                "rho": 7.0,
                "sigma_data": 1.0,
                "sigma_max": sigma_max,
                "sigma_min": sigma_min,
                "sigma_schedule": "exponential",
            }),
        };
        config.as_object().cloned()
    }
}

impl Family {
    /// The sampler's config: that of the markers, or of SDXL base, and LCM's class for an LCM.
    #[must_use]
    pub fn scheduler(&self) -> Map<String, Value> {
        let mut config = self.prediction.scheduler().unwrap_or_else(|| euler("epsilon"));
        if self.is_told_guidance && config["_class_name"] == "EulerDiscreteScheduler" {
            // The keys of the schedule stay, as in the `from_config` of LCM-SDXL's model card.
            config.insert("_class_name".into(), json!("LCMScheduler"));
        }
        config
    }

    /// Whether it is an edit model whose UNet is shown scaled latents (CosXL Edit), which
    /// `is_cosxl_edit` of `model_index.json` says.
    #[must_use]
    pub fn is_cosxl_edit(&self) -> bool {
        self.in_channels == 8 && matches!(self.prediction, Prediction::CosXl { .. })
    }

    /// What the file marks of its latents, as entries of the VAE's `config.json`.
    #[must_use]
    pub fn marked_latents(&self) -> Option<Map<String, Value>> {
        let (scaling_factor, Some(mean), Some(std)) = self.latents() else { return None };
        json!({ "scaling_factor": scaling_factor, "latents_mean": mean, "latents_std": std }).as_object().cloned()
    }

    /// Scale, mean and standard deviation of the latents.
    pub(super) fn latents(&self) -> (f64, Option<&[f64]>, Option<&[f64]>) {
        match &self.prediction {
            Prediction::Playground { mean, std } => (0.5, Some(mean), Some(std)),
            Prediction::Epsilon | Prediction::V { .. } | Prediction::CosXl { .. } => (0.130_25, None, None),
        }
    }

    /// `model_index.json`.
    #[must_use]
    pub fn index(&self) -> Map<String, Value> {
        let class = match (self.in_channels, self.is_refiner) {
            (9, _) => "StableDiffusionXLInpaintPipeline",
            (8, _) => "StableDiffusionXLInstructPix2PixPipeline",
            (_, true) => "StableDiffusionXLImg2ImgPipeline",
            (_, false) => "StableDiffusionXLPipeline",
        };
        let first = |library: &str, name: &str| if self.is_refiner { json!([null, null]) } else { json!([library, name]) };
        let index = json!({
            "_class_name": class,
            "force_zeros_for_empty_prompt": !self.is_refiner,
            "is_cosxl_edit": self.is_cosxl_edit(),
            "requires_aesthetics_score": self.is_refiner,
            "scheduler": ["diffusers", self.scheduler()["_class_name"]],
            "text_encoder": first("transformers", "CLIPTextModel"),
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer": first("transformers", "CLIPTokenizer"),
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        });
        index.as_object().cloned().unwrap_or_default()
    }
}

impl Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.prediction, self.is_refiner) {
            (Prediction::Playground { .. }, _) => f.write_str("Playground v2.5")?,
            (Prediction::CosXl { .. }, _) => f.write_str("CosXL")?,
            (_, true) => f.write_str("SDXL refiner")?,
            (_, false) => f.write_str("SDXL base")?,
        }
        match self.in_channels {
            4 => {}
            8 => f.write_str(", for editing (8 input channels)")?,
            9 => f.write_str(", for inpainting (9 input channels)")?,
            other => write!(f, ", with {other} input channels")?,
        }
        if self.is_told_guidance {
            f.write_str(", LCM (told the guidance scale)")?;
        }
        match self.prediction {
            Prediction::V { zero_terminal_snr: true } => f.write_str(", v-prediction with zero terminal SNR"),
            Prediction::V { zero_terminal_snr: false } => f.write_str(", v-prediction"),
            Prediction::Epsilon | Prediction::Playground { .. } | Prediction::CosXl { .. } => Ok(()),
        }
    }
}

/// The sampler of the published SDXL folders.
fn euler(prediction: &str) -> Map<String, Value> {
    let config = json!({
        "_class_name": "EulerDiscreteScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.000_85,
        "interpolation_type": "linear",
        "num_train_timesteps": 1000,
        "prediction_type": prediction,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "use_karras_sigmas": false,
    });
    config.as_object().cloned().unwrap_or_default()
}

/// The values of a small marker tensor.
fn numbers(file: &SafetensorsFile, name: &str) -> Result<Vec<f64>> {
    const MOST: i64 = 1024;
    let entry = &file.entries()[name];
    if entry.shape.iter().product::<i64>() > MOST {
        return Err(Error::bad_file(file.path(), format!("`{name}` is {:?}, not a few numbers", entry.shape)));
    }
    let tensor = read_tensor(file, name, Placement { device: Device::Cpu, kind: Kind::Double })?;
    Ok(Vec::try_from(&tensor.f_flatten(0, -1)?)?)
}
