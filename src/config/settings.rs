//! The settings of one layer: how it is pruned, how it is palettized. Names and defaults are
//! coremltools'.

use std::fmt::{self, Display};

use serde::{Serialize, Serializer};
use serde_yaml::FlowSeq;

use super::fields::Fields;
use super::key::Section;
use super::keys;
use super::kinds::Words;
use super::limits;
use super::mistake::Mistakes;

/// The settings that a rule of the config gives to layers. Each rule is complete in itself: a key
/// that it leaves out has its default, not the value of `global_config`.
pub(super) trait Settings: Default + Clone + PartialEq + Serialize {
    /// The keys.
    const SECTION: &'static Section;

    fn read(fields: &Fields<'_>, mistakes: &mut Mistakes<'_>) -> Self;
}

/// How a layer is pruned: coremltools' `ModuleSparseGPTConfig` without its quantizer.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct PruneSettings {
    /// Which weights are set to zero: `target_sparsity` or `n_m_ratio`.
    #[serde(flatten, serialize_with = "write_sparsity")]
    pub sparsity: Sparsity,
    /// Addition to the Hessian's diagonal, as a share of its mean. At least 0.
    pub hessian_dampening: f64,
    /// The columns that are masked and solved as one block. At least 1, and a multiple of m for n:m
    /// sparsity.
    pub processing_group_size: usize,
}

/// Which weights are set to zero.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Sparsity {
    /// `target_sparsity`: this share of each block of columns, anywhere in it. In [0, 1).
    Unstructured(f64),
    /// `n_m_ratio`: n of every m consecutive weights of a row.
    NOfM(NmRatio),
}

/// Of every `m` consecutive weights of a row, `n` are zero; 0 < n < m.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NmRatio {
    /// The zeros.
    pub n: usize,
    /// The weights that they are taken from.
    pub m: usize,
}

impl Sparsity {
    /// The share of zeros.
    pub fn share(&self) -> f64 {
        match self {
            Sparsity::Unstructured(share) => *share,
            Sparsity::NOfM(NmRatio { n, m }) => *n as f64 / *m as f64,
        }
    }
}

impl Display for Sparsity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Sparsity::Unstructured(share) => write!(f, "{share:?}"),
            Sparsity::NOfM(NmRatio { n, m }) => write!(f, "{n}:{m}"),
        }
    }
}

/// How a layer is palettized: coremltools' `ModulePostTrainingPalettizerConfig`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct PaletteSettings {
    /// A palette has 2^n_bits entries; 1, 2, 3, 4, 6 or 8.
    pub n_bits: u8,
    /// One palette for the whole weight, or one for each group of channels (`granularity` and
    /// `group_size`).
    #[serde(flatten, serialize_with = "write_granularity")]
    pub granularity: Granularity,
    /// The channels that are grouped: 0, the output channels (o of [o, d]), or 1, the input
    /// channels.
    pub channel_axis: usize,
    /// Whether each output channel is divided by its largest magnitude first, and the divisor
    /// stored.
    pub enable_per_channel_scale: bool,
}

/// How many weights share a palette.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Granularity {
    /// All of them.
    PerTensor,
    /// Those of `group_size` neighbouring channels.
    PerGroupedChannel {
        /// Channels in a group. At least 1.
        group_size: usize,
    },
}

impl Granularity {
    const PER_TENSOR: &str = "per_tensor";
    const PER_GROUPED_CHANNEL: &str = "per_grouped_channel";

    /// The channels in a group, if there are groups.
    pub fn group_size(&self) -> Option<usize> {
        match self {
            Granularity::PerTensor => None,
            Granularity::PerGroupedChannel { group_size } => Some(*group_size),
        }
    }
}

impl Default for PruneSettings {
    fn default() -> Self {
        use keys::prune_settings::*;
        PruneSettings {
            sparsity: Sparsity::Unstructured(TARGET_SPARSITY.default_value()),
            hessian_dampening: HESSIAN_DAMPENING.default_value(),
            processing_group_size: PROCESSING_GROUP_SIZE.default_value(),
        }
    }
}

impl Default for PaletteSettings {
    fn default() -> Self {
        use keys::palette_settings::*;
        PaletteSettings {
            n_bits: N_BITS.default_value(),
            granularity: Granularity::PerTensor,
            channel_axis: CHANNEL_AXIS.default_value(),
            enable_per_channel_scale: ENABLE_PER_CHANNEL_SCALE.default_value(),
        }
    }
}

impl Settings for PruneSettings {
    const SECTION: &'static Section = &keys::prune_settings::SECTION;

