//! Flags override the config file and follow the same rules.

use std::path::Path;

use sdxl_squeeze::Result;
use sdxl_squeeze::codebook::{Grouping, NmRatio, OnMisfit, Sparsity};
use sdxl_squeeze::config::{Edit, Finding, Place, Prompts, PruneSection, RunConfig, SolverKind, flags};

use super::{mistakes_of, parsed};

/// Parses a config with flags, each given as its name and its argument.
fn edited(yaml: &str, flags: &[(&str, &str)]) -> Result<RunConfig> {
    let edits: Vec<Edit> = flags.iter().map(|(name, argument)| Edit::new(name, *argument).unwrap()).collect();
    RunConfig::parse_edited(Path::new("x.yaml"), yaml.as_bytes(), &edits)
}

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
    let config = edited(CONFIG, &[("target-sparsity", "0.6"), ("n-bits", "3"), ("group-size", "16")]).unwrap();
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
    let seed = u64::MAX.to_string();
    let flags = [
        ("model", "m"),
        ("device", "cuda:3"),
        ("dtype", "bf16"),
        ("prompts", "p.txt"),
        ("calibration-nsamples", "7"),
        ("steps", "9"),
        ("guidance", "4.0"),
        ("seed", &*seed),
        ("width", "1024"),
        ("solver", "joint"),
        ("n-m-ratio", "1:4"),
        ("on-misfit", "smaller_group"),
    ];
    let config = edited(CONFIG, &flags).unwrap();
    assert_eq!((config.model.path.as_deref(), config.model.device.as_str()), (Some("m".as_ref()), "cuda:3"));
    let calibration = &config.calibration;
    assert_eq!(
        (&calibration.prompts, &calibration.samples),
        (&Prompts::File("p.txt".into()), &None),
        "prompts are run, samples are not read"
    );
    assert_eq!((calibration.calibration_nsamples, calibration.steps, calibration.guidance), (7, Some(9), Some(4.0)));
    assert_eq!((calibration.seed, calibration.size), (u64::MAX, Some((512, 1024))));
    assert_eq!(config.solver, SolverKind::Joint);
    let prune = config.prune.as_ref().unwrap();
    assert_eq!(prune.rules.global_config.unwrap().sparsity, Sparsity::NOfM(NmRatio { n: 1, m: 4 }));
    assert_eq!(config.palettize.as_ref().unwrap().on_misfit, OnMisfit::SmallerGroup);
    assert_eq!(parsed(&config.to_yaml()), config);
}

#[test]
fn a_solver_brings_what_goes_with_it() {
    let of = |yaml: &str, solver: Option<&'static str>, sequencing: Option<&'static str>, target: Option<&'static str>| {
        let named = [("solver", solver), ("sequencing", sequencing), ("target", target)];
        let mut flags: Vec<(&str, &str)> = named.into_iter().filter_map(|(flag, word)| Some((flag, word?))).collect();
        let config = edited(yaml, &flags).unwrap();
        assert_eq!(parsed(&config.to_yaml()), config);
        flags.reverse();
        assert_eq!(edited(yaml, &flags).unwrap(), config, "the order of flags does not matter");
        (config.solver.name(), config.sequencing.name(), config.target.name())
    };
    let (joint, sequential) = ("palettize: {}", "palettize: {}\nsolver: sequential");
    assert_eq!(of(joint, None, None, None), ("joint", "sublayer", "dense"));
    assert_eq!(of("prune: {algorithm: magnitude}", None, None, None), ("sequential", "stage", "current"));
    assert_eq!(of("sequencing: stage\npalettize: {}", None, None, None), ("joint", "stage", "current"));
    assert_eq!(of(sequential, None, None, None), ("sequential", "stage", "current"));
    assert_eq!(of(sequential, Some("joint"), None, None), ("joint", "sublayer", "dense"));
    assert_eq!(of(sequential, Some("joint"), Some("stage"), None), ("joint", "stage", "current"));
    assert_eq!(of(joint, Some("sequential"), None, None), ("sequential", "stage", "current"));
    assert_eq!(of(joint, None, Some("stage"), None), ("joint", "stage", "current"));
    assert_eq!(of(joint, None, None, Some("current")), ("joint", "sublayer", "current"));
    // A target that the config names explicitly stays, although the flags change the default
    // target.
    assert_eq!(of("target: current\npalettize: {}", Some("joint"), Some("sublayer"), None), ("joint", "sublayer", "current"));
    refused(
        joint,
        &[("sequencing", "stage"), ("target", "dense")],
        &[("--target dense", "needs `solver: joint` and `sequencing: sublayer`")],
    );
    let magnitude = "prune: {algorithm: magnitude}\npalettize: {}";
    refused(magnitude, &[("solver", "joint")], &[("--solver joint", "sparse_gpt")]);
    refused(sequential, &[("target-size", "1GiB")], &[("--target-size 1GiB", "a budget needs `solver: joint`")]);
    refused(joint, &[("target-size", "1GiB"), ("target-bits", "3")], &[("--target-size 1GiB", "exclude each other")]);
}

