//! Log lines as JSON, for `--progress json`.

use std::fmt::Debug;

use serde_json::json;
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

use super::progress::{VERSION, print_line};

/// Writes each log event as one JSON object, which docs/progress.md describes.
#[derive(Debug)]
pub(super) struct JsonLog;

/// The message of an event, and what else it has, as `name=value`.
#[derive(Default)]
struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let value = match field.name() {
            "message" => format!("{value:?}"),
            name => format!("{name}={value:?}"),
        };
        if !self.0.is_empty() {
            self.0.push(' ');
        }
        self.0.push_str(&value);
    }
}

impl<S: Subscriber> Layer<S> for JsonLog {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut text = Text::default();
        event.record(&mut text);
        let level = event.metadata().level().as_str().to_lowercase();
        print_line(&json!({"version": VERSION, "event": "log", "level": level, "text": text.0}).to_string());
    }
}
