//! The smallest file that reaches a closeness to the dense model.
//!
//! The config is compressed to one size after another. Each is judged as
//! [`compare`](super::compare) judges, on prompts that the calibration does not use, and `search`
//! says which size is next.

mod goal;
mod judged;
mod search;

use std::path::Path;

pub use goal::{Closeness, Goal};
use judged::Judged;
use sdxl_pipeline::PipelineFolder;
pub use search::Ending;
use search::{Point, Search, Step, smallest_reached};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use squeeze_base::error::{Error, Result};
use squeeze_base::number;
use squeeze_base::progress::{Event, Progress, Task};

use super::entry::Entry;
use super::frame::calibration_prompts;
use super::judge::Judge;
use super::judging::Judging;
use crate::calibration::{PromptSet, Samples, settings};
use crate::compress::{MeanBits, Prepared, Solved, Tries};
use crate::config::{RunConfig, SizeSearch};
use crate::plan::Plan;
use crate::recipe::RunOptions;
use crate::report::or_nan;

/// The smallest result that reached a closeness, and how it was found.
#[derive(Debug)]
pub struct Reached {
    /// The config with a rule for each layer.
    pub config: RunConfig,
    /// The report of its run, [`JobReport`](crate::compress::JobReport), as JSON, with the key
    /// `search`: [`sizes`](Self::sizes) and the rest of this.
    pub report: Value,
    /// The closeness that was asked for.
    pub goal: Goal,
    /// Every size that was solved, in order.
    pub sizes: Vec<TriedSize>,
    /// Why the search ended.
    pub ending: Ending,
}

/// A size that was solved and judged.
#[derive(Debug, Clone, Serialize)]
pub struct TriedSize {
    /// The mean bits of a compressed weight that were asked for.
    pub target_bits: f64,
    /// Stored bits per weight, over all compressed weights.
    pub bits_per_weight: f64,
    /// Bytes of the container.
    pub bytes: u64,
    /// How close the result is to the dense model.
    #[serde(flatten)]
    pub closeness: Closeness,
    /// Whether that reaches the target.
    pub is_reached: bool,
}

/// What is kept of a size once it is judged.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct JudgedSize {
    bytes: u64,
    #[serde(deserialize_with = "or_nan")]
    bits_per_weight: f64,
    closeness: Closeness,
}

/// A search that has passed all checks that are possible before it computes (see
/// [`Prepared`](crate::compress::Prepared)).
#[derive(Debug)]
pub struct Reaching<'a> {
    folder: &'a PipelineFolder,
    options: RunOptions,
    prepared: Prepared<'a>,
    goal: Goal,
    judging: Judging,
    solves: usize,
}

impl<'a> Reaching<'a> {
    /// Prepares to compress the UNet of `folder` by `config`, whose budget has a closeness for its
    /// target, into the container `path`. `shares` says whether the search will be given its
    /// samples.
    ///
    /// # Errors
    /// As [`Prepared::new`]; [`Error::Argument`] if the budget's target is a size, or a prompt of
    /// the search is among the calibration's.
    pub fn new(folder: &'a PipelineFolder, config: &RunConfig, shares: bool, options: &RunOptions, path: &Path) -> Result<Self> {
        let none = || Error::Argument("a search needs a budget with `target_error` or `target_psnr`".into());
        let budget = config.budget.as_ref().ok_or_else(none)?;
        let goal = Goal::of(budget.target)?;
        let section = budget.search.clone().unwrap_or_default();
        let judging = judging(folder, config, &section)?;
        Judge::new(folder, &judging, options.placement())?;
        let entry = Entry { name: String::new(), config: config.clone(), curve: None };
        calibration_prompts(std::slice::from_ref(&entry), &judging.set)?;
        let prepared = Tries::prepared(folder, config, shares, options, path)?;
        Ok(Reaching { folder, options: options.clone(), prepared, goal, judging, solves: section.solves })
    }

    /// The plan of one of the runs, at the size of the config as it is.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        self.prepared.plan()
    }
}

