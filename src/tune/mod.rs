//! Tuning: after the layers are compressed, palette entries, norms and biases are trained by
//! gradients until the UNet predicts what the dense one does.

mod adam;
mod backward;
mod chances;
mod effect;
mod judge;
mod lesson;
mod parameters;
mod state;
mod table;
#[cfg(test)]
mod tests;
mod train;

pub use effect::{Effects, Weight, effects};
pub use judge::{Drawing, Judge, Predict, Probe};
pub use lesson::{Lesson, Split, split};
pub use state::{Log, State};
pub use train::{Trained, Training, tune};
