//! The check of the model's files beside the drawing of samples: the one waits for the disk and one
//! processor thread, the other for the device.

use std::sync::atomic::{AtomicBool, Ordering};

use squeeze_base::error::Result;
use squeeze_base::progress::{Event, Progress};

/// Runs `check` in a thread of its own beside `work`. If `check` fails, `work` is asked to stop,
/// and the error is that of `check`, which is the cause of others.
///
/// # Errors
/// As `check` and `work`.
pub(super) fn beside<C: Send, W>(
    check: impl FnOnce() -> Result<C> + Send,
    work: impl FnOnce(&dyn Progress) -> Result<W>,
    progress: &dyn Progress,
) -> Result<(C, W)> {
    let has_failed = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let checking = scope.spawn(|| check().inspect_err(|_| has_failed.store(true, Ordering::Relaxed)));
        let worked = work(&Stoppable { progress, has_failed: &has_failed });
        let checked = checking.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        Ok((checked?, worked?))
    })
}

/// Progress of work that stops once the check beside it has failed.
struct Stoppable<'a> {
    progress: &'a dyn Progress,
    has_failed: &'a AtomicBool,
}

impl Progress for Stoppable<'_> {
    fn report(&self, event: Event<'_>) {
        self.progress.report(event);
    }

    fn cancelled(&self) -> bool {
        self.has_failed.load(Ordering::Relaxed) || self.progress.cancelled()
    }
}

/// Listens to nothing; the work stops when the other's does.
pub(super) struct Unseen<'a>(pub &'a dyn Progress);

impl Progress for Unseen<'_> {
    fn report(&self, _event: Event<'_>) {}

    fn cancelled(&self) -> bool {
        self.0.cancelled()
    }
}

#[cfg(test)]
mod tests {
    use squeeze_base::error::Error;
    use squeeze_base::progress::{Silent, Task};

    use super::*;

    #[test]
    fn a_failed_check_stops_the_work_and_is_the_error() {
        let endless = |progress: &dyn Progress| -> Result<()> {
            let task = Task::begin(progress, "work", "pieces", 1);
            loop {
                task.go_on()?;
                std::thread::yield_now();
            }
        };
        let failing = || -> Result<()> { Err(Error::Argument("the check".into())) };
        let error = beside(failing, endless, &Silent).unwrap_err();
        assert_eq!(error.to_string(), "the check");
        let error = beside(|| Ok(()), |_| -> Result<()> { Err(Error::Argument("the work".into())) }, &Silent).unwrap_err();
        assert_eq!(error.to_string(), "the work");
        assert_eq!(beside(|| Ok(1), |_| Ok(2), &Silent).unwrap(), (1, 2));
    }
}
