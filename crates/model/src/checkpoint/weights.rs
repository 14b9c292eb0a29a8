//! The tensors of one part of a pipeline: in one file, in shards with an index, or among others in
//! a single-file checkpoint.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use half::f16;
use safetensors::Dtype;
use serde::Deserialize;
use squeeze_base::error::{Error, Result};
use squeeze_base::input::{self, Limit, SourceFile};
use squeeze_base::safetensors_file::{Entry, Magnitudes, SafetensorsFile};
use squeeze_base::shorten::shorten;
use squeeze_numerics::device::Placement;
use tch::{Device, Kind, Tensor};

use super::lora::PartLoras;
use super::source::{TensorSource, TensorSpec};
use super::tensor::{float_kind, halves, read_entry};
use super::view::View;

/// The weights of a part (`unet/`, `text_encoder/`, …), under the names of this library's networks.
#[derive(Debug, Clone)]
pub struct Weights {
    folder: PathBuf,
    files: Vec<Arc<SafetensorsFile>>,
    /// The place of each tensor, by its name in the network.
    index: BTreeMap<String, Place>,
    /// What is merged into tensors when they are read.
    loras: Option<PartLoras>,
}

/// The place of a tensor.
#[derive(Debug, Clone)]
struct Place {
    /// The file's index.
    file: usize,
    /// The tensor's name in the file.
    stored: String,
    /// The stored data: of the whole tensor or of some of its rows.
    entry: Entry,
    /// Whether the stored matrix is the transpose of the network's.
    transposed: bool,
    /// The tensor's shape in the network.
    shape: Vec<i64>,
}

/// `*.index.json` as diffusers and transformers write it.
#[derive(Deserialize)]
struct ShardIndex {
    weight_map: BTreeMap<String, String>,
}

impl Weights {
    /// Opens `folder/stem.safetensors`, its shards (`stem.safetensors.index.json`), or the `.fp16`
    /// variant of either, the plain ones first. Where both are there, the library that writes
    /// such files decides: diffusers (the stem `diffusion_pytorch_model`) reads the shards,
    /// transformers the single file. The log names what is not read. `rename` turns a name in the
    /// file into the network's name for it.
    ///
    /// # Errors
    /// If there are none, or one is damaged, or an index disagrees with its shards.
    pub fn open(folder: &Path, stem: &str, rename: impl Fn(&str) -> String) -> Result<Self> {
        // A link to nothing counts, so that it is refused and not passed over.
        let existing = |name: String| Some(folder.join(name)).filter(|path| path.symlink_metadata().is_ok());
        for variant in ["", ".fp16"] {
            let mut single = existing(format!("{stem}{variant}.safetensors"));
            let names = [format!("{stem}.safetensors.index{variant}.json"), format!("{stem}{variant}.safetensors.index.json")];
            let mut shards = names.into_iter().find_map(existing);
            if let (Some(file), Some(index)) = (&single, &shards) {
                let of_diffusers = stem == "diffusion_pytorch_model";
                let (library, read, left) = if of_diffusers { ("diffusers", index, file) } else { ("transformers", file, index) };
                tracing::warn!(
                    "{}: the weights are there twice; like {library}, this program reads {} and not {}",
                    folder.display(),
                    read.file_name().unwrap_or_default().to_string_lossy(),
                    left.file_name().unwrap_or_default().to_string_lossy(),
                );
                let unread = if of_diffusers { &mut single } else { &mut shards };
                *unread = None;
            }
            if let Some(path) = single {
                let file = SafetensorsFile::open(&path)?;
                let owner = file.entries().keys().map(|name| (name.clone(), 0)).collect();
                return Self::new(folder, vec![Arc::new(file)], owner, |name| vec![View::whole(rename(name))]);
            }
            if let Some(path) = shards {
                let (files, owner) = open_shards(folder, &path)?;
                return Self::new(folder, files, owner, |name| vec![View::whole(rename(name))]);
            }
        }
        let pickled = std::fs::read_dir(folder)
            .map_err(Error::read(folder))?
            .flatten()
            .any(|e| e.path().extension() == Some("bin".as_ref()));
        let hint = if pickled {
            "; pickled .bin weights are not read: in Python, load the model with diffusers and save it with save_pretrained, \
             which writes safetensors"
        } else {
            ""
        };
        Err(Error::bad_file(
            folder,
            format!("no {stem}.safetensors in this folder, nor its .fp16 variant, nor shards with their index{hint}"),
        ))
    }

