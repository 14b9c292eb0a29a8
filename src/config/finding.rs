//! Findings: what people should know of a config, most of it once the model's layers are known.

use std::fmt::{self, Display};

use squeeze_base::error::{Mistake, Place};
use squeeze_base::number;
use squeeze_codebook::{BitWidth, LayerKind, Misfit, NmRatio};

/// The sections that have rules for layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Section {
    /// `prune`
    Prune,
    /// `palettize`
    Palettize,
    /// `text_encoders`
    TextEncoders,
    /// `vae`
    Vae,
}

impl Display for Section {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Section::Prune => "prune",
            Section::Palettize => "palettize",
            Section::TextEncoders => "text_encoders",
            Section::Vae => "vae",
        })
    }
}

/// The severity of a [`Finding`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// As the config asks; for information.
    Note,
    /// Probably a mistake.
    Warning,
    /// The run must not begin.
    Error,
}

/// The reason why a section leaves a layer alone.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Why {
    /// The config has no such section.
    NoSection,
    /// Its stage matches no entry of `prune.layers`, or it belongs to no stage.
    OutsideLayers,
    /// The rule that decides, named here, is `null` or absent.
    NoSettings(String),
    /// Its weight has at most `weight_threshold` elements.
    Small {
        /// The threshold.
        weight_threshold: u64,
    },
    /// The group size does not divide its channels, or m its columns.
    Misfit,
}

/// An observation about a config that people should know.
#[derive(Debug, Clone, PartialEq)]
pub enum Finding {
    /// A key or flag under a name that it had once. A warning.
    FormerName {
        /// The name given.
        old: String,
        /// The present name.
        new: String,
        /// Where it was written.
        place: Place,
    },
    /// A pattern of `prune.layers` that matches no stage's name. An error.
    NoStage {
        /// The pattern.
        pattern: String,
        /// Where it was written.
        place: Place,
        /// The model's stages.
        stages: Vec<String>,
    },
    /// A pattern of `prune.layers` for the mid block of a model that has none, as in KOALA-700M. A
    /// note.
    NoMidBlock {
        /// The pattern.
        pattern: String,
        /// Where it was written.
        place: Place,
    },
    /// A pattern of `module_name_configs` that matches no layer's name. An error.
    NoLayer {
        /// The section of the pattern.
        section: Section,
        /// The pattern.
        pattern: String,
        /// Where it was written.
        place: Place,
        /// The most similar layer name.
        nearest: Option<String>,
    },
    /// A pattern that matches only what earlier ones have matched. A warning.
    Shadowed {
        /// The section of the pattern.
        section: Section,
        /// The pattern.
        pattern: String,
        /// Where it was written.
        place: Place,
        /// The earlier patterns.
        by: Vec<String>,
    },
    /// A pattern of `prune.module_name_configs` whose layers all lie outside `prune.layers`. A
    /// warning.
    OutOfReach {
        /// The pattern.
        pattern: String,
        /// Where it was written.
        place: Place,
    },
    /// A rule for a type of which the model has no layer. A warning.
    NoLayerOfType {
        /// The section of the rule.
        section: Section,
        /// The type.
        module_type: LayerKind,
    },
    /// A section that leaves every layer alone. A warning.
    Idle {
        /// The section.
        section: Section,
    },
    /// A layer whose channels its group size does not divide. An error or a warning, depending on
    /// `on_misfit`.
    GroupMisfit {
        /// The layer.
        layer: String,
        /// Its channels along `channel_axis`.
        channels: i64,
        /// The group size.
        group_size: usize,
        /// The treatment of the layer.
        becomes: Misfit,
    },
    /// A layer whose output channels or groups its vectors do not divide. An error or a warning,
    /// depending on `on_misfit`.
    VectorMisfit {
        /// The layer.
        layer: String,
        /// Its output channels.
        channels: i64,
        /// The group size, if it has groups.
        group_size: Option<usize>,
        /// The output channels that were to share an index.
        vector_length: usize,
        /// The treatment of the layer.
        becomes: VectorMisfit,
    },
    /// Layers whose groups were widened, since a group had too few indices for a palette of
    /// vectors. A warning.
    WiderGroups {
        /// The group size asked for.
        group_size: usize,
        /// The group size that they get; none for one palette.
        becomes: Option<usize>,
        /// The output channels that share an index.
        vector_length: usize,
        /// The bits of an index.
        bits: BitWidth,
        /// The layers, in the model's order.
        layers: Vec<String>,
    },
    /// Layers that get scalar palettes, since one palette of vectors would be larger than all their
    /// indices. A warning.
    TooSmallForVectors {
        /// The output channels that were to share an index.
        vector_length: usize,
        /// The bits of an index.
        bits: BitWidth,
        /// The layers, in the model's order.
        layers: Vec<String>,
    },
    /// A layer whose rows n:m groups do not divide. An error.
    RatioMisfit {
        /// The layer.
        layer: String,
        /// The weights in a row: d of [o, d].
        columns: i64,
        /// The ratio.
        ratio: NmRatio,
    },
    /// Layers whose palettes the joint solver makes after pruning, since it cannot find them
    /// jointly. A warning.
    NotJoint {
        /// The layers, in the model's order.
        layers: Vec<String>,
    },
    /// No layer is left to compress, by any section.
    Nothing,
    /// Palettes of some layers take more bytes than the weights in fp16.
    LargerThanFp16 {
        /// The layers, in the model's order.
        layers: Vec<String>,
        /// Their bytes with palettes.
        bytes: u64,
        /// Their bytes in fp16.
        dense: u64,
    },
    /// Layers that a section leaves alone. A note.
    LeftAlone {
        /// The section.
        section: Section,
        /// The reason.
        why: Why,
        /// The layers, in the model's order.
        layers: Vec<String>,
    },
}

