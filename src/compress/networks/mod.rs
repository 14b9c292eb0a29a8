//! Compresses a pipeline's text encoders and its VAE, each into a container of its own.
//!
//! The layers of a network are palettized piece by piece, in the order of its forward pass: each
//! for the inputs that the compressed layers before it produce, and fitted to the outputs of the
//! dense network or of its own dense weights. The inputs of text encoders come from texts, those of
//! the VAE's decoder from latents that the dense pipeline draws, those of its encoder from their
//! pictures.

mod amount;
mod dense;
mod disk;
mod inputs;
mod plan;
mod prepare;
mod report;
mod run;
mod walk;

pub use disk::check_disk_of;
pub use plan::NetworkPlan;
pub use prepare::PreparedNetwork;
pub use report::NetworkReport;
