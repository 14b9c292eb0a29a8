//! Palettes of vectors that fit their layer, and whose groups are worth their palettes.

use squeeze_codebook::{Grouping, OnMisfit, PaletteOptions};

use super::finding::{Finding, VectorMisfit};
use super::layer_info::LayerInfo;
use super::limits::VECTOR_LENGTHS;

/// A group's palette may take a sixteenth of the bytes of the group's indices.
const WORTH: f64 = 16.0;

/// The settings of a layer whose palettes were to have vectors; none if it is left alone. Groups
/// are known to divide its output channels. `share` is the share of its weights that are pruned.
pub(super) fn fit(
    settings: PaletteOptions,
    layer: &LayerInfo,
    share: f64,
    on_misfit: OnMisfit,
    findings: &mut Vec<Finding>,
) -> Option<PaletteOptions> {
    let channels = layer.shape.first().copied().unwrap_or(1);
    let outputs = usize::try_from(channels).unwrap_or(1).max(1);
    let group_size = settings.grouping.group_size();
    let group = group_size.unwrap_or(outputs);
    let mut settings = settings;
    if !group.is_multiple_of(settings.vector_length) {
        let shorter = VECTOR_LENGTHS.into_iter().rev().find(|length| group.is_multiple_of(*length));
        let becomes = match on_misfit {
            OnMisfit::SmallerGroup => VectorMisfit::Shorter(shorter.expect("1 divides every group")),
            OnMisfit::Dense => VectorMisfit::Dense,
            OnMisfit::Error => VectorMisfit::Error,
        };
        let (layer, vector_length) = (layer.name.clone(), settings.vector_length);
        findings.push(Finding::VectorMisfit { layer, channels, group_size, vector_length, becomes });
        match becomes {
            VectorMisfit::Shorter(length) => settings.vector_length = length,
            VectorMisfit::Dense | VectorMisfit::Error => return None,
        }
    }
    let PaletteOptions { bits, vector_length, .. } = settings;
    if vector_length == 1 {
        return Some(settings);
    }
    let palette = (2 * vector_length * bits.entries()) as f64;
    let kept = layer.columns() as f64 * (1.0 - share);
    let indices = |outputs: usize| (outputs / vector_length) as f64 * kept * f64::from(bits.bits()) / 8.0;
    if palette > indices(outputs) {
        note(findings, Finding::TooSmallForVectors { vector_length, bits, layers: vec![layer.name.clone()] });
        settings.vector_length = 1;
    } else if let Some(group_size) = group_size.filter(|size| WORTH * palette > indices(*size)) {
        let wider = (1..=outputs / group_size).map(|count| count * group_size);
        let wider = wider.filter(|size| outputs.is_multiple_of(*size)).find(|size| WORTH * palette <= indices(*size));
        let becomes = wider.filter(|size| *size < outputs);
        settings.grouping = becomes.map_or(Grouping::PerTensor, |group_size| Grouping::PerGroupedChannel { group_size });
        if group_size < outputs {
            note(findings, Finding::WiderGroups { group_size, becomes, vector_length, bits, layers: vec![layer.name.clone()] });
        }
    }
    Some(settings)
}

/// Adds a finding about layers, or its layers to the same finding about others: a model may have
/// hundreds of them.
fn note(findings: &mut Vec<Finding>, mut found: Finding) {
    match findings.iter_mut().find(|finding| is_the_same(finding, &found)).and_then(layers_of) {
        Some(layers) => layers.extend(layers_of(&mut found).map(std::mem::take).unwrap_or_default()),
        None => findings.push(found),
    }
}

/// Whether two findings about vectors differ in their layers alone.
fn is_the_same(one: &Finding, other: &Finding) -> bool {
    use Finding::{TooSmallForVectors, WiderGroups};
    if let WiderGroups { group_size, becomes, vector_length, bits, layers: _ } = one {
        let same = (*group_size, *becomes, *vector_length, *bits);
        return matches!(other, WiderGroups { group_size, becomes, vector_length, bits, layers: _ }
            if (*group_size, *becomes, *vector_length, *bits) == same);
    }
    if let TooSmallForVectors { vector_length, bits, layers: _ } = one {
        let same = (*vector_length, *bits);
        return matches!(other, TooSmallForVectors { vector_length, bits, layers: _ } if (*vector_length, *bits) == same);
    }
    false
}

/// The layers of a finding about vectors.
fn layers_of(finding: &mut Finding) -> Option<&mut Vec<String>> {
    if let Finding::WiderGroups { layers, .. } | Finding::TooSmallForVectors { layers, .. } = finding {
        return Some(layers);
    }
    None
}