    /// The tensors of `file` that `views` makes of its stored tensors: none, one or several of
    /// each.
    ///
    /// # Errors
    /// [`Error::BadFile`] if two stored tensors have one name in the network, or a view does not
    /// fit the shape of its tensor.
    pub fn of_file(file: Arc<SafetensorsFile>, views: impl Fn(&str) -> Vec<View>) -> Result<Self> {
        let path = file.path().to_owned();
        let owner = file.entries().keys().map(|name| (name.clone(), 0)).collect();
        Self::new(&path, vec![file], owner, views)
    }

    fn new(
        folder: &Path,
        files: Vec<Arc<SafetensorsFile>>,
        owner: BTreeMap<String, usize>,
        views: impl Fn(&str) -> Vec<View>,
    ) -> Result<Self> {
        let mut index: BTreeMap<String, Place> = BTreeMap::new();
        for (stored, file) in owner {
            // The names are keys of `entries`: the callers checked this for each file.
            let whole = &files[file].entries()[&stored];
            for View { name, part, transposed } in views(&stored) {
                let misfit = || Error::bad_file(folder, format!("`{stored}` is {:?}, which cannot be `{name}`", whole.shape));
                let entry = match part {
                    None => whole.clone(),
                    Some((part, parts)) => whole.part(part, parts).ok_or_else(misfit)?,
                };
                let shape = match (transposed, &entry.shape[..]) {
                    (false, shape) => shape.to_vec(),
                    (true, [rows, columns]) => vec![*columns, *rows],
                    (true, _) => return Err(misfit()),
                };
                if let Some(earlier) = index.get(&name) {
                    let problem = format!("`{stored}` and `{}` are both read as `{name}`", earlier.stored);
                    return Err(Error::bad_file(folder, problem));
                }
                index.insert(name, Place { file, stored: stored.clone(), entry, transposed, shape });
            }
        }
        Ok(Weights { folder: folder.to_owned(), files, index, loras: None })
    }

    /// Gives the weights that `is_linear` names the shape [o, i] of matrices if they are stored as
    /// 1x1 convolutions [o, i, 1, 1]; the order of the elements is equal.
    pub fn with_linear(mut self, is_linear: impl Fn(&str) -> bool) -> Self {
        for (_, place) in self.index.iter_mut().filter(|(name, _)| is_linear(name)) {
            if let [output, input, 1, 1] = place.shape[..] {
                place.shape = vec![output, input];
            }
        }
        self
    }

    /// The weights without the tensors that `is_surplus` names, and the names of these.
    #[must_use]
    pub fn without(mut self, is_surplus: impl Fn(&str) -> bool) -> (Self, Vec<String>) {
        let surplus: Vec<String> = self.index.keys().filter(|name| is_surplus(name)).cloned().collect();
        self.index.retain(|name, _| !is_surplus(name));
        (self, surplus)
    }

    /// These weights with the changes of LoRAs, which are merged into each tensor when a source
    /// reads it. [`survey`](Self::survey) looks at the values before the change.
    #[must_use]
    pub fn with_loras(self, loras: Option<PartLoras>) -> Self {
        Weights { loras, ..self }
    }

