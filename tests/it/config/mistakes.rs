//! Every mistake in a config is found and reported with its place.

use super::{parsed, refused};

/// Asserts that the config has one mistake, which is at this place and whose message contains
/// `words`.
#[track_caller]
fn wrong(yaml: &str, line: u64, column: u64, words: &[&str]) {
    let found = refused(yaml);
    assert_eq!(found.len(), 1, "{found:?}\n{yaml}");
    assert_eq!((found[0].0, found[0].1), (line, column), "{found:?}\n{yaml}");
    for word in words {
        assert!(found[0].2.contains(word), "no {word} in {}", found[0].2);
    }
}

/// Asserts that the value of `key` in a `global_config` is a mistake. The value begins in column 5
/// + the length of the key + 2.
#[track_caller]
fn wrong_value(section: &str, key: &str, value: &str, words: &[&str]) {
    let column = 5 + key.len() as u64 + 2;
    wrong(&format!("{section}:\n  global_config:\n    {key}: {value}\n"), 3, column, &[&[key], words].concat());
}

#[test]
fn unknown_keys_and_the_nearest_known_one() {
    wrong("prun: {}\n", 1, 1, &["unknown key `prun`", "did you mean `prune`?"]);
    wrong("prune:\n  global_confg: {}\n", 2, 3, &["`global_confg` in prune;", "`global_config`?"]);
    wrong("prune:\n  global_config:\n    target_sparcity: 0.4\n", 3, 5, &["prune.global_config;", "`target_sparsity`?"]);
    wrong("palettize: {global_config: {nbits: 4}}\n", 1, 29, &["did you mean `n_bits`?"]);
    wrong("palettize:\n  module_name_configs:\n    a.*: {n_bit: 4}\n", 3, 11, &["module_name_configs.a.*", "`n_bits`?"]);
    wrong("calibration:\n  zebra: 1\n", 2, 3, &["unknown key `zebra` in calibration (known: ", "calibration_nsamples", "seed"]);
}

#[test]
fn keys_of_coremltools_that_stand_elsewhere() {
    wrong("prune:\n  calibration_nsamples: 128\n", 2, 3, &["it belongs to calibration"]);
    wrong("prune:\n  global_config:\n    weight_dtype: float32\n", 3, 5, &["prunes only"]);
    wrong("prune:\n  global_config:\n    algorithm: sparse_gpt\n", 3, 5, &["belongs to prune itself"]);
    wrong("palettize:\n  global_config:\n    lut_dtype: int8\n", 3, 5, &["fp16"]);
}

#[test]
fn values_of_a_wrong_type_are_refused() {
    wrong_value("prune", "target_sparsity", "'0.4'", &["must be a number, not `0.4`"]);
    wrong_value("prune", "processing_group_size", "128.5", &["must be a whole number, not 128.5"]);
    wrong_value("palettize", "n_bits", "[4]", &["must be a whole number, not a list"]);
    wrong_value("palettize", "enable_per_channel_scale", "yes", &["must be true or false, not `yes`"]);
    wrong_value("palettize", "granularity", "4", &["must be", "not 4"]);
    wrong("prune: 0.4\n", 1, 8, &["prune must be a mapping", "not 0.4"]);
    wrong("[1, 2]\n", 1, 1, &["the config must be a mapping"]);
    wrong("prune:\n  layers: mid_block\n", 2, 11, &["must be a list of regular expressions, not `mid_block`"]);
    wrong("prune:\n  layers: []\n", 2, 11, &["at least one stage"]);
    wrong("prune:\n  layers:\n  - mid_block\n  - 3\n", 4, 5, &["an entry of `layers` must be text", "not 3"]);
    wrong("calibration:\n  prompts: 7\n", 2, 12, &["must be a file or a list of prompts, not 7"]);
    wrong("calibration:\n  prompts: []\n", 2, 12, &["at least one prompt"]);
    wrong("calibration:\n  prompts: [a cat, 7]\n", 2, 20, &["an entry of `prompts`", "not 7"]);
    wrong("calibration:\n  prompts: ['']\n", 2, 13, &["must not be empty"]);
    wrong("model:\n  path: ''\n", 2, 9, &["`path` must not be empty"]);
    wrong("model:\n  path: 12\n", 2, 9, &["must be text"]);
    wrong("palettize:\n  3: {}\n", 2, 3, &["a key of palettize must be text, not 3"]);
    wrong("palettize:\n  global_config: [n_bits, 4]\n", 2, 18, &["palettize.global_config must be a mapping", "not a list"]);
    wrong(
        "palettize:\n  module_type_configs:\n    Linear: 4\n",
        3,
        13,
        &["module_type_configs.Linear must be a mapping", "not 4"],
    );
}

