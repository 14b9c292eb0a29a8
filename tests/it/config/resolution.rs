//! The first rule that matches a layer decides, as in coremltools.

use LayerKind::{Conv2d, Linear};
use proptest::prelude::*;
use sdxl_squeeze::codebook::{LayerKind, Misfit, Sparsity};
use sdxl_squeeze::config::{Choice, Finding, LayerInfo, Resolution, RunConfig, Severity, Why};

use super::{layer, mistakes_of, parsed};

/// The layers of a small UNet.
fn layers() -> Vec<LayerInfo> {
    vec![
        layer("conv_in", Conv2d, &[64, 4, 3, 3]),
        layer("time_embedding.linear_1", Linear, &[128, 32]),
        layer("down_blocks.0.resnets.0.conv1", Conv2d, &[64, 64, 3, 3]),
        layer("down_blocks.1.attentions.0.to_q", Linear, &[128, 128]),
        layer("down_blocks.1.attentions.0.to_k", Linear, &[128, 160]),
        layer("mid_block.resnets.0.conv1", Conv2d, &[128, 128, 3, 3]),
        layer("mid_block.attentions.0.to_q", Linear, &[128, 128]),
        layer("up_blocks.0.attentions.0.to_q", Linear, &[128, 128]),
        layer("up_blocks.0.tiny", Linear, &[32, 64]),
        layer("conv_out", Conv2d, &[4, 64, 3, 3]),
    ]
}

fn resolved(yaml: &str) -> Resolution {
    parsed(yaml).resolve(&layers())
}

/// The `n_bits` of each layer; 0 for a layer without palettes.
fn bits(resolution: &Resolution) -> Vec<u8> {
    resolution.layers.iter().map(|layer| layer.palettize.settings().map_or(0, |settings| settings.bits.bits())).collect()
}

fn sparsity(resolution: &Resolution) -> Vec<f64> {
    resolution.layers.iter().map(|layer| layer.prune.settings().map_or(0.0, |settings| settings.sparsity.target())).collect()
}

fn of(resolution: &Resolution, severity: Severity) -> Vec<String> {
    resolution
        .findings
        .iter()
        .filter(|finding| finding.severity() == severity)
        .map(|finding| finding.mistake().to_string())
        .collect()
}

#[test]
fn name_before_type_before_global_and_null_leaves_alone() {
    let resolution = resolved(
        r"
palettize:
  weight_threshold: 0
  global_config: {n_bits: 1}
  module_type_configs: {Conv2d: {n_bits: 2}}
  module_name_configs:
    'down_blocks\..*to_q': {n_bits: 8}
    'down_blocks\..*': {n_bits: 6}
    '.*to_q': {n_bits: 3}
    'conv_.*': null
",
    );
    assert_eq!(bits(&resolution), [0, 1, 6, 8, 6, 2, 3, 3, 1, 0]);
    assert_eq!(resolution.layers[0].palettize, Choice::Leave(Why::NoSettings("module_name_configs `conv_.*`".into())));
    assert_eq!(resolution.layers[0].prune, Choice::Leave(Why::NoSection));
    let uses: Vec<_> = resolution.rules.iter().map(|rule| (rule.rule.as_str(), rule.matched, rule.decided)).collect();
    let expected = [
        (r"module_name_configs `down_blocks\..*to_q`", 1, 1),
        (r"module_name_configs `down_blocks\..*`", 3, 2),
        ("module_name_configs `.*to_q`", 3, 2),
        ("module_name_configs `conv_.*`", 2, 2),
        ("module_type_configs `Conv2d`", 4, 1),
        ("global_config", 10, 2),
    ];
    assert_eq!(uses, expected);
    assert!(resolution.checked().is_ok());
}

/// The recipe of a byte budget has a rule for each layer. The layers that it leaves dense give one
/// note together, not one note each.
#[test]
fn a_null_for_each_layer_is_one_note() {
    let all = resolved("palettize: {global_config: {n_bits: 4}}");
    let nulls = |count: usize| {
        let names = all.layers.iter().take(count).map(|layer| format!("'{}': null", layer.name.replace('.', r"\.")));
        let names = names.collect::<Vec<_>>().join(", ");
        let found = resolved(&format!(
            "palettize: {{weight_threshold: 0, global_config: {{n_bits: 4}}, module_name_configs: {{{names}}}}}"
        ));
        of(&found, Severity::Note).into_iter().filter(|note| note.contains("palettize")).collect::<Vec<_>>()
    };
    assert_eq!(nulls(3).len(), 3);
    let one = nulls(9);
    assert_eq!(one.len(), 1, "{one:?}");
    assert!(one[0].contains("as each of 9 rules is null, 9 layers: "), "{one:?}");
}