/// Compresses to the smallest size that reaches the closeness of `reaching`, and writes the
/// container to its path. The closeness is measured on the container, read back, with the noises
/// and calls of the command line's `compare`.
///
/// `samples` are used if they are given. Finished sizes are kept in the work folder beside the path
/// until the container is written; with [`RunOptions::resume`] none of them is made or judged
/// again.
///
/// # Errors
/// [`Error::Unreached`] if no size that was solved reaches the target; as
/// [`run`](crate::compress::run) and [`compare`](super::compare).
pub fn reach(reaching: Reaching<'_>, samples: Option<&Samples>, progress: &dyn Progress) -> Result<Reached> {
    let _numerics = crate::init();
    let Reaching { folder, options, prepared, goal, judging, solves } = reaching;
    let judge = Judge::new(folder, &judging, options.placement())?;
    let weights = folder.unet_weights()?;
    let judged_on = json!({
        "set": format!("{:?}", judging.set),
        "held_out": judging.held_out,
        "encoders": folder.prompt_files()?,
        "vae": super::vae_files(folder)?,
    });
    let mut tries = Tries::new(prepared, &options, samples, judged_on, progress)?;
    let mut judged = Judged::new(folder, options.placement(), &judge, &weights);
    let mut points: Vec<Point> = Vec::new();
    let mut sizes: Vec<TriedSize> = Vec::new();
    let task = Task::begin(progress, "sizes", "solves", solves);
    let ending = loop {
        let step = {
            let forecast = tries.forecast();
            let search = Search {
                expected: &|bits| forecast.at(bits),
                ends: (forecast.least_bits(), forecast.most_bits()),
                bytes_of_thousandth: forecast.bytes_of_thousandth(),
                first_error: goal.expected_error(),
                solves,
            };
            search.next(&points)
        };
        let bits = match step {
            Step::Solve(bits) => bits,
            Step::End(ending) => break ending,
        };
        task.go_on()?;
        task.advance(&format!("{bits} bits a weight"));
        let JudgedSize { bytes, bits_per_weight, closeness } = size(&mut tries, &mut judged, bits, goal, progress)?;
        let is_reached = goal.is_reached(closeness);
        let target_bits = bits.bits();
        sizes.push(TriedSize { target_bits, bits_per_weight, bytes, closeness, is_reached });
        say(progress, &told(bits, bytes, closeness, is_reached));
        let before = smallest_reached(&points).map(|point| point.bits);
        points.push(Point { bits, bytes, is_reached, excess: goal.excess(closeness) });
        // Of the containers only that of the smallest size that reaches the target is needed.
        let best = smallest_reached(&points).map(|point| point.bits);
        for surplus in [Some(bits), before].into_iter().flatten().filter(|bits| Some(*bits) != best) {
            tries.drop_container(surplus)?;
        }
    };
    drop(task);
    let Some(best) = smallest_reached(&points).copied() else { return Err(unreached(goal, &sizes, ending, solves)) };
    let solved = tries.solve(best.bits, progress)?;
    say(progress, &ended(ending, best, &points));
    let notes = judged.into_notes().into_iter().chain(tries.warnings().iter().cloned()).collect();
    let report = report(&solved, notes, (goal, &sizes, ending), (&judging, judge.held_out()));
    tries.finish(&solved)?;
    Ok(Reached { config: solved.config, report, goal, sizes, ending })
}

/// What sizes are judged on.
fn judging(folder: &PipelineFolder, config: &RunConfig, section: &SizeSearch) -> Result<Judging> {
    let set = settings(folder, &config.calibration)?;
    let set = PromptSet { prompts: section.prompts.load()?, seed: Judging::SEED, ..set };
    Ok(Judging { held_out: section.calls, noise_floor: false, shown: 0, ..Judging::of(set) })
}

