//! Display of the library's progress: bars, lines or JSON.

use std::io::{self, IsTerminal, Write};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use sdxl_squeeze::number;
use sdxl_squeeze::progress::{Event, LayerDone, Progress};
use serde_json::{Map, Value, json};

use super::terminal;

/// The argument of `--progress`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    /// Bars on a terminal, a line now and then elsewhere.
    Auto,
    /// One JSON object per line.
    Json,
    /// Nothing.
    None,
}

impl FromStr for Mode {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "auto" => Ok(Mode::Auto),
            "json" => Ok(Mode::Json),
            "none" => Ok(Mode::None),
            _ => Err("known: auto, json, none".into()),
        }
    }
}

/// Writes the library's progress to standard error.
pub(super) struct Reporter {
    display: Display,
    /// The bars; none for the other displays.
    bars: Option<MultiProgress>,
    /// Tasks under way, the innermost last.
    tasks: Mutex<Vec<Running>>,
    interrupted: Arc<AtomicBool>,
}

#[derive(Clone, Copy, PartialEq)]
enum Display {
    Bars,
    Lines,
    Json,
    Nothing,
}

/// A task that has begun and not ended.
struct Running {
    task: String,
    unit: String,
    total: u64,
    /// Pieces that were reported when they began; the last of them is under way.
    begun: u64,
    /// Pieces that were reported when they were done.
    finished: u64,
    start: Instant,
    /// When a line last showed it.
    shown: Instant,
    bar: Option<ProgressBar>,
}

/// Least time between two lines about a task.
const PAUSE: Duration = Duration::from_secs(5);

impl Reporter {
    pub(super) fn new(mode: Mode) -> Self {
        let display = match mode {
            Mode::Auto if io::stderr().is_terminal() => Display::Bars,
            Mode::Auto => Display::Lines,
            Mode::Json => Display::Json,
            Mode::None => Display::Nothing,
        };
        let bars = (display == Display::Bars).then(|| MultiProgress::with_draw_target(terminal::stderr()));
        Reporter { display, bars, tasks: Mutex::default(), interrupted: Arc::default() }
    }

    /// Catches interrupts (Ctrl-C): from now on the first one ends the work at the next place where
    /// nothing is lost, and the second one at once.
    pub(super) fn end_on_interrupt(&self) -> sdxl_squeeze::Result<()> {
        let failed = |why: io::Error| sdxl_squeeze::Error::Failed(format!("interrupts cannot be caught: {why}"));
        for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
            // In this order the first interrupt finds the flag unset.
            signal_hook::flag::register_conditional_shutdown(signal, 1, self.interrupted.clone()).map_err(failed)?;
            signal_hook::flag::register(signal, self.interrupted.clone()).map_err(failed)?;
        }
        Ok(())
    }

    /// A writer of log lines above the bars.
    pub(super) fn log_writer(&self) -> LogWriter {
        LogWriter(self.bars.clone())
    }

    /// The tasks under way. No holder of this lock can leave them half changed, so a panic that
    /// poisons the lock does no harm.
    fn tasks(&self) -> MutexGuard<'_, Vec<Running>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Running {
    fn done(&self) -> u64 {
        self.finished + self.begun.saturating_sub(1)
    }

    /// Pieces per second and seconds left, once a piece is done.
    fn pace(&self) -> Option<(f64, f64)> {
        let seconds = self.start.elapsed().as_secs_f64();
        if self.done() == 0 || seconds < 0.05 {
            return None;
        }
        let rate = self.done() as f64 / seconds;
        Some((rate, self.total.saturating_sub(self.done()) as f64 / rate))
    }

    fn status(&self) -> String {
        let mut text = String::new();
        if let Some((rate, left)) = self.pace() {
            let rate = if rate < 1.0 { format!("{:.1} s each", 1.0 / rate) } else { format!("{rate:.1} {}/s", self.unit) };
            text = format!("{rate}, {} left, ", number::time(left));
        }
        if let Some(peak) = sdxl_squeeze::memory::peak() {
            text.push_str(&format!("peak {}", number::size(peak)));
        }
        text
    }
}

impl Progress for Reporter {
    fn cancelled(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }

