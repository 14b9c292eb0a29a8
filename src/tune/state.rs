//! The state of a training under way, which a continued run goes on with.

use std::collections::{BTreeMap, HashMap};
use std::fmt::{self, Display};

use half::f16;
use sdxl_model::checkpoint::{SafetensorsFile, TensorBytes, halves, read_tensor};
use serde::{Deserialize, Serialize};
use squeeze_base::error::{Error, Result};
use squeeze_numerics::device::Placement;
use tch::{Device, Kind, Tensor};

use super::adam::{Adam, Moments};
use super::parameters::Parameters;

/// What happened so far.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Log {
    /// Steps taken.
    pub steps: usize,
    /// Each judgement by the held-out prompts: after which step, and the error of the final
    /// latents, ‖x - x'‖² / ‖x'‖².
    pub judged: Vec<(usize, f64)>,
    /// The step after which the best state was, 0 being the start.
    pub best: usize,
    /// The factor of the loss in fp16, whose gradients would be too small otherwise.
    pub(super) loss_scale: f64,
    /// Steps since the factor changed.
    pub(super) since: usize,
    /// Steps that were left out because a gradient was not finite.
    pub skipped: usize,
}

impl Log {
    /// The error of the best state, and that at the start.
    #[must_use]
    pub fn errors(&self) -> Option<(f64, f64)> {
        let at = |step: usize| self.judged.iter().find(|(judged, _)| *judged == step).map(|(_, error)| *error);
        Some((at(self.best)?, at(0)?))
    }
}

impl Display for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (best, start) = self.errors().unwrap_or((f64::NAN, f64::NAN));
        let Log { steps, best: after, skipped, .. } = self;
        let percent = |error: f64| format!("{:.3} %", 100.0 * error);
        write!(
            f,
            "tuning: the latents of held-out prompts were {} off, and are {} after {after} of {steps} steps",
            percent(start),
            percent(best)
        )?;
        if *after == 0 {
            f.write_str(", so nothing is changed")?;
        }
        if *skipped > 0 {
            write!(f, "; {skipped} steps were left out because fp16 overflowed")?;
        }
        Ok(())
    }
}

/// A training under way.
#[derive(Debug)]
pub struct State {
    /// What happened so far.
    pub log: Log,
    /// fp32 `[n]` by name: the trained values.
    pub(super) values: BTreeMap<String, Tensor>,
    pub(super) moments: BTreeMap<String, Moments>,
    /// The best values, as they are stored.
    pub(super) best: BTreeMap<String, Vec<f16>>,
}

/// The key of the log in the file's metadata.
const LOG: &str = "log";
const VALUE: &str = "value";
const FIRST: &str = "first";
const SECOND: &str = "second";
const BEST: &str = "best";

impl State {
    /// The bytes of a safetensors file with the state. Tensors are named by their role and their
    /// checkpoint name.
    ///
    /// # Errors
    /// If libtorch refuses to copy a tensor.
    pub(super) fn to_bytes(
        log: &Log,
        parameters: &Parameters<'_>,
        adam: &Adam,
        best: &BTreeMap<String, Vec<f16>>,
    ) -> Result<Vec<u8>> {
        let mut tensors = Vec::new();
        for (name, parameter) in &parameters.by_name {
            tensors.push((format!("{VALUE} {name}"), TensorBytes::of(&parameter.value)?));
        }
        for (name, moments) in &adam.moments {
            tensors.push((format!("{FIRST} {name}"), TensorBytes::of(&moments.first)?));
            tensors.push((format!("{SECOND} {name}"), TensorBytes::of(&moments.second)?));
        }
        for (name, values) in best {
            tensors.push((format!("{BEST} {name}"), TensorBytes::of(&Tensor::f_from_slice(values)?)?));
        }
        let log = serde_json::to_string(log).map_err(|why| Error::Failed(why.to_string()))?;
        let metadata = HashMap::from([(LOG.to_owned(), log)]);
        safetensors::serialize(tensors, Some(metadata)).map_err(|why| Error::Failed(why.to_string()))
    }

    /// Reads a state of the tensors of `parameters`.
    ///
    /// # Errors
    /// [`Error::BadFile`] if the file has no state of them.
    pub fn read(file: &SafetensorsFile) -> Result<Self> {
        let bad = |problem: &str| Error::bad_file(file.path(), problem.to_owned());
        let log = file.metadata().get(LOG).ok_or_else(|| bad("is no state of a tuning"))?;
        let log = serde_json::from_str(log).map_err(|_| bad("has a log that cannot be read"))?;
        let mut state = State { log, values: BTreeMap::new(), moments: BTreeMap::new(), best: BTreeMap::new() };
        for entry in file.entries().keys() {
            let Some((role, name)) = entry.split_once(' ') else { return Err(bad("has a tensor of no role")) };
            let read = |kind: Kind| read_tensor(file, entry, Placement { device: Device::Cpu, kind });
            match role {
                VALUE => {
                    state.values.insert(name.to_owned(), read(Kind::Float)?);
                }
                FIRST => {
                    let second =
                        read_tensor(file, &format!("{SECOND} {name}"), Placement { device: Device::Cpu, kind: Kind::Float })?;
                    state.moments.insert(name.to_owned(), Moments { first: read(Kind::Float)?, second });
                }
                SECOND => {}
                BEST => {
                    state.best.insert(name.to_owned(), halves(&read(Kind::Half)?)?);
                }
                _ => return Err(bad("has a tensor of an unknown role")),
            }
        }
        Ok(state)
    }

    /// Puts the state in the place of that of `parameters` and `adam`.
    ///
    /// # Errors
    /// [`Error::Argument`] if it is a state of other tensors; if libtorch refuses.
    pub(super) fn restore(self, parameters: &mut Parameters<'_>, adam: &mut Adam) -> Result<(Log, BTreeMap<String, Vec<f16>>)> {
        let other = || Error::Argument("the state of the tuning is one of another network".into());
        let State { log, mut values, mut moments, best } = self;
        let device = parameters.placement().device;
        for (name, parameter) in &mut parameters.by_name {
            let (value, moments) = values.remove(name).zip(moments.remove(name)).ok_or_else(other)?;
            let size = parameter.value.size();
            let sizes =
                [value.size(), moments.first.size(), moments.second.size(), vec![best.get(name).map_or(0, Vec::len) as i64]];
            if sizes.iter().any(|of_state| *of_state != size) {
                return Err(other());
            }
            parameter.value = value.f_to_device(device)?;
            let moments = Moments { first: moments.first.f_to_device(device)?, second: moments.second.f_to_device(device)? };
            adam.moments.insert(name.clone(), moments);
        }
        if values.is_empty() && moments.is_empty() && best.len() == parameters.by_name.len() {
            Ok((log, best))
        } else {
            Err(other())
        }
    }
}
