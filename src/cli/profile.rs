//! The time of a run by step, from the spans that the library enters.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use sdxl_squeeze::Error;
use sdxl_squeeze::output::write_file;
use tracing::span::{Attributes, Id};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

/// Sums the time of each kind of step. Clones share their sums.
#[derive(Debug, Clone, Default)]
pub(super) struct Profile(Arc<Mutex<BTreeMap<&'static str, Step>>>);

/// All steps of one name.
#[derive(Debug, Clone, Copy, Default, serde::Serialize)]
struct Step {
    /// How often it was entered.
    count: u64,
    /// Seconds inside it, summed over all threads.
    seconds: f64,
    /// Seconds inside it, and in no step within it.
    own_seconds: f64,
}

/// A span that is entered.
#[derive(Default)]
struct Timer {
    entered: Option<Instant>,
    /// The time of the spans within it.
    inside: Duration,
}

impl Profile {
    /// Writes the sums as JSON to `path`.
    pub(super) fn write(&self, path: &Path) -> Result<(), Error> {
        let steps = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let text = serde_json::to_string_pretty(&*steps).expect("names and numbers are JSON");
        write_file(path, |out| writeln!(out, "{text}"))
    }
}

impl<S: tracing::Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Profile {
    fn on_new_span(&self, _: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        if let Some(span) = context.span(id) {
            span.extensions_mut().insert(Timer::default());
        }
    }

    fn on_enter(&self, id: &Id, context: Context<'_, S>) {
        if let Some(span) = context.span(id)
            && let Some(timer) = span.extensions_mut().get_mut::<Timer>()
        {
            timer.entered = Some(Instant::now());
        }
    }

    fn on_exit(&self, id: &Id, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        let mut extensions = span.extensions_mut();
        let Some(timer) = extensions.get_mut::<Timer>() else { return };
        let Some(entered) = timer.entered.take() else { return };
        let elapsed = entered.elapsed();
        let own = elapsed.saturating_sub(std::mem::take(&mut timer.inside));
        drop(extensions);
        if let Some(parent) = span.parent()
            && let Some(timer) = parent.extensions_mut().get_mut::<Timer>()
        {
            timer.inside += elapsed;
        }
        let mut steps = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let step = steps.entry(span.name()).or_default();
        step.count += 1;
        step.seconds += elapsed.as_secs_f64();
        step.own_seconds += own.as_secs_f64();
    }
}