    fn report(&self, event: Event<'_>) {
        match event {
            Event::Begin { task, unit, total } => self.begin(task, unit, total),
            Event::Advance { item } => self.piece(&event, item, |running| running.begun += 1),
            Event::Stage { stage, .. } => self.piece(&event, stage, |running| running.begun += 1),
            Event::Sample { stage, .. } => self.piece(&event, stage, |running| running.finished += 1),
            Event::Layer(layer) => self.remark(&event, &describe(&layer)),
            Event::Note(line) => self.remark(&event, line),
            Event::End => self.end(),
        }
    }
}

impl Reporter {
    fn begin(&self, task: &str, unit: &str, total: u64) {
        let now = Instant::now();
        let bar = self.bars.as_ref().map(|bars| {
            let bar = bars.add(ProgressBar::new(total));
            let style = ProgressStyle::with_template("{prefix:>22} {bar:28.cyan/dim} {pos:>4}/{len} {wide_msg}");
            bar.set_style(style.expect("the template is valid, and constant"));
            bar.set_prefix(task.to_owned());
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        });
        if self.display == Display::Json {
            print_line(&json!({"version": VERSION, "event": "begin", "task": task, "unit": unit, "total": total}).to_string());
        }
        let (task, unit) = (task.to_owned(), unit.to_owned());
        self.tasks().push(Running { task, unit, total, begun: 0, finished: 0, start: now, shown: now, bar });
    }

    /// Shows that a piece of the innermost task has begun or is done.
    fn piece(&self, event: &Event<'_>, item: &str, count: impl FnOnce(&mut Running)) {
        let mut tasks = self.tasks();
        let Some(running) = tasks.last_mut() else { return };
        count(running);
        match self.display {
            Display::Bars => {
                if let Some(bar) = &running.bar {
                    bar.set_position(running.done());
                    bar.set_message(format!("{item}  {}", running.status()));
                }
            }
            Display::Lines if running.shown.elapsed() >= PAUSE => {
                running.shown = Instant::now();
                let (done, total) = (running.done(), running.total);
                print_line(&format!("{}: {done}/{total} {}, {item}, {}", running.task, running.unit, running.status()));
            }
            Display::Json => {
                let (rate, left) = running.pace().unzip();
                let mut line = json_of(event);
                line.extend(members(json!({
                    "task": running.task, "done": running.done(), "total": running.total,
                    "per_second": rate, "seconds_left": left, "peak_bytes": sdxl_squeeze::memory::peak(),
                })));
                print_line(&Value::Object(line).to_string());
            }
            Display::Lines | Display::Nothing => {}
        }
    }

    /// Shows a line of its own.
    fn remark(&self, event: &Event<'_>, line: &str) {
        match (self.display, &self.bars) {
            (Display::Bars, Some(bars)) => bars.suspend(|| print_line(line)),
            (Display::Bars | Display::Lines, _) => print_line(line),
            (Display::Json, _) => print_line(&Value::Object(json_of(event)).to_string()),
            (Display::Nothing, _) => {}
        }
    }

    fn end(&self) {
        let Some(running) = self.tasks().pop() else { return };
        if let Some(bar) = &running.bar {
            bar.finish_and_clear();
        }
        match self.display {
            Display::Json => {
                let seconds = running.start.elapsed().as_secs_f64();
                // The last piece is done where all were begun; where the task was broken off it is
                // not.
                let done = if running.begun >= running.total { running.total } else { running.done() };
                let line = json!({
                    "version": VERSION, "event": "end", "task": running.task, "done": done, "total": running.total,
                    "seconds": seconds,
                });
                print_line(&line.to_string());
            }
            // A short task needs no line at its end.
            Display::Lines if running.start.elapsed() >= PAUSE => {
                print_line(&format!("{}: {}", running.task, number::time(running.start.elapsed().as_secs_f64())));
            }
            Display::Bars | Display::Lines | Display::Nothing => {}
        }
    }
}

/// Prints a line to standard error.
pub(super) fn print_line(line: &str) {
    // The work goes on even if nobody can be told.
    let _ = writeln!(io::stderr().lock(), "{line}");
}

