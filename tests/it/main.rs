//! Tests of the public interface and of the program, many of them against golden values.

mod architectures;
mod as_people_have_them;
#[cfg(unix)]
mod attacks;
mod bad_input;
mod budget;
mod chain;
mod cli;
mod compress;
mod config;
mod container;
mod coreml;
mod devices;
mod ends;
#[cfg(unix)]
mod evidence;
#[cfg(unix)]
mod first_run;
mod first_second;
mod gpu;
mod habits;
mod images;
mod inputs;
mod integrity;
mod joint;
mod lora;
mod matrices;
mod memory;
mod networks;
mod output_metric;
mod outputs;
mod overflow;
mod palettes;
mod pipelines;
mod plan;
mod quantized;
// The ignored tests of this module print tables.
#[allow(clippy::print_stdout)]
mod reliability;
mod report;
mod resume;
mod samplers;
mod schedulers;
mod settings;
mod single_file;
mod snapshots;
mod sparsegpt;
mod squeeze;
mod streams;
mod support;
mod sweep;
mod synth;
mod target;
mod tokens;
#[cfg(unix)]
mod traps;
mod tune;
mod vae_encoder;
mod vector_palettes;
mod watched;
mod wrong_files;
