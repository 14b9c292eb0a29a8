//! The section `joint`: effort of the joint solver.

use serde::{Serialize, Serializer};
use squeeze_codebook::Effort;

use super::fields::Fields;
use super::keys::joint as keys;
use super::mistake::Mistakes;

pub(super) fn read(fields: &Fields<'_>, mistakes: &mut Mistakes<'_>) -> Effort {
    Effort {
        refit_steps: fields.value(&keys::REFIT_STEPS, mistakes),
        exchange_turns: fields.value(&keys::EXCHANGE_TURNS, mistakes),
        exchange_steps: fields.value(&keys::EXCHANGE_STEPS, mistakes),
        sweep: fields.value(&keys::SWEEP, mistakes),
        palette_steps: fields.value(&keys::PALETTE_STEPS, mistakes),
        polish: fields.value(&keys::POLISH, mistakes),
        turns: fields.value(&keys::TURNS, mistakes),
        output_probes: fields.value(&keys::OUTPUT_PROBES, mistakes),
    }
}

/// The solver's type with its fields as keys; the compiler holds the two alike.
#[derive(Serialize)]
#[serde(remote = "Effort")]
struct EffortKeys {
    refit_steps: usize,
    exchange_turns: usize,
    exchange_steps: usize,
    sweep: bool,
    palette_steps: usize,
    polish: bool,
    turns: usize,
    output_probes: usize,
}

pub(super) fn write<S: Serializer>(effort: &Effort, serializer: S) -> Result<S::Ok, S::Error> {
    EffortKeys::serialize(effort, serializer)
}
