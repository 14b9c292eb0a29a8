//! The settings of one layer: how it is pruned, how it is palettized. Names and defaults are coremltools'.

use super::emit::{self, Yaml};
use super::fields::{Fields, boolean, number, whole, word};
use super::limits;
use super::mistake::Mistakes;
use super::tree::{Node, Value};
use crate::codebook::{Grouping, NmRatio, PaletteOptions, PruneOptions, Sparsity};

/// What a rule of the config gives to a layer. Each rule is complete in itself: what it leaves out has the default, not the value
/// of `global_config`.
pub(super) trait Settings: Default + Clone + PartialEq {
    fn read(fields: &mut Fields<'_>, mistakes: &mut Mistakes<'_>) -> Self;
    fn write(&self, yaml: &mut Yaml);
}

impl Settings for PruneOptions {
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
        let settings = PruneOptions {
            sparsity: n_of_m.or(unstructured).unwrap_or(default.sparsity),
            dampening: fields
                .get("hessian_dampening", mistakes, |node| limits::not_negative(number(node)?))
                .unwrap_or(default.dampening),
            block: fields.get("processing_group_size", mistakes, |node| limits::count(whole(node)?)).unwrap_or(default.block),
        };
        if let (Sparsity::NOfM(pair), Some(node)) = (settings.sparsity, ratio)
            && let Err(why) = limits::whole_groups(pair, settings.block)
        {
            mistakes.add(node.position, why);
        }
        settings
    }

    fn write(&self, yaml: &mut Yaml) {
        let PruneOptions { sparsity, dampening, block } = *self;
        let (target, ratio) = match sparsity {
            Sparsity::Unstructured(share) => (Some(share), None),
            Sparsity::NOfM(pair) => (None, Some(pair)),
        };
        yaml.entry("target_sparsity", emit::or_null(target, emit::number));
        yaml.entry("n_m_ratio", emit::or_null(ratio, |NmRatio { n, m }| format!("[{n}, {m}]")));
        yaml.entry("hessian_dampening", emit::number(dampening));
        yaml.entry("processing_group_size", block.to_string());
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

impl Settings for PaletteOptions {
    fn read(fields: &mut Fields<'_>, mistakes: &mut Mistakes<'_>) -> Self {
        let default = Self::default();
        PaletteOptions {
            bits: fields.get("n_bits", mistakes, |node| limits::n_bits(whole(node)?)).unwrap_or(default.bits),
            grouping: grouping(fields, mistakes).unwrap_or(default.grouping),
            axis: fields.get("channel_axis", mistakes, |node| limits::channel_axis(whole(node)?)).unwrap_or(default.axis),
            per_channel_scale: fields.get("enable_per_channel_scale", mistakes, boolean).unwrap_or(default.per_channel_scale),
        }
    }

    fn write(&self, yaml: &mut Yaml) {
        let PaletteOptions { bits, grouping, axis, per_channel_scale } = *self;
        yaml.entry("n_bits", bits.to_string());
        yaml.entry(
            "granularity",
            match grouping {
                Grouping::PerTensor => PER_TENSOR,
                Grouping::PerGroupedChannel { .. } => PER_GROUPED_CHANNEL,
            },
        );
        yaml.entry("group_size", emit::or_null(grouping.group_size(), |size| size.to_string()));
        yaml.entry("channel_axis", axis.to_string());
        yaml.entry("enable_per_channel_scale", per_channel_scale.to_string());
    }
}

const PER_TENSOR: &str = "per_tensor";
const PER_GROUPED_CHANNEL: &str = "per_grouped_channel";

/// `granularity` and `group_size` together; nothing where either is absent or wrong.
fn grouping(fields: &mut Fields<'_>, mistakes: &mut Mistakes<'_>) -> Option<Grouping> {
    let words = [(PER_TENSOR, false), (PER_GROUPED_CHANNEL, true)];
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
        true => group_size.map(|group_size| Grouping::PerGroupedChannel { group_size }),
        false => Some(Grouping::PerTensor),
    }
}
