//! On-disk store of finished layers: bounds memory and makes runs resumable. A thread writes layers
//! while the next ones are solved.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Map, Value};
use squeeze_base::digest;
use squeeze_base::error::{Error, Result};
use squeeze_base::number;
use squeeze_container::{CompressedWeight, Container, ContainerWriter, StoredLayer};

use super::kept::{self, Kept};
use super::part::{self, SolvedLayer, Writing};
use super::report::LayerReport;

/// The folder in which a run for the container `path` keeps finished layers until the container is
/// written.
#[must_use]
pub fn workspace_folder(path: &Path) -> PathBuf {
    path.with_extension("work")
}

/// Whether a run for the container `path` was begun and waits to be resumed. A run that is at work
/// does not wait.
#[must_use]
pub fn is_unfinished(path: &Path) -> bool {
    let folder = workspace_folder(path);
    let is_at_work = || File::open(folder.join(LOCK)).is_ok_and(|lock| lock.try_lock().is_err());
    folder.join(RUN).is_file() && !is_at_work()
}

/// A folder beside the result, which is removed once the result is written.
///
/// `run.json` has the identity of the run. Finished layers are in `part-NNNN.safetensors`, each a
/// container of a few weights that is written atomically: whatever kills a run, layers that were
/// finished some seconds before are kept. A lock keeps a second run out.
///
/// Every file that is read back is checked against a hash first. Damaged layers are compressed
/// again, with a warning.
#[derive(Debug)]
pub struct Workspace {
    folder: PathBuf,
    /// The part that is being written. It comes before the lock, so that it is waited for before
    /// another run may begin.
    writing: Option<Writing>,
    _lock: File,
    /// A hash of the run's identity, which is part of the seal of every file.
    run: String,
    /// Warnings about damaged files.
    warnings: Vec<String>,
    /// The kinds of notes on layers that were warned of: their texts without names and numbers.
    noted: BTreeSet<String>,
    parts: Vec<Container>,
    finished: BTreeMap<String, Finished>,
    waiting: Vec<SolvedLayer>,
    waiting_bytes: u64,
    since: Instant,
}

/// A folder that no other run can work in, before it is known which run this one is.
#[derive(Debug)]
pub(super) struct Claim {
    folder: PathBuf,
    lock: File,
}

impl Claim {
    /// Takes the lock of `folder`, which is created if it is absent.
    ///
    /// # Errors
    /// [`Error::Argument`] if another process works in it; [`Error::Write`].
    pub(super) fn of(folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder).map_err(Error::write(folder))?;
        let path = folder.join(LOCK);
        let lock = File::create(&path).map_err(Error::write(&path))?;
        lock.try_lock().map_err(|_| Error::Argument(format!("another run is at work in {}", folder.display())))?;
        Ok(Claim { folder: folder.to_owned(), lock })
    }

    /// Whether the folder has results of an unfinished run, of this identity or another.
    pub(super) fn has_run(&self) -> bool {
        self.folder.join(RUN).exists() || has_results(&self.folder).unwrap_or(true)
    }

    /// Gives a folder back in which no run has been at work: nothing is left of it.
    fn give_back(self) {
        if !self.has_run() {
            // What cannot be removed is in nobody's way.
            let _ = std::fs::remove_file(self.folder.join(LOCK));
            let _ = std::fs::remove_dir(&self.folder);
        }
    }

    /// The result of `work` with this claim, which is given back if there is none.
    ///
    /// # Errors
    /// As `work`.
    pub(super) fn during<T>(self, work: impl FnOnce(&Self) -> Result<T>) -> Result<(Self, T)> {
        match work(&self) {
            Ok(result) => Ok((self, result)),
            Err(error) => {
                self.give_back();
                Err(error)
            }
        }
    }

    /// [`Workspace::open`] of the folder.
    ///
    /// # Errors
    /// As there.
    pub(super) fn open(self, identity: &Map<String, Value>, resume: bool) -> Result<Workspace> {
        Workspace::begin(self, identity, resume)
    }
}

#[derive(Debug)]
struct Finished {
    part: usize,
    report: LayerReport,
    notes: Vec<String>,
}

/// The longest time that finished layers wait to be written.
const WAIT: Duration = Duration::from_secs(15);
/// The bytes of finished layers that are written at once, however short they have waited. As many
/// wait meanwhile, and the container's writer has a copy of those that it writes.
const MANY: u64 = crate::plan::WAITING / 4;

