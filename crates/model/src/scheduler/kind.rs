//! The samplers that are implemented, and their names.

use std::str::FromStr;

use squeeze_base::error::{Error, Result};
use squeeze_base::shorten::shorten;

use super::noise::Training;

/// A sampler that is implemented.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SchedulerKind {
    /// Euler's method (Karras et al. 2022; `EulerDiscreteScheduler`).
    Euler,
    /// Ancestral sampling with Euler's method (`EulerAncestralDiscreteScheduler`).
    EulerAncestral,
    /// Heun's method (Karras et al. 2022; `HeunDiscreteScheduler`).
    Heun,
    /// DDIM (Song et al. 2021; `DDIMScheduler`).
    Ddim,
    /// DDPM (Ho et al. 2020; `DDPMScheduler`).
    Ddpm,
    /// DPM-Solver++ 2M and its stochastic variant (Lu et al. 2022; `DPMSolverMultistepScheduler`).
    DpmSolverMultistep,
    /// DPM-Solver++ (S) as a stochastic sampler with the noise of a Brownian tree
    /// (`DPMSolverSDEScheduler`).
    DpmSolverSde,
    /// UniPC (Zhao et al. 2023; `UniPCMultistepScheduler`).
    UniPc,
    /// PLMS (Liu et al. 2022; `PNDMScheduler`).
    Pndm,
    /// Multistep consistency sampling (Luo et al. 2023; `LCMScheduler`).
    Lcm,
    /// Trajectory consistency distillation (Zheng et al. 2024; `TCDScheduler`).
    Tcd,
    /// Euler's method with EDM's preconditioning (`EDMEulerScheduler`).
    EdmEuler,
    /// DPM-Solver++ 2M with EDM's preconditioning (`EDMDPMSolverMultistepScheduler`).
    EdmDpmSolverMultistep,
}

impl SchedulerKind {
    /// Every sampler.
    pub const ALL: [SchedulerKind; 13] = [
        SchedulerKind::Euler,
        SchedulerKind::EulerAncestral,
        SchedulerKind::Heun,
        SchedulerKind::Ddim,
        SchedulerKind::Ddpm,
        SchedulerKind::DpmSolverMultistep,
        SchedulerKind::DpmSolverSde,
        SchedulerKind::UniPc,
        SchedulerKind::Pndm,
        SchedulerKind::Lcm,
        SchedulerKind::Tcd,
        SchedulerKind::EdmEuler,
        SchedulerKind::EdmDpmSolverMultistep,
    ];

    /// The class name in diffusers.
    #[must_use]
    pub fn class(self) -> &'static str {
        match self {
            SchedulerKind::Euler => "EulerDiscreteScheduler",
            SchedulerKind::EulerAncestral => "EulerAncestralDiscreteScheduler",
            SchedulerKind::Heun => "HeunDiscreteScheduler",
            SchedulerKind::Ddim => "DDIMScheduler",
            SchedulerKind::Ddpm => "DDPMScheduler",
            SchedulerKind::DpmSolverMultistep => "DPMSolverMultistepScheduler",
            SchedulerKind::DpmSolverSde => "DPMSolverSDEScheduler",
            SchedulerKind::UniPc => "UniPCMultistepScheduler",
            SchedulerKind::Pndm => "PNDMScheduler",
            SchedulerKind::Lcm => "LCMScheduler",
            SchedulerKind::Tcd => "TCDScheduler",
            SchedulerKind::EdmEuler => "EDMEulerScheduler",
            SchedulerKind::EdmDpmSolverMultistep => "EDMDPMSolverMultistepScheduler",
        }
    }

    /// The sampler of a class name in diffusers.
    pub(super) fn of_class(class: &str) -> Option<Self> {
        SchedulerKind::ALL.into_iter().find(|kind| kind.class() == class)
    }

    /// What the class makes of the keys that describe training. The EDM samplers have no such keys.
    pub(super) fn training(self) -> Training {
        let usual = Training { start: 0.0001, end: 0.02, schedule: "linear", more: &[], rescales: true };
        match self {
            SchedulerKind::Heun => Training { start: 0.00085, end: 0.012, more: &["exp"], rescales: false, ..usual },
            SchedulerKind::DpmSolverSde => Training { start: 0.00085, end: 0.012, rescales: false, ..usual },
            SchedulerKind::Pndm => Training { rescales: false, ..usual },
            SchedulerKind::Ddpm => Training { more: &["laplace", "sigmoid"], ..usual },
            SchedulerKind::Lcm | SchedulerKind::Tcd => {
                Training { start: 0.00085, end: 0.012, schedule: "scaled_linear", ..usual }
            }
            SchedulerKind::Euler
            | SchedulerKind::EulerAncestral
            | SchedulerKind::Ddim
            | SchedulerKind::DpmSolverMultistep
            | SchedulerKind::UniPc
            | SchedulerKind::EdmEuler
            | SchedulerKind::EdmDpmSolverMultistep => usual,
        }
    }

    /// Whether the class has EDM's preconditioning, and timesteps that are ln(σ) / 4.
    pub(super) fn is_edm(self) -> bool {
        matches!(self, SchedulerKind::EdmEuler | SchedulerKind::EdmDpmSolverMultistep)
    }

    /// Whether `timestep_spacing` changes the timesteps.
    pub(super) fn is_spaced(self) -> bool {
        !self.is_edm() && !matches!(self, SchedulerKind::Lcm | SchedulerKind::Tcd)
    }

    /// Whether the sampler takes η, the share of noise that each step adds.
    pub(super) fn has_eta(self) -> bool {
        matches!(self, SchedulerKind::Ddim | SchedulerKind::Tcd)
    }
}