#[test]
fn a_section_that_is_not_there_is_added() {
    let config = edited("palettize: null\n", &[("target-sparsity", "0.0"), ("group-size", "8")]).unwrap();
    let prune = config.prune.unwrap();
    assert_eq!(prune.layers, PruneSection::default().layers);
    assert_eq!(
        prune.layers.iter().map(|stage| stage.value.to_string()).collect::<Vec<_>>(),
        [r"down_blocks\.\d+", "mid_block", r"up_blocks\.\d+"]
    );
    assert_eq!(prune.rules.global_config.unwrap().sparsity, Sparsity::Unstructured(0.0));
    assert_eq!(config.palettize.unwrap().rules.global_config.unwrap().grouping, Grouping::PerGroupedChannel { group_size: 8 });
    assert_eq!(edited(CONFIG, &[]).unwrap(), parsed(CONFIG), "no flags, no change");
}

#[track_caller]
fn refused(config: &str, flags: &[(&str, &str)], expected: &[(&str, &str)]) {
    let mistakes = mistakes_of(edited(config, flags).unwrap_err());
    let shown: Vec<String> = mistakes.iter().map(ToString::to_string).collect();
    assert_eq!(mistakes.len(), expected.len(), "{shown:?}");
    for (mistake, (flag, words)) in mistakes.iter().zip(expected) {
        assert_eq!(mistake.place, Place::Flag((*flag).to_owned()), "{shown:?}");
        assert!(mistake.problem.contains(words), "{shown:?}");
    }
}

#[test]
fn bad_flags_are_named_all_at_once() {
    let flags = [("target-sparsity", "1.0"), ("n-bits", "5"), ("group-size", "0")];
    let expected = [
        ("--target-sparsity 1.0", "must be at least 0 and less than 1"),
        ("--n-bits 5", "must be 1, 2, 3, 4, 6 or 8"),
        ("--group-size 0", "between 1"),
    ];
    refused(CONFIG, &flags, &expected);
    let flags = [
        ("model", ""),
        ("device", "gpu"),
        ("dtype", "f8"),
        ("calibration-nsamples", "0"),
        ("steps", "-1"),
        ("guidance", "NaN"),
        ("height", "0"),
        ("n-m-ratio", "4:2"),
        ("on-misfit", "skip"),
        ("solver", "both"),
    ];
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
    refused(CONFIG, &flags, &expected);
    let flags = [("seed", "-1"), ("steps", "many"), ("target-size", "933MB")];
    let expected = [
        ("--seed -1", "`seed` must be between 0 and"),
        ("--steps many", "`steps` must be a whole number, not `many`"),
        ("--target-size 933MB", "must be a size such as 933MiB"),
    ];
    refused(CONFIG, &flags, &expected);
}

#[test]
fn mistakes_of_the_file_come_before_those_of_the_flags() {
    let yaml = "palettize:\n  global_config: {n_bits: 5}\n  on_misfit: skip\n";
    let mistakes = mistakes_of(edited(yaml, &[("steps", "0")]).unwrap_err());
    let shown: Vec<String> = mistakes.iter().map(ToString::to_string).collect();
    assert_eq!(mistakes.len(), 3, "{shown:?}");
    assert!(shown[0].starts_with("x.yaml:2:27: ") && shown[1].starts_with("x.yaml:3:14: "), "{shown:?}");
    assert!(shown[2].starts_with("--steps 0: `steps` must be between 1"), "{shown:?}");
    // A flag replaces a wrong value in the file, which is then not a mistake.
    assert!(edited(yaml, &[("n-bits", "4"), ("on-misfit", "dense")]).is_ok());
}

#[test]
fn flags_that_do_not_go_together_or_do_nothing() {
    let both = [("target-sparsity", "0.4"), ("n-m-ratio", "2:4")];
    refused(CONFIG, &both, &[("--target-sparsity 0.4", "--n-m-ratio exclude each other")]);
    let both = [("prompts", "p"), ("samples", "s")];
    refused(CONFIG, &both, &[("--prompts p", "--samples exclude each other")]);
    refused("prune: {}", &[("height", "512")], &[("--height 512", "needs --width")]);
    refused(CONFIG, &[("n-m-ratio", "2:5")], &[("--n-m-ratio 2:5", "multiple of 5, not 128")]);
    let nothing = "palettize: {global_config: null, module_type_configs: {Linear: null}}";
    refused(nothing, &[("n-bits", "4")], &[("--n-bits 4", "every rule of `palettize` is null")]);
    refused("prune: {}", &[("on-misfit", "dense")], &[("--on-misfit dense", "no `palettize` section")]);
    refused("prune: {algorithm: magnitude}", &[("solver", "joint")], &[("--solver joint", "not magnitude")]);
}