impl Workspace {
    /// Begins a run in `folder`, or continues the run that is there.
    ///
    /// `identity` is everything that the result depends on, entry by entry. With `resume` a run of
    /// the same identity is continued, and a run of another identity is refused; without, the
    /// content of the folder is removed. A damaged part is removed together with all parts after
    /// it, because their layers were calibrated behind its layers.
    ///
    /// # Errors
    /// [`Error::Argument`] naming the entries that differ, or if another process works in the
    /// folder; [`Error::Write`].
    pub fn open(folder: &Path, identity: &Map<String, Value>, resume: bool) -> Result<Self> {
        Claim::of(folder)?.open(identity, resume)
    }

    fn begin(Claim { folder, lock }: Claim, identity: &Map<String, Value>, resume: bool) -> Result<Self> {
        let folder = folder.as_path();
        let stored = match kept::read(folder, UNKNOWN, RUN) {
            Kept::Whole(text) => serde_json::from_slice::<Map<String, Value>>(&text).map_or(Kept::Damaged, Kept::Whole),
            // A run writes its identity before anything else.
            Kept::Absent if !has_results(folder)? => Kept::Absent,
            Kept::Absent | Kept::Damaged => Kept::Damaged,
        };
        let text = serde_json::to_vec_pretty(identity).map_err(|why| Error::Argument(why.to_string()))?;
        let mut workspace = Workspace {
            folder: folder.to_owned(),
            writing: None,
            _lock: lock,
            run: digest::of_bytes(&text),
            warnings: Vec::new(),
            noted: BTreeSet::new(),
            parts: Vec::new(),
            finished: BTreeMap::new(),
            waiting: Vec::new(),
            waiting_bytes: 0,
            since: Instant::now(),
        };
        let had_run = stored != Kept::Absent;
        match stored {
            Kept::Whole(stored) if resume => check_identity(folder, &stored, identity)?,
            Kept::Damaged if resume => {
                workspace.warn(format!("{} is damaged; what is of this run is gone on with", folder.join(RUN).display()));
                kept::write(folder, UNKNOWN, RUN, &text)?;
            }
            Kept::Whole(_) | Kept::Damaged | Kept::Absent => {
                if had_run {
                    let folder = folder.display();
                    tracing::warn!("an unfinished run in {folder} is thrown away; --resume would have gone on with it");
                }
                workspace.clear()?;
                kept::write(folder, UNKNOWN, RUN, &text)?;
            }
        }
        workspace.read_parts()?;
        Ok(workspace)
    }

    /// Removes everything but the lock.
    fn clear(&self) -> Result<()> {
        let lock = self.folder.join(LOCK);
        for entry in std::fs::read_dir(&self.folder).map_err(Error::read(&self.folder))?.flatten() {
            let path = entry.path();
            if path != lock {
                let removed = if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
                removed.map_err(Error::write(&path))?;
            }
        }
        Ok(())
    }

    /// Reads the parts up to the first damaged one, and removes that and all parts after it.
    fn read_parts(&mut self) -> Result<()> {
        loop {
            let path = self.folder.join(part_name(self.parts.len()));
            if !path.exists() {
                break;
            }
            if let Err(why) = self.add_part(&path) {
                self.warn(format!("{why}: its layers, and all that were finished after it, are made again"));
                break;
            }
        }
        for entry in std::fs::read_dir(&self.folder).map_err(Error::read(&self.folder))?.flatten() {
            let number = part_number(&entry.file_name().to_string_lossy());
            if number.is_some_and(|number| number >= self.parts.len()) {
                std::fs::remove_file(entry.path()).map_err(Error::write(&entry.path()))?;
            }
        }
        Ok(())
    }

    /// A hash of the run's identity.
    pub(super) fn run(&self) -> &str {
        &self.run
    }

    /// Logs a warning that will be in the report too.
    pub(super) fn warn(&mut self, warning: String) {
        tracing::warn!("{warning}");
        self.warnings.push(warning);
    }

    /// Writes `content` to the file `name`.
    pub(super) fn keep(&self, name: &str, content: &[u8]) -> Result<()> {
        kept::write(self.folder(), self.run(), name, content)
    }

    /// The content of the file `name`; `None` if it is absent, or damaged, of which this warns.
    pub(super) fn kept(&mut self, name: &str) -> Option<Vec<u8>> {
        match kept::read(self.folder(), self.run(), name) {
            Kept::Whole(content) => Some(content),
            Kept::Absent => None,
            Kept::Damaged => {
                self.warn(format!("{} is damaged, and made again", self.folder().join(name).display()));
                None
            }
        }
    }

    /// Warnings about damaged files of the folder.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Checks the hash of a part and adds its layers.
    fn add_part(&mut self, path: &Path) -> Result<()> {
        self.add(Container::open(path)?)
    }

