//! Compresses one weight matrix so that the layer's output changes as little as possible.
//!
//! The solver knows matrices, not models. Its measure of a change D [o, d] of a weight is tr(D H
//! D^T), where the [`Hessian`] H [d, d] holds the second moments of the layer's inputs. [`prune`]
//! follows SparseGPT (Frantar and Alistarh 2023, arXiv:2301.00774) in the form that coremltools 9.0
//! gave it; [`magnitude_prune`] is the baseline. [`gptq()`] rounds to fixed values with error
//! feedback.

mod correlations;
mod device_sweep;
mod factor;
mod geometry;
mod gptq;
mod hessian;
mod joint;
mod kernels;
mod leaf;
mod magnitude;
mod matrix;
mod note;
mod output_error;
mod output_metric;
mod output_residual;
pub mod palette;
mod sparsegpt;
mod sparsity;
mod sweep;
mod triangle;
mod waiting;
mod weight;

pub use factor::Factor;
pub use geometry::{InputGeometry, Windows};
pub use gptq::{GPTQ_DAMPENING, Quantized, gptq};
pub use hessian::Hessian;
pub use joint::{
    DeviceJoint, Joint, JointFactors, JointOptions, LayerEvidence, Order, finds_jointly, has_whole, joint, joint_on_device,
};
pub use kernels::{has_kernels, on_own_stream, ready_for_threads};
pub use magnitude::{Masked, magnitude_prune};
pub use note::Note;
pub use output_error::{output_energies, output_energy, output_error};
pub use output_metric::{OutputGradients, OutputMetric};
pub use output_residual::OutputResidual;
pub use sparsegpt::{Pruned, prune, prune_many, prune_with};
pub use waiting::WaitingHessian;