#[test]
fn a_flag_replaces_what_excludes_it_in_the_file() {
    let yaml = "palettize: {}\nbudget: {target_size: 1GiB, probes: 3}\nprune: {global_config: {n_m_ratio: [2, 4]}}";
    let config = edited(yaml, &[("target-bits", "3"), ("target-sparsity", "0.4")]).unwrap();
    let expected = "palettize: {}\nbudget: {target_bits: 3, probes: 3}\nprune: {global_config: {target_sparsity: 0.4}}";
    assert_eq!(config, parsed(expected));
    // A size takes the place of a search with all that belongs to it, and a closeness that of
    // another.
    let search = "palettize: {}\nbudget: {target_psnr: 35, target_prompts: [owl], target_calls: 9, target_solves: 3, probes: 3}";
    let size = edited(search, &[("target-bits", "3")]).unwrap();
    assert_eq!(size, parsed("palettize: {}\nbudget: {target_bits: 3, probes: 3}"));
    let other = edited(search, &[("target-error", "0.5%"), ("target-solves", "4")]).unwrap();
    assert_eq!(other, parsed(&search.replace("target_psnr: 35", "target_error: 0.5%").replace("solves: 3", "solves: 4")));
    let both = [("target-size", "1GiB"), ("target-prompts", "p.txt")];
    refused(search, &both, &[("--target-size 1GiB", "--target-prompts exclude each other")]);
}

/// `granularity` is the former name of the key `sequencing` and of its flag.
#[test]
fn former_names_are_accepted_with_a_warning() {
    let remarks = |config: RunConfig| -> Vec<String> {
        assert!(config.remarks.0.iter().all(|finding| matches!(finding, Finding::FormerName { .. })));
        config.remarks.0.iter().map(|finding| finding.mistake().to_string()).collect()
    };
    let old = parsed("palettize: {}\ngranularity: stage\n");
    let new = parsed("palettize: {}\nsequencing: stage\n");
    assert_eq!(old, new);
    assert_eq!(remarks(new.clone()), [""; 0]);
    assert_eq!(remarks(old.clone()), ["x.yaml:2:14: `granularity` is called `sequencing` now; the old name still works"]);
    assert!(old.resolve(&[]).findings.iter().any(|finding| matches!(finding, Finding::FormerName { .. })));
    assert!(old.to_yaml().contains("\nsequencing: stage\n"));

    let by_flag = edited("palettize: {}", &[("granularity", "stage")]).unwrap();
    assert_eq!(by_flag, new);
    let warning = "--granularity stage: `--granularity` is called `--sequencing` now; the old name still works";
    assert_eq!(remarks(by_flag), [warning]);
    // A flag replaces the key under either of the key's names.
    assert_eq!(edited("palettize: {}\ngranularity: sublayer\n", &[("sequencing", "stage")]).unwrap(), new);

    let both = super::refused("palettize: {}\ngranularity: stage\nsequencing: stage\n");
    assert_eq!(both.len(), 1, "{both:?}");
    assert_eq!((both[0].0, both[0].1), (2, 14));
    assert!(both[0].2.contains("`granularity` is the former name of `sequencing`; give one"), "{both:?}");
    let both = [("sequencing", "stage"), ("granularity", "stage")];
    refused("palettize: {}", &both, &[("--sequencing stage", "--granularity exclude each other")]);
}

#[test]
fn every_flag_edits_a_key() {
    let names: Vec<&str> = flags().map(|flag| flag.name).collect();
    assert_eq!(names.len(), 45, "{names:?}");
    for flag in flags() {
        assert!(flag.help.len() > 10 && !flag.help.ends_with('.'), "{flag:?}");
        assert_eq!(flag.former, flag.name == "granularity");
        // An empty argument is wrong for every kind of value but a negative prompt, which then is
        // the empty text.
        let config = "palettize: {}\nprune: {}\n";
        if flag.name == "negative-prompt" {
            let config = edited(config, &[(flag.name, "")]).unwrap();
            assert_eq!(config.calibration.negative_prompt.as_deref(), Some(""));
            continue;
        }
        let mistakes = mistakes_of(edited(config, &[(flag.name, "")]).unwrap_err());
        assert_eq!(mistakes[0].place, Place::Flag(format!("--{} ''", flag.name)));
    }
    assert!(Edit::new("zebra", "1").unwrap_err().is_bad_input());
}
