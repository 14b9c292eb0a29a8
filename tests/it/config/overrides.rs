//! Flags override the file, by the same rules.

use sdxl_squeeze::codebook::{Grouping, NmRatio, OnMisfit, Sparsity};
use sdxl_squeeze::config::{Overrides, Place, Prompts, PruneSection, RunConfig, SolverKind};

use super::{mistakes_of, parsed};

const CONFIG: &str = "
calibration: {samples: s.safetensors, height: 512, width: 512}
prune:
  global_config: {target_sparsity: 0.4}
  module_type_configs: {Conv2d: null, Linear: {n_m_ratio: [2, 4]}}
  module_name_configs: {'a.*': {target_sparsity: 0.7, hessian_dampening: 0.5}, 'b.*': null}
palettize:
  global_config: null
  module_type_configs: {Conv2d: {n_bits: 8}}
  module_name_configs: {'a.*': {n_bits: 6, granularity: per_grouped_channel, group_size: 4, channel_axis: 1}, 'b.*': null}
";

#[test]
fn settings_go_to_every_rule_that_is_not_null() {
    let mut config = parsed(CONFIG);
    let flags = Overrides { target_sparsity: Some(0.6), n_bits: Some(3), group_size: Some(16), ..Overrides::default() };
    config.apply(&flags).unwrap();
    let expected = parsed(
        "
calibration: {samples: s.safetensors, height: 512, width: 512}
prune:
  global_config: {target_sparsity: 0.6}
  module_type_configs: {Conv2d: null, Linear: {target_sparsity: 0.6}}
  module_name_configs: {'a.*': {target_sparsity: 0.6, hessian_dampening: 0.5}, 'b.*': null}
palettize:
  global_config: null
  module_type_configs: {Conv2d: {n_bits: 3, granularity: per_grouped_channel, group_size: 16}}
  module_name_configs: {'a.*': {n_bits: 3, granularity: per_grouped_channel, group_size: 16, channel_axis: 1}, 'b.*': null}
",
    );
    assert_eq!(config, expected);
}

#[test]
fn the_other_flags() {
    let mut config = parsed(CONFIG);
    let flags = Overrides {
        model: Some("m".into()),
        device: Some("cuda:3".into()),
        dtype: Some("bf16".into()),
        prompts: Some("p.txt".into()),
        calibration_nsamples: Some(7),
        steps: Some(9),
        guidance: Some(4.0),
        seed: Some(u64::MAX),
        width: Some(1024),
        solver: Some("joint".into()),
        n_m_ratio: Some("1:4".into()),
        on_misfit: Some("smaller_group".into()),
        ..Overrides::default()
    };
    config.apply(&flags).unwrap();
    assert_eq!((config.model.path.as_deref(), config.model.device.as_str()), (Some("m".as_ref()), "cuda:3"));
    let calibration = &config.calibration;
    assert_eq!(
        (&calibration.prompts, &calibration.samples),
        (&Prompts::File("p.txt".into()), &None),
        "prompts are run, samples are not read"
    );
    assert_eq!((calibration.calibration_nsamples, calibration.steps, calibration.guidance), (7, 9, 4.0));
    assert_eq!((calibration.seed, calibration.size), (u64::MAX, Some((512, 1024))));
    assert_eq!(config.solver, SolverKind::Joint);
    let prune = config.prune.as_ref().unwrap();
    assert_eq!(prune.rules.global_config.unwrap().sparsity, Sparsity::NOfM(NmRatio { n: 1, m: 4 }));
    assert_eq!(config.palettize.as_ref().unwrap().on_misfit, OnMisfit::SmallerGroup);
    assert_eq!(parsed(&config.to_yaml()), config);
}

#[test]
fn a_solver_brings_what_goes_with_it() {
    let of = |yaml: &str, solver: Option<&str>, granularity: Option<&str>, target: Option<&str>| {
        let own = |word: Option<&str>| word.map(str::to_owned);
        let flags = Overrides { solver: own(solver), granularity: own(granularity), target: own(target), ..Overrides::default() };
        let mut config = parsed(yaml);
        config.apply(&flags).unwrap();
        assert_eq!(parsed(&config.to_yaml()), config);
        (config.solver.name(), config.pace.name(), config.target.name())
    };
    let (joint, sequential) = ("palettize: {}", "palettize: {}\nsolver: sequential");
    assert_eq!(of(joint, None, None, None), ("joint", "sublayer", "dense"));
    assert_eq!(of("prune: {algorithm: magnitude}", None, None, None), ("sequential", "stage", "current"));
    assert_eq!(of("granularity: stage\npalettize: {}", None, None, None), ("joint", "stage", "current"));
    assert_eq!(of(sequential, None, None, None), ("sequential", "stage", "current"));
    assert_eq!(of(sequential, Some("joint"), None, None), ("joint", "sublayer", "dense"));
    assert_eq!(of(sequential, Some("joint"), Some("stage"), None), ("joint", "stage", "current"));
    assert_eq!(of(joint, Some("sequential"), None, None), ("sequential", "stage", "current"));
    assert_eq!(of(joint, None, Some("stage"), None), ("joint", "stage", "current"));
    assert_eq!(of(joint, None, None, Some("current")), ("joint", "sublayer", "current"));
    // What is named already is not changed by naming it again.
    assert_eq!(of("target: current\npalettize: {}", Some("joint"), Some("sublayer"), None), ("joint", "sublayer", "current"));
    refused(
        joint,
        Overrides { granularity: Some("stage".into()), target: Some("dense".into()), ..Overrides::default() },
        &[("--target dense", "needs `solver: joint` and `granularity: sublayer`")],
    );
    let magnitude = "prune: {algorithm: magnitude}\npalettize: {}";
    refused(magnitude, Overrides { solver: Some("joint".into()), ..Overrides::default() }, &[("--solver joint", "sparse_gpt")]);
    refused(
        sequential,
        Overrides { target_size: Some("1GiB".into()), ..Overrides::default() },
        &[("--target-size 1GiB", "a budget needs `solver: joint`")],
    );
    let both = Overrides { target_size: Some("1GiB".into()), target_bits: Some(3.0), ..Overrides::default() };
    refused(joint, both, &[("--target-bits 3", "exclude each other")]);
}

