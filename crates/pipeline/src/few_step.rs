//! The steps and the guidance that a model was made for.
//!
//! Distilled models draw a picture in one to eight steps, most without guidance. Nothing in their
//! files states it. It is read from the UNet (that of an LCM is told the guidance scale), from the
//! sampler's config, and from the model's name: a word such as `lightning` counts where a number of
//! steps, the sampler or the name of a release agrees with it. Alone it is only a hint, because
//! many models are called so that are not distilled.

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
    /// What its user should know beside: that the model may be a distilled one, or that such a
    /// model is usually run with another sampler; and the flags for it.
    pub hint: Option<String>,
}

/// A kind of distilled model.
#[derive(Debug, Clone, Copy)]
struct Family {
    /// With its article.
    name: &'static str,
    /// Its steps where the name of the model gives no number.
    steps: usize,
    guidance: f64,
    /// The sampler that its publishers advise, as flags.
    sampler: &'static str,
}

const TRAILING: &str = "--timestep-spacing trailing";
const TURBO: Family = Family {
    name: "a Turbo",
    steps: 4,
    guidance: 0.0,
    sampler: "--scheduler euler-ancestral --timestep-spacing trailing, and --height 512 --width 512 for SDXL-Turbo itself",
};
const LIGHTNING: Family = Family { name: "a Lightning", steps: 4, guidance: 0.0, sampler: TRAILING };
const HYPER: Family = Family { name: "a Hyper-SD", steps: 4, guidance: 0.0, sampler: TRAILING };
const TCD: Family = Family { name: "a TCD", steps: 4, guidance: 0.0, sampler: "--scheduler tcd" };
const LCM: Family = Family { name: "an LCM", steps: 4, guidance: 1.0, sampler: "--scheduler lcm" };
/// A whole UNet that is told its guidance scale: LCM-SDXL was distilled at scales of 3 to 13, and
/// the guide "Latent Consistency Model" of diffusers draws with 8. It is called once a step all the
/// same.
const TOLD: Family = Family { guidance: 8.0, ..LCM };

impl SamplingDefaults {
    /// The defaults of a model; those of a model that is not distilled are `steps` and `guidance`.
    #[must_use]
    pub fn of(folder: &PipelineFolder, steps: usize, guidance: f64) -> Self {
        let path = folder.root().canonicalize().unwrap_or_else(|_| folder.root().to_owned());
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let names = [Some(name), folder.name.clone()];
        let names: Vec<&str> = names.iter().flatten().map(String::as_str).collect();
        let is_told = folder.unet.config().time_cond_proj_dim.is_some();
        Self::read(&names, &folder.scheduler, is_told, (steps, guidance))
    }

    /// What `names`, the sampler's config and the UNet say; `usual` are the steps and the guidance
    /// of a model that is not distilled.
    fn read(names: &[&str], scheduler: &SchedulerConfig, is_told: bool, usual: (usize, f64)) -> Self {
        let told = is_told.then(|| (TOLD, "its UNet is told the guidance scale, as that of an LCM".to_owned()));
        let Some((family, why)) = told.or_else(|| by_name(names, scheduler)).or_else(|| by_scheduler(scheduler)) else {
            return SamplingDefaults { steps: usual.0, guidance: usual.1, why: None, hint: suggestion(names) };
        };
        let named = names.iter().find_map(|name| steps_in(name));
        // A network that predicts the picture itself draws it in one step.
        let lightning_in_one = family.name == LIGHTNING.name && scheduler.text("prediction_type") == Some("sample");
        let steps = named.unwrap_or(if lightning_in_one { 1 } else { family.steps });
        // Some Hyper-SD models keep the guidance of the model that they were distilled from.
        let guidance = if names.iter().any(|name| keeps_guidance(name)) { usual.1 } else { family.guidance };
        let hint = (!runs_as(family, scheduler)).then(|| {
            format!("{} model is usually run with {} (its sampler is {})", family.name, family.sampler, scheduler.class())
        });
        SamplingDefaults { steps, guidance, why: Some(why), hint }
    }

    /// The hint, unless its user has chosen what it is about: steps and guidance of a model that
    /// may be a distilled one, or the sampler of one that is.
    #[must_use]
    pub fn open_hint(&self, has_steps_and_guidance: bool, has_sampler: bool) -> Option<&str> {
        let is_settled = if self.why.is_some() { has_sampler } else { has_steps_and_guidance };
        self.hint.as_deref().filter(|_| !is_settled)
    }
}

