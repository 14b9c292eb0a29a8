//! How hard the joint solver tries: the section `joint`.

use super::emit::Yaml;
use super::fields::{Fields, boolean, whole};
use super::limits;
use super::mistake::Mistakes;
use crate::codebook::Effort;

pub(super) fn read(fields: &mut Fields<'_>, mistakes: &mut Mistakes<'_>) -> Effort {
    let default = Effort::default();
    let mut steps = |key, default| fields.get(key, mistakes, |node| limits::steps(whole(node)?)).unwrap_or(default);
    let refit_steps = steps("refit_steps", default.refit_steps);
    let exchange_turns = steps("exchange_turns", default.exchange_turns);
    let exchange_steps = steps("exchange_steps", default.exchange_steps);
    let palette_steps = steps("palette_steps", default.palette_steps);
    let turns = steps("turns", default.turns);
    Effort {
        refit_steps,
        exchange_turns,
        exchange_steps,
        sweep: fields.get("sweep", mistakes, boolean).unwrap_or(default.sweep),
        palette_steps,
        polish: fields.get("polish", mistakes, boolean).unwrap_or(default.polish),
        turns,
    }
}

pub(super) fn write(effort: &Effort, yaml: &mut Yaml) {
    let Effort { refit_steps, exchange_turns, exchange_steps, sweep, palette_steps, polish, turns } = effort;
    yaml.entry("refit_steps", refit_steps.to_string());
    yaml.entry("exchange_turns", exchange_turns.to_string());
    yaml.entry("exchange_steps", exchange_steps.to_string());
    yaml.entry("sweep", sweep.to_string());
    yaml.entry("palette_steps", palette_steps.to_string());
    yaml.entry("polish", polish.to_string());
    yaml.entry("turns", turns.to_string());
}