/// A size and its closeness, as far as they are kept, or made now.
fn size(
    tries: &mut Tries<'_>,
    judged: &mut Judged<'_>,
    bits: MeanBits,
    goal: Goal,
    progress: &dyn Progress,
) -> Result<JudgedSize> {
    let name = format!("{bits}-bits.judged.json");
    let as_json = |why: serde_json::Error| Error::internal(format!("a judgement in JSON: {why}"));
    if let Some(kept) = tries.kept(&name) {
        let kept: JudgedSize = serde_json::from_slice(&kept).map_err(as_json)?;
        if kept.closeness.psnr.is_some() || !goal.needs_pictures() {
            return Ok(kept);
        }
    }
    let Solved { container, report, .. } = tries.solve(bits, progress)?;
    if progress.cancelled() {
        return Err(Error::Stopped);
    }
    let closeness = judged.closeness(&container, goal.needs_pictures(), progress)?;
    let number = |key: &str| report.get(key).ok_or_else(|| Error::internal(format!("a report has no `{key}`")));
    let made = JudgedSize {
        bytes: number("bytes")?.as_u64().unwrap_or_default(),
        bits_per_weight: number("bits_per_weight")?.as_f64().unwrap_or(f64::NAN),
        closeness,
    };
    tries.keep(&name, &serde_json::to_vec(&made).map_err(as_json)?)?;
    Ok(made)
}

/// Says something in the log and to whoever listens.
fn say(progress: &dyn Progress, text: &str) {
    tracing::info!("{text}");
    progress.report(Event::Note(text));
}

/// A size in words.
fn told(bits: MeanBits, bytes: u64, closeness: Closeness, is_reached: bool) -> String {
    let verdict = if is_reached { "reaches" } else { "does not reach" };
    format!("{bits} bits a weight, {}: {}, which {verdict} the target", number::size(bytes), closeness.text())
}

/// The end of a search in words.
fn ended(ending: Ending, best: Point, points: &[Point]) -> String {
    let solves = match points.len() {
        1 => "the only size that was solved".to_owned(),
        count => format!("the result of {count} solved sizes"),
    };
    let why = match ending {
        Ending::WithinOnePercent => "a size that is smaller by one per cent or less does not reach the target".to_owned(),
        Ending::NothingBetween => "the next smaller size does not reach the target".to_owned(),
        Ending::Smallest => "no smaller settings are allowed".to_owned(),
        Ending::Largest | Ending::Solves => {
            let below = points.iter().filter(|point| !point.is_reached && point.bits < best.bits);
            match below.map(|point| point.bytes).max() {
                Some(bytes) => format!(
                    "no more solves are allowed (`target_solves`); a size between this and {} may reach the target too",
                    number::size(bytes)
                ),
                None => "no more solves are allowed (`target_solves`); a smaller size may reach the target too".to_owned(),
            }
        }
    };
    format!("{} at {} bits a weight is {solves}: {why}", number::size(best.bytes), best.bits)
}

/// The error that no size reaches the target.
fn unreached(goal: Goal, sizes: &[TriedSize], ending: Ending, solves: usize) -> Error {
    let best = sizes.iter().min_by(|a, b| goal.excess(a.closeness).total_cmp(&goal.excess(b.closeness)));
    let Some(best) = best else { return Error::internal("a search solved no size") };
    let remedy = match ending {
        Ending::Solves => format!(
            "allow more solves (--target-solves {} --resume goes on with those that are there), or ask for less",
            solves.saturating_mul(2).min(100)
        ),
        Ending::Largest | Ending::WithinOnePercent | Ending::NothingBetween | Ending::Smallest => {
            "these are the settings of least error that the config allows, so ask for less".to_owned()
        }
    };
    Error::Unreached {
        target: goal.text(),
        solves: sizes.len(),
        size: format!("{} at {} bits a weight", number::size(best.bytes), best.target_bits),
        best: best.closeness.text(),
        remedy,
    }
}

/// The report of the result's run with the search.
fn report(
    solved: &Solved,
    notes: Vec<String>,
    (goal, sizes, ending): (Goal, &[TriedSize], Ending),
    (judging, calls): (&Judging, usize),
) -> Value {
    let mut report = solved.report.clone();
    if let Some(said) = report.get_mut("notes").and_then(Value::as_array_mut) {
        said.extend(notes.into_iter().map(Value::from));
    }
    report["search"] = json!({
        "goal": goal,
        "ended": ending,
        "prompts": judging.set.prompts,
        "seed": judging.set.seed,
        "calls": calls,
        "sizes": sizes,
    });
    report
}
