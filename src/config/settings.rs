//! The settings of one layer: how it is pruned, how it is palettized. Names and defaults are coremltools'.

use std::fmt::{self, Display};

use super::emit::{self, Yaml};
use super::fields::{Fields, boolean, number, whole, word};
use super::limits;
use super::mistake::Mistakes;
use super::tree::{Node, Value};

/// What a rule of the config gives to a layer. Each rule is complete in itself: what it leaves out has the default, not the value
/// of `global_config`.
pub(super) trait Settings: Default + Clone + PartialEq {
    fn read(fields: &mut Fields<'_>, mistakes: &mut Mistakes<'_>) -> Self;
    fn write(&self, yaml: &mut Yaml);
}

/// How a layer is pruned: coremltools' `ModuleSparseGPTConfig` without its quantizer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PruneSettings {
    /// Which weights are set to zero: `target_sparsity` or `n_m_ratio`.
    pub sparsity: Sparsity,
    /// What is added to the Hessian's diagonal, as a share of its mean. At least 0.
    pub hessian_dampening: f64,
    /// The columns that are masked and solved as one block. At least 1, and a multiple of m for n:m sparsity.
    pub processing_group_size: usize,
}

/// Which weights are set to zero.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Sparsity {
    /// `target_sparsity`: this share of each block of columns, wherever in it. In [0, 1).
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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PaletteSettings {
    /// A palette has 2^n_bits entries; 1, 2, 3, 4, 6 or 8.
    pub n_bits: u8,
    /// One palette for the whole weight, or one for each group of channels (`granularity` and `group_size`).
    pub granularity: Granularity,
    /// The channels that are grouped: 0, the output channels (o of [o, d]), or 1, the input channels.
    pub channel_axis: usize,
    /// Whether each output channel is divided by its largest magnitude first, and the divisor stored.
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
        PruneSettings { sparsity: Sparsity::Unstructured(0.5), hessian_dampening: 0.01, processing_group_size: 128 }
    }
}

impl Default for PaletteSettings {
    fn default() -> Self {
        PaletteSettings { n_bits: 4, granularity: Granularity::PerTensor, channel_axis: 0, enable_per_channel_scale: false }
    }
}

impl Settings for PruneSettings {
    fn read(fields: &mut Fields<'_>, mistakes: &mut Mistakes<'_>) -> Self {
        let default = Self::default();
        let target = fields.given("target_sparsity");
        let ratio = fields.given("n_m_ratio");
        if let (Some(_), Some(ratio)) = (target, ratio) {
            mistakes.add(ratio.position, "`n_m_ratio` and `target_sparsity` exclude each other; give one");
        }
        let unstructured =
            fields.get("target_sparsity", mistakes, |node| limits::target_sparsity(number(node)?)).map(Sparsity::Unstructured);
        let n_of_m = fields.get("n_m_ratio", mistakes, n_m_ratio).map(Sparsity::NOfM);
        let settings = PruneSettings {
            sparsity: n_of_m.or(unstructured).unwrap_or(default.sparsity),
            hessian_dampening: fields
                .get("hessian_dampening", mistakes, |node| limits::not_negative(number(node)?))
                .unwrap_or(default.hessian_dampening),
            processing_group_size: fields
                .get("processing_group_size", mistakes, |node| limits::count(whole(node)?))
                .unwrap_or(default.processing_group_size),
        };
        if let (Sparsity::NOfM(pair), Some(node)) = (settings.sparsity, ratio)
            && let Err(why) = limits::whole_groups(pair, settings.processing_group_size)
        {
            mistakes.add(node.position, why);
        }
        settings
    }

    fn write(&self, yaml: &mut Yaml) {
        let PruneSettings { sparsity, hessian_dampening, processing_group_size } = *self;
        let (target, ratio) = match sparsity {
            Sparsity::Unstructured(share) => (Some(share), None),
            Sparsity::NOfM(pair) => (None, Some(pair)),
        };
        yaml.entry("target_sparsity", emit::or_null(target, emit::number));
        yaml.entry("n_m_ratio", emit::or_null(ratio, |NmRatio { n, m }| format!("[{n}, {m}]")));
        yaml.entry("hessian_dampening", emit::number(hessian_dampening));
        yaml.entry("processing_group_size", processing_group_size.to_string());
    }
}

/// `[2, 4]`, as coremltools writes it, or `2:4`, as people do.
fn n_m_ratio(node: &Node) -> Result<NmRatio, String> {
    match &node.value {
        Value::Text(text) => limits::n_m_text(text),
        Value::List(pair) => match pair.as_slice() {
            [n, m] => limits::n_m_ratio(whole(n).unwrap_or(0), whole(m).unwrap_or(0)),
            _ => Err("must be a list of two numbers, such as [2, 4]".into()),
        },
        _ => Err("must be a list of two numbers, such as [2, 4]".into()),
    }
}

impl Settings for PaletteSettings {
    fn read(fields: &mut Fields<'_>, mistakes: &mut Mistakes<'_>) -> Self {
        let default = Self::default();
        PaletteSettings {
            n_bits: fields.get("n_bits", mistakes, |node| limits::n_bits(whole(node)?)).unwrap_or(default.n_bits),
            granularity: granularity(fields, mistakes).unwrap_or(default.granularity),
            channel_axis: fields
                .get("channel_axis", mistakes, |node| limits::channel_axis(whole(node)?))
                .unwrap_or(default.channel_axis),
            enable_per_channel_scale: fields
                .get("enable_per_channel_scale", mistakes, boolean)
                .unwrap_or(default.enable_per_channel_scale),
        }
    }

    fn write(&self, yaml: &mut Yaml) {
        let PaletteSettings { n_bits, granularity, channel_axis, enable_per_channel_scale } = *self;
        yaml.entry("n_bits", n_bits.to_string());
        yaml.entry(
            "granularity",
            match granularity {
                Granularity::PerTensor => Granularity::PER_TENSOR,
                Granularity::PerGroupedChannel { .. } => Granularity::PER_GROUPED_CHANNEL,
            },
        );
        yaml.entry("group_size", emit::or_null(granularity.group_size(), |size| size.to_string()));
        yaml.entry("channel_axis", channel_axis.to_string());
        yaml.entry("enable_per_channel_scale", enable_per_channel_scale.to_string());
    }
}

/// `granularity` and `group_size` together; nothing where either is absent or wrong.
fn granularity(fields: &mut Fields<'_>, mistakes: &mut Mistakes<'_>) -> Option<Granularity> {
    let words = [(Granularity::PER_TENSOR, false), (Granularity::PER_GROUPED_CHANNEL, true)];
    let (named, sized) = (fields.given("granularity"), fields.given("group_size"));
    let grouped = fields.get("granularity", mistakes, |node| word(node, &words));
    let group_size = fields.get("group_size", mistakes, |node| limits::count(whole(node)?));
    match (grouped, named, sized) {
        (Some(true), Some(node), None) => mistakes.add(node.position, "`granularity: per_grouped_channel` needs a `group_size`"),
        (Some(false), _, Some(node)) => {
            mistakes.add(node.position, "`group_size` goes with `granularity: per_grouped_channel`, not per_tensor")
        }
        (None, None, Some(node)) => {
            mistakes.add(node.position, "`group_size` goes with `granularity: per_grouped_channel`, which is not given")
        }
        _ => {}
    }
    match grouped? {
        true => group_size.map(|group_size| Granularity::PerGroupedChannel { group_size }),
        false => Some(Granularity::PerTensor),
    }
}
