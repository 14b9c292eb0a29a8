//! The steps and the guidance that a model was made for.
//!
//! Distilled models draw a picture in one to eight steps, without guidance. Nothing in their files
//! states it, so it is read from the sampler's config and from the model's name.

use std::path::Path;
use std::sync::LazyLock;

use regex::Regex;
use sdxl_model::scheduler::SchedulerConfig;

use super::folder::PipelineFolder;

/// Steps and guidance for a model, where its user names none.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingDefaults {
    /// Denoising steps.
    pub steps: usize,
    /// Guidance scale; 1 or less is none.
    pub guidance: f64,
    /// What shows that the model is a distilled one; `None` if nothing does.
    pub why: Option<String>,
}

/// A kind of distilled model.
#[derive(Debug, Clone, Copy)]
struct Family {
    /// With its article.
    name: &'static str,
    /// Its steps where the name of the model gives no number.
    steps: usize,
    guidance: f64,
    /// The flags for the sampler of the published models.
    sampler: &'static str,
}

const TURBO: Family = Family {
    name: "a Turbo",
    steps: 4,
    guidance: 0.0,
    sampler: "--scheduler euler-ancestral --timestep-spacing trailing, and --height 512 --width 512 for SDXL-Turbo itself",
};
const LIGHTNING: Family =
    Family { name: "a Lightning", steps: 4, guidance: 0.0, sampler: "--scheduler euler --timestep-spacing trailing" };
const HYPER: Family =
    Family { name: "a Hyper-SD", steps: 4, guidance: 0.0, sampler: "--scheduler ddim --timestep-spacing trailing" };
const TCD: Family = Family { name: "a TCD", steps: 4, guidance: 0.0, sampler: "--scheduler tcd" };
const LCM: Family = Family { name: "an LCM", steps: 4, guidance: 1.0, sampler: "--scheduler lcm" };

impl SamplingDefaults {
    /// The defaults of a model; those of a model that is not distilled are `steps` and `guidance`.
    #[must_use]
    pub fn of(folder: &PipelineFolder, steps: usize, guidance: f64) -> Self {
        let path = folder.root().canonicalize().unwrap_or_else(|_| folder.root().to_owned());
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let names = [Some(name), folder.name.clone()];
        let names: Vec<&str> = names.iter().flatten().map(String::as_str).collect();
        Self::read(&names, &folder.scheduler).unwrap_or(SamplingDefaults { steps, guidance, why: None })
    }

    /// What `names` and the sampler's config say; `None` if they say nothing.
    fn read(names: &[&str], scheduler: &SchedulerConfig) -> Option<Self> {
        let (family, why) = by_name(names).or_else(|| by_scheduler(scheduler))?;
        let named = names.iter().find_map(|name| steps_in(name));
        // A network that predicts the picture itself draws it in one step.
        let lightning_in_one = family.name == LIGHTNING.name && scheduler.text("prediction_type") == Some("sample");
        let steps = named.unwrap_or(if lightning_in_one { 1 } else { family.steps });
        Some(SamplingDefaults { steps, guidance: family.guidance, why: Some(why) })
    }
}

/// What to do for a distilled model in a checkpoint that has no sampler's config: it gets SDXL's
/// sampler of `class`, which is not the one that it was made for. `None` for other models.
pub(crate) fn sampler_advice(path: &Path, class: &str) -> Option<String> {
    let name = path.file_name()?.to_string_lossy();
    let (Family { sampler, .. }, why) = by_name(&[&name])?;
    let path = path.display();
    Some(format!(
        "{path} does not name its sampler, and {class} with SDXL's settings is taken; {why}, which is made for {sampler}"
    ))
}

/// The family that a name states.
fn by_name(names: &[&str]) -> Option<(Family, String)> {
    static WORD: LazyLock<Regex> = LazyLock::new(|| {
        // Short words count where they begin after a separator; the others also within a word.
        Regex::new(r"(?i)(turbo|lightning)|(?:^|[^a-z])(lcm|tcd|hyper)(?:[^a-z]|sd|$)").expect("the pattern is correct")
    });
    names.iter().find_map(|name| {
        let found = WORD.captures(name)?;
        let word = found.get(1).or(found.get(2))?.as_str().to_lowercase();
        let family = match word.as_str() {
            "turbo" => TURBO,
            "lightning" => LIGHTNING,
            "lcm" => LCM,
            "tcd" => TCD,
            _ => HYPER,
        };
        Some((family, format!("the name `{name}` is that of {} model", family.name)))
    })
}

