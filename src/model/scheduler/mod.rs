//! Samplers. PLACEHOLDER until the real module lands.
#![allow(missing_docs)]
use crate::error::Result;
use std::path::Path;
use tch::Tensor;
#[derive(Debug, Clone)]
pub struct SchedulerConfig;
impl SchedulerConfig {
    pub fn read(_: &Path) -> Result<Self> {
        Ok(SchedulerConfig)
    }
    pub fn with_override(&self, _: &str) -> Result<Self> {
        Ok(SchedulerConfig)
    }
    pub fn scheduler(&self, _: usize) -> Result<Box<dyn Scheduler>> {
        todo!()
    }
    pub fn class(&self) -> &str {
        ""
    }
}
pub trait Scheduler {
    fn timesteps(&self) -> &[f64];
    fn init_noise_sigma(&self) -> f64;
    fn scale_model_input(&self, sample: &Tensor, index: usize) -> Result<Tensor>;
    fn step(&mut self, index: usize, model_output: &Tensor, sample: &Tensor) -> Result<Tensor>;
}
