//! Networks as programs, in the operations that coremltools writes for them.
//!
//! [`Network`] has the operations and layers that all networks consist of; [`unet`], [`text`] and
//! [`vae`] put the networks of a pipeline together from them.

mod attention;
mod network;
mod norm;
mod resnet;
mod text;
mod tokens;
mod unet;
mod vae;

use network::Network;
pub(super) use text::{CAUSAL_MASK, lower as lower_text_encoder};
pub(super) use unet::{lower as lower_unet, noise_tables};
pub(super) use vae::{compute_element, lower_decoder, lower_encoder};

use crate::program::{ProgramBuilder, Var};

/// A program, its inputs and its outputs.
pub(super) struct Lowered {
    pub program: ProgramBuilder,
    pub inputs: Vec<Var>,
    pub outputs: Vec<Var>,
}