/// The family whose sampler a pipeline has.
fn by_scheduler(scheduler: &SchedulerConfig) -> Option<(Family, String)> {
    let class = scheduler.class();
    let trailing = scheduler.text("timestep_spacing") == Some("trailing");
    let of_picture = scheduler.text("prediction_type") == Some("sample");
    let (family, what) = match class {
        "LCMScheduler" => (LCM, ""),
        "TCDScheduler" => (TCD, ""),
        "EulerAncestralDiscreteScheduler" if trailing => (TURBO, " with trailing timesteps"),
        "EulerDiscreteScheduler" if trailing && of_picture => {
            (LIGHTNING, " with trailing timesteps and the prediction type `sample`")
        }
        _ => return None,
    };
    Some((family, format!("its sampler is {class}{what}, as that of {} model", family.name)))
}

/// The steps that a name gives, such as `4step` or `8-steps`.
fn steps_in(name: &str) -> Option<usize> {
    static STEPS: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"(?i)(?:^|[^0-9])([1-9]|1[0-9])[ _-]?steps?").expect("the pattern is correct"));
    STEPS.captures(name)?[1].parse().ok()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn scheduler(class: &str, keys: serde_json::Value) -> SchedulerConfig {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("scheduler_config.json");
        let mut keys = keys;
        keys["_class_name"] = json!(class);
        std::fs::write(&path, keys.to_string()).unwrap();
        SchedulerConfig::read(&path).unwrap()
    }

    /// Steps and guidance of a model with this name and an ordinary sampler.
    fn named(name: &str) -> Option<(usize, f64)> {
        let euler = scheduler("EulerDiscreteScheduler", json!({}));
        SamplingDefaults::read(&[name], &euler).map(|defaults| (defaults.steps, defaults.guidance))
    }

    #[test]
    fn names_of_distilled_models_are_known() {
        assert_eq!(named("sdxl-turbo"), Some((4, 0.0)));
        assert_eq!(named("DreamShaperXL_Turbo_v2"), Some((4, 0.0)));
        assert_eq!(named("sdxl_lightning_2step"), Some((2, 0.0)));
        assert_eq!(named("juggernautXL_v9Rdphoto2Lightning"), Some((4, 0.0)));
        assert_eq!(named("Hyper-SDXL-8steps"), Some((8, 0.0)));
        assert_eq!(named("HyperSDXL_1step"), Some((1, 0.0)));
        assert_eq!(named("lcm-sdxl"), Some((4, 1.0)));
        assert_eq!(named("TCD-SDXL"), Some((4, 0.0)));
    }

    #[test]
    fn other_names_are_not() {
        for name in ["stable-diffusion-xl-base-1.0", "hyperrealism_v3", "emoji-sdxl", "Calcmix", "sdxl_30step", ""] {
            assert_eq!(named(name), None, "{name}");
        }
    }

    #[test]
    fn samplers_of_distilled_models_are_known() {
        let read = |class: &str, keys| {
            let defaults = SamplingDefaults::read(&["model"], &scheduler(class, keys));
            defaults.map(|defaults| (defaults.steps, defaults.guidance))
        };
        assert_eq!(read("LCMScheduler", json!({})), Some((4, 1.0)));
        assert_eq!(read("TCDScheduler", json!({})), Some((4, 0.0)));
        assert_eq!(read("EulerAncestralDiscreteScheduler", json!({"timestep_spacing": "trailing"})), Some((4, 0.0)));
        let one = json!({"timestep_spacing": "trailing", "prediction_type": "sample"});
        assert_eq!(read("EulerDiscreteScheduler", one), Some((1, 0.0)));
        // Trailing timesteps alone are those of many models with 20 steps and more.
        assert_eq!(read("EulerDiscreteScheduler", json!({"timestep_spacing": "trailing"})), None);
        assert_eq!(read("EulerAncestralDiscreteScheduler", json!({})), None);
    }
}
