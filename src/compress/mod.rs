//! Compresses a UNet stage by stage along its chain.
//!
//! For each stage: the Hessians of its layers on the outputs of the stages already compressed, then each layer pruned and palettized,
//! then the compressed stage's outputs go on. Nothing of a finished stage stays in memory but what is stored of it.

mod gather;
mod job;
mod layer;
mod recipe;

use std::collections::BTreeMap;

use tch::Kind;

pub use gather::Gatherer;
pub use job::{JobReport, calibrate, run, write_container};
pub use layer::{LayerErrors, Treated, Treatment, treat};

pub use recipe::{Recipe, layers_of};

use crate::calibration::Samples;
use crate::checkpoint::TensorSource;
use crate::container::CompressedWeight;
use crate::device::Placement;
use crate::error::{Error, Result};
use crate::model::unet::{Carry, UnetChain};
use crate::model::{Layer, Unobserved};
use crate::progress::{Progress, Task};
use crate::solver::Hessian;

/// What is done to each layer, by name. Layers that are not in it stay as they are, in fp16.
pub type Treatments = BTreeMap<String, Treatment>;

/// A compressed UNet's layers, and what they cost.
#[derive(Debug, Default)]
pub struct Compressed {
    /// The treated weights, by layer name.
    pub weights: BTreeMap<String, CompressedWeight>,
    /// Every treated layer, in execution order.
    pub layers: Vec<LayerReport>,
    /// What has to be said, each with the name of its layer or stage.
    pub notes: Vec<String>,
}

/// A treated layer.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct LayerReport {
    /// The checkpoint name, without `.weight`.
    pub name: String,
    /// The stage, or `head` or `tail`.
    pub stage: String,
    /// The weight's shape.
    pub shape: Vec<i64>,
    /// Pruned share of the weight.
    pub sparsity: f64,
    /// Stored bits a weight, with palettes and scales.
    pub bits_per_weight: f64,
    /// Stored bytes.
    pub bytes: u64,
    /// Vectors that its Hessian was made of; absent where none was needed.
    pub vectors: Option<u64>,
    /// What it cost.
    pub errors: LayerErrors,
}

/// Compresses the UNet whose dense weights `source` gives, placed as `placement` says.
///
/// `samples` are needed if anything is pruned. Without pruning no forward is run at all.
///
/// # Errors
/// If a layer cannot be treated, activations become NaN or infinite, or there are no samples where some are needed.
pub fn compress(
    chain: &UnetChain,
    source: &dyn TensorSource,
    treatments: &Treatments,
    samples: &Samples,
    placement: Placement,
    progress: &dyn Progress,
) -> Result<Compressed> {
    let calibrated = treatments.values().any(|treatment| treatment.prune.is_some());
    if calibrated && samples.calls.is_empty() {
        return Err(Error::Argument("pruning needs calibration samples, and there are none".into()));
    }
    let mut done = Compressed { notes: samples.notes.clone(), ..Compressed::default() };
    let task = Task::begin(progress, "compressing", "parts", chain.stages().len() + 2);

    task.advance("head");
    let mut head = chain.load_head(source)?;
    if head.layers().iter().any(|layer| treatments.get(layer.name()).is_some_and(|t| t.prune.is_some())) {
        return Err(Error::Argument("the layers before the first stage cannot be pruned; only stages are calibrated".into()));
    }
    treat_layers("head", head.layers_mut(), treatments, None, &mut done, progress)?;
    let mut carries: Vec<Carry> = Vec::new();
    if calibrated {
        for call in &samples.calls {
            let call = call.placed(placement)?;
            carries.push(head.forward(&call.sample, call.timestep, &call.conditioning, &mut Unobserved)?);
        }
    }
    drop(head);

    for spec in chain.stages() {
        let name = spec.name().to_string();
        task.advance(&name);
        let mut stage = spec.load(source)?;
        let pruned = |layer: &Layer| treatments.get(layer.name()).is_some_and(|treatment| treatment.prune.is_some());
        let mut gatherer =
            Gatherer::new(stage.layers().iter().filter(|layer| pruned(layer)).map(|layer| layer.name().to_owned()));
        {
            let task = Task::begin(progress, "Hessians", "samples", carries.len());
            for carry in &carries {
                task.advance(&name);
                stage.forward(carry.shallow_clone(), &mut gatherer)?;
                gatherer.forward_done();
            }
        }
        treat_layers(&name, stage.layers_mut(), treatments, Some(&gatherer), &mut done, progress)?;
        drop(gatherer);
        let task = Task::begin(progress, "outputs", "samples", carries.len());
        for carry in &mut carries {
            task.advance(&name);
            let after = stage.forward(carry.shallow_clone(), &mut Unobserved)?;
            if after.hidden_states.f_isfinite()?.f_all()?.f_int64_value(&[])? == 0 {
                return Err(Error::NotFinite(format!("the output of `{name}`, compressed, has NaN or infinity in it")));
            }
            *carry = after;
        }
    }

    task.advance("tail");
    let mut tail = chain.load_tail(source)?;
    treat_layers("tail", tail.layers_mut(), treatments, None, &mut done, progress)?;
    Ok(done)
}

/// Treats the layers of a part and puts what they decode to in their place.
fn treat_layers(
    part: &str,
    layers: &mut [Layer],
    treatments: &Treatments,
    gatherer: Option<&Gatherer>,
    done: &mut Compressed,
    progress: &dyn Progress,
) -> Result<()> {
    let wanted = layers.iter().filter(|layer| treatments.contains_key(layer.name())).count();
    let task = Task::begin(progress, "layers", "layers", wanted);
    for layer in layers {
        let Some(treatment) = treatments.get(layer.name()) else { continue };
        task.advance(layer.name());
        let hessian = gatherer.and_then(|gatherer| gatherer.hessian(layer.name()));
        let treated = treat(layer, treatment, hessian)?;
        layer.replace_weight(&treated.decoded.f_to_kind(Kind::Float)?)?;
        for note in &treated.notes {
            tracing::warn!("{}: {note}", layer.name());
            done.notes.push(format!("{}: {note}", layer.name()));
        }
        let report = LayerReport {
            name: layer.name().to_owned(),
            stage: part.to_owned(),
            shape: layer.weight().size(),
            sparsity: treated.stored.as_ref().map_or(0.0, CompressedWeight::sparsity),
            bits_per_weight: treated.stored.as_ref().map_or(16.0, CompressedWeight::bits_per_weight),
            bytes: treated.stored.as_ref().map_or(2 * layer.weight().numel() as u64, CompressedWeight::stored_bytes),
            vectors: hessian.map(Hessian::vectors),
            errors: treated.errors,
        };
        task.note(&describe(&report));
        done.layers.push(report);
        if let Some(stored) = treated.stored {
            done.weights.insert(layer.name().to_owned(), stored);
        }
    }
    Ok(())
}

/// A line for people who watch.
fn describe(layer: &LayerReport) -> String {
    let LayerErrors { weight, pruned_output, output } = layer.errors;
    let percent = |error: f64| format!("{:.2} %", 100.0 * error);
    let errors = match (pruned_output, output) {
        (Some(pruned), Some(output)) => format!("output error {} pruned, {} stored", percent(pruned), percent(output)),
        _ => format!("weight error {}", percent(weight)),
    };
    format!("{}: {:.2} bits a weight, {errors}", layer.name, layer.bits_per_weight)
}