#[test]
fn the_order_in_the_file_decides() {
    let early = resolved("palettize: {module_name_configs: {'.*': {n_bits: 8}, 'mid_block.*': {n_bits: 2}}}");
    assert!(bits(&early).iter().filter(|bits| **bits > 0).all(|bits| *bits == 8));
    let warnings = of(&early, Severity::Warning);
    assert_eq!(
        warnings,
        ["x.yaml:1:54: palettize: `mid_block.*` decides nothing, as all its layers match earlier patterns: `.*`"]
    );
    let late = resolved("palettize: {module_name_configs: {'mid_block.*': {n_bits: 2}, '.*': {n_bits: 8}}}");
    assert_eq!(bits(&late)[5..7], [2, 2]);
    assert!(of(&late, Severity::Warning).is_empty());
}

#[test]
fn patterns_match_whole_names() {
    let resolution = resolved(
        "palettize: {module_name_configs: {'mid_block': null, 'conv_out|conv_i': null, 'down_blocks.0.resnets.0.conv1': {}}}",
    );
    let errors = of(&resolution, Severity::Error);
    assert_eq!(errors.len(), 1, "{errors:?}");
    assert!(
        errors[0].starts_with("x.yaml:1:35: palettize: `mid_block` in `module_name_configs` is no layer's whole name"),
        "{errors:?}"
    );
}

#[test]
fn prune_reaches_the_stages_that_layers_names() {
    let yaml = r"
prune:
  layers: ['down_blocks\.\d+', mid_block]
  global_config: {target_sparsity: 0.4}
  module_type_configs: {Conv2d: null}
  module_name_configs: {'.*to_k': {n_m_ratio: [3, 4]}, 'up_blocks\..*': {target_sparsity: 0.9}, 'conv_out': null}
";
    let resolution = resolved(yaml);
    assert_eq!(sparsity(&resolution), [0.0, 0.0, 0.0, 0.4, 0.75, 0.0, 0.4, 0.0, 0.0, 0.0]);
    assert_eq!(resolution.layers[2].prune, Choice::Leave(Why::NoSettings("module_type_configs `Conv2d`".into())));
    for outside in [0, 1, 7, 8, 9] {
        assert_eq!(resolution.layers[outside].prune, Choice::Leave(Why::OutsideLayers));
    }
    let warnings = of(&resolution, Severity::Warning);
    assert_eq!(warnings.len(), 2, "{warnings:?}");
    assert!(
        warnings[0].contains(r"x.yaml:6:56: prune: `up_blocks\..*` decides nothing, as all its layers are outside `layers`"),
        "{warnings:?}"
    );
    assert!(warnings[1].contains("`conv_out`"), "{warnings:?}");
    let notes = of(&resolution, Severity::Note);
    assert_eq!(notes.len(), 2, "{notes:?}");
    assert!(
        notes[0].contains("prune: left alone as outside `layers`, 5 layers: `conv_in`, `time_embedding.linear_1`"),
        "{notes:?}"
    );
    assert!(notes[1].contains("prune: left alone as module_type_configs `Conv2d` is null, 2 layers: "), "{notes:?}");
    assert!(resolution.checked().is_ok());
}

#[test]
fn patterns_that_match_nothing_are_all_named() {
    let yaml = r"
prune:
  layers: ['down_bloks\.\d+', mid_block, 'mid_block.resnets.0']
  module_name_configs: {'conv_out.weight': null}
palettize:
  module_name_configs: {'.*': {}, 'mid_block\.attention\.0\.to_q': null, 'zebra': null}
";
    let resolution = resolved(yaml);
    let mistakes = mistakes_of(resolution.checked().unwrap_err());
    let shown: Vec<String> = mistakes.iter().map(ToString::to_string).collect();
    assert_eq!(
        shown,
        [
            r"x.yaml:3:12: prune: `down_bloks\.\d+` in `layers` is no stage's whole name (there are down_blocks.0, down_blocks.1, mid_block, up_blocks.0)",
            "x.yaml:3:42: prune: `mid_block.resnets.0` in `layers` is no stage's whole name (there are down_blocks.0, down_blocks.1, mid_block, up_blocks.0)",
            "x.yaml:4:25: prune: `conv_out.weight` in `module_name_configs` is no layer's whole name; the nearest is `conv_out`",
            r"x.yaml:6:35: palettize: `mid_block\.attention\.0\.to_q` in `module_name_configs` is no layer's whole name; the nearest is `mid_block.attentions.0.to_q`",
            "x.yaml:6:74: palettize: `zebra` in `module_name_configs` is no layer's whole name",
        ]
    );
}