    /// The part's folder, or the single-file checkpoint.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The files of the tensors.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|file| file.path())
    }

    /// The tensors' names and places. The shape of an entry is that in the file.
    pub fn entries(&self) -> impl Iterator<Item = (&str, &Entry)> {
        self.index.iter().map(|(name, place)| (name.as_str(), &place.entry))
    }

    /// The shape of the tensor `name` in the network, if it is there.
    #[must_use]
    pub fn shape(&self, name: &str) -> Option<&[i64]> {
        self.index.get(name).map(|place| place.shape.as_slice())
    }

    /// The dtype in which the tensor `name` is stored, if it is there.
    #[must_use]
    pub fn dtype_of(&self, name: &str) -> Option<Dtype> {
        self.index.get(name).map(|place| place.entry.dtype)
    }

    /// The tensors with their shapes in the network.
    pub fn tensors(&self) -> impl Iterator<Item = TensorSpec> {
        self.index.iter().map(|(name, place)| TensorSpec { name: name.clone(), shape: place.shape.clone() })
    }

    /// Reads all files once, before anything is computed: for their hashes, and to check that every
    /// value is finite in fp16, which a container needs. The hashes are under the files' names
    /// after `prefix`. `on_file` is called with each file's name.
    ///
    /// # Errors
    /// [`Error::Tensors`] naming the tensors with a NaN, an infinity, or a value that fp16 does not
    /// hold; [`Error::Changed`]; [`Error::Read`].
    pub fn survey(&self, prefix: &str, mut on_file: impl FnMut(&str)) -> Result<Vec<SourceFile>> {
        let (mut sources, mut problems) = (Vec::new(), Vec::new());
        for (number, file) in self.files.iter().enumerate() {
            let name = file.path().file_name().expect("a regular file has a name").to_string_lossy();
            on_file(&name);
            let (sha256, magnitudes) = file.survey()?;
            sources.push(SourceFile { bytes: file.bytes(), file: format!("{prefix}{name}"), scale: None, sha256 });
            problems.extend(self.problems_of(number, &magnitudes, Dtype::F16));
        }
        self.refuse(problems)?;
        Ok(sources)
    }

    /// Reads all files for tensors with a NaN or an infinity, as the cause of one in the network's
    /// output.
    ///
    /// # Errors
    /// [`Error::Tensors`] naming them; [`Error::Changed`]; [`Error::Read`].
    pub fn check_finite(&self) -> Result<()> {
        let mut problems = Vec::new();
        for (number, file) in self.files.iter().enumerate() {
            problems.extend(self.problems_of(number, &file.survey()?.1, Dtype::F32));
        }
        self.refuse(problems)
    }

    /// What is wrong with the values of the file `number` in `dtype`, a sentence for each tensor.
    fn problems_of(&self, number: usize, magnitudes: &BTreeMap<&str, Magnitudes>, dtype: Dtype) -> Vec<String> {
        let of_file = self.index.iter().filter(|(_, place)| place.file == number);
        let problem = |(name, place): (&String, &Place)| {
            let problem = magnitudes.get(place.stored.as_str())?.check(dtype).err()?;
            Some(format!("`{name}` {problem}"))
        };
        of_file.filter_map(problem).collect()
    }

    /// One error of all problems, if there are any.
    fn refuse(&self, mut problems: Vec<String>) -> Result<()> {
        if problems.is_empty() {
            return Ok(());
        }
        const SHOWN: usize = 4;
        let more = if problems.len() > SHOWN { format!("; and {} tensors more", problems.len() - SHOWN) } else { String::new() };
        problems.truncate(SHOWN);
        Err(Error::Tensors { path: self.folder.clone(), problem: format!("{}{more}", problems.join("; ")) })
    }

    /// Checks that no file was changed since it was opened. Every read checks too.
    ///
    /// # Errors
    /// [`Error::Changed`] naming the file; [`Error::Read`].
    pub fn check_unchanged(&self) -> Result<()> {
        self.files.iter().try_for_each(|file| file.check_unchanged())
    }

    /// The dtype of most elements; `None` if there are no tensors.
    #[must_use]
    pub fn dtype(&self) -> Option<Dtype> {
        let mut elements: Vec<(Dtype, i64)> = Vec::new();
        for (_, entry) in self.entries() {
            let numel = entry.shape.iter().product::<i64>();
            match elements.iter_mut().find(|(dtype, _)| *dtype == entry.dtype) {
                Some((_, sum)) => *sum += numel,
                None => elements.push((entry.dtype, numel)),
            }
        }
        elements.into_iter().max_by_key(|(_, sum)| *sum).map(|(dtype, _)| dtype)
    }

    /// Compares names, shapes and dtypes with an architecture's, before any data is read. `unused`
    /// names surplus tensors that are known and not needed.
    ///
    /// # Errors
    /// [`Error::Tensors`] naming the tensors that are missing, misshapen, of a wrong dtype, or
    /// surplus.
    pub fn check(&self, expected: &[TensorSpec], unused: impl Fn(&str) -> bool) -> Result<()> {
        let stored = self.index.iter().map(|(name, place)| (name.as_str(), (place.shape.as_slice(), place.entry.dtype)));
        check_tensors(&self.folder, expected, stored.collect(), unused)
    }

    /// Reads the tensor `name` of `shape` in row-major order, rounded to fp16.
    ///
    /// # Errors
    /// [`Error::BadFile`] or [`Error::Tensors`] if it is missing, damaged or of another shape, or
    /// has a value that fp16 does not hold; [`Error::Read`]; [`Error::Changed`].
    pub fn halves(&self, name: &str, shape: &[i64]) -> Result<Vec<f16>> {
        let source = self.source(Placement { device: Device::Cpu, kind: Kind::Half });
        halves(&source.tensor(name, shape)?)
    }

    /// A source that reads from here and places each tensor.
    #[must_use]
    pub fn source(&self, placement: Placement) -> WeightsSource<'_> {
        WeightsSource { weights: self, placement, narrow: false }
    }

    /// As [`source`](Self::source), but kernels and matrices that are stored in fewer bytes than
    /// the dtype of `placement` keep their own dtype; layers convert them at each use. That halves
    /// the memory of fp32 computation on an fp16 checkpoint, and results are equal.
    #[must_use]
    pub fn narrow_source(&self, placement: Placement) -> WeightsSource<'_> {
        WeightsSource { weights: self, placement, narrow: true }
    }

    /// Bytes of each element of the tensor `name` from [`narrow_source`](Self::narrow_source).
    #[must_use]
    pub fn narrow_bytes(&self, name: &str, placement: Placement) -> Option<usize> {
        let kind = float_kind(self.index.get(name)?.entry.dtype)?;
        Some(kind.elt_size_in_bytes().min(placement.kind.elt_size_in_bytes()))
    }
}

