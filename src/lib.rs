//! Compresses the UNet of Stable Diffusion XL so that it fits on a phone, with pictures close to
//! those of the dense model.
//!
//! A compressed weight has a *mask* (which elements are not zero) and a *palette* for each group of
//! channels (the few values that its elements may have). The solver chooses mask, palette and
//! indices layer by layer, so that the output of each layer on calibration inputs changes least.
//! The result is one file, the [container], which can be exported for diffusers and for
//! Core ML.
//!
//! # A complete program
//!
//! This program compresses the bundled model to 4 bits a weight. It is run by `cargo test`.
//!
//! ```
//! use std::path::Path;
//!
//! use sdxl_squeeze::compress::{Prepared, run};
//! use sdxl_squeeze::config::RunConfig;
//! use sdxl_squeeze::pipeline::PipelineFolder;
//! use sdxl_squeeze::progress::Silent;
//! use sdxl_squeeze::recipe::RunOptions;
//!
//! fn main() -> sdxl_squeeze::Result<()> {
//!     sdxl_squeeze::init();
//!     let folder = PipelineFolder::open(Path::new("models/emoji-sdxl"))?;
//!     let config = RunConfig::read(Path::new("configs/emoji/tutorial-4bit-gs16.yaml"))?;
//!     let options = RunOptions::of(&config)?;
//!     let out = std::env::temp_dir().join("unet.squeezed.safetensors");
//!     let prepared = Prepared::new(&folder, &config, false, &options, &out)?;
//!     let report = run(&prepared, None, &Silent)?;
//!     assert_eq!(format!("{:.2} bits a weight", report.bits_per_weight), "4.08 bits a weight");
//! #   std::fs::remove_file(out).expect("the container was written");
//!     Ok(())
//! }
//! ```
//!
//! `examples/` has five more programs: compress a pipeline, draw a picture, prune one layer, read a
//! container, write a Core ML package.
//!
//! # Modules
//!
//! In the order of their dependencies, the lowest first:
//!
//! | module | content |
//! |---|---|
//! | [`progress`], [`pattern`], [`picture`] | what long work reports, names of layers, PNG files |
//! | [`device`] | devices and dtypes |
//! | [`checkpoint`] | config files and safetensors, read tensor by tensor |
//! | [`model`] | UNet, text encoders, VAE decoder and samplers; nothing about compression |
//! | [`codebook`] | bit widths, palettes, groups and sparsity: the terms of all that follows |
//! | [`container`] | the compressed UNet in one file |
//! | [`solver`] | Hessians, SparseGPT, palettes and the joint solver, on matrices |
//! | [`pipeline`] | a diffusers folder, prompts, the denoising loop, pictures |
//! | [`synth`] | whole pipelines with made-up weights |
//! | [`shipped`] | the configs, prompts and the small model inside of the program |
//! | [`config`] | a run as YAML |
//! | [`recipe`] | a config, resolved on the layers of one UNet; devices and limits of a run |
//! | [`calibration`] | the inputs of the UNet, recorded while the dense pipeline draws |
//! | [`plan`] | sizes, memory, passes and work of a run, before it starts |
//! | [`tune`](mod@tune) | training of palettes, norms and biases by gradients |
//! | [`compress`] | the run: stage by stage, layer by layer, resumable |
//! | [`export`], [`coreml`], [`bundle`] | diffusers folders, coremltools checkpoints, Core ML packages, all files for Apple's Swift pipeline |
//! | [`inspect`](mod@inspect) | the stages, layers and sizes of a model |
//! | [`compare`], [`report`] | configs against the dense model, the smallest file of a closeness; pictures |
//!
//! # Environment
//!
//! - **libtorch 2.11.0.** `LIBTORCH` names its folder at build time. The programs of this package
//!   find it at run time without help (`build.rs` sets their rpath). A program in another package
//!   has to set its own rpath, or `LD_LIBRARY_PATH`.
//! - **A GPU is optional.** The CUDA half of libtorch is loaded when a [`device`] is asked for.
//! - **Memory.** [`recipe::RunOptions::budget`] bounds a run; without a budget, a run takes at most
//!   nine tenths of the free memory of its device. [`plan`] predicts the peak.
//! - **[`init`]** sets what the numbers depend on in the whole process: fp32 convolutions and
//!   products on a GPU are fp32 and not TF32, and MKL computes the same bits on any number of
//!   threads. It also lets glibc keep large blocks of freed memory, which saves a tenth of a
//!   full-size forward. Call it first in `main`.
//! - **`GOMP_SPINCOUNT=5000`** makes a run on CPUs about a tenth faster. GNU OpenMP reads the
//!   variable before `main`, so `init` cannot set it. The command line starts itself again with it.
//!
//! The library writes nothing to the standard streams. It reports to a [`progress::Progress`] and
//! logs with [`tracing`](https://docs.rs/tracing).

pub mod bundle;
pub mod calibration;
pub mod compare;
pub mod compress;
pub mod config;
pub mod export;
mod geometry;
pub mod inspect;
pub mod plan;
pub mod recipe;
pub mod report;
pub mod shipped;
pub mod synth;
pub mod tune;

pub use sdxl_model::{self as model, checkpoint};
pub use sdxl_pipeline::{self as pipeline, picture};
pub use squeeze_base::{Bug, Error, Mistake, Place, Result, pattern, progress};
// The modules that are hidden from the documentation are public for the command line, and
// `allow_tf32` for a bench.
#[doc(hidden)]
pub use squeeze_base::{input, memory, number, output};
pub use squeeze_codebook as codebook;
pub use squeeze_container as container;
pub use squeeze_coreml as coreml;
#[doc(hidden)]
pub use squeeze_numerics::allow_tf32;
#[doc(hidden)]
pub use squeeze_numerics::libtorch;
pub use squeeze_numerics::{Numerics, device, init, random};
pub use squeeze_solver as solver;
