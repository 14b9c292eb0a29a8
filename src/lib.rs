//! Makes the SDXL UNet small enough for a phone and keeps its pictures.

pub mod allocator;
pub mod calibration;
pub mod checkpoint;
pub mod compare;
pub mod compress;
pub mod config;
pub mod container;
pub mod coreml;
pub mod device;
mod digest;
mod elementwise;
mod error;
pub mod export;
mod finite;
pub mod input;
pub mod inspect;
pub mod memory;
pub mod model;
pub mod number;
mod numerics;
pub mod output;
pub mod pattern;
pub mod picture;
pub mod pipeline;
pub mod plan;
mod product;
pub mod progress;
pub mod recipe;
pub mod report;
mod shorten;
pub mod solver;
mod sum;
pub mod synth;

pub use error::{Error, Result};
pub use numerics::{Numerics, init};