/// Whether a sampler's config is what the publishers of a family advise.
fn runs_as(family: Family, scheduler: &SchedulerConfig) -> bool {
    match scheduler.class() {
        // Their timesteps are those of distillation.
        "LCMScheduler" | "TCDScheduler" => true,
        _ => family.sampler.contains(TRAILING) && scheduler.text("timestep_spacing") == Some("trailing"),
    }
}

/// The family that a name states, if a number of steps, the sampler, or the name of a release
/// agrees.
fn by_name(names: &[&str], scheduler: &SchedulerConfig) -> Option<(Family, String)> {
    static RELEASE: LazyLock<Regex> = LazyLock::new(|| {
        Regex::new(r"(?i)^(sd_?xl[-_](turbo|lightning)|(hyper|lcm|tcd)-sdxl)([^a-z]|$)").expect("the pattern is correct")
    });
    let (family, name) = word_in(names)?;
    let spaced = scheduler.text("timestep_spacing") == Some("trailing");
    // Models whose noise ends in pure noise have this spacing for another reason.
    let ends_in_noise = scheduler.entries().get("rescale_betas_zero_snr").and_then(serde_json::Value::as_bool) == Some(true);
    let also = if let Some(steps) = names.iter().find_map(|name| steps_in(name)) {
        format!(" for {steps} step{}", if steps == 1 { "" } else { "s" })
    } else if RELEASE.is_match(name) {
        String::new()
    } else if by_scheduler(scheduler).is_some() {
        format!(", and its sampler is {}", scheduler.class())
    } else if spaced && !ends_in_noise {
        ", and its sampler has trailing timesteps".to_owned()
    } else {
        return None;
    };
    Some((family, format!("the name `{name}` is that of {} model{also}", family.name)))
}

/// What a name suggests that nothing else shows.
fn suggestion(names: &[&str]) -> Option<String> {
    let (family, name) = word_in(names)?;
    let Family { name: kind, steps, guidance, sampler } = family;
    Some(format!(
        "the name `{name}` suggests {kind} model, but nothing else does; if it is one, give --steps {steps} --guidance {guidance} \
         {sampler}, or what its publisher advises"
    ))
}

