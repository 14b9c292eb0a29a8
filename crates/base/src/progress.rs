//! Typed reports of long work, for whoever listens: a terminal, a log, another program.

use crate::error::{Error, Result};

/// Listens to long work. The library reports; what people see is the listener's business.
///
/// Work is a stack of tasks: a task that begins inside another ends before it. Tasks begin and end
/// on one thread. Pieces of a task may be reported by several threads at once, one for each device.
pub trait Progress: Send + Sync {
    /// Takes one report.
    fn report(&self, event: Event<'_>);

    /// Whether the work has to stop at the next place where nothing is lost.
    fn cancelled(&self) -> bool {
        false
    }
}

/// One report.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Event<'a> {
    /// A task begins.
    Begin {
        /// Its name ("denoising").
        task: &'a str,
        /// The plural of one piece ("steps", "tensors").
        unit: &'a str,
        /// How many pieces it consists of.
        total: u64,
    },
    /// The next piece of the innermost task begins; the piece before it is done.
    Advance {
        /// The piece, named for people ("timestep 981").
        item: &'a str,
    },
    /// A part of the network begins, which is a piece of the innermost task.
    Stage {
        /// The stage's name, as in layer names ("down_blocks.1"), or `head` or `tail`.
        stage: &'a str,
        /// Its place, counted from 0.
        index: usize,
        /// The number of parts.
        count: usize,
    },
    /// A sample has passed through a part of the network, which is a piece of the innermost task.
    Sample {
        /// The stage, or `head` or `tail`.
        stage: &'a str,
        /// The device that computed it, as a place in the run's list of devices.
        device: usize,
    },
    /// A layer is compressed.
    Layer(LayerDone<'a>),
    /// A remark for people.
    Note(&'a str),
    /// The innermost task ends, whether it was finished or not.
    End,
}

/// The numbers of a compressed layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayerDone<'a> {
    /// The checkpoint name, without `.weight`.
    pub layer: &'a str,
    /// The stage, or `head` or `tail`.
    pub stage: &'a str,
    /// The pruned share of the weight.
    pub sparsity: f64,
    /// Stored bits a weight, with palettes and scales.
    pub bits_per_weight: f64,
    /// Stored bytes.
    pub bytes: u64,
    /// ‖W - W'‖² / ‖W‖² of the weight as stored.
    pub weight_error: f64,
    /// ‖X W - X W'‖² / ‖X W‖² on the calibration inputs after pruning alone, if it was measured.
    pub pruned_output_error: Option<f64>,
    /// ‖X W - X W'‖² / ‖X W‖² on the calibration inputs as stored, if it was measured.
    pub output_error: Option<f64>,
}

/// Listens to nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn report(&self, _event: Event<'_>) {}
}

/// A task under way: it begins when this is made and ends when this is dropped, so that an early
/// return ends it too.
pub struct Task<'a>(&'a dyn Progress);

impl<'a> Task<'a> {
    /// Begins a task of `total` pieces; `unit` is the plural of one piece.
    pub fn begin(progress: &'a dyn Progress, task: &str, unit: &str, total: usize) -> Self {
        progress.report(Event::Begin { task, unit, total: total as u64 });
        Task(progress)
    }

    /// Reports that the next piece begins.
    pub fn advance(&self, item: &str) {
        self.0.report(Event::Advance { item });
    }

    /// Reports that a part of the network begins.
    pub fn stage(&self, stage: &str, index: usize, count: usize) {
        self.0.report(Event::Stage { stage, index, count });
    }

    /// Reports that a device has taken a sample through a part of the network.
    pub fn sample(&self, stage: &str, device: usize) {
        self.0.report(Event::Sample { stage, device });
    }

    /// Reports the numbers of a compressed layer.
    pub fn layer(&self, layer: LayerDone<'_>) {
        self.0.report(Event::Layer(layer));
    }

    /// An error if the work has to stop.
    ///
    /// # Errors
    /// [`Error::Stopped`].
    pub fn go_on(&self) -> Result<()> {
        if self.0.cancelled() { Err(Error::Stopped) } else { Ok(()) }
    }
}

impl Drop for Task<'_> {
    fn drop(&mut self) {
        self.0.report(Event::End);
    }
}