    /// Adds the layers of a part whose data is known to be whole.
    fn add(&mut self, part: Container) -> Result<()> {
        for layer in part::layers(&part, &self.run)? {
            let SolvedLayer { report, notes, .. } = layer;
            self.finished.insert(report.name.clone(), Finished { part: self.parts.len(), report, notes });
        }
        self.parts.push(part);
        Ok(())
    }

    /// Whether a layer is finished: on disk, or on its way there.
    #[must_use]
    pub fn has(&self, layer: &str) -> bool {
        self.finished.contains_key(layer) || self.on_the_way(layer).is_some()
    }

    fn on_the_way(&self, layer: &str) -> Option<&SolvedLayer> {
        self.writing.as_ref()?.layers().iter().find(|solved| solved.report.name == layer)
    }

    /// Adds a solved layer, which is written within seconds, or by [`flush`](Self::flush). A layer
    /// that stays dense has no weight.
    ///
    /// # Errors
    /// [`Error::Write`], also of layers that were added before.
    pub fn push(&mut self, report: LayerReport, notes: Vec<String>, weight: Option<CompressedWeight>) -> Result<()> {
        self.log(&report.name, &notes);
        if self.waiting.is_empty() {
            self.since = Instant::now();
        }
        self.waiting_bytes += weight.as_ref().map_or(0, CompressedWeight::stored_bytes);
        self.waiting.push(SolvedLayer { report, notes, weight });
        if self.waiting_bytes > MANY || self.since.elapsed() > WAIT { self.hand_over() } else { Ok(()) }
    }

    /// Logs `notes` on a layer: the first of each kind as a warning. Hundreds of layers may have
    /// the same to say, and the report lists them all.
    fn log(&mut self, layer: &str, notes: &[String]) {
        for note in notes {
            let kind = number::masked(note.strip_prefix(layer).unwrap_or(note));
            if self.noted.insert(kind) {
                tracing::warn!("{note} (the report names all layers with such a note)");
            } else {
                tracing::info!("{note}");
            }
        }
    }

    /// Hands the layers that wait to the thread that writes them, once it has written those that it
    /// was given before.
    ///
    /// # Errors
    /// [`Error::Write`] of the layers before.
    pub fn hand_over(&mut self) -> Result<()> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        self.wait()?;
        let path = self.folder.join(part_name(self.parts.len()));
        self.waiting_bytes = 0;
        self.writing = Some(Writing::begin(&path, self.run.clone(), std::mem::take(&mut self.waiting))?);
        Ok(())
    }

    /// Waits until the thread has written what it was given.
    fn wait(&mut self) -> Result<()> {
        match self.writing.take() {
            Some(writing) => self.add(writing.end()?),
            None => Ok(()),
        }
    }

    /// Writes the layers that wait, and returns when they are on the disk.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn flush(&mut self) -> Result<()> {
        self.hand_over()?;
        self.wait()
    }

    /// The weight of a finished layer; `None` if the layer stays dense.
    ///
    /// # Errors
    /// [`Error::Argument`] if it is not finished; [`Error::BadFile`].
    pub fn weight(&self, layer: &str) -> Result<Option<CompressedWeight>> {
        if let Some(solved) = self.on_the_way(layer) {
            return Ok(solved.weight.clone());
        }
        let (part, name) = self.place(layer)?;
        if part.has_weight(&name) { part.weight(&name).map(Some) } else { Ok(None) }
    }

    /// Copies the weight of a layer that is on the disk to `writer`, with this `report`. Returns
    /// how it is stored; `None` if the layer stays dense.
    ///
    /// # Errors
    /// [`Error::Argument`] if it is not on the disk; as [`ContainerWriter::copy_weight`].
    pub(super) fn copy(&self, layer: &str, writer: &mut ContainerWriter, report: Value) -> Result<Option<StoredLayer>> {
        let (part, name) = self.place(layer)?;
        if !part.has_weight(&name) {
            return Ok(None);
        }
        writer.copy_weight(part, &name, report)?;
        part.stored(&name).map(Some)
    }

    /// The part that a layer is in, and the name of its weight.
    fn place(&self, layer: &str) -> Result<(&Container, String)> {
        let finished = self.finished.get(layer).ok_or_else(|| Error::Argument(format!("`{layer}` is not finished")))?;
        Ok((&self.parts[finished.part], format!("{layer}.weight")))
    }

    /// The reports and notes of the layers on the disk, in the order of their names.
    pub fn reports(&self) -> impl Iterator<Item = (&LayerReport, &[String])> {
        self.finished.values().map(|finished| (&finished.report, finished.notes.as_slice()))
    }

    /// Removes the folder, once the result is written.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn remove(self) -> Result<()> {
        std::fs::remove_dir_all(&self.folder).map_err(Error::write(&self.folder))
    }
}