#[test]
fn values_out_of_bounds() {
    for share in ["1.0", "1", "-0.1", "1.5", ".nan", ".inf", "-.inf"] {
        wrong_value("prune", "target_sparsity", share, &["must be at least 0 and less than 1, not "]);
    }
    for bits in ["0", "5", "7", "9", "16", "-4", "99999999999999999999"] {
        let words: &[&str] = if bits.len() < 10 { &["must be 1, 2, 3, 4, 6 or 8, not "] } else { &["must be a whole number"] };
        wrong_value("palettize", "n_bits", bits, words);
    }
    wrong_value("palettize", "channel_axis", "2", &["must be 0", "or 1", "not 2"]);
    wrong_value("palettize", "channel_axis", "-1", &["not -1"]);
    wrong_value("prune", "hessian_dampening", "-0.01", &["at least 0", "not -0.01"]);
    wrong_value("prune", "hessian_dampening", ".inf", &["finite"]);
    wrong_value("prune", "processing_group_size", "0", &["between 1 and", "not 0"]);
    wrong_value("prune", "processing_group_size", "-128", &["not -128"]);
    for (key, value) in
        [("calibration_nsamples", "0"), ("steps", "0"), ("guidance", "-1"), ("seed", "-1"), ("calibration_nsamples", "-5")]
    {
        wrong(&format!("calibration:\n  {key}: {value}\n"), 2, 5 + key.len() as u64, &[key, &format!("not {value}")]);
    }
    wrong("calibration:\n  height: 512\n", 2, 11, &["`height` and `width` go together"]);
    wrong("calibration:\n  height: 512\n  width: 0\n", 3, 10, &["`width` must be between 1"]);
    wrong("palettize:\n  weight_threshold: -1\n", 2, 21, &["weight_threshold", "not -1"]);
    wrong("model:\n  device: gpu\n", 2, 11, &["`device` must be cpu, cuda, cuda:N or mps", "not `gpu`"]);
    wrong("model:\n  dtype: int8\n", 2, 10, &["`dtype` must be f32, f16 or bf16"]);
    wrong("palettize:\n  on_misfit: smaller_groups\n", 2, 14, &["smaller_group, dense, error", "perhaps `smaller_group`"]);
    wrong("prune:\n  algorithm: gptq\n", 2, 14, &["must be sparse_gpt, or magnitude, not `gptq`"]);
    wrong("palettize: {}\nsolver: both\n", 2, 9, &["`solver` must be sequential, or joint, not `both`"]);
    wrong("solver: joint\nprune: {algorithm: magnitude}\n", 1, 9, &["`solver: joint` chooses masks as sparse_gpt does"]);
}

#[test]
fn solvers_and_what_goes_with_them() {
    wrong("palettize: {}\nsequencing: block\n", 2, 13, &["must be stage, or sublayer, not `block`"]);
    wrong("palettize: {}\ntarget: fp16\n", 2, 9, &["must be current, or dense, not `fp16`"]);
    let needs = "`target: dense` needs `solver: joint` and `sequencing: sublayer`";
    wrong("palettize: {}\nsolver: sequential\nsequencing: sublayer\ntarget: dense\n", 4, 9, &[needs]);
    wrong("palettize: {}\nsequencing: stage\ntarget: dense\n", 3, 9, &[needs]);
    wrong("calibration:\n  timestep_weighting: late\n", 2, 23, &["must be uniform, or early, or log, not `late`"]);
    wrong("calibration:\n  captions_nsamples: 0\n", 2, 22, &["must be between 1"]);
    wrong("calibration:\n  caption: x.txt\n", 2, 3, &["unknown key `caption` in calibration; did you mean `captions`?"]);
}

