//! A layer to be solved, with everything that a thread needs for it.

use squeeze_base::error::{Error, Result};
use squeeze_solver::{Factor, Hessian, JointFactors, OutputMetric, OutputResidual, on_own_stream};
use tch::{Device, Tensor};

use super::layer::{CompressedLayer, Evidence};
use super::one_layer::compress_layer;
use crate::recipe::LayerRecipe;

/// A layer to be solved. It owns handles to its tensors, so that any thread can solve it.
pub(super) struct Problem<'a> {
    pub name: String,
    /// The dense weight [o, ...].
    pub weight: Tensor,
    pub recipe: &'a LayerRecipe,
    /// `None` for layers that need no Hessian.
    pub sums: Option<Sums>,
    /// The place in the team of the device that solves it.
    pub place: usize,
    /// Bytes that solving takes besides the Hessian, by estimate.
    pub bytes: u64,
}

/// What calibration has gathered for a layer.
pub(super) struct Sums {
    pub hessian: Hessian,
    /// The factors, if other layers of the same input need them too.
    pub factors: SharedFactors,
    pub correction: Option<OutputResidual>,
    /// The metric of the layer's outputs, if indices are polished by it.
    pub metric: Option<OutputMetric>,
    pub held_out: Option<Tensor>,
}

/// A compressed layer.
pub(super) struct Solved {
    pub compressed: CompressedLayer,
    /// The vectors in its Hessian.
    pub vectors: Option<u64>,
}

impl Problem<'_> {
    /// Compresses the layer on `device`.
    ///
    /// # Errors
    /// As [`compress_layer`].
    pub(super) fn solve(self, device: Device) -> Result<Solved> {
        let _span = tracing::debug_span!("layer").entered();
        let Problem { name, weight, recipe, sums, .. } = self;
        let sums = sums.map(|sums| sums.to_device(device)).transpose()?;
        let weight = weight.f_to_device(device)?;
        let evidence = sums.as_ref().map(|Sums { hessian, factors, correction, metric, held_out }| Evidence {
            hessian,
            pruned: None,
            factors: factors.sequential.as_ref().map(|(dampening, factors)| (*dampening, factors.as_slice())),
            joint: factors.joint.as_ref(),
            correction: correction.as_ref(),
            metric: metric.as_ref(),
            held_out: held_out.as_ref(),
        });
        // Weight and sums are dropped once all operations with them have ended.
        let compressed = on_own_stream(device, || compress_layer(&name, &weight, recipe, evidence))?;
        Ok(Solved { compressed, vectors: evidence.map(|evidence| evidence.hessian.vectors()) })
    }
}

impl Sums {
    /// The sums on `device`, with the same memory where they are there already.
    fn to_device(&self, device: Device) -> Result<Self> {
        Ok(Sums {
            hessian: self.hessian.to_device(device)?,
            factors: self.factors.to_device(device)?,
            correction: self.correction.as_ref().map(|correction| correction.to_device(device)).transpose()?,
            metric: self.metric.clone(),
            held_out: self.held_out.as_ref().map(|vectors| vectors.f_to_device(device)).transpose()?,
        })
    }
}

/// The factors of a Hessian that several layers share.
#[derive(Default)]
pub(super) struct SharedFactors {
    /// For SparseGPT and GPTQ, with the dampening that was asked for.
    sequential: Option<(f64, Vec<Factor>)>,
    joint: Option<JointFactors>,
}

impl SharedFactors {
    /// Makes the factors that `recipe` needs, unless they are there.
    ///
    /// # Errors
    /// As [`Factor::new`].
    pub(super) fn prepare(&mut self, hessian: &Hessian, name: &str, recipe: &LayerRecipe) -> Result<()> {
        match (recipe.joint_options(), recipe.sequential_dampening()) {
            (Some(options), _) => {
                let (dampening, order) = (options.dampening(), options.order());
                if self.joint.as_ref().is_none_or(|factors| !factors.fit(dampening, order)) {
                    // The old factors are dropped first: there may not be memory for both.
                    self.joint = None;
                    self.joint = Some(JointFactors::new(hessian, dampening, order).map_err(Error::layer(name))?);
                }
            }
            (None, Some(dampening)) => {
                if self.sequential.as_ref().is_none_or(|(made_with, _)| *made_with != dampening) {
                    let factors = Factor::all(hessian, dampening).map_err(Error::layer(name))?;
                    self.sequential = Some((dampening, factors));
                }
            }
            (None, None) => {}
        }
        Ok(())
    }

    /// The factors on `device`, with the same memory where they are there already.
    pub(super) fn to_device(&self, device: Device) -> Result<Self> {
        let sequential = self.sequential.as_ref().map(|(dampening, factors)| -> Result<_> {
            let factors = factors.iter().map(|factor| factor.to_device(device)).collect::<Result<_>>()?;
            Ok((*dampening, factors))
        });
        let joint = self.joint.as_ref().map(|factors| factors.to_device(device));
        Ok(SharedFactors { sequential: sequential.transpose()?, joint: joint.transpose()? })
    }
}