/// A sampler picked by name.
///
/// The names are [`NAMES`](Self::NAMES) and diffusers' class names, in upper or lower case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SchedulerChoice {
    /// The sampler.
    pub kind: SchedulerKind,
    /// Whether the name asks for Karras's sigmas; otherwise the config decides.
    pub karras: bool,
    /// Whether the name asks for the stochastic variant of DPM-Solver++, or for PNDM without its
    /// Runge-Kutta steps; otherwise the config decides.
    pub variant: bool,
}

const fn choice(kind: SchedulerKind) -> SchedulerChoice {
    SchedulerChoice { kind, karras: false, variant: false }
}

const fn with_karras(choice: SchedulerChoice) -> SchedulerChoice {
    SchedulerChoice { karras: true, ..choice }
}

const SDE: SchedulerChoice = SchedulerChoice { variant: true, ..choice(SchedulerKind::DpmSolverMultistep) };

const CHOICES: [(&str, SchedulerChoice); 20] = [
    ("euler", choice(SchedulerKind::Euler)),
    ("euler-karras", with_karras(choice(SchedulerKind::Euler))),
    ("euler-ancestral", choice(SchedulerKind::EulerAncestral)),
    ("heun", choice(SchedulerKind::Heun)),
    ("heun-karras", with_karras(choice(SchedulerKind::Heun))),
    ("ddim", choice(SchedulerKind::Ddim)),
    ("ddpm", choice(SchedulerKind::Ddpm)),
    ("dpmpp-2m", choice(SchedulerKind::DpmSolverMultistep)),
    ("dpmpp-2m-karras", with_karras(choice(SchedulerKind::DpmSolverMultistep))),
    ("dpmpp-2m-sde", SDE),
    ("dpmpp-2m-sde-karras", with_karras(SDE)),
    ("dpmpp-sde", choice(SchedulerKind::DpmSolverSde)),
    ("dpmpp-sde-karras", with_karras(choice(SchedulerKind::DpmSolverSde))),
    ("unipc", choice(SchedulerKind::UniPc)),
    ("unipc-karras", with_karras(choice(SchedulerKind::UniPc))),
    ("plms", SchedulerChoice { variant: true, ..choice(SchedulerKind::Pndm) }),
    ("lcm", choice(SchedulerKind::Lcm)),
    ("tcd", choice(SchedulerKind::Tcd)),
    ("edm-euler", choice(SchedulerKind::EdmEuler)),
    ("edm-dpmpp-2m", choice(SchedulerKind::EdmDpmSolverMultistep)),
];

impl SchedulerChoice {
    /// The short names.
    pub const NAMES: [&'static str; CHOICES.len()] = {
        let mut names = [""; CHOICES.len()];
        let mut index = 0;
        while index < names.len() {
            names[index] = CHOICES[index].0;
            index += 1;
        }
        names
    };
}

impl FromStr for SchedulerChoice {
    type Err = Error;

    /// # Errors
    /// [`Error::Argument`] with the known names and the nearest of them.
    fn from_str(name: &str) -> Result<Self> {
        let classes = SchedulerKind::ALL.map(|kind| (kind.class(), choice(kind)));
        if let Some((_, choice)) = CHOICES.iter().chain(&classes).find(|choice| choice.0.eq_ignore_ascii_case(name)) {
            return Ok(*choice);
        }
        let names = Self::NAMES.join(", ");
        let likeness = |known: &str| strsim::jaro_winkler(&name.to_lowercase(), &known.to_lowercase());
        let known = CHOICES.iter().chain(&classes).map(|choice| choice.0);
        let nearest = known.max_by(|a, b| likeness(a).total_cmp(&likeness(b))).expect("there are known names");
        Err(Error::Argument(format!("unknown scheduler `{}`: did you mean `{nearest}`? (known: {names})", shorten(name))))
    }
}