#[test]
fn the_effort_keeps_to_its_bounds() {
    let with = |line: &str| format!("palettize: {{}}\njoint:\n  {line}\n");
    wrong(&with("refit_steps: -1"), 3, 16, &["must be between 0 and 1000, not -1"]);
    wrong(&with("turns: 1001"), 3, 10, &["must be between 0 and 1000, not 1001"]);
    wrong(&with("sweep: 3"), 3, 10, &["must be true or false, not 3"]);
    wrong(&with("polish_steps: 3"), 3, 3, &["unknown key `polish_steps` in joint"]);
    assert!(!parsed(&with("polish: false")).effort.polish);
}

#[test]
fn a_budget_needs_one_target_within_its_bounds() {
    let with = |budget: &str| format!("solver: joint\npalettize: {{}}\nbudget:\n{budget}");
    wrong(&with("  target_bits: 3\n  target_size: 1GiB\n"), 5, 16, &["exclude each other"]);
    wrong(&with("  min_bits: 3\n"), 4, 3, &["`budget` needs `target_size` or `target_bits`"]);
    for size in ["933MB", "many", "-1MiB", "1e400GiB"] {
        wrong(&with(&format!("  target_size: '{size}'\n")), 4, 16, &["`target_size` must be a size such as 933MiB"]);
    }
    for bits in ["0", "-1", "17", ".nan"] {
        wrong(&with(&format!("  target_bits: {bits}\n")), 4, 16, &["must be above 0 and at most 16"]);
    }
    for percent in ["0.5", "0%", "100%", "-1%", "1e-1%", "'%'", "many"] {
        wrong(
            &with(&format!("  target_error: {percent}\n")),
            4,
            17,
            &["must be a percentage above 0% and below 100%, such as 0.5%"],
        );
    }
    for decibels in ["0", "100", "-3", ".inf", ".nan"] {
        wrong(&with(&format!("  target_psnr: {decibels}\n")), 4, 16, &["must be above 0 and below 100"]);
    }
    wrong(&with("  target_error: 1%\n  target_psnr: 35\n"), 4, 17, &["`target_error` and `target_psnr` exclude each other"]);
    wrong(&with("  target_psnr: 35\n  target_bits: 3\n"), 5, 16, &["`target_bits` and `target_psnr` exclude each other"]);
    wrong(&with("  target_psnr: 35\n  target_solves: 101\n"), 5, 18, &["must be between 1 and 100"]);
    wrong(&with("  target_psnr: 35\n  target_calls: 0\n"), 5, 17, &["must be between 1"]);
    wrong(&with("  target_psnr: 35\n  target_prompts: []\n"), 5, 19, &["at least one prompt"]);
    wrong(&with("  target_psnr: 35\n  target_prompts: [owl, 3]\n"), 5, 25, &["an entry of `prompts` must be text"]);
    for (key, value) in [("target_prompts", "[owl]"), ("target_calls", "9"), ("target_solves", "3")] {
        let place = 5 + key.len() as u64;
        let goes = format!("`{key}` goes with `target_error` or `target_psnr`");
        wrong(&with(&format!("  target_bits: 3\n  {key}: {value}\n")), 5, place, &[&goes]);
    }
    wrong(&with("  target_bits: 3\n  min_bits: 5\n"), 5, 13, &["must be 1, 2, 3, 4, 6 or 8"]);
    wrong(&with("  target_bits: 3\n  max_sparsity: 1.0\n"), 5, 17, &["less than 1"]);
    wrong(&with("  target_bits: 3\n  probes: 0\n"), 5, 11, &["between 1"]);
    wrong(&with("  target_bits: 3\n  min_bit: 3\n"), 5, 3, &["unknown key `min_bit` in budget; did you mean `min_bits`?"]);
    let needs = "a budget needs `solver: joint` and a `palettize` section";
    wrong("solver: joint\nprune: {}\nbudget: {target_bits: 3}\n", 3, 9, &[needs]);
    wrong("solver: sequential\npalettize: {}\nbudget: {target_bits: 3}\n", 3, 9, &[needs]);
}