/// The first name with the word of a family.
fn word_in<'a>(names: &[&'a str]) -> Option<(Family, &'a str)> {
    static WORD: LazyLock<Regex> = LazyLock::new(|| {
        // Short words count where they begin after a separator; the others also within a word.
        Regex::new(r"(?i)(turbo|lightning)|(?:^|[^a-z])(lcm|tcd|hyper)(?:[^a-z]|sd|$)").expect("the pattern is correct")
    });
    names.iter().find_map(|name| {
        let found = WORD.captures(name)?;
        let family = match found.get(1).or(found.get(2))?.as_str().to_lowercase().as_str() {
            "turbo" => TURBO,
            "lightning" => LIGHTNING,
            "lcm" => LCM,
            "tcd" => TCD,
            _ => HYPER,
        };
        Some((family, *name))
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

/// Whether a name says that the model keeps classifier-free guidance, as `Hyper-SDXL-8steps-CFG`.
fn keeps_guidance(name: &str) -> bool {
    static CFG: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"(?i)(?:^|[^a-z])cfg(?:[^a-z]|$)").expect("the pattern is correct"));
    CFG.is_match(name)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn scheduler(class: &str, keys: serde_json::Value) -> SchedulerConfig {
        let mut keys = keys;
        keys["_class_name"] = json!(class);
        SchedulerConfig::from_entries("scheduler_config.json".as_ref(), keys.as_object().unwrap().clone()).unwrap()
    }

    /// Steps and guidance of a distilled model with this name and sampler, and the hint; `None` of
    /// a model that is not taken for one.
    fn of(name: &str, scheduler: &SchedulerConfig) -> (Option<(usize, f64)>, Option<String>) {
        let SamplingDefaults { steps, guidance, why, hint } = SamplingDefaults::read(&[name], scheduler, false, (30, 5.0));
        if why.is_none() {
            assert_eq!((steps, guidance), (30, 5.0), "{name}");
        }
        (why.map(|_| (steps, guidance)), hint)
    }

    /// Steps and guidance of a model with this name and an ordinary sampler.
    fn named(name: &str) -> Option<(usize, f64)> {
        of(name, &scheduler("EulerDiscreteScheduler", json!({}))).0
    }

    #[test]
    fn names_of_distilled_models_are_known() {
        // Names with a number of steps, and those of releases.
        assert_eq!(named("sdxl-turbo"), Some((4, 0.0)));
        assert_eq!(named("sd_xl_turbo_1.0_fp16.safetensors"), Some((4, 0.0)));
        assert_eq!(named("SDXL-Lightning"), Some((4, 0.0)));
        assert_eq!(named("sdxl_lightning_2step"), Some((2, 0.0)));
        assert_eq!(named("sdxl_lightning_4step_unet.safetensors"), Some((4, 0.0)));
        assert_eq!(named("RealVisXL_V4.0_Lightning_5 steps"), Some((5, 0.0)));
        assert_eq!(named("Hyper-SDXL-8steps"), Some((8, 0.0)));
        assert_eq!(named("Hyper-SDXL-8steps-CFG"), Some((8, 5.0)));
        assert_eq!(named("HyperSDXL_1step"), Some((1, 0.0)));
        assert_eq!(named("lcm-sdxl"), Some((4, 1.0)));
        assert_eq!(named("TCD-SDXL"), Some((4, 0.0)));
    }

    #[test]
    fn a_word_alone_is_a_hint() {
        let trailing = scheduler("EulerDiscreteScheduler", json!({"timestep_spacing": "trailing"}));
        for (name, flags) in [
            ("DreamShaperXL_Turbo_v2", "--scheduler euler-ancestral --timestep-spacing trailing, and --height 512 "),
            ("DreamShaperXL_Turbo_v2_1", "--scheduler euler-ancestral --timestep-spacing trailing, and --height 512 "),
            ("juggernautXL_v9Rdphoto2Lightning", "--timestep-spacing trailing, or"),
            ("lightning_storm_xl", "--timestep-spacing trailing, or"),
        ] {
            let (defaults, hint) = of(name, &scheduler("EulerDiscreteScheduler", json!({})));
            assert_eq!(defaults, None, "{name}");
            let hint = hint.unwrap();
            for part in [name, "suggests a ", &format!("--steps 4 --guidance 0 {flags}")] {
                assert!(hint.contains(part), "{hint}");
            }
            // The sampler agrees.
            assert_eq!(of(name, &trailing), (Some((4, 0.0)), None), "{name}");
            assert_eq!(of(name, &scheduler("LCMScheduler", json!({}))), (Some((4, 0.0)), None), "{name}");
        }
        // The spacing of models that end in pure noise says nothing.
        let noise = json!({"timestep_spacing": "trailing", "rescale_betas_zero_snr": true, "prediction_type": "v_prediction"});
        assert_eq!(of("lightning_storm_xl", &scheduler("EulerDiscreteScheduler", noise)).0, None);
    }

    #[test]
    fn a_sampler_that_the_family_does_not_use_is_a_hint() {
        let euler = scheduler("EulerDiscreteScheduler", json!({"timestep_spacing": "leading"}));
        let (defaults, hint) = of("sdxl_lightning_4step_unet.safetensors", &euler);
        assert_eq!(defaults, Some((4, 0.0)));
        assert!(hint.unwrap().contains("a Lightning model is usually run with --timestep-spacing trailing"));
        assert!(of("sdxl-turbo", &euler).1.unwrap().contains("a Turbo model is usually run with --scheduler euler-ancestral "));
        assert!(of("lcm-sdxl", &euler).1.unwrap().contains("--scheduler lcm"));
        assert_eq!(of("lcm-sdxl", &scheduler("LCMScheduler", json!({}))).1, None);
    }

    #[test]
    fn a_unet_that_is_told_the_scale_is_an_lcm() {
        let read = |class: &str| SamplingDefaults::read(&["model"], &scheduler(class, json!({})), true, (30, 5.0));
        let lcm = read("LCMScheduler");
        assert_eq!((lcm.steps, lcm.guidance, lcm.hint), (4, 8.0, None));
        assert!(lcm.why.unwrap().contains("told the guidance scale"));
        assert!(read("EulerDiscreteScheduler").hint.unwrap().contains("--scheduler lcm"));
    }

    #[test]
    fn other_names_are_not() {
        for name in ["stable-diffusion-xl-base-1.0", "hyperrealism_v3", "emoji-sdxl", "Calcmix", "sdxl_30step", ""] {
            assert_eq!(of(name, &scheduler("EulerDiscreteScheduler", json!({}))), (None, None), "{name}");
        }
    }

    #[test]
    fn samplers_of_distilled_models_are_known() {
        let read = |class: &str, keys| of("model", &scheduler(class, keys)).0;
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
