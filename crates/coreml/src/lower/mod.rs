//! Networks as programs, in the operations that coremltools writes for them.
//!
//! [`Network`] has the operations and layers that all networks consist of; [`unet`] puts the UNet
//! together from them.

mod attention;
mod network;
mod norm;
mod unet;

use network::Network;
pub(super) use unet::{Lowered, lower};