#[test]
fn a_ratio_is_n_of_m_with_n_below_m() {
    for ratio in ["[4, 4]", "[5, 4]", "[0, 4]", "[-2, 4]", "[2, four]", "4:4", "4:2"] {
        wrong_value("prune", "n_m_ratio", ratio, &["0 < n < m"]);
    }
    for ratio in ["[2]", "[2, 4, 8]", "2.4", "{n: 2}"] {
        wrong_value("prune", "n_m_ratio", ratio, &["a list of two numbers"]);
    }
    wrong_value("prune", "n_m_ratio", "two of four", &["such as 2:4"]);
    let both = "prune:\n  global_config:\n    target_sparsity: 0.5\n    n_m_ratio: [2, 4]\n";
    wrong(both, 4, 16, &["`n_m_ratio` and `target_sparsity` exclude each other"]);
    let straddling = "prune:\n  global_config:\n    n_m_ratio: [2, 5]\n    processing_group_size: 128\n";
    wrong(straddling, 3, 16, &["2:5 needs a `processing_group_size` that is a multiple of 5, not 128"]);
    assert_eq!(parsed("prune: {global_config: {n_m_ratio: '2:4'}}"), parsed("prune: {global_config: {n_m_ratio: [2, 4]}}"));
}

#[test]
fn a_group_size_goes_with_its_granularity() {
    let in_global = |lines: &str| format!("palettize:\n  global_config:\n{lines}");
    wrong(&in_global("    granularity: per_grouped_channel\n"), 3, 18, &["needs a `group_size`"]);
    wrong(&in_global("    granularity: per_grouped_channel\n    group_size: null\n"), 3, 18, &["needs a `group_size`"]);
    wrong(&in_global("    granularity: per_tensor\n    group_size: 16\n"), 4, 17, &["goes with", "not per_tensor"]);
    wrong(&in_global("    group_size: 16\n"), 3, 17, &["goes with", "which is not given"]);
    for size in ["0", "-16", "1.5", "many"] {
        wrong(
            &in_global(&format!("    granularity: per_grouped_channel\n    group_size: {size}\n")),
            4,
            17,
            &["`group_size` must be"],
        );
    }
    // A wrong granularity is one mistake. Settings that depend on the granularity are not judged
    // then.
    wrong(
        &in_global("    granularity: per_channel\n    group_size: 16\n"),
        3,
        18,
        &["per_tensor", "perhaps `per_grouped_channel`"],
    );
    wrong(&in_global("    granularity: per_block\n"), 3, 18, &["per_tensor, or per_grouped_channel"]);
}

#[test]
fn vectors_need_output_channels_and_no_scales() {
    let in_global = |lines: &str| format!("palettize:\n  global_config:\n{lines}");
    for length in ["0", "3", "8", "16", "-2", "1.5", "two"] {
        wrong(&in_global(&format!("    cluster_dim: {length}\n")), 3, 18, &["`cluster_dim` must be"]);
    }
    let axis = in_global("    channel_axis: 1\n    cluster_dim: 2\n");
    wrong(&axis, 4, 18, &["`cluster_dim: 2` needs `channel_axis: 0`"]);
    let scales = in_global("    cluster_dim: 4\n    enable_per_channel_scale: true\n");
    wrong(&scales, 3, 18, &["`cluster_dim: 4` and `enable_per_channel_scale` exclude each other"]);
    // Scalar palettes have both.
    parsed(&in_global("    channel_axis: 1\n    cluster_dim: 1\n    enable_per_channel_scale: true\n"));
    let vectors = parsed(&in_global("    cluster_dim: 2\n    n_bits: 8\n")).palettize.unwrap().rules.global_config.unwrap();
    assert_eq!((vectors.vector_length, vectors.bits.bits()), (2, 8));
}