#[test]
fn groups_that_do_not_fit() {
    let config = |on_misfit: &str| {
        format!("palettize: {{on_misfit: {on_misfit}, global_config: {{granularity: per_grouped_channel, group_size: 48}}}}")
    };
    let on_error = resolved(&config("error"));
    let errors = of(&on_error, Severity::Error);
    assert_eq!(errors.len(), 9, "all but the small weight: {errors:?}");
    assert!(
        errors[0].starts_with("palettize: `conv_in` has 64 channels, which groups of 48 do not divide; say `on_misfit"),
        "{errors:?}"
    );
    assert!(errors[8].contains("`conv_out` has 4 channels"));
    assert_eq!(mistakes_of(on_error.checked().unwrap_err()).len(), 9);

    let smaller = resolved(&config("smaller_group"));
    let sizes: Vec<_> = smaller
        .layers
        .iter()
        .map(|layer| layer.palettize.settings().and_then(|settings| settings.grouping.group_size()))
        .collect();
    assert_eq!(sizes, [32, 32, 32, 32, 32, 32, 32, 32, 0, 4].map(|size| Some(size).filter(|size| *size > 0)));
    assert_eq!(of(&smaller, Severity::Warning).len(), 9);

    let dense = resolved(&config("dense"));
    assert!(bits(&dense).iter().all(|bits| *bits == 0));
    assert_eq!(dense.layers[9].palettize, Choice::Leave(Why::Misfit));
    let becomes = |finding: &Finding| matches!(finding, Finding::GroupMisfit { becomes: Misfit::Dense, .. });
    assert_eq!(dense.findings.iter().filter(|finding| becomes(finding)).count(), 9);
    assert!(of(&dense, Severity::Warning).last().unwrap().contains("no layer is left to palettize"));

    let columns = resolved("palettize: {global_config: {granularity: per_grouped_channel, group_size: 32, channel_axis: 1}}");
    let errors = of(&columns, Severity::Error);
    assert!(errors.len() == 1 && errors[0].contains("`conv_in` has 4 channels"), "{errors:?}");
}

/// The vector length and the group size of each layer; 0 for one palette.
fn vectors(resolution: &Resolution) -> Vec<(usize, usize)> {
    let settings = resolution.layers.iter().map(|layer| layer.palettize.settings());
    settings.map(|found| found.map_or((0, 0), |found| (found.vector_length, found.grouping.group_size().unwrap_or(0)))).collect()
}

#[test]
fn vectors_that_do_not_fit() {
    let uneven = [layer("a", Linear, &[126, 512]), layer("b", Conv2d, &[128, 64, 3, 3]), layer("c", Linear, &[125, 640])];
    let config = |on_misfit: &str, group: &str| {
        parsed(&format!("palettize: {{on_misfit: {on_misfit}, global_config: {{n_bits: 2, cluster_dim: 4{group}}}}}"))
    };
    let refused = config("error", "").resolve(&uneven);
    assert_eq!(
        of(&refused, Severity::Error),
        [
            "palettize: `a` has 126 output channels, which vectors of 4 do not divide; say `on_misfit: smaller_group` or `dense`, or give \
             it a rule of its own",
            "palettize: `c` has 125 output channels, which vectors of 4 do not divide; say `on_misfit: smaller_group` or `dense`, or give \
             it a rule of its own",
        ]
    );
    assert_eq!(mistakes_of(refused.checked().unwrap_err()).len(), 2);
    let shorter = config("smaller_group", "").resolve(&uneven);
    assert_eq!(vectors(&shorter), [(2, 0), (4, 0), (1, 0)]);
    let said = of(&shorter, Severity::Warning);
    assert!(
        said.len() == 2 && said[0].ends_with("it gets vectors of 2") && said[1].ends_with("it gets scalar palettes"),
        "{said:?}"
    );
    let dense = config("dense", "").resolve(&uneven);
    assert_eq!(vectors(&dense), [(0, 0), (4, 0), (0, 0)]);
    assert_eq!(dense.layers[0].palettize, Choice::Leave(Why::Misfit));
    assert!(of(&dense, Severity::Warning)[0].ends_with("it stays fp16"));

    // Groups of 6 hold vectors of 2. 125 channels are first cut into groups of 5, which hold none,
    // and 128 into groups of 4, which are too few for their palette.
    let groups = config("smaller_group", ", granularity: per_grouped_channel, group_size: 6").resolve(&uneven);
    assert_eq!(vectors(&groups), [(2, 6), (4, 16), (1, 5)]);
    let said = of(&groups, Severity::Warning);
    assert!(said.contains(
        &"palettize: `a` has 126 output channels in groups of 6, which vectors of 4 do not divide; it gets vectors of 2".into()
    ));
}

