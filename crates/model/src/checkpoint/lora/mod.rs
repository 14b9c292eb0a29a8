//! LoRA files and their kin, merged into weights while these are read.
//!
//! A merged weight is computed in fp32 from the stored weight and rounded once, to the dtype of the
//! stored weight: it equals the weight of a model that was saved after diffusers' `fuse_lora` in
//! fp32.

mod adapter;
mod keys;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use squeeze_base::error::{Error, Result};
use squeeze_base::pattern::NamePattern;
use squeeze_base::safetensors_file::SafetensorsFile;
use squeeze_numerics::finite::is_finite;
use tch::{Kind, Tensor};

use self::adapter::{Adapter, Pieces};
use self::keys::{Key, Piece, underscored};
use super::source::TensorSpec;
use super::tensor::read_tensor;
pub use keys::LoraPart;

/// A LoRA file and its strength.
#[derive(Debug)]
pub struct Lora {
    file: SafetensorsFile,
    strength: f64,
    /// The tensors of each module.
    modules: BTreeMap<(LoraPart, String), Pieces>,
    /// Names of tensors that are of no known dialect.
    unknown: Vec<String>,
}

impl Lora {
    /// Opens a LoRA file. `strength` is the factor of its changes; 1 is the file's own.
    ///
    /// # Errors
    /// [`Error::Range`] if the strength is not finite; [`Error::Read`]; [`Error::BadFile`].
    pub fn open(path: &Path, strength: f64) -> Result<Self> {
        if !strength.is_finite() {
            return Err(Error::range("the strength of a LoRA", strength, "a finite number"));
        }
        let file = SafetensorsFile::open(path)?;
        if file.entries().is_empty() {
            return Err(Error::bad_file(path, "has no tensors, so that it changes nothing"));
        }
        let mut modules: BTreeMap<(LoraPart, String), Pieces> = BTreeMap::new();
        let mut unknown = Vec::new();
        for name in file.entries().keys() {
            match Key::parse(name) {
                Some(Key { part, module, piece }) => {
                    let pieces = modules.entry((part, module)).or_default();
                    if let Some(earlier) = pieces.insert(piece, name.clone()) {
                        let problem = format!("`{earlier}` and `{name}` are the same tensor of one module");
                        return Err(Error::bad_file(path, problem));
                    }
                }
                None => unknown.push(name.clone()),
            }
        }
        Ok(Lora { file, strength, modules, unknown })
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// The factor of its changes.
    #[must_use]
    pub fn strength(&self) -> f64 {
        self.strength
    }

    /// Its length in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.file.bytes()
    }

    /// SHA-256 of the file, in hex.
    ///
    /// # Errors
    /// [`Error::Changed`]; [`Error::Read`].
    pub fn sha256(&self) -> Result<String> {
        self.file.sha256()
    }
}

/// A network that LoRAs are bound to.
#[derive(Debug)]
pub struct LoraTarget {
    /// The network.
    pub part: LoraPart,
    /// Its tensors.
    pub tensors: Vec<TensorSpec>,
    /// Other names of its modules, and the names in [`tensors`](Self::tensors): those of original
    /// checkpoints.
    pub aliases: Vec<(String, String)>,
}

/// LoRAs, bound to the tensors of a pipeline's networks.
#[derive(Debug)]
pub struct Loras {
    loras: Vec<Lora>,
    changes: BTreeMap<(LoraPart, String), Vec<Change>>,
}

/// A change of a tensor by one of the LoRAs.
#[derive(Debug)]
struct Change {
    lora: usize,
    kind: ChangeKind,
}

#[derive(Debug)]
enum ChangeKind {
    Weight(Adapter),
    /// A difference of the whole tensor, by name: of a bias.
    Difference(String),
}

impl Loras {
    /// Binds `loras` to `targets`. Tensors that match nothing are an error, unless one of `ignored`
    /// matches their whole name.
    ///
    /// # Errors
    /// [`Error::Tensors`] naming the first tensors that match no module, or whose shapes do not fit
    /// it; [`Error::Internal`] if two modules of a network have one name in kohya's spelling.
    pub fn bind(loras: Vec<Lora>, targets: &[LoraTarget], ignored: &[NamePattern]) -> Result<Self> {
        let modules = targets.iter().map(|target| Ok((target.part, Modules::of(target)?))).collect::<Result<BTreeMap<_, _>>>()?;
        let mut changes: BTreeMap<(LoraPart, String), Vec<Change>> = BTreeMap::new();
        for (number, lora) in loras.iter().enumerate() {
            let before = changes.values().map(Vec::len).sum::<usize>();
            let mut unmatched = lora.unknown.clone();
            for ((part, module), pieces) in &lora.modules {
                let target = modules.get(part).and_then(|modules| modules.get(module));
                let Some(target) = target else {
                    unmatched.extend(pieces.values().cloned());
                    continue;
                };
                // Only what is not ignored is read.
                let pieces: Pieces = pieces
                    .iter()
                    .filter(|(_, name)| !is_ignored(ignored, name))
                    .map(|(piece, name)| (*piece, name.clone()))
                    .collect();
                if pieces.is_empty() {
                    continue;
                }
                let mut add = |tensor: &str, kind: ChangeKind| {
                    changes.entry((*part, tensor.to_owned())).or_default().push(Change { lora: number, kind });
                };
                if let Some(name) = pieces.get(&Piece::BiasDifference) {
                    let shape = lora.file.entries().get(name).map(|entry| entry.shape.as_slice());
                    match &target.bias {
                        Some(bias) if shape == Some(&bias.shape) => add(&bias.name, ChangeKind::Difference(name.clone())),
                        _ => unmatched.push(name.clone()),
                    }
                }
                if pieces.keys().any(|piece| *piece != Piece::BiasDifference) {
                    let adapter = Adapter::new(&lora.file, &pieces, &target.weight.shape, lora.strength)?;
                    add(&target.weight.name, ChangeKind::Weight(adapter));
                }
            }
            unmatched.retain(|name| !is_ignored(ignored, name));
            if !unmatched.is_empty() {
                return Err(no_module(lora.path(), &unmatched));
            }
            if changes.values().map(Vec::len).sum::<usize>() == before {
                tracing::warn!("{} changes nothing: all of its tensors are ignored", lora.path().display());
            }
        }
        Ok(Loras { loras, changes })
    }

