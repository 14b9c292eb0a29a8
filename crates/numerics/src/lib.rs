//! Reproducible tensor arithmetic on libtorch: the same bits on any number of threads.

pub mod brownian;
pub mod device;
pub mod elementwise;
pub mod finite;
pub mod libtorch;
pub mod one_thread;
pub mod product;
pub mod random;
mod seed_sequence;
mod settings;
pub mod sum;
#[cfg(unix)]
mod symbols;
#[cfg(not(unix))]
#[path = "no_symbols.rs"]
mod symbols;
pub mod waiting;

pub use settings::{Numerics, allow_tf32, init};