#[test]
fn groups_are_widened_until_they_are_worth_their_palettes() {
    let layers = [
        layer("down_blocks.0.wide", Linear, &[320, 5120]),
        layer("down_blocks.0.square", Linear, &[320, 320]),
        layer("down_blocks.0.small", Linear, &[64, 64]),
        layer("down_blocks.0.tiny", Linear, &[48, 48]),
        layer("down_blocks.0.kernel", Conv2d, &[320, 320, 3, 3]),
    ];
    let config = |more: &str| {
        let rule = "granularity: per_grouped_channel, group_size: 16, cluster_dim: 2, n_bits: 8";
        parsed(&format!("palettize: {{global_config: {{{rule}}}}}\n{more}"))
    };
    // A palette has 1 KiB, so that a group needs 16 KiB of indices, one byte for two weights.
    // Groups of 16 have 40, 2.5, 0.5, 0.4 and 22.5 KiB. All of `small` has 2 KiB, of `tiny` 1.1.
    let found = config("").resolve(&layers);
    assert_eq!(vectors(&found), [(2, 16), (2, 160), (2, 0), (2, 0), (2, 16)]);
    let palette = "have too few indices for palettes of 8 bits with vectors of 2";
    assert_eq!(
        of(&found, Severity::Warning),
        [
            format!("palettize: groups of 16 channels {palette}; groups of 160 for `down_blocks.0.square`"),
            format!("palettize: groups of 16 channels {palette}; one palette for `down_blocks.0.small`, `down_blocks.0.tiny`"),
        ]
    );
    // With half of the vectors pruned groups have half of the indices.
    let pruned = config("prune: {global_config: {target_sparsity: 0.5}}").resolve(&layers);
    assert_eq!(vectors(&pruned), [(2, 16), (2, 320), (2, 0), (1, 16), (2, 32)].map(|(length, size)| (length, size % 320)));
    let said = of(&pruned, Severity::Warning);
    let scalar = "a palette of 8 bits with vectors of 2 is larger than all indices; scalar palettes for `down_blocks.0.tiny`";
    assert!(said.contains(&format!("palettize: {scalar}")), "{said:?}");
    // Scalar palettes are never changed.
    let scalars =
        parsed("palettize: {global_config: {granularity: per_grouped_channel, group_size: 1, n_bits: 8}}").resolve(&layers);
    assert!(vectors(&scalars).iter().all(|found| *found == (1, 1)) && of(&scalars, Severity::Warning).is_empty());
}

#[test]
fn small_weights_stay_as_they_are() {
    let resolution = resolved("palettize: {}");
    assert_eq!(layers()[8].shape.iter().product::<i64>(), 2048);
    assert_eq!(resolution.layers[8].palettize, Choice::Leave(Why::Small { weight_threshold: 2048 }));
    assert_eq!(bits(&resolution).iter().filter(|bits| **bits == 0).count(), 1);
    let notes = of(&resolution, Severity::Note);
    assert_eq!(notes, ["palettize: left in fp16 as of at most 2048 elements, 1 weight: `up_blocks.0.tiny`"]);
    assert_eq!(bits(&resolved("palettize: {weight_threshold: 2047}"))[8], 4);
    assert_eq!(bits(&resolved(&format!("palettize: {{weight_threshold: {}}}", u64::MAX))), [0; 10]);
}

#[test]
fn rows_that_no_ratio_divides() {
    let resolution = resolved("prune: {global_config: {n_m_ratio: [1, 128], processing_group_size: 256}}");
    let errors = of(&resolution, Severity::Error);
    assert_eq!(errors.len(), 3, "{errors:?}");
    assert_eq!(
        errors[0],
        "prune: `down_blocks.0.resnets.0.conv1` has rows of 576 weights, which 1:128 does not divide; give it a rule of its own"
    );
    assert!(matches!(resolution.layers[3].prune, Choice::Apply(settings) if matches!(settings.sparsity, Sparsity::NOfM(_))));
}

