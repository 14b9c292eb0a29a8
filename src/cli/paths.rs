//! Refuses outputs that would overwrite an input of the same command, another of its outputs, or a
//! file that is there already.

use std::path::{Path, PathBuf};

use sdxl_squeeze::config::{Prompts, RunConfig};
use sdxl_squeeze::output::{check_file, check_folder, would_replace};
use sdxl_squeeze::{Error, Result, shipped};

/// The folders of a pipeline's parts, into which no output may be written.
const PARTS: [&str; 7] = ["unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"];

/// The paths of a command, each with the flag that names it. The method that adds a path tells its
/// use.
#[derive(Debug, Default)]
pub(super) struct Paths {
    inputs: Vec<Named>,
    models: Vec<Named>,
    files: Vec<Named>,
    folders: Vec<Named>,
    places: Vec<Named>,
}

/// A path and its target.
#[derive(Debug)]
struct Named {
    flag: String,
    written: PathBuf,
    /// The path without links and dots, as far as it exists.
    real: PathBuf,
}

impl Paths {
    /// A file or a folder that is read.
    pub(super) fn reads(mut self, flag: &str, path: Option<&Path>) -> Self {
        self.inputs.extend(path.map(|path| Named::of(flag, path)));
        self
    }

    /// A file of prompts that is read, unless it is in the program.
    pub(super) fn prompts(self, flag: &str, path: Option<&Path>) -> Self {
        self.reads(flag, path.filter(|path| shipped::prompts_for(path).is_none()))
    }

    /// Files that are read by one flag.
    pub(super) fn read_by<'p>(self, flag: &str, paths: impl IntoIterator<Item = &'p Path>) -> Self {
        paths.into_iter().fold(self, |named, path| named.reads(flag, Some(path)))
    }

    /// A pipeline that is read: a folder, or a single-file checkpoint.
    pub(super) fn model(mut self, flag: &str, path: Option<&Path>) -> Self {
        self.models.extend(path.map(|path| Named::of(flag, path)));
        self
    }

    /// The inputs of a run.
    pub(super) fn run(self, flag: &str, file: &Path, config: &RunConfig) -> Self {
        let calibration = &config.calibration;
        let prompts = match &calibration.prompts {
            Prompts::File(path) if config.is_calibrated() && calibration.samples.is_none() => Some(path.as_path()),
            Prompts::File(_) | Prompts::List(_) => None,
        };
        let search = config.budget.as_ref().and_then(|budget| budget.search.as_ref());
        let judged = match search.map(|search| &search.prompts) {
            Some(Prompts::File(path)) => Some(path.as_path()),
            Some(Prompts::List(_)) | None => None,
        };
        self.reads(flag, Some(file).filter(|file| shipped::config_for(file).is_none()))
            .model("the model", config.model.path.as_deref())
            .model("the base", config.model.base.as_deref())
            .model("the VAE", config.model.vae.as_deref())
            .read_by("a LoRA", config.model.loras.iter().map(|lora| lora.path.as_path()))
            .prompts("the prompts", prompts)
            .reads("the samples", calibration.samples.as_deref())
            .prompts("the captions", calibration.captions.as_deref())
            .prompts("the prompts of the target", judged)
    }

    /// A file that is written.
    pub(super) fn writes(mut self, flag: &str, path: Option<&Path>) -> Self {
        self.files.extend(path.map(|path| Named::of(flag, path)));
        self
    }

    /// A folder that is created, or emptied. No input may be in it, and it may be in no input.
    pub(super) fn fills(mut self, flag: &str, path: &Path) -> Self {
        self.folders.push(Named::of(flag, path));
        self
    }

    /// A folder that files are added to. It may be in no pipeline's folder.
    pub(super) fn puts_into(mut self, flag: &str, path: &Path) -> Self {
        self.places.push(Named::of(flag, path));
        self
    }

    /// # Errors
    /// [`Error::Argument`] naming the two paths that exclude each other.
    pub(super) fn check(&self) -> Result<()> {
        let Paths { inputs, models, files, folders, places } = self;
        for place in places {
            check_folder(&place.written)?;
            check_inputs(place, models.iter().filter(|model| place.is_in(model)))?;
        }
        for (index, file) in files.iter().enumerate() {
            if file.is_device() {
                continue;
            }
            check_inputs(file, inputs.iter().filter(|input| input.is(file)))?;
            check_inputs(file, models.iter().filter(|model| file.is_part_of(model)))?;
            check_outputs(file, files.iter().take(index).filter(|other| other.is(file)))?;
            check_outputs(file, folders.iter().filter(|folder| file.is_in(folder)))?;
        }
        for (index, folder) in folders.iter().enumerate() {
            check_inputs(folder, inputs.iter().chain(models).filter(|input| folder.is_in(input) || input.is_in(folder)))?;
            check_outputs(folder, folders.iter().take(index).filter(|other| folder.is_in(other) || other.is_in(folder)))?;
        }
        Ok(())
    }

    /// Checks that no file that is written is there already, unless the user lets it be replaced.
    ///
    /// # Errors
    /// [`Error::Argument`] naming the first that is there.
    pub(super) fn check_new(&self, overwrite: bool) -> Result<()> {
        match self.files.iter().find(|file| !overwrite && would_replace(&file.written)) {
            None => Ok(()),
            Some(Named { flag, written, .. }) => Err(Error::Argument(format!(
                "{flag} would replace {}, which is there already; name another place, or add --overwrite",
                written.display()
            ))),
        }
    }

    /// Checks the paths like [`check`](Self::check), and that the folder of each output file
    /// exists.
    pub(super) fn check_writable(&self) -> Result<()> {
        self.check()?;
        self.files.iter().try_for_each(|file| check_file(&file.written))
    }
}