#[test]
fn fixed_values_exclude_what_belongs_to_fitted_ones() {
    let in_global = |lines: &str| format!("palettize:\n  global_config:\n{lines}");
    wrong(&in_global("    values: int8\n"), 3, 13, &["`values` must be one of kmeans, int, nf4"]);
    for block in ["0", "-64", "1.5", "all"] {
        wrong(&in_global(&format!("    values: int\n    block_size: {block}\n")), 4, 17, &["`block_size` must be"]);
    }
    wrong(&in_global("    block_size: 64\n"), 3, 17, &["`block_size` goes with `values: int` or `values: nf4`"]);
    wrong(&in_global("    values: kmeans\n    feedback: true\n"), 4, 15, &["`feedback` goes with `values: int`"]);
    wrong(&in_global("    values: int\n    n_bits: 6\n"), 4, 13, &["`values: int` has 4 or 8 bits, not 6"]);
    wrong(&in_global("    values: nf4\n    n_bits: 8\n"), 4, 13, &["`values: nf4` has 4 bits, not 8"]);
    let groups = in_global("    values: nf4\n    granularity: per_grouped_channel\n    group_size: 16\n");
    wrong(&groups, 4, 18, &["`granularity: per_grouped_channel` and `values: nf4` exclude each other"]);
    wrong(&in_global("    values: int\n    cluster_dim: 2\n"), 4, 18, &["`cluster_dim` and `values: int` exclude each other"]);
    wrong(&in_global("    values: int\n    enable_per_channel_scale: true\n"), 4, 31, &["exclude each other"]);

    let int = in_global("    values: int\n    n_bits: 8\n");
    wrong(&format!("solver: joint\n{int}"), 1, 9, &["`values: int` needs `solver: sequential`"]);
    wrong(&format!("{int}budget: {{target_bits: 3}}\n"), 5, 9, &["a budget needs `solver: joint`"]);
    wrong(&format!("{int}tune: {{}}\n"), 5, 7, &["`tune` trains the entries of palettes, which `values: int` fixes"]);
    wrong(&format!("prune: {{}}\n{int}    feedback: true\n"), 1, 8, &["`prune` and `feedback: true` exclude each other"]);
    // A rule for some layers is enough.
    let some = "palettize:\n  module_name_configs:\n    conv_in: {values: nf4}\n";
    wrong(&format!("solver: joint\n{some}"), 1, 9, &["`values: nf4` needs `solver: sequential`"]);
    for yaml in [some, &int] {
        let config = parsed(yaml);
        assert_eq!((config.solver.name(), config.is_calibrated()), ("sequential", false));
    }
    let gptq = parsed(&in_global("    values: nf4\n    feedback: true\n    block_size: 32\n"));
    assert!(gptq.is_calibrated() && gptq.solver.name() == "sequential");
    let quantizer = gptq.palettize.unwrap().rules.global_config.unwrap().quantizer.unwrap();
    assert_eq!((quantizer.grid.name(), quantizer.block_size, quantizer.feedback), ("nf4", 32, true));
}

#[test]
fn bad_patterns_and_types() {
    wrong("prune:\n  layers: ['up_blocks(']\n", 2, 12, &["`up_blocks(` is not a regular expression: unclosed group"]);
    wrong(
        "palettize:\n  module_name_configs:\n    '*.conv': null\n",
        3,
        5,
        &["`*.conv` is not a regular expression: repetition operator"],
    );
    wrong("palettize:\n  module_name_configs:\n    '(a{1000}){1000}': null\n", 3, 5, &["not a regular expression", "size limit"]);
    wrong(
        "prune:\n  module_type_configs:\n    linear: null\n",
        3,
        5,
        &["unknown module type `linear`", "did you mean `Linear`?"],
    );
    wrong(
        "prune:\n  module_type_configs:\n    GroupNorm: null\n",
        3,
        5,
        &["unknown module type `GroupNorm`", "Conv2d and Linear"],
    );
}

#[test]
fn keys_given_twice() {
    wrong("palettize:\n  global_config:\n    n_bits: 4\n    n_bits: 6\n", 4, 5, &["`n_bits` is given twice, first in line 3"]);
    wrong("prune: {}\nprune: {}\n", 2, 1, &["`prune` is given twice"]);
    wrong(
        "palettize:\n  module_name_configs:\n    a: null\n    b: null\n    \"a\": {}\n",
        5,
        5,
        &["`a` is given twice, first in line 3"],
    );
}