#[test]
fn a_model_without_a_type_or_without_layers() {
    let linear: Vec<LayerInfo> = layers().into_iter().filter(|layer| layer.module_type == Linear).collect();
    let resolution = parsed("palettize: {global_config: {}, module_type_configs: {Conv2d: null}}").resolve(&linear);
    assert_eq!(
        of(&resolution, Severity::Warning),
        ["palettize: `module_type_configs` has a rule for Conv2d, but the model has no such layer"]
    );
    let strange = [
        layer("down_blocks.0.a", Linear, &[]),
        layer("mid_block.a", Conv2d, &[0, -1, 3, 3]),
        layer("up_blocks.0.a", Conv2d, &[i64::MAX; 4]),
    ];
    let yaml = "prune: {global_config: {n_m_ratio: [2, 4]}}\npalettize: {on_misfit: smaller_group, weight_threshold: 0, global_config: {granularity: per_grouped_channel, group_size: 4294967295, channel_axis: 1}}";
    for layers in [&[][..], &strange[..]] {
        let _ = parsed(yaml).resolve(layers);
    }
}

/// Rules with `n_bits` or null: an ordered list by glob, a list by layer type, and one for all
/// other layers.
type GlobRules = (Vec<(String, Option<u8>)>, Vec<(LayerKind, Option<u8>)>, Option<u8>);

/// Rules whose patterns are literals and wildcards over a small alphabet, so that the test can
/// state the rule of coremltools again in a few lines.
fn rules() -> impl Strategy<Value = GlobRules> {
    let settings = prop::option::of(prop::sample::select(&[1u8, 2, 3, 4, 6, 8][..]));
    let patterns = prop::collection::vec(("[ab.*]{1,3}", settings.clone()), 0..6).prop_map(|rules| {
        let mut unique: Vec<(String, Option<u8>)> = Vec::new();
        for (pattern, settings) in rules {
            if unique.iter().all(|(other, _)| *other != pattern) {
                unique.push((pattern, settings));
            }
        }
        unique
    });
    let types = prop::collection::hash_map(prop::sample::select(&[Conv2d, Linear][..]), settings.clone(), 0..3)
        .prop_map(|types| types.into_iter().collect());
    (patterns, types, settings)
}

/// Whether `name` matches a glob in which `*` is any text and `.` is any one character.
fn matches(pattern: &[u8], name: &[u8]) -> bool {
    match (pattern.split_first(), name.split_first()) {
        (None, rest) => rest.is_none(),
        (Some((b'*', pattern)), _) => (0..=name.len()).any(|skip| matches(pattern, &name[skip..])),
        (Some((wanted, pattern)), Some((found, name))) => (*wanted == b'.' || wanted == found) && matches(pattern, name),
        (Some(_), None) => false,
    }
}

proptest! {
    #[test]
    fn the_first_match_decides((names, types, global) in rules(), layers in prop::collection::vec(("[ab]{1,3}", any::<bool>()), 1..8)) {
        let value = |settings: &Option<u8>| settings.map_or("null".to_owned(), |bits| format!("{{n_bits: {bits}}}"));
        let mut yaml = format!("palettize:\n  weight_threshold: 0\n  global_config: {}\n  module_type_configs:\n", value(&global));
        types.iter().for_each(|(module_type, settings)| yaml += &format!("    {module_type}: {}\n", value(settings)));
        yaml += "  module_name_configs:\n";
        names.iter().for_each(|(glob, settings)| yaml += &format!("    '{}': {}\n", glob.replace('*', ".*"), value(settings)));
        let config: RunConfig = parsed(&yaml);
        let layers: Vec<LayerInfo> = layers.iter().map(|(name, conv)| layer(name, if *conv { Conv2d } else { Linear }, &[8, 8, 1, 1])).collect();
        let resolution = config.resolve(&layers);

        // coremltools decides by `for regex in configs: if re.fullmatch(…): return …`, then by the
        // type, then by the global config.
        let expected = |layer: &LayerInfo| {
            let by_name = names.iter().find(|(glob, _)| matches(glob.as_bytes(), layer.name.as_bytes())).map(|(_, settings)| *settings);
            let by_type = types.iter().find(|(listed, _)| *listed == layer.module_type).map(|(_, settings)| *settings);
            by_name.or(by_type).unwrap_or(global).unwrap_or(0)
        };
        prop_assert_eq!(bits(&resolution), layers.iter().map(expected).collect::<Vec<_>>(), "{}", yaml);

        // Each pattern that matches no name is an error, and there are no other errors.
        let idle = names.iter().filter(|(glob, _)| !layers.iter().any(|layer| matches(glob.as_bytes(), layer.name.as_bytes()))).count();
        prop_assert_eq!(of(&resolution, Severity::Error).len(), idle, "{}", yaml);
        let total: usize = resolution.rules.iter().map(|rule| rule.decided).sum();
        prop_assert_eq!(total, layers.len(), "each layer is decided by one rule");
    }
}
