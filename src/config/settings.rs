//! The settings of one layer: how it is pruned, how it is palettized. Names and defaults are
//! coremltools'.

use serde::Serialize;
use serde_yaml::FlowSeq;
use squeeze_codebook::{BitWidth, Grouping, NmRatio, PaletteOptions, PruneOptions, Quantizer, Sparsity};

use super::fields::Fields;
use super::key::Section;
use super::keys;
use super::limits;
use super::mistake::Mistakes;
use super::words::{GranularityWord, ValuesWord};

/// The settings that a rule of the config gives to layers. Each rule is complete in itself: a key
/// that it leaves out has its default, not the value of `global_config`.
pub(super) trait Settings: Default + Clone + PartialEq {
    /// The keys.
    const SECTION: &'static Section;
    /// The keys and values that a config has for them.
    type Written: Serialize;

    fn read(fields: &Fields<'_>, mistakes: &mut Mistakes<'_>) -> Self;
    fn written(&self) -> Self::Written;
}

impl Settings for PruneOptions {
    const SECTION: &'static Section = &keys::prune_settings::SECTION;
    type Written = PruneKeys;

    fn read(fields: &Fields<'_>, mistakes: &mut Mistakes<'_>) -> Self {
        use keys::prune_settings::*;
        let ratio = fields.given(N_M_RATIO.name);
        if let (Some(_), Some(ratio)) = (fields.given(TARGET_SPARSITY.name), ratio) {
            mistakes.add(ratio.position, "`n_m_ratio` and `target_sparsity` exclude each other; give one");
        }
        let share = fields.value(&TARGET_SPARSITY, mistakes);
        let settings = PruneOptions {
            sparsity: fields.get(&N_M_RATIO, mistakes).map_or(Sparsity::Unstructured(share), Sparsity::NOfM),
            dampening: fields.value(&HESSIAN_DAMPENING, mistakes),
            block: fields.value(&PROCESSING_GROUP_SIZE, mistakes),
            // The palettes decide it, when the recipe is resolved.
            rows_together: 1,
        };
        if let (Sparsity::NOfM(pair), Some(node)) = (settings.sparsity, ratio)
            && let Err(problem) = limits::whole_groups(pair, settings.block)
        {
            mistakes.add(node.position, problem);
        }
        settings
    }

    fn written(&self) -> PruneKeys {
        let PruneOptions { sparsity, dampening, block, rows_together: _ } = *self;
        let (target_sparsity, n_m_ratio) = match sparsity {
            Sparsity::Unstructured(share) => (Some(share), None),
            Sparsity::NOfM(NmRatio { n, m }) => (None, Some(FlowSeq([n, m]))),
        };
        PruneKeys { target_sparsity, n_m_ratio, hessian_dampening: dampening, processing_group_size: block }
    }
}

/// The keys of [`PruneOptions`].
#[derive(Serialize)]
pub(super) struct PruneKeys {
    target_sparsity: Option<f64>,
    n_m_ratio: Option<FlowSeq<[usize; 2]>>,
    hessian_dampening: f64,
    processing_group_size: usize,
}

impl Settings for PaletteOptions {
    const SECTION: &'static Section = &keys::palette_settings::SECTION;
    type Written = PaletteKeys;

    fn read(fields: &Fields<'_>, mistakes: &mut Mistakes<'_>) -> Self {
        use keys::palette_settings::*;
        let settings = PaletteOptions {
            bits: fields.value(&N_BITS, mistakes),
            grouping: grouping(fields, mistakes),
            axis: fields.value(&CHANNEL_AXIS, mistakes),
            per_channel_scale: fields.value(&ENABLE_PER_CHANNEL_SCALE, mistakes),
            vector_length: fields.value(&CLUSTER_DIM, mistakes),
            quantizer: quantizer(fields, mistakes),
        };
        let PaletteOptions { axis, per_channel_scale, vector_length, .. } = settings;
        if let (2.., Some(node)) = (vector_length, fields.given(CLUSTER_DIM.name)) {
            if axis != 0 {
                mistakes.add(
                    node.position,
                    format!("`cluster_dim: {vector_length}` needs `channel_axis: 0`, along which vectors lie"),
                );
            }
            if per_channel_scale {
                mistakes.add(
                    node.position,
                    format!("`cluster_dim: {vector_length}` and `enable_per_channel_scale` exclude each other"),
                );
            }
        }
        check_quantizer(&settings, fields, mistakes);
        settings
    }

    fn written(&self) -> PaletteKeys {
        let PaletteOptions { bits, grouping, axis, per_channel_scale, vector_length, quantizer } = *self;
        let granularity = match grouping {
            Grouping::PerTensor => GranularityWord::PerTensor,
            Grouping::PerGroupedChannel { .. } => GranularityWord::PerGroupedChannel,
        };
        PaletteKeys {
            n_bits: bits,
            granularity,
            group_size: grouping.group_size(),
            cluster_dim: Some(vector_length).filter(|length| *length > 1),
            channel_axis: axis,
            enable_per_channel_scale: per_channel_scale,
            values: quantizer.map(|quantizer| ValuesWord::of(quantizer.grid)),
            block_size: quantizer.map(|quantizer| quantizer.block_size),
            feedback: quantizer.map(|quantizer| quantizer.feedback),
        }
    }
}

