//! The config that is written beside the results equals the config of the run.

use std::fmt::Write as _;

use proptest::prelude::*;
use sdxl_squeeze::config::RunConfig;

use super::parsed;

/// Text with characters and words that are hard to quote in YAML.
fn text() -> impl Strategy<Value = String> {
    const ODD: &[&str] = &[
        "null", "~", "true", "0x10", "1e3", ".nan", "- a", "a: b", "#", " a ", "it's", "\"", "\\", "a\nb", "\r", "\t", "\u{0}",
        "\u{85}", "\u{2028}", "é🦀", "\u{feff}", "%", "@", "&a", "*a", "!x", "|", ">", "'",
    ];
    prop_oneof![3 => "[a-z_/. ]{0,12}[a-z]", 2 => prop::sample::select(ODD).prop_map(|odd| format!("{odd}x")), 2 => prop::sample::select(ODD).prop_map(str::to_owned), 2 => "\\PC{1,20}", 1 => any::<String>()]
        .prop_filter("blank text is refused", |text| !text.trim().is_empty())
}

/// Writes text as a double-quoted scalar of YAML. This encoder shares no code with the library: it
/// escapes every character that is not an ASCII letter or digit.
fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for c in text.chars() {
        if c.is_ascii_alphanumeric() {
            quoted.push(c);
        } else {
            write!(quoted, "\\U{:08x}", u32::from(c)).unwrap();
        }
    }
    quoted + "\""
}

fn list(entries: Vec<String>) -> String {
    format!("[{}]", entries.join(", "))
}

fn optional(key: &'static str, value: impl Strategy<Value = String>) -> impl Strategy<Value = Option<String>> {
    prop::option::of(value).prop_map(move |value| value.map(|value| format!("{key}: {value}")))
}

fn mapping(entries: Vec<Option<String>>) -> String {
    format!("{{{}}}", entries.into_iter().flatten().collect::<Vec<_>>().join(", "))
}

fn share() -> impl Strategy<Value = String> {
    prop_oneof![
        (0.0..1.0f64).prop_map(|share| format!("{share:?}")),
        prop::sample::select(&["0", "0.4", "1e-300", "5e-324", "0.9999999999999999"][..]).prop_map(str::to_owned)
    ]
}

fn prune_settings() -> impl Strategy<Value = String> {
    let sparsity = prop_oneof![
        share().prop_map(|share| format!("target_sparsity: {share}")),
        (1..4u32, 0..3u32).prop_map(|(n, more)| format!("n_m_ratio: [{n}, {}]", [4, 8, 16][more as usize]))
    ];
    (
        prop::option::of(sparsity),
        optional("hessian_dampening", share()),
        optional("processing_group_size", (1..9u32).prop_map(|n| (n * 16).to_string())),
    )
        .prop_map(|(sparsity, dampening, block)| mapping(vec![sparsity, dampening, block]))
}

fn palette_settings() -> impl Strategy<Value = String> {
    let granularity = prop_oneof![
        Just("granularity: per_tensor".to_owned()),
        (1..u32::MAX).prop_map(|size| format!("group_size: {size}, granularity: per_grouped_channel"))
    ];
    (
        optional("n_bits", prop::sample::select(&["1", "2", "3", "4", "6", "8"][..]).prop_map(str::to_owned)),
        prop::option::of(granularity),
        // Vectors go with neither.
        prop_oneof![
            (
                optional("channel_axis", (0..2u32).prop_map(|axis| axis.to_string())),
                optional("enable_per_channel_scale", any::<bool>().prop_map(|scale| scale.to_string())),
            ),
            (optional("cluster_dim", prop::sample::select(&["1", "2", "4"][..]).prop_map(str::to_owned)), Just(None)),
        ],
    )
        .prop_map(|(n_bits, granularity, (axis, scale))| mapping(vec![n_bits, granularity, axis, scale]))
}

fn rules<S: Strategy<Value = String> + Clone + 'static>(settings: S) -> impl Strategy<Value = Vec<Option<String>>> {
    let or_null = prop_oneof![3 => settings, 1 => Just("null".to_owned())];
    let names = prop::collection::hash_map(text().prop_map(|name| quoted(&regex_escape(&name))), or_null.clone(), 0..5);
    let types = prop::collection::hash_map(prop::sample::select(&["Conv2d", "Linear"][..]), or_null.clone(), 0..3);
    (optional("global_config", or_null), prop::option::of(types), prop::option::of(names)).prop_map(|(global, types, names)| {
        let types = types.map(|types| {
            format!(
                "module_type_configs: {}",
                mapping(types.iter().map(|(key, value)| Some(format!("{key}: {value}"))).collect())
            )
        });
        let names = names.map(|names| {
            format!(
                "module_name_configs: {}",
                mapping(names.iter().map(|(key, value)| Some(format!("{key}: {value}"))).collect())
            )
        });
        vec![global, types, names]
    })
}

/// A pattern that compiles and matches `text`.
fn regex_escape(text: &str) -> String {
    text.chars().map(|c| if c.is_ascii_punctuation() { format!("\\{c}") } else { c.to_string() }).collect()
}