/// The outcome for a layer whose output channels or groups its vectors do not divide.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VectorMisfit {
    /// The layer gets vectors of this length; 1 is a scalar palette.
    Shorter(usize),
    /// The layer stays fp16.
    Dense,
    /// The policy forbids it.
    Error,
}

impl Finding {
    /// The severity.
    #[must_use]
    pub fn severity(&self) -> Severity {
        match self {
            Finding::NoStage { .. } | Finding::NoLayer { .. } | Finding::RatioMisfit { .. } | Finding::Nothing => Severity::Error,
            Finding::GroupMisfit { becomes: Misfit::Error, .. } => Severity::Error,
            Finding::VectorMisfit { becomes: VectorMisfit::Error, .. } => Severity::Error,
            Finding::VectorMisfit { becomes: VectorMisfit::Shorter(_) | VectorMisfit::Dense, .. } => Severity::Warning,
            Finding::GroupMisfit { becomes: Misfit::SmallerGroup(_) | Misfit::Dense, .. } => Severity::Warning,
            Finding::FormerName { .. }
            | Finding::Shadowed { .. }
            | Finding::OutOfReach { .. }
            | Finding::NoLayerOfType { .. }
            | Finding::WiderGroups { .. }
            | Finding::TooSmallForVectors { .. }
            | Finding::NotJoint { .. }
            | Finding::LargerThanFp16 { .. }
            | Finding::Idle { .. } => Severity::Warning,
            Finding::NoMidBlock { .. } | Finding::LeftAlone { .. } => Severity::Note,
        }
    }

    /// Its place in the config, if it has a single one.
    #[must_use]
    pub fn place(&self) -> Place {
        match self {
            Finding::FormerName { place, .. }
            | Finding::NoStage { place, .. }
            | Finding::NoMidBlock { place, .. }
            | Finding::NoLayer { place, .. }
            | Finding::Shadowed { place, .. }
            | Finding::OutOfReach { place, .. } => place.clone(),
            Finding::NoLayerOfType { .. }
            | Finding::Idle { .. }
            | Finding::GroupMisfit { .. }
            | Finding::VectorMisfit { .. }
            | Finding::WiderGroups { .. }
            | Finding::TooSmallForVectors { .. }
            | Finding::NotJoint { .. }
            | Finding::Nothing
            | Finding::LargerThanFp16 { .. }
            | Finding::RatioMisfit { .. }
            | Finding::LeftAlone { .. } => Place::Default,
        }
    }

    /// The finding as a mistake, which is shown with its place in front.
    #[must_use]
    pub fn mistake(&self) -> Mistake {
        Mistake { place: self.place(), problem: self.to_string() }
    }
}