/// The keys of [`PaletteOptions`].
#[derive(Serialize)]
pub(super) struct PaletteKeys {
    n_bits: BitWidth,
    granularity: GranularityWord,
    group_size: Option<usize>,
    /// Not written for scalar palettes, so that configs from before there were vectors are written
    /// as they were.
    #[serde(skip_serializing_if = "Option::is_none")]
    cluster_dim: Option<usize>,
    channel_axis: usize,
    enable_per_channel_scale: bool,
    // Nor are the keys of fixed values written for fitted palettes.
    #[serde(skip_serializing_if = "Option::is_none")]
    values: Option<ValuesWord>,
    #[serde(skip_serializing_if = "Option::is_none")]
    block_size: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    feedback: Option<bool>,
}

/// Reads `values`, `block_size` and `feedback`, which go together.
fn quantizer(fields: &Fields<'_>, mistakes: &mut Mistakes<'_>) -> Option<Quantizer> {
    use keys::palette_settings::*;
    let grid = fields.value(&VALUES, mistakes).grid();
    let (block_size, feedback) = (fields.value(&BLOCK_SIZE, mistakes), fields.value(&FEEDBACK, mistakes));
    if grid.is_none() {
        for key in [BLOCK_SIZE.name, FEEDBACK.name] {
            if let Some(node) = fields.given(key) {
                mistakes.add(node.position, format!("`{key}` goes with `values: int` or `values: nf4`"));
            }
        }
    }
    grid.map(|grid| Quantizer { grid, block_size, feedback })
}

/// Checks that nothing of fitted palettes is asked for beside fixed values.
fn check_quantizer(settings: &PaletteOptions, fields: &Fields<'_>, mistakes: &mut Mistakes<'_>) {
    use keys::palette_settings::*;
    let PaletteOptions { bits, grouping, axis: _, per_channel_scale, vector_length, quantizer } = *settings;
    let Some(Quantizer { grid, .. }) = quantizer else { return };
    if let Err(problem) = grid.entries(bits) {
        let node = fields.given(N_BITS.name).or_else(|| fields.given(VALUES.name));
        node.into_iter().for_each(|node| mistakes.add(node.position, problem.clone()));
    }
    let name = grid.name();
    let excluded = [
        (GRANULARITY.name, grouping != Grouping::PerTensor, "`granularity: per_grouped_channel`"),
        (CLUSTER_DIM.name, vector_length > 1, "`cluster_dim`"),
        (ENABLE_PER_CHANNEL_SCALE.name, per_channel_scale, "`enable_per_channel_scale`"),
    ];
    for (key, is_asked, what) in excluded {
        if let (true, Some(node)) = (is_asked, fields.given(key)) {
            mistakes.add(node.position, format!("{what} and `values: {name}` exclude each other"));
        }
    }
}

/// Reads `granularity` and `group_size`, which go together.
fn grouping(fields: &Fields<'_>, mistakes: &mut Mistakes<'_>) -> Grouping {
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
        (GranularityWord::PerGroupedChannel, Some(group_size)) => Grouping::PerGroupedChannel { group_size },
        // A missing group size is a mistake, so this config is not used.
        (GranularityWord::PerGroupedChannel, None) | (GranularityWord::PerTensor, _) => Grouping::PerTensor,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_that_are_not_given_have_the_defaults_of_the_options() {
        let prune = keys::prune_settings::TARGET_SPARSITY.default_value();
        let expected = PruneOptions {
            sparsity: Sparsity::Unstructured(prune),
            dampening: keys::prune_settings::HESSIAN_DAMPENING.default_value(),
            block: keys::prune_settings::PROCESSING_GROUP_SIZE.default_value(),
            rows_together: 1,
        };
        assert_eq!(PruneOptions::default(), expected);
        let expected = PaletteOptions {
            bits: keys::palette_settings::N_BITS.default_value(),
            grouping: Grouping::PerTensor,
            axis: keys::palette_settings::CHANNEL_AXIS.default_value(),
            per_channel_scale: keys::palette_settings::ENABLE_PER_CHANNEL_SCALE.default_value(),
            vector_length: keys::palette_settings::CLUSTER_DIM.default_value(),
            quantizer: keys::palette_settings::VALUES.default_value().grid().map(|grid| Quantizer {
                grid,
                block_size: keys::palette_settings::BLOCK_SIZE.default_value(),
                feedback: keys::palette_settings::FEEDBACK.default_value(),
            }),
        };
        assert_eq!(PaletteOptions::default(), expected);
    }
}
