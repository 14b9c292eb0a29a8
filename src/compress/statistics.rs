//! Counts of what a run computed, in the terms of its plan.

use std::collections::{BTreeMap, BTreeSet};

use sdxl_model::unet::PartName;
use sdxl_model::{Layer, Observer};
use squeeze_base::error::Result;
use tch::Tensor;

/// Counts of the passes and multiply-adds of a run, by part of the network.
#[derive(Debug, Clone, Default)]
pub struct Statistics {
    /// The parts that samples have run through.
    pub parts: BTreeMap<PartName, PartStatistics>,
    /// Sentences about the units whose activations were beyond fp16.
    pub overflows: BTreeSet<String>,
}

/// Counts of the passes and multiply-adds in one part.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct PartStatistics {
    /// The number of passes over the samples in which Hessians were gathered.
    pub passes: usize,
    /// Multiply-adds of all forwards for Hessians, and of the samples' advance.
    pub multiply_adds: f64,
}

impl Statistics {
    /// Adds one pass in which Hessians were gathered.
    pub(super) fn add_pass(&mut self, part: PartName, multiply_adds: f64) {
        self.add_advance(part, multiply_adds);
        self.parts.entry(part).or_default().passes += 1;
    }

    /// Adds the advance of the samples.
    pub(super) fn add_advance(&mut self, part: PartName, multiply_adds: f64) {
        self.parts.entry(part).or_default().multiply_adds += multiply_adds;
    }
}

/// Passes everything on to another observer, and counts the multiply-adds of layers and attention.
pub(super) struct Counter<'a> {
    pub observer: &'a mut dyn Observer,
    pub multiply_adds: f64,
    /// The number of keys of the attention under way.
    keys: i64,
}

impl<'a> Counter<'a> {
    pub(super) fn of(observer: &'a mut dyn Observer) -> Self {
        Counter { observer, multiply_adds: 0.0, keys: 0 }
    }
}

impl Observer for Counter<'_> {
    fn input(&mut self, layer: &Layer, input: &Tensor) -> Result<()> {
        self.observer.input(layer, input)
    }

    fn residual(&mut self, layer: &Layer, residual: &Tensor) -> Result<()> {
        self.observer.residual(layer, residual)
    }

    fn output(&mut self, layer: &Layer, output: &Tensor) -> Result<()> {
        let weight = layer.weight().size();
        let columns: i64 = weight.iter().skip(1).product();
        self.multiply_adds += output.numel() as f64 * columns as f64;
        if layer.name().ends_with(".to_k") {
            self.keys = output.size()[1];
        }
        if layer.name().ends_with(".to_out.0") {
            // Queries by keys, and their softmax by values.
            self.multiply_adds += 2.0 * output.numel() as f64 * self.keys as f64;
        }
        self.observer.output(layer, output)
    }
}
