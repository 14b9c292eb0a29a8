//! How the library says what it is doing, without knowing who listens.

use crate::error::{Error, Result};

/// Listens to long work. The library calls it; what people see is the caller's business.
///
/// Work is a stack of tasks: a task begun inside another ends before it. The pieces of one task may be done by several threads at once, each
/// of which says so, hence `Sync`; tasks are begun and ended by one thread.
pub trait Progress: Sync {
    /// A task of `total` pieces begins; `unit` is the plural of one piece ("steps", "tensors").
    fn begin(&self, task: &str, unit: &str, total: u64);
    /// One piece is done or at hand, named for people ("timestep 981").
    fn advance(&self, item: &str);
    /// Something that is worth a line of its own.
    fn note(&self, _line: &str) {}
    /// The innermost task has ended, finished or not.
    fn end(&self);
    /// Whether the work is to stop at the next place where nothing is lost.
    fn cancelled(&self) -> bool {
        false
    }
}

/// Listens to nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn begin(&self, _task: &str, _unit: &str, _total: u64) {}
    fn advance(&self, _item: &str) {}
    fn end(&self) {}
}

/// A task under way: begun when made, ended when dropped, so that an early return ends it too.
pub struct Task<'a>(&'a dyn Progress);

impl<'a> Task<'a> {
    /// Begins a task.
    pub fn begin(progress: &'a dyn Progress, task: &str, unit: &str, total: usize) -> Self {
        progress.begin(task, unit, total as u64);
        Task(progress)
    }

    /// One piece is done or at hand.
    pub fn advance(&self, item: &str) {
        self.0.advance(item);
    }

    /// Something that is worth a line of its own.
    pub fn note(&self, line: &str) {
        self.0.note(line);
    }

    /// An error if the work is to stop.
    ///
    /// # Errors
    /// [`Error::Stopped`].
    pub fn go_on(&self) -> Result<()> {
        if self.0.cancelled() { Err(Error::Stopped) } else { Ok(()) }
    }
}

impl Drop for Task<'_> {
    fn drop(&mut self) {
        self.0.end();
    }
}