fn check_inputs<'a>(output: &Named, mut hit: impl Iterator<Item = &'a Named>) -> Result<()> {
    let Some(Named { flag, written, .. }) = hit.next() else { return Ok(()) };
    let (output, by) = (output.written.display(), &output.flag);
    Err(Error::Argument(format!("{by} would write {output}, but {flag} reads {}; name another place", written.display())))
}

fn check_outputs<'a>(output: &Named, mut hit: impl Iterator<Item = &'a Named>) -> Result<()> {
    let Some(Named { flag, written, .. }) = hit.next() else { return Ok(()) };
    let (output, by) = (output.written.display(), &output.flag);
    Err(Error::Argument(format!("{by} would write {output}, and {flag} {}; name different places", written.display())))
}

impl Named {
    fn of(flag: &str, path: &Path) -> Self {
        Named { flag: flag.to_owned(), written: path.to_owned(), real: real(path) }
    }

    /// Whether both paths lead to one file or folder, which need not exist yet.
    fn is(&self, other: &Named) -> bool {
        same(&self.real, &other.real)
    }

    /// Whether the path leads to the folder, or into it at any depth.
    fn is_in(&self, folder: &Named) -> bool {
        self.real.ancestors().any(|ancestor| same(ancestor, &folder.real))
    }

    /// Whether the path leads to a file of the pipeline in `model`, links followed, or into the
    /// folder of one of its parts.
    fn is_part_of(&self, model: &Named) -> bool {
        let parts = PARTS.map(|part| model.real.join(part));
        let in_a_part = parts.iter().any(|part| part.is_dir() && self.real.ancestors().any(|ancestor| same(ancestor, part)));
        let files = parts.iter().filter_map(|part| std::fs::read_dir(part).ok()).flatten().flatten();
        let links_here = self.real.is_file() && files.into_iter().any(|file| same(&file.path(), &self.real));
        in_a_part || links_here || same(&self.real, &model.real.join("model_index.json")) || self.is(model)
    }

    /// Whether the path is a device such as `/dev/null` or a terminal, to which two outputs may go.
    fn is_device(&self) -> bool {
        #[cfg(unix)]
        {
            use std::os::unix::fs::FileTypeExt;
            std::fs::metadata(&self.written).is_ok_and(|metadata| metadata.file_type().is_char_device())
        }
        #[cfg(not(unix))]
        false
    }
}

/// The target of a path: without links and dots as far as it exists, and the rest as written.
fn real(path: &Path) -> PathBuf {
    /// The number of links that Linux follows.
    const LINKS: usize = 40;
    let mut path = path.to_owned();
    for _ in 0..LINKS {
        if let Ok(real) = path.canonicalize() {
            return real;
        }
        let parent = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        // An output through a link to a file that does not exist yet creates that file.
        match std::fs::read_link(&path) {
            Ok(link) => path = parent.join(link),
            Err(_) if path.parent().is_none() => return path,
            Err(_) => return path.file_name().map_or_else(|| real(&parent), |name| real(&parent).join(name)),
        }
    }
    path
}