    fn read(fields: &Fields<'_>, mistakes: &mut Mistakes<'_>) -> Self {
        use keys::prune_settings::*;
        let ratio = fields.given(N_M_RATIO.name);
        if let (Some(_), Some(ratio)) = (fields.given(TARGET_SPARSITY.name), ratio) {
            mistakes.add(ratio.position, "`n_m_ratio` and `target_sparsity` exclude each other; give one");
        }
        let share = fields.value(&TARGET_SPARSITY, mistakes);
        let settings = PruneSettings {
            sparsity: fields.get(&N_M_RATIO, mistakes).map_or(Sparsity::Unstructured(share), Sparsity::NOfM),
            hessian_dampening: fields.value(&HESSIAN_DAMPENING, mistakes),
            processing_group_size: fields.value(&PROCESSING_GROUP_SIZE, mistakes),
        };
        if let (Sparsity::NOfM(pair), Some(node)) = (settings.sparsity, ratio)
            && let Err(problem) = limits::whole_groups(pair, settings.processing_group_size)
        {
            mistakes.add(node.position, problem);
        }
        settings
    }
}

/// Writes the keys `target_sparsity` and `n_m_ratio`.
fn write_sparsity<S: Serializer>(sparsity: &Sparsity, serializer: S) -> Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    struct Keys {
        target_sparsity: Option<f64>,
        n_m_ratio: Option<FlowSeq<[usize; 2]>>,
    }
    let (target_sparsity, n_m_ratio) = match *sparsity {
        Sparsity::Unstructured(share) => (Some(share), None),
        Sparsity::NOfM(NmRatio { n, m }) => (None, Some(FlowSeq([n, m]))),
    };
    Keys { target_sparsity, n_m_ratio }.serialize(serializer)
}

impl Settings for PaletteSettings {
    const SECTION: &'static Section = &keys::palette_settings::SECTION;

    fn read(fields: &Fields<'_>, mistakes: &mut Mistakes<'_>) -> Self {
        use keys::palette_settings::*;
        PaletteSettings {
            n_bits: fields.value(&N_BITS, mistakes),
            granularity: granularity(fields, mistakes),
            channel_axis: fields.value(&CHANNEL_AXIS, mistakes),
            enable_per_channel_scale: fields.value(&ENABLE_PER_CHANNEL_SCALE, mistakes),
        }
    }
}

/// The values of the key `granularity`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum GranularityWord {
    PerTensor,
    PerGroupedChannel,
}

impl Words for GranularityWord {
    const WORDS: &'static [(&'static str, Self)] = &[
        (Granularity::PER_TENSOR, GranularityWord::PerTensor),
        (Granularity::PER_GROUPED_CHANNEL, GranularityWord::PerGroupedChannel),
    ];
}

/// Reads `granularity` and `group_size`, which go together.
fn granularity(fields: &Fields<'_>, mistakes: &mut Mistakes<'_>) -> Granularity {
    use keys::palette_settings::*;
    let (word_node, size_node) = (fields.given(GRANULARITY.name), fields.given(GROUP_SIZE.name));
    let word = fields.get(&GRANULARITY, mistakes);
    let group_size = fields.get(&GROUP_SIZE, mistakes);
    match (word, word_node, size_node) {
        (Some(GranularityWord::PerGroupedChannel), Some(node), None) => {
            mistakes.add(node.position, "`granularity: per_grouped_channel` needs a `group_size`")
        }
        (Some(GranularityWord::PerTensor), _, Some(node)) => {
            mistakes.add(node.position, "`group_size` goes with `granularity: per_grouped_channel`, not per_tensor")
        }
        (None, None, Some(node)) => {
            mistakes.add(node.position, "`group_size` goes with `granularity: per_grouped_channel`, which is not given")
        }
        // Complete, or with a `granularity` that cannot be read, of which nothing follows.
        (Some(_) | None, _, Some(_) | None) => {}
    }
    match (word.unwrap_or_else(|| GRANULARITY.default_value()), group_size) {
        (GranularityWord::PerGroupedChannel, Some(group_size)) => Granularity::PerGroupedChannel { group_size },
        // A missing group size is a mistake, so this config is not used.
        (GranularityWord::PerGroupedChannel, None) | (GranularityWord::PerTensor, _) => Granularity::PerTensor,
    }
}

/// Writes the keys `granularity` and `group_size`.
fn write_granularity<S: Serializer>(granularity: &Granularity, serializer: S) -> Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    struct Keys {
        granularity: &'static str,
        group_size: Option<usize>,
    }
    let word = match granularity {
        Granularity::PerTensor => Granularity::PER_TENSOR,
        Granularity::PerGroupedChannel { .. } => Granularity::PER_GROUPED_CHANNEL,
    };
    Keys { granularity: word, group_size: granularity.group_size() }.serialize(serializer)
}