/// The file with the identity of the run.
const LOCK: &str = "lock";
const RUN: &str = "run.json";
/// The run in the seal of [`RUN`] itself, which cannot depend on its own content.
const UNKNOWN: &str = "";

/// Whether a folder has files besides the lock and the identity: a run has been working in it.
fn has_results(folder: &Path) -> Result<bool> {
    let entries = std::fs::read_dir(folder).map_err(Error::read(folder))?;
    let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    // Temporary files of killed runs begin with a dot.
    let result = |name: String| name != LOCK && !name.starts_with(RUN) && !name.starts_with('.');
    Ok(names.into_iter().any(result))
}

fn part_name(number: usize) -> String {
    format!("part-{number:04}.safetensors")
}

fn part_number(name: &str) -> Option<usize> {
    name.strip_prefix("part-")?.strip_suffix(".safetensors")?.parse().ok()
}

/// An error that names every entry that differs.
fn check_identity(folder: &Path, stored: &Map<String, Value>, wanted: &Map<String, Value>) -> Result<()> {
    let keys = stored.keys().chain(wanted.keys().filter(|key| !stored.contains_key(*key)));
    let changed: Vec<&str> = keys.filter(|key| stored.get(*key) != wanted.get(*key)).map(String::as_str).collect();
    if changed.is_empty() {
        return Ok(());
    }
    Err(Error::Argument(format!(
        "the run in {} cannot go on: changed since it began: {} (without --resume it begins anew)",
        folder.display(),
        changed.join(", ")
    )))
}

#[cfg(test)]
mod tests {
    use half::f16;
    use serde_json::json;

    use super::*;

    fn report(name: &str) -> LayerReport {
        LayerReport {
            name: name.into(),
            stage: "mid_block".into(),
            shape: vec![2, 4],
            sparsity: 0.5,
            bits_per_weight: 3.0,
            bytes: 3,
            vectors: Some(7),
            errors: Default::default(),
        }
    }

    fn weight() -> CompressedWeight {
        let values: Vec<f16> = (0..8).map(|i| f16::from_f32(i as f32)).collect();
        CompressedWeight::sparse(vec![2, 4], &[true, false, true, true, false, false, true, true], &values).unwrap()
    }

    fn identity(config: &str) -> Map<String, Value> {
        Map::from_iter([("config".to_owned(), json!(config)), ("model".to_owned(), json!("m"))])
    }

    #[test]
    fn what_was_finished_is_there_after_the_end_and_only_for_the_same_run() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("work");
        let mut first = Workspace::open(&path, &identity("a"), false).unwrap();
        let twice = Workspace::open(&path, &identity("a"), true).unwrap_err().to_string();
        assert!(twice.contains("another run"), "{twice}");
        first.push(report("a"), vec!["a: said".into()], Some(weight())).unwrap();
        first.flush().unwrap();
        first.push(report("dense"), vec![], None).unwrap();
        first.flush().unwrap();
        first.push(report("lost"), vec![], Some(weight())).unwrap();
        drop(first);

        let second = Workspace::open(&path, &identity("a"), true).unwrap();
        assert!(second.has("a") && second.has("dense") && !second.has("lost"));
        assert_eq!(second.weight("a").unwrap(), Some(weight()));
        assert_eq!(second.weight("dense").unwrap(), None);
        assert!(second.weight("lost").is_err());
        let notes: Vec<_> = second.reports().map(|(report, notes)| (report.name.as_str(), notes.to_vec())).collect();
        assert_eq!(notes, [("a", vec!["a: said".to_owned()]), ("dense", vec![])]);
        drop(second);

