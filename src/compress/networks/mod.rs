//! Compresses a pipeline's text encoders and its VAE's decoder, each into a container of its own.
//!
//! The layers of a network are palettized piece by piece, in the order of its forward pass: each
//! for the inputs that the compressed layers before it produce, and fitted to the outputs of its
//! own dense weights. The inputs of text encoders come from texts, those of the decoder from
//! latents that the dense pipeline draws.

mod dense;
mod inputs;
mod plan;
mod prepare;
mod report;
mod run;
mod walk;

pub use plan::NetworkPlan;
pub use prepare::PreparedNetwork;
pub use report::NetworkReport;