#[test]
fn a_section_that_is_not_there_is_added() {
    let mut config = parsed("palettize: null\n");
    config.apply(&Overrides { target_sparsity: Some(0.0), group_size: Some(8), ..Overrides::default() }).unwrap();
    let prune = config.prune.unwrap();
    assert_eq!(prune.layers, PruneSection::default().layers);
    assert_eq!(
        prune.layers.iter().map(|stage| stage.value.to_string()).collect::<Vec<_>>(),
        [r"down_blocks\.\d+", "mid_block", r"up_blocks\.\d+"]
    );
    assert_eq!(prune.rules.global_config.unwrap().sparsity, Sparsity::Unstructured(0.0));
    assert_eq!(config.palettize.unwrap().rules.global_config.unwrap().grouping, Grouping::PerGroupedChannel { group_size: 8 });
    let mut config = RunConfig::default();
    config.apply(&Overrides::default()).unwrap();
    assert_eq!(config, RunConfig::default(), "no flags, no change");
}

#[track_caller]
fn refused(config: &str, flags: Overrides, expected: &[(&str, &str)]) {
    let mut config = parsed(config);
    let before = config.clone();
    let mistakes = mistakes_of(config.apply(&flags).unwrap_err());
    assert_eq!(config, before, "nothing is changed by halves");
    let shown: Vec<String> = mistakes.iter().map(ToString::to_string).collect();
    assert_eq!(mistakes.len(), expected.len(), "{shown:?}");
    for (mistake, (flag, words)) in mistakes.iter().zip(expected) {
        assert_eq!(mistake.place, Place::Flag((*flag).to_owned()), "{shown:?}");
        assert!(mistake.problem.contains(words), "{shown:?}");
    }
}

#[test]
fn bad_flags_are_named_all_at_once() {
    let flags = Overrides { target_sparsity: Some(1.0), n_bits: Some(5), group_size: Some(0), ..Overrides::default() };
    let expected = [
        ("--target-sparsity 1.0", "must be at least 0 and less than 1"),
        ("--n-bits 5", "must be 1, 2, 3, 4, 6 or 8"),
        ("--group-size 0", "between 1"),
    ];
    refused(CONFIG, flags, &expected);
    let flags = Overrides {
        device: Some("gpu".into()),
        dtype: Some("f8".into()),
        model: Some("".into()),
        calibration_nsamples: Some(0),
        steps: Some(-1),
        guidance: Some(f64::NAN),
        height: Some(0),
        n_m_ratio: Some("4:2".into()),
        on_misfit: Some("skip".into()),
        solver: Some("both".into()),
        ..Overrides::default()
    };
    let expected = [
        ("--model ''", "empty"),
        ("--device gpu", "must be cpu"),
        ("--dtype f8", "must be f32"),
        ("--calibration-nsamples 0", "between 1"),
        ("--steps -1", "between 1"),
        ("--guidance NaN", "finite"),
        ("--height 0", "between 1"),
        ("--n-m-ratio 4:2", "0 < n < m"),
        ("--on-misfit skip", "smaller_group"),
        ("--solver both", "sequential, or joint"),
    ];
    refused(CONFIG, flags, &expected);
}

#[test]
fn flags_that_do_not_go_together_or_do_nothing() {
    let both = Overrides { target_sparsity: Some(0.4), n_m_ratio: Some("2:4".into()), ..Overrides::default() };
    refused(CONFIG, both, &[("--target-sparsity 0.4", "--n-m-ratio exclude each other")]);
    let both = Overrides { prompts: Some("p".into()), samples: Some("s".into()), ..Overrides::default() };
    refused(CONFIG, both, &[("--prompts p", "--samples exclude each other")]);
    refused("prune: {}", Overrides { height: Some(512), ..Overrides::default() }, &[("--height 512", "needs --width")]);
    let straddling = Overrides { n_m_ratio: Some("2:5".into()), ..Overrides::default() };
    refused(CONFIG, straddling, &[("--n-m-ratio 2:5", "multiple of 5, not 128")]);
    let nothing = "palettize: {global_config: null, module_type_configs: {Linear: null}}";
    refused(
        nothing,
        Overrides { n_bits: Some(4), ..Overrides::default() },
        &[("--n-bits 4", "every rule of `palettize` is null")],
    );
    refused(
        "prune: {}",
        Overrides { on_misfit: Some("dense".into()), ..Overrides::default() },
        &[("--on-misfit dense", "no `palettize` section")],
    );
    let joint = Overrides { solver: Some("joint".into()), ..Overrides::default() };
    refused("prune: {algorithm: magnitude}", joint, &[("--solver joint", "not magnitude")]);
}