        let other = Map::from_iter([("build".to_owned(), json!("x")), ("config".to_owned(), json!("a"))]);
        let refused = Workspace::open(&path, &other, true).unwrap_err().to_string();
        assert!(refused.contains("changed since it began: model, build ("), "{refused}");
        let refused = Workspace::open(&path, &identity("b"), true).unwrap_err();
        assert!(refused.is_bad_input() && refused.to_string().contains("changed since it began: config ("), "{refused}");
        let anew = Workspace::open(&path, &identity("b"), false).unwrap();
        assert!(!anew.has("a"));
        anew.remove().unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn a_run_that_does_not_say_any_more_what_it_is_is_not_thrown_away_without_a_word() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("work");
        let first = Workspace::open(&path, &identity("a"), false).unwrap();
        first.keep("samples.json", b"[]").unwrap();
        drop(first);
        for name in ["run.json", "run.json.sha256"] {
            std::fs::remove_file(path.join(name)).unwrap();
        }
        let mut second = Workspace::open(&path, &identity("a"), true).unwrap();
        assert!(second.warnings().len() == 1 && second.warnings()[0].contains("run.json is damaged"), "{:?}", second.warnings());
        assert_eq!(second.kept("samples.json").unwrap(), b"[]");
        // A run that had nothing yet begins without a word.
        let new = folder.path().join("new");
        drop(Workspace::open(&new, &identity("a"), false).unwrap());
        std::fs::remove_file(new.join("run.json.sha256")).unwrap();
        assert!(Workspace::open(&new, &identity("a"), true).unwrap().warnings().is_empty());
    }

    #[test]
    fn layers_on_their_way_can_be_read_and_one_that_cannot_be_written_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.work");
        let mut workspace = Workspace::open(&path, &identity("a"), false).unwrap();
        workspace.push(report("a"), vec!["note".into()], Some(weight())).unwrap();
        assert!(!workspace.has("a"), "only what is handed over is on its way");
        workspace.hand_over().unwrap();
        assert!(workspace.has("a"));
        assert_eq!(workspace.weight("a").unwrap(), Some(weight()));
        // Whether the thread is still at it or not, the next layers come after its.
        workspace.push(report("b"), Vec::new(), None).unwrap();
        workspace.flush().unwrap();
        assert_eq!((workspace.weight("a").unwrap(), workspace.weight("b").unwrap()), (Some(weight()), None));
        assert_eq!(
            workspace.reports().map(|(report, notes)| (report.name.as_str(), notes.len())).collect::<Vec<_>>(),
            [("a", 1), ("b", 0)]
        );

        std::fs::remove_dir_all(&path).unwrap();
        workspace.push(report("c"), Vec::new(), Some(weight())).unwrap();
        workspace.hand_over().unwrap();
        assert!(matches!(workspace.flush(), Err(Error::Write { .. })));
        assert!(!workspace.has("c"));
    }

    #[test]
    fn no_flipped_bit_is_taken_for_good() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("work");
        let mut first = Workspace::open(&path, &identity("a"), false).unwrap();
        for name in ["a", "b", "c"] {
            first.push(report(name), vec![], Some(weight())).unwrap();
            first.flush().unwrap();
        }
        drop(first);
        let names: Vec<String> = (0..3).map(part_name).chain(["run.json".into(), "run.json.sha256".into()]).collect();
        let whole: Vec<Vec<u8>> = names.iter().map(|name| std::fs::read(path.join(name)).unwrap()).collect();
        for i in 0..300usize {
            let file = i % names.len();
            let mut damaged = whole[file].clone();
            let bit = i.wrapping_mul(0x9e37_79b9) % (8 * damaged.len());
            damaged[bit / 8] ^= 1 << (bit % 8);
            for (name, content) in names.iter().zip(&whole) {
                std::fs::write(path.join(name), content).unwrap();
            }
            std::fs::write(path.join(&names[file]), damaged).unwrap();
            let workspace = Workspace::open(&path, &identity("a"), true).unwrap();
            let there: Vec<bool> = ["a", "b", "c"].iter().map(|name| workspace.has(name)).collect();
            // Layers before a damaged part are kept; all layers are kept if only the identity is
            // damaged.
            assert_eq!(there, [file > 0, file > 1, file > 2], "{}, bit {bit}", names[file]);
            assert!(
                workspace.warnings().iter().any(|warning| warning.contains(&names[file.min(3)])),
                "{:?}",
                workspace.warnings()
            );
            for name in ["a", "b", "c"].iter().filter(|name| workspace.has(name)) {
                assert_eq!(workspace.weight(name).unwrap(), Some(weight()));
            }
        }
        // A part of another run, though whole.
        for (name, content) in names.iter().zip(&whole) {
            std::fs::write(path.join(name), content).unwrap();
        }
        let mut other = Workspace::open(&folder.path().join("other"), &identity("b"), false).unwrap();
        other.push(report("a"), vec![], Some(weight())).unwrap();
        other.flush().unwrap();
        std::fs::copy(other.folder().join(part_name(0)), path.join(part_name(0))).unwrap();
        let workspace = Workspace::open(&path, &identity("a"), true).unwrap();
        assert!(!workspace.has("a") && workspace.warnings()[0].contains("is no part of this run"), "{:?}", workspace.warnings());
    }
}