/// Compares tensors by name, shape and dtype with an architecture's. `path` names them in errors,
/// `unused` names surplus tensors that are known and not needed.
///
/// # Errors
/// [`Error::Tensors`] naming the tensors that are missing, misshapen, of a wrong dtype, or surplus.
pub fn check_tensors(
    path: &Path,
    expected: &[TensorSpec],
    stored: BTreeMap<&str, (&[i64], Dtype)>,
    unused: impl Fn(&str) -> bool,
) -> Result<()> {
    let (mut missing, mut misshapen, mut mistyped) = (Vec::new(), Vec::new(), Vec::new());
    let mut surplus = stored;
    for spec in expected {
        match surplus.remove(spec.name.as_str()) {
            None => missing.push(format!("{} {:?}", spec.name, spec.shape)),
            Some((shape, _)) if shape != spec.shape => {
                misshapen.push(format!("{} is {shape:?}, not {:?}", spec.name, spec.shape));
            }
            Some((_, dtype)) if float_kind(dtype).is_none() => {
                mistyped.push(format!("{} is {dtype:?}, not F32, F16 or BF16", spec.name));
            }
            Some(_) => {}
        }
    }
    let surplus: Vec<String> = surplus.into_keys().filter(|name| !unused(name)).map(str::to_owned).collect();
    if let Some(prefix) = common_prefix(expected, &surplus) {
        let problem = format!(
            "all names of tensors begin with `{prefix}`, as where a wrapped network was saved (torch.compile makes `_orig_mod.`, \
             DataParallel `module.`) or a part of a single-file checkpoint; save the network inside the wrapper, or take \
             `{prefix}` off the names"
        );
        return Err(Error::Tensors { path: path.to_owned(), problem });
    }
    let lists = [
        ("missing", missing),
        ("of another shape", misshapen),
        ("of another dtype", mistyped),
        ("unknown to this architecture", surplus),
    ];
    let problems: Vec<String> =
        lists.iter().filter(|(_, names)| !names.is_empty()).map(|(what, names)| some(what, names)).collect();
    if problems.is_empty() {
        return Ok(());
    }
    Err(Error::Tensors { path: path.to_owned(), problem: format!("tensors disagree with config.json: {}", problems.join("; ")) })
}

