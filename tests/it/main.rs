//! Tests from outside: against golden values, through the public interface and through the binary.
#![allow(clippy::print_stdout)]

mod bad_input;
mod chain;
mod cli;
mod compress;
mod config;
mod container;
mod coreml;
mod gpu;
mod palettes;
mod pipelines;
mod report;
mod schedulers;
mod sparsegpt;
mod support;
mod synth;
mod tokens;
