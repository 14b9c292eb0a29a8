//! The configs that `compare` runs: those that the command line names, or the sizes of a sweep.

use std::path::{Path, PathBuf};

use sdxl_squeeze::compare::{Entry, Shipped, Sweep};
use sdxl_squeeze::config::{Edit, RunConfig};
use sdxl_squeeze::{Error, Result};

use super::edits::Edits;

/// A config of the command line, or one in the program.
#[derive(Debug, Clone, Copy)]
enum Source<'a> {
    File(&'a Path),
    Shipped(Shipped),
}

/// An entry, and the path that names its config in messages.
#[derive(Debug)]
pub(super) struct Named {
    pub path: PathBuf,
    pub entry: Entry,
}

impl Source<'_> {
    fn path(&self) -> &Path {
        match self {
            Source::File(path) => path,
            Source::Shipped(shipped) => Path::new(shipped.path),
        }
    }

    fn name(&self) -> String {
        match self {
            Source::File(path) => path.file_stem().unwrap_or(path.as_os_str()).to_string_lossy().into_owned(),
            Source::Shipped(shipped) => shipped.name.to_owned(),
        }
    }

    /// The config with the edits of the command line, and a further one.
    fn config(&self, edits: &Edits, further: Option<Edit>) -> Result<RunConfig> {
        match self {
            Source::File(path) => edits.config_with(path, further),
            Source::Shipped(shipped) => edits.shipped_with(shipped.config(), further),
        }
    }
}

/// An entry for each of `configs`.
///
/// # Errors
/// As [`RunConfig::read_edited`].
pub(super) fn of_configs(configs: &[PathBuf], edits: &Edits) -> Result<Vec<Named>> {
    configs.iter().map(|path| single(Source::File(path), edits)).collect()
}

/// An entry for each size of `sweep` and each of `bases`, and one for each of `points`. Without
/// bases it is the shipped one, and without points the tutorial's, unless `no_points`.
///
/// # Errors
/// [`Error::Argument`] if `edits` set a size; as [`RunConfig::read_edited`].
pub(super) fn of_sweep(
    sweep: Sweep,
    bases: &[PathBuf],
    points: &[PathBuf],
    no_points: bool,
    edits: &Edits,
) -> Result<Vec<Named>> {
    if let Some(flag) = edits.first_of(&["target-bits", "target-size", "target-error", "target-psnr"]) {
        return Err(Error::Argument(format!("--sweep and --{flag} both set sizes; give one")));
    }
    let curves: Vec<Source> = match bases {
        [] => vec![Source::Shipped(Shipped::BASE)],
        bases => bases.iter().map(|path| Source::File(path)).collect(),
    };
    let singles: Vec<Source> = match points {
        [] if no_points => Vec::new(),
        [] => Shipped::TUTORIAL.map(Source::Shipped).into(),
        points => points.iter().map(|path| Source::File(path)).collect(),
    };
    let mut entries = Vec::new();
    for base in curves {
        for size in sweep.sizes() {
            let config = base.config(edits, Some(Edit::new("target-bits", size.to_string())?))?;
            let (curve, path) = (base.name(), base.path().to_owned());
            entries.push(Named { path, entry: Entry { name: format!("{curve}-{size}-bits"), config, curve: Some(curve) } });
        }
    }
    for point in singles {
        entries.push(single(point, edits)?);
    }
    Ok(entries)
}

/// The entry of a config as it is.
fn single(source: Source<'_>, edits: &Edits) -> Result<Named> {
    let config = source.config(edits, None)?;
    Ok(Named { path: source.path().to_owned(), entry: Entry { name: source.name(), config, curve: None } })
}