/// The version of the JSON lines. It grows when a member is renamed, removed or gets another
/// meaning; new members and events leave it as it is. See docs/progress.md.
pub(super) const VERSION: u32 = 1;

/// The members that say what an event is; the caller adds where the task stands.
fn json_of(event: &Event<'_>) -> Map<String, Value> {
    let mut line = members(match event {
        Event::Begin { task, unit, total } => json!({"event": "begin", "task": task, "unit": unit, "total": total}),
        Event::Advance { item } => json!({"event": "advance", "item": item}),
        Event::Stage { stage, index, count } => json!({"event": "stage", "stage": stage, "index": index, "count": count}),
        Event::Sample { stage, device } => json!({"event": "sample", "stage": stage, "device": device}),
        Event::Layer(layer) => json!({
            "event": "layer", "layer": layer.layer, "stage": layer.stage, "sparsity": layer.sparsity,
            "bits_per_weight": layer.bits_per_weight, "bytes": layer.bytes, "weight_error": layer.weight_error,
            "pruned_output_error": layer.pruned_output_error, "output_error": layer.output_error,
        }),
        Event::Note(text) => json!({"event": "note", "text": text}),
        Event::End => json!({"event": "end"}),
    });
    line.insert("version".into(), VERSION.into());
    line
}

fn members(object: Value) -> Map<String, Value> {
    match object {
        Value::Object(members) => members,
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => {
            unreachable!("`json!({{..}})` makes an object")
        }
    }
}

/// A compressed layer in one line.
fn describe(layer: &LayerDone<'_>) -> String {
    let errors = match (layer.pruned_output_error, layer.output_error) {
        (Some(pruned), Some(output)) => {
            format!("output error {} pruned, {} stored", number::percent(pruned), number::percent(output))
        }
        _ => format!("weight error {}", number::percent(layer.weight_error)),
    };
    format!("{}: {:.2} bits a weight, {errors}", layer.layer, layer.bits_per_weight)
}

/// Writes log lines to standard error, above the bars.
///
/// It never fails: the work goes on even if nobody can read the log. tracing-subscriber reports a
/// writer's failure by printing to the same standard error, which panics.
#[derive(Clone)]
pub(super) struct LogWriter(Option<MultiProgress>);

impl Write for LogWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let write = || io::stderr().lock().write_all(bytes);
        let _ = match &self.0 {
            Some(bars) => bars.suspend(write),
            None => write(),
        };
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let _ = io::stderr().lock().flush();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_are_advanced_by_many_threads_and_none_is_lost() {
        let reporter = Reporter::new(Mode::None);
        reporter.report(Event::Begin { task: "outer", unit: "pieces", total: 1 });
        reporter.report(Event::Begin { task: "inner", unit: "pieces", total: 800 });
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| (0..100).for_each(|_| reporter.report(Event::Advance { item: "one" })));
            }
        });
        assert_eq!(reporter.tasks().last().map(|running| running.begun), Some(800));
        reporter.report(Event::End);
        assert_eq!(reporter.tasks().last().map(|running| running.begun), Some(0));
    }

    #[test]
    fn the_documentation_lists_the_members_of_every_event() {
        let layer = LayerDone {
            layer: "conv_in",
            stage: "head",
            sparsity: 0.0,
            bits_per_weight: 4.0,
            bytes: 1,
            weight_error: 0.0,
            pruned_output_error: None,
            output_error: None,
        };
        let docs = include_str!("../../docs/progress.md");
        for event in [
            Event::Begin { task: "t", unit: "u", total: 1 },
            Event::Advance { item: "i" },
            Event::Stage { stage: "s", index: 0, count: 1 },
            Event::Sample { stage: "s", device: 0 },
            Event::Layer(layer),
            Event::Note("n"),
            Event::End,
        ] {
            let members = json_of(&event);
            assert_eq!(members["version"], 1);
            let name = members["event"].as_str().unwrap();
            let row = docs.lines().find(|line| line.starts_with(&format!("| `{name}` |"))).unwrap();
            for member in members.keys().filter(|member| !["event", "version"].contains(&member.as_str())) {
                assert!(row.contains(&format!("`{member}`")), "docs/progress.md does not name `{member}` of `{name}`");
            }
        }
    }
}