    /// The LoRAs, in the order in which they are merged.
    #[must_use]
    pub fn loras(&self) -> &[Lora] {
        &self.loras
    }

    /// The number of tensors of `part` that are changed.
    #[must_use]
    pub fn changed(&self, part: LoraPart) -> usize {
        self.changes.keys().filter(|(of, _)| *of == part).count()
    }

    /// The LoRAs' changes of one network; `None` if they do not change it.
    #[must_use]
    pub fn of(self: &Arc<Self>, part: LoraPart) -> Option<PartLoras> {
        (self.changed(part) > 0).then(|| PartLoras { all: Arc::clone(self), part })
    }
}

/// The changes of one network.
#[derive(Debug, Clone)]
pub struct PartLoras {
    all: Arc<Loras>,
    part: LoraPart,
}

impl PartLoras {
    /// Whether the tensor `name` is changed.
    pub(super) fn change(&self, name: &str) -> bool {
        self.all.changes.contains_key(&(self.part, name.to_owned()))
    }

    /// The tensor `name` with its changes, rounded to `kind`. `stored` is the stored tensor in fp32
    /// on the CPU, in the shape of the network.
    ///
    /// # Errors
    /// [`Error::Tensors`] if a LoRA has values that are not finite, or a merged value is none in
    /// `kind`; [`Error::Changed`]; [`Error::Read`].
    pub(super) fn merged(&self, name: &str, stored: &Tensor, kind: Kind) -> Result<Tensor> {
        let mut merged = stored.shallow_clone();
        let changes = self.all.changes.get(&(self.part, name.to_owned())).map(Vec::as_slice).unwrap_or_default();
        for Change { lora, kind } in changes {
            let Lora { file, strength, .. } = &self.all.loras[*lora];
            merged = match kind {
                ChangeKind::Weight(adapter) => adapter.apply(file, &merged)?,
                ChangeKind::Difference(key) => {
                    let difference = read_tensor(file, key, squeeze_numerics::device::Placement::CPU)?;
                    merged.f_add(&difference.f_mul_scalar(*strength)?)?
                }
            };
        }
        let merged = merged.f_to_kind(kind)?;
        if !is_finite(&merged)? {
            let path = changes.last().map_or_else(Default::default, |change| self.all.loras[change.lora].path().to_owned());
            let problem = format!("merged into `{name}`, it makes values that are not finite in {kind:?}");
            return Err(Error::Tensors { path, problem });
        }
        Ok(merged)
    }
}

/// The modules of a network, by their names in kohya's spelling.
struct Modules(BTreeMap<String, Module>);

/// A module's tensors.
#[derive(Clone)]
struct Module {
    weight: TensorSpec,
    bias: Option<TensorSpec>,
}

impl Modules {
    fn of(target: &LoraTarget) -> Result<Self> {
        let find = |name: &str| target.tensors.iter().find(|spec| spec.name == name).cloned();
        let mut modules = BTreeMap::new();
        let mut by_name = BTreeMap::new();
        for spec in &target.tensors {
            let Some(module) = spec.name.strip_suffix(".weight") else { continue };
            let tensors = Module { weight: spec.clone(), bias: find(&format!("{module}.bias")) };
            if modules.insert(underscored(module), tensors.clone()).is_some() {
                return Err(Error::internal(format!("two modules are called `{}`", underscored(module))));
            }
            by_name.insert(module.to_owned(), tensors);
        }
        // transformers 5 leaves `text_model.` out.
        if target.part != LoraPart::Unet {
            let short =
                modules.iter().filter_map(|(name, module)| Some((name.strip_prefix("text_model_")?.to_owned(), module.clone())));
            let short: Vec<_> = short.collect();
            modules.extend(short);
        }
        for (alias, module) in &target.aliases {
            if let Some(tensors) = by_name.get(module) {
                modules.entry(underscored(alias)).or_insert_with(|| tensors.clone());
            }
        }
        Ok(Modules(modules))
    }

    fn get(&self, module: &str) -> Option<&Module> {
        self.0.get(module)
    }
}

fn is_ignored(ignored: &[NamePattern], name: &str) -> bool {
    ignored.iter().any(|pattern| pattern.matches(name))
}

fn no_module(path: &Path, unmatched: &[String]) -> Error {
    const SHOWN: usize = 4;
    let more = if unmatched.len() > SHOWN { format!(", and {} more", unmatched.len() - SHOWN) } else { String::new() };
    let shown: Vec<String> = unmatched.iter().take(SHOWN).map(|name| format!("`{name}`")).collect();
    let matching = if unmatched.len() == 1 { "tensor matches" } else { "tensors match" };
    let problem = format!(
        "{} {matching} no module of this pipeline ({}{more}); --lora-ignore REGEX goes on without those that it matches",
        unmatched.len(),
        shown.join(", ")
    );
    Error::Tensors { path: path.to_owned(), problem }
}