/// What stands before the names of all expected tensors in `stored`.
fn common_prefix<'a>(expected: &[TensorSpec], stored: &'a [String]) -> Option<&'a str> {
    let names: BTreeSet<&str> = stored.iter().map(String::as_str).collect();
    let first = &expected.first()?.name;
    let prefixes = stored.iter().filter_map(|name| name.strip_suffix(first.as_str()));
    prefixes
        .filter(|prefix| !prefix.is_empty())
        .find(|prefix| expected.iter().all(|tensor| names.contains(format!("{prefix}{}", tensor.name).as_str())))
}

/// "3 missing (a, b, c)", with the first few names of a long list.
fn some(what: &str, names: &[String]) -> String {
    const SHOWN: usize = 4;
    let more = if names.len() > SHOWN { format!(", and {} more", names.len() - SHOWN) } else { String::new() };
    format!("{} {what} ({}{more})", names.len(), names[..names.len().min(SHOWN)].join(", "))
}

/// Files, and the number of the file of each tensor.
type Shards = (Vec<Arc<SafetensorsFile>>, BTreeMap<String, usize>);

/// Opens the shards that an index names, each once.
fn open_shards(folder: &Path, index_path: &Path) -> Result<Shards> {
    let text = input::read(index_path, Limit::SHARD_INDEX)?;
    let index: ShardIndex =
        serde_json::from_slice(&text).map_err(|source| Error::Json { path: index_path.to_owned(), source })?;
    let mut numbers: BTreeMap<&str, usize> = BTreeMap::new();
    let mut files: Vec<Arc<SafetensorsFile>> = Vec::new();
    let mut owner = BTreeMap::new();
    for (tensor, shard) in &index.weight_map {
        let number = match numbers.get(shard.as_str()) {
            Some(number) => *number,
            None => {
                // An index is untrusted data: it may name files of its own folder, no others.
                if Path::new(shard).file_name() != Some(shard.as_ref()) {
                    return Err(Error::bad_file(index_path, format!("`{}` is not a file name", shorten(shard))));
                }
                files.push(Arc::new(SafetensorsFile::open(&folder.join(shard))?));
                numbers.insert(shard, files.len() - 1);
                files.len() - 1
            }
        };
        if !files[number].entries().contains_key(tensor) {
            return Err(Error::bad_file(index_path, format!("`{tensor}` is said to be in {shard}, but is not")));
        }
        owner.insert(tensor.clone(), number);
    }
    Ok((files, owner))
}

/// [`Weights`] as a [`TensorSource`].
#[derive(Debug, Clone, Copy)]
pub struct WeightsSource<'a> {
    weights: &'a Weights,
    placement: Placement,
    narrow: bool,
}

impl TensorSource for WeightsSource<'_> {
    fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor> {
        let wrong = |problem: String| Error::Tensors { path: self.weights.folder.clone(), problem };
        let place = self.weights.index.get(name).ok_or_else(|| wrong(format!("tensor `{name}` is missing")))?;
        if place.shape != shape {
            return Err(wrong(format!("tensor `{name}` is {:?}, not {shape:?}", place.shape)));
        }
        let stored = float_kind(place.entry.dtype);
        let is_narrower = |stored: &Kind| stored.elt_size_in_bytes() < self.placement.kind.elt_size_in_bytes();
        let kind = stored.filter(|stored| self.narrow && shape.len() > 1 && is_narrower(stored)).unwrap_or(self.placement.kind);
        let file = &self.weights.files[place.file];
        let read = |placement: Placement| -> Result<Tensor> {
            let tensor = read_entry(file, &place.stored, &place.entry, placement)?;
            Ok(if place.transposed { tensor.f_transpose(0, 1)?.f_contiguous()? } else { tensor.f_view(shape)? })
        };
        match &self.weights.loras {
            Some(loras) if loras.change(name) => {
                let merged = loras.merged(name, &read(Placement::CPU)?, stored.unwrap_or(Kind::Float))?;
                Ok(merged.f_to_device(self.placement.device)?.f_to_kind(kind)?)
            }
            _ => read(Placement { kind, ..self.placement }),
        }
    }
}