fn config() -> impl Strategy<Value = String> {
    let model = (
        optional("path", text().prop_map(|path| quoted(&path))),
        optional("device", Just("cuda:1".to_owned())),
        optional("dtype", Just("bf16".to_owned())),
    )
        .prop_map(|(path, device, dtype)| mapping(vec![path, device, dtype]));
    let prompts = prop_oneof![
        text().prop_map(|path| quoted(&path)),
        prop::collection::vec(text().prop_map(|prompt| quoted(&prompt)), 1..4).prop_map(list)
    ];
    let calibration = (
        optional("prompts", prompts),
        optional("samples", text().prop_map(|path| quoted(&path))),
        optional("captions", text().prop_map(|path| quoted(&path))),
        optional("captions_nsamples", (1..=u32::MAX).prop_map(|n| n.to_string())),
        optional("timestep_weighting", prop::sample::select(&["uniform", "early", "log"][..]).prop_map(str::to_owned)),
        optional("calibration_nsamples", (1..=u32::MAX).prop_map(|n| n.to_string())),
        optional("steps", (1..1000u32).prop_map(|n| n.to_string())),
        optional("guidance", (0.0..1e300f64).prop_map(|guidance| format!("{guidance:?}"))),
        optional("seed", any::<u64>().prop_map(|seed| seed.to_string())),
        prop::option::of((1..=u32::MAX, 1..=u32::MAX).prop_map(|(height, width)| format!("height: {height}, width: {width}"))),
    )
        .prop_map(|(a, b, c, d, e, f, g, h, i, j)| mapping(vec![a, b, c, d, e, f, g, h, i, j]));
    let layers =
        optional("layers", prop::collection::vec(text().prop_map(|name| quoted(&regex_escape(&name))), 1..4).prop_map(list));
    let prune = (layers, rules(prune_settings().boxed())).prop_map(|(layers, rules)| mapping([vec![layers], rules].concat()));
    let palettize = (
        optional("on_misfit", prop::sample::select(&["smaller_group", "dense", "error"][..]).prop_map(str::to_owned)),
        optional("weight_threshold", any::<u64>().prop_map(|n| n.to_string())),
        rules(palette_settings().boxed()),
    )
        .prop_map(|(misfit, threshold, rules)| mapping([vec![misfit, threshold], rules].concat()));
    let solver = prop::sample::select(
        &[
            "",
            "solver: joint",
            "solver: sequential",
            "solver: sequential, sequencing: sublayer",
            "sequencing: stage",
            "target: current",
            "solver: joint, sequencing: sublayer, target: dense",
        ][..],
    )
    .prop_map(|keys| (!keys.is_empty()).then(|| keys.to_owned()));
    let joint = (
        optional("refit_steps", (0..=1000u32).prop_map(|n| n.to_string())),
        optional("palette_steps", (0..=1000u32).prop_map(|n| n.to_string())),
        optional("turns", (0..=1000u32).prop_map(|n| n.to_string())),
        optional("output_probes", (0..=1000u32).prop_map(|n| n.to_string())),
        optional("sweep", any::<bool>().prop_map(|on| on.to_string())),
        optional("polish", any::<bool>().prop_map(|on| on.to_string())),
    )
        .prop_map(|(a, b, c, d, e, f)| mapping(vec![a, b, c, d, e, f]));
    let target = prop_oneof![
        (1..=1u64 << 50).prop_map(|bytes| format!("target_size: {bytes}")),
        (1..=160u32).prop_map(|tenths| format!("target_bits: {}", f64::from(tenths) / 10.0)),
        (1e-9..99.0_f64).prop_map(|percent| format!("target_error: {percent}%, target_calls: 7, target_prompts: [owl]")),
        (0.1..99.0_f64, 1..=100_u32).prop_map(|(psnr, solves)| format!("target_psnr: {psnr}, target_solves: {solves}")),
    ];
    let budget = (
        target,
        optional("min_bits", prop::sample::select(&["1", "2", "3", "4", "6", "8"][..]).prop_map(str::to_owned)),
        optional("max_sparsity", share()),
        optional("probes", (1..=u32::MAX).prop_map(|n| n.to_string())),
    )
        .prop_map(|(target, b, c, d)| mapping(vec![Some(target), b, c, d]));
    let sections = (
        optional("model", model),
        optional("calibration", calibration),
        optional("prune", prune),
        palettize.prop_map(|section| Some(format!("palettize: {section}"))),
        optional("joint", joint),
        prop::option::of(budget),
        networks("text_encoders"),
        networks("vae"),
    );
    (solver, sections).prop_map(|(solver, (a, b, c, d, e, budget, text, vae))| {
        // Only the joint solver accepts a budget.
        let spends = solver.as_ref().is_none_or(|solver| !solver.contains("sequential"));
        let budget = budget.filter(|_| spends).map(|budget| format!("budget: {budget}"));
        mapping(vec![a, b, solver, c, d, e, budget, text, vae])
    })
}