impl Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Finding::FormerName { old, new, place: _ } => write!(f, "`{old}` is called `{new}` now; the old name still works"),
            Finding::NoStage { pattern, stages, place: _ } => {
                write!(f, "prune: `{pattern}` in `layers` is no stage's whole name (there are {})", stages.join(", "))
            }
            Finding::NoMidBlock { pattern, place: _ } => {
                write!(f, "prune: `{pattern}` in `layers` names no stage here, as the model has no mid block")
            }
            Finding::NoLayer { section, pattern, nearest, place: _ } => {
                write!(f, "{section}: `{pattern}` in `module_name_configs` is no layer's whole name")?;
                nearest.as_ref().map_or(Ok(()), |name| write!(f, "; the nearest is `{name}`"))
            }
            Finding::Shadowed { section, pattern, by, place: _ } => {
                write!(f, "{section}: `{pattern}` decides nothing, as all its layers match earlier patterns: {}", some(by))
            }
            Finding::OutOfReach { pattern, place: _ } => {
                write!(f, "prune: `{pattern}` decides nothing, as all its layers are outside `layers`")
            }
            Finding::NoLayerOfType { section, module_type } => {
                write!(f, "{section}: `module_type_configs` has a rule for {module_type}, but the model has no such layer")
            }
            Finding::Idle { section } => {
                let what = if *section == Section::Prune { "prune" } else { "palettize" };
                write!(f, "{section}: no layer is left to {what}")
            }
            Finding::Nothing => f.write_str(
                "no layer of the UNet is left to compress: the sections `prune` and `palettize` leave all of them alone, for the \
                 reasons above",
            ),
            Finding::LargerThanFp16 { layers, bytes, dense } => {
                let (bits, fp16) = (16.0 * *bytes as f64 / (*dense).max(1) as f64, number::count(*dense));
                write!(
                    f,
                    "palettize: palettes make these layers larger than fp16, {bits:.1} bits a weight, {} bytes in the place of \
                     {fp16}; take larger groups, fewer bits or a higher `weight_threshold` for {}",
                    number::count(*bytes),
                    some(layers)
                )
            }
            Finding::GroupMisfit { layer, channels, group_size, becomes } => {
                write!(f, "palettize: `{layer}` has {channels} channels, which groups of {group_size} do not divide; ")?;
                match becomes {
                    Misfit::SmallerGroup(size) => write!(f, "it gets groups of {size}"),
                    Misfit::Dense => f.write_str("it stays fp16"),
                    Misfit::Error => f.write_str("say `on_misfit: smaller_group` or `dense`, or give it a rule of its own"),
                }
            }
            Finding::VectorMisfit { layer, channels, group_size, vector_length, becomes } => {
                let groups = group_size.map_or(String::new(), |size| format!(" in groups of {size}"));
                write!(
                    f,
                    "palettize: `{layer}` has {channels} output channels{groups}, which vectors of {vector_length} do not divide; "
                )?;
                match becomes {
                    VectorMisfit::Shorter(1) => f.write_str("it gets scalar palettes"),
                    VectorMisfit::Shorter(length) => write!(f, "it gets vectors of {length}"),
                    VectorMisfit::Dense => f.write_str("it stays fp16"),
                    VectorMisfit::Error => f.write_str("say `on_misfit: smaller_group` or `dense`, or give it a rule of its own"),
                }
            }
            Finding::WiderGroups { group_size, becomes, vector_length, bits, layers } => {
                let becomes = becomes.map_or("one palette".to_owned(), |size| format!("groups of {size}"));
                write!(
                    f,
                    "palettize: groups of {group_size} channels have too few indices for palettes of {bits} bits with vectors of \
                     {vector_length}; {becomes} for {}",
                    some(layers)
                )
            }
            Finding::TooSmallForVectors { vector_length, bits, layers } => {
                write!(
                    f,
                    "palettize: a palette of {bits} bits with vectors of {vector_length} is larger than all indices; scalar palettes \
                     for {}",
                    some(layers)
                )
            }
            Finding::NotJoint { layers } => {
                write!(
                    f,
                    "palettize: `solver: joint` does not find palettes along input channels (`channel_axis: 1`) or with scales \
                     (`enable_per_channel_scale`) jointly; it makes them after pruning, as `solver: sequential` does, for {}",
                    some(layers)
                )
            }
            Finding::RatioMisfit { layer, columns, ratio: NmRatio { n, m } } => {
                write!(
                    f,
                    "prune: `{layer}` has rows of {columns} weights, which {n}:{m} does not divide; give it a rule of its own"
                )
            }
            Finding::LeftAlone { section, why, layers } => {
                let (one, many) = if let Why::Small { .. } = why { ("weight", "weights") } else { ("layer", "layers") };
                let count = if layers.len() == 1 { format!("1 {one}") } else { format!("{} {many}", layers.len()) };
                let layers = some(layers);
                match why {
                    Why::NoSection => write!(f, "{section}: no such section, which leaves alone {count}: {layers}"),
                    Why::OutsideLayers => write!(f, "{section}: left alone as outside `layers`, {count}: {layers}"),
                    Why::NoSettings(rule) => write!(f, "{section}: left alone as {rule} is null, {count}: {layers}"),
                    Why::Small { weight_threshold } => {
                        write!(f, "{section}: left in fp16 as of at most {weight_threshold} elements, {count}: {layers}")
                    }
                    Why::Misfit => write!(f, "{section}: left alone as they do not fit, {count}: {layers}"),
                }
            }
        }
    }
}

/// The first few names of a list, and how many more there are.
fn some(names: &[String]) -> String {
    const SHOWN: usize = 5;
    let shown = names.iter().take(SHOWN).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN { format!("{shown} and {} more", names.len() - SHOWN) } else { shown }
}
