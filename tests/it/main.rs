//! Tests from outside: against golden values, through the public interface and through the binary.
#![allow(clippy::print_stdout)]

mod bad_input;
mod chain;
mod cli;
mod config;
mod container;
mod gpu;
mod pipelines;
mod schedulers;
mod support;
mod synth;
mod tokens;