/// Whether two resolved paths name one file or folder.
fn same(a: &Path, b: &Path) -> bool {
    if a == b {
        return true;
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let id = |path: &Path| std::fs::metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()));
        id(a).is_some_and(|a| id(b) == Some(a))
    }
    #[cfg(not(unix))]
    false
}

#[cfg(unix)]
#[cfg(test)]
mod tests {
    use super::*;

    fn refused(paths: Paths) -> String {
        let error = paths.check().unwrap_err();
        assert!(error.is_bad_input());
        error.to_string()
    }

    #[test]
    fn outputs_and_inputs_under_any_name() {
        let folder = tempfile::tempdir().unwrap();
        let here = |name: &str| folder.path().join(name);
        std::fs::write(here("input"), b"x").unwrap();
        std::fs::create_dir(here("below")).unwrap();
        std::os::unix::fs::symlink(here("input"), here("link")).unwrap();
        std::os::unix::fs::symlink(here("absent"), here("dangling")).unwrap();
        std::fs::hard_link(here("input"), here("twin")).unwrap();
        let reads = || Paths::default().reads("--unet", Some(&here("input")));
        for name in ["input", "link", "twin", "below/../input", "./input"] {
            let message = refused(reads().writes("-o", Some(&here(name))));
            assert!(message.contains("-o would write") && message.contains("--unet reads"), "{message}");
        }
        reads().writes("-o", Some(&here("other"))).check().unwrap();
        for name in ["new", "below/../new", "./new"] {
            refused(Paths::default().writes("-o", Some(&here("new"))).writes("--latents-out", Some(&here(name))));
        }
        refused(Paths::default().writes("-o", Some(&here("absent"))).writes("--latents-out", Some(&here("dangling"))));
        let null = Some(Path::new("/dev/null"));
        Paths::default().reads("--unet", null).writes("-o", null).writes("--latents-out", null).check().unwrap();
    }

    #[test]
    fn only_files_stand_in_the_way_of_new_ones() {
        let folder = tempfile::tempdir().unwrap();
        let here = |name: &str| folder.path().join(name);
        std::fs::write(here("there"), b"x").unwrap();
        std::os::unix::fs::symlink(here("there"), here("link")).unwrap();
        for name in ["there", "link"] {
            let paths = Paths::default().writes("-o", Some(&here("new"))).writes("--latents-out", Some(&here(name)));
            let refused = paths.check_new(false).unwrap_err();
            assert!(refused.is_bad_input() && refused.to_string().starts_with("--latents-out would replace "), "{refused}");
            paths.check_new(true).unwrap();
        }
        Paths::default().writes("-o", Some(Path::new("/dev/null"))).check_new(false).unwrap();
    }

    #[test]
    fn folders_in_and_around_what_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let here = |name: &str| folder.path().join(name);
        std::fs::create_dir_all(here("model/unet")).unwrap();
        std::fs::write(here("model/model_index.json"), b"{}").unwrap();
        std::fs::write(here("blob"), b"x").unwrap();
        std::os::unix::fs::symlink(here("blob"), here("model/unet/weights")).unwrap();
        std::os::unix::fs::symlink(here("model"), here("alias")).unwrap();
        let model = || Paths::default().model("--model", Some(&here("alias")));
        for name in ["model", "model/new", "model/unet/very/deep", "alias/new", "."] {
            refused(model().fills("--out", &here(name)));
        }
        for name in ["model", "model/new", "alias/unet"] {
            refused(model().puts_into("--out", &here(name)));
        }
        model().puts_into("--out", folder.path()).check().unwrap();
        model().fills("--out", &here("new/deep")).check().unwrap();
        for name in ["blob", "model/model_index.json", "alias/unet/new"] {
            refused(model().writes("-o", Some(&here(name))));
        }
        model().writes("-o", Some(&here("model/picture.png"))).check().unwrap();
        refused(Paths::default().fills("the work folder", &here("work")).writes("--samples-out", Some(&here("work/samples"))));
    }
}