#[test]
fn all_mistakes_at_once_in_the_order_of_the_file() {
    let yaml = "\
model: {devise: cpu}
calibration:
  calibration_nsamples: 0
  steps: x
prune:
  layers: ['a(', 'mid_block', ')b']
  global_config: {target_sparsity: 1.0, n_m_ratio: [4, 2]}
palettize:
  module_name_configs:
    conv_in: {n_bits: 5, granularity: per_grouped_channel}
    conv_in: null
  global_config:
    n_bits: 12
  on_misfit: ignore
seed: 4
";
    let places: Vec<(u64, u64)> = refused(yaml).into_iter().map(|(line, column, _)| (line, column)).collect();
    let expected = [
        (1, 9),
        (3, 25),
        (4, 10),
        (6, 12),
        (6, 31),
        (7, 36),
        (7, 52),
        (7, 52),
        (10, 23),
        (10, 39),
        (11, 5),
        (13, 13),
        (14, 14),
        (15, 1),
    ];
    assert_eq!(places, expected, "{:#?}", refused(yaml));

    let two = refused("prune:\n  global_config: {target_sparsity: 1.0}\npalettize:\n  global_config: {n_bits: 5}\n");
    assert_eq!(two.len(), 2);
    assert!(two[0].2.contains("target_sparsity") && two[1].2.contains("n_bits"), "{two:?}");
}

#[test]
fn files_that_are_no_config() {
    for empty in ["", "\n\n", "# nothing\n", "---\n", "null\n", "~"] {
        let found = refused(empty);
        assert!(found.len() == 1 && found[0].2.contains("empty"), "{empty:?}: {found:?}");
    }
    for bytes in [
        &b"\xff\xfe\x00"[..],
        b"prune: \xc3",
        b"\x00",
        b"PK\x03\x04",
        b"{",
        b"a: [",
        b"\t",
        b"- - - -",
        b"prune: &a {<<: *a}",
        b"!!binary x",
    ] {
        refused(bytes);
    }
    for deep in ["[".repeat(100_000), "prune: {".repeat(10_000), "a:\n".to_owned() + &"  a:\n".repeat(2)] {
        refused(deep);
    }
    let laugh: String = (1..30).map(|i| format!("a{i}: &a{i} [*a{0}, *a{0}, *a{0}, *a{0}]\n", i - 1)).collect();
    let found = refused(format!("a0: &a0 [x]\n{laugh}"));
    assert!(found[0].2.contains("too large"), "{found:?}");
}

#[test]
fn the_display_is_one_line_a_mistake() {
    let error = sdxl_squeeze::config::RunConfig::parse(
        "dir/x.yaml".as_ref(),
        b"prune:\n  layers: [\"a\\nb(\"]\n  global_config: {\"x\\ny\": 1}\n",
    );
    let error = error.unwrap_err().to_string();
    let lines: Vec<&str> = error.lines().collect();
    assert_eq!(lines.len(), 2, "{error}");
    assert!(lines[0].starts_with("dir/x.yaml:2:12: `a\\nb(` is not a regular expression: "), "{error}");
    assert!(lines[1].starts_with("dir/x.yaml:3:19: unknown key `x\\ny` in prune.global_config"), "{error}");
}

mod never_a_panic {
    use std::path::Path;

    use proptest::prelude::*;
    use sdxl_squeeze::config::RunConfig;

    proptest! {
        #[test]
        fn on_any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = RunConfig::parse(Path::new("x"), &bytes);
        }

        #[test]
        fn on_yaml_like_text(
            text in "((model|calibration|prune|palettize|global_config|layers|n_bits|group_size|seed|n_m_ratio|[a-z&*!<|>'\"]|[0-9.-]{1,4}|: |: |\n|\n  |\n    |- |, |\\{|\\}|\\[|\\]|#)){0,60}"
        ) {
            let _ = RunConfig::parse(Path::new("x"), text.as_bytes());
        }

        #[test]
        fn on_a_config_with_one_byte_changed(at in 0usize..700, byte in any::<u8>()) {
            let mut bytes = std::fs::read(crate::support::repo("configs/tutorial-s40-4bit-gs16.yaml")).unwrap();
            let at = at % bytes.len();
            bytes[at] = byte;
            let _ = RunConfig::parse(Path::new("x"), &bytes);
        }
    }
}