/// A section for other networks than the UNet.
fn networks(section: &'static str) -> impl Strategy<Value = Option<String>> {
    let rules = [
        "global_config: {n_bits: 6, granularity: per_grouped_channel, group_size: 16}",
        "module_name_configs: {'.*conv_out': null, '.*': {n_bits: 8, cluster_dim: 2}}, weight_threshold: 7",
        "module_type_configs: {Linear: {channel_axis: 1}}, on_misfit: dense",
    ];
    let written =
        (1..=u32::MAX, prop::sample::select(rules.to_vec())).prop_map(|(count, rules)| format!("{{nsamples: {count}, {rules}}}"));
    prop::option::of(written).prop_map(move |written| written.map(|written| format!("{section}: {written}")))
}

proptest! {
    #[test]
    fn to_yaml_parses_to_an_equal_config(yaml in config()) {
        let config = parsed(&yaml);
        let written = config.to_yaml();
        prop_assert_eq!(&parsed(&written), &config, "{}", written);
        prop_assert_eq!(parsed(&written).to_yaml(), written, "the same text again");
    }
}

#[test]
fn every_default_is_written() {
    let written = parsed("prune: {}\npalettize: {}\n").to_yaml();
    let expected = r#"model:
  path: null
  device: cpu
  dtype: f32
calibration:
  prompts: calibration/varied.txt
  samples: null
  captions: null
  captions_nsamples: 512
  timestep_weighting: uniform
  calibration_nsamples: 384
  scheduler: null
  timestep_spacing: null
  eta: 0.0
  steps: null
  guidance: null
  guidance_rescale: 0.0
  negative_prompt: null
  seed: 0
  height: null
  width: null
solver: joint
sequencing: sublayer
target: dense
joint:
  refit_steps: 8
  exchange_turns: 3
  exchange_steps: 4
  sweep: true
  palette_steps: 0
  polish: true
  turns: 2
  output_probes: 0
prune:
  layers:
    - down_blocks\.\d+
    - mid_block
    - up_blocks\.\d+
  algorithm: sparse_gpt
  global_config:
    target_sparsity: 0.5
    n_m_ratio: null
    hessian_dampening: 0.01
    processing_group_size: 128
  module_type_configs: {}
  module_name_configs: {}
palettize:
  global_config:
    n_bits: 4
    granularity: per_tensor
    group_size: null
    channel_axis: 0
    enable_per_channel_scale: false
  module_type_configs: {}
  module_name_configs: {}
  on_misfit: error
  weight_threshold: 2048
budget: null
"#;
    let (comment, yaml) = written.split_once('\n').unwrap();
    assert!(comment.starts_with("# "));
    assert_eq!(yaml, expected);
}

/// Recipes are in containers, which are the same as before there were vectors.
#[test]
fn the_length_of_vectors_is_written_where_there_are_any() {
    let vectors = parsed("palettize: {global_config: {cluster_dim: 2}}");
    assert!(vectors.to_yaml().contains("    group_size: null\n    cluster_dim: 2\n    channel_axis: 0\n"));
    assert_eq!(parsed(&vectors.to_yaml()), vectors);
    let scalars = parsed("palettize: {global_config: {cluster_dim: 1}}");
    assert!(!scalars.to_yaml().contains("cluster_dim"));
    assert_eq!(scalars, parsed("palettize: {global_config: {}}"));
}

#[test]
fn the_default_is_the_shortest_config_with_palettes() {
    assert_eq!(RunConfig::default(), parsed("palettize: {}"));
    assert_eq!(parsed(&RunConfig::default().to_yaml()), RunConfig::default());
}

#[test]
fn null_and_absent_are_the_same_but_for_rules() {
    assert_eq!(parsed("model: null\ncalibration: null\nprune: null\npalettize: {}\n"), parsed("palettize: {}"));
    assert_eq!(parsed("palettize: {on_misfit: null, weight_threshold: null}"), parsed("palettize: {}"));
    let global = |yaml: &str| parsed(yaml).palettize.unwrap().rules.global_config;
    assert!(global("palettize: {}").is_some(), "coremltools: nothing configured is the default config");
    assert!(global("palettize: {global_config: {}}").is_some());
    assert!(global("palettize: {global_config: null}").is_none());
    assert!(global("palettize: {module_type_configs: {Linear: {}}}").is_none(), "coremltools: only what is named");
    assert!(global("palettize: {module_name_configs: {a: null}}").is_none());
}

/// Fixed values exclude so many other keys that they are not among the random configs.
#[test]
fn fixed_values_come_back() {
    for settings in
        ["values: int", "values: int, n_bits: 8, block_size: 4294967295", "values: nf4, block_size: 1, feedback: true"]
    {
        let config = parsed(&format!("palettize: {{module_name_configs: {{a: {{{settings}}}, b: {{n_bits: 2}}}}}}\n"));
        let yaml = config.to_yaml();
        assert_eq!(parsed(&yaml), config);
        assert!(yaml.matches("block_size").count() == 1 && yaml.matches("feedback").count() == 1, "{yaml}");
    }
}
