//! The documentation and the schema that are made from the declarations of config keys, and the
//! shipped configs checked with that schema.

use std::path::{Path, PathBuf};

use sdxl_squeeze::config::{RunConfig, reference};
use serde_json::Value;

use super::{parsed, refused};
use crate::support::repo;

/// Compares a file with the text that it must have. If the environment has `UPDATE`, the text is
/// written to the file first.
#[track_caller]
fn up_to_date(file: &str, text: &str) {
    let path = repo(file);
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&path, text).unwrap();
    }
    let present = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(present == text, "{file} is stale: UPDATE=1 cargo test --test it -- config::reference");
}

#[test]
fn docs_and_schema_are_up_to_date() {
    let docs = std::fs::read_to_string(repo("docs/config.md")).unwrap();
    up_to_date("docs/config.md", &reference::with_tables(&docs).unwrap());
    up_to_date("configs/schema.json", &format!("{}\n", serde_json::to_string_pretty(&reference::schema()).unwrap()));
    assert_eq!(docs.matches("<!-- keys: ").count(), 12, "a table for each section");
    for (text, problem) in
        [("<!-- keys: prune", "not closed"), ("<!-- keys: x --><!-- end -->", "no section"), ("<!-- keys: x -->", "no end")]
    {
        assert!(reference::with_tables(text).unwrap_err().contains(problem));
    }
}

/// The ways in which `value` breaks a JSON schema. The function knows only the keywords of our own
/// schema; any other keyword counts as broken.
fn complaints(schema: &Value, value: &Value, at: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut check = |holds: bool, keyword: &str| {
        if !holds {
            found.push(format!("{at}: {value} breaks {keyword}"));
        }
    };
    let is = |name: &Value| match name.as_str().unwrap() {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        "number" => value.is_number(),
        "integer" => value.is_i64() || value.is_u64(),
        other => panic!("{other}"),
    };
    let number = |bound: &Value, holds: fn(f64, f64) -> bool| value.as_f64().is_none_or(|n| holds(n, bound.as_f64().unwrap()));
    let length = |bound: &Value, holds: fn(usize, usize) -> bool| {
        value.as_array().is_none_or(|list| holds(list.len(), bound.as_u64().unwrap() as usize))
    };
    let mut nested = Vec::new();
    for (keyword, rule) in schema.as_object().unwrap() {
        match keyword.as_str() {
            "$schema" | "title" | "description" | "default" | "deprecated" => {}
            "type" => check(rule.as_array().map_or_else(|| is(rule), |types| types.iter().any(is)), keyword),
            "enum" => check(rule.as_array().unwrap().contains(value), keyword),
            "anyOf" => {
                let holds = |schema: &Value| complaints(schema, value, at).is_empty();
                check(rule.as_array().unwrap().iter().any(holds), keyword);
            }
            "minimum" => check(number(rule, |n, bound| n >= bound), keyword),
            "maximum" => check(number(rule, |n, bound| n <= bound), keyword),
            "exclusiveMinimum" => check(number(rule, |n, bound| n > bound), keyword),
            "exclusiveMaximum" => check(number(rule, |n, bound| n < bound), keyword),
            "minItems" => check(length(rule, |n, bound| n >= bound), keyword),
            "maxItems" => check(length(rule, |n, bound| n <= bound), keyword),
            "pattern" => {
                let pattern = regex::Regex::new(rule.as_str().unwrap()).unwrap();
                check(value.as_str().is_none_or(|text| pattern.is_match(text)), keyword);
            }
            "items" => {
                let items = value.as_array().into_iter().flatten().enumerate();
                nested.extend(items.flat_map(|(index, item)| complaints(rule, item, &format!("{at}.{index}"))));
            }
            "properties" => {
                let known = value.as_object().into_iter().flatten().filter_map(|(key, item)| Some((key, rule.get(key)?, item)));
                nested.extend(known.flat_map(|(key, rule, item)| complaints(rule, item, &format!("{at}.{key}"))));
            }
            "additionalProperties" => {
                let listed = |key: &str| schema.get("properties").is_some_and(|properties| properties.get(key).is_some());
                let others = value.as_object().into_iter().flatten().filter(|(key, _)| !listed(key));
                nested.extend(others.flat_map(|(key, item)| match rule {
                    Value::Bool(false) => vec![format!("{at}: unknown key {key}")],
                    rule => complaints(rule, item, &format!("{at}.{key}")),
                }));
            }
            other => panic!("the checker does not know {other}"),
        }
    }
    found.extend(nested);
    found
}

fn by_schema(yaml: &str) -> Vec<String> {
    complaints(&reference::schema(), &serde_yaml::from_str(yaml).unwrap(), "config")
}

fn shipped() -> Vec<PathBuf> {
    let folders = ["configs", "configs/emoji"].map(|folder| std::fs::read_dir(repo(folder)).unwrap());
    let paths = folders.into_iter().flatten().map(|entry| entry.unwrap().path());
    paths.filter(|path| path.extension() == Some("yaml".as_ref())).collect()
}

#[test]
fn shipped_configs_name_the_schema_and_obey_it() {
    let schema = repo("configs/schema.json").canonicalize().unwrap();
    assert!(shipped().len() > 20);
    for path in shipped() {
        let text = std::fs::read_to_string(&path).unwrap();
        let named = text.lines().next().unwrap().strip_prefix("# yaml-language-server: $schema=");
        let named = named.unwrap_or_else(|| panic!("{}: no schema in its first line", path.display()));
        assert_eq!(path.parent().unwrap().join(named).canonicalize().unwrap(), schema, "{}", path.display());
        assert_eq!(by_schema(&text), [""; 0], "{}", path.display());
        let resolved = RunConfig::read(&path).unwrap().to_yaml();
        assert_eq!(by_schema(&resolved), [""; 0], "{resolved}");
    }
}

#[test]
fn the_schema_refuses_what_the_program_refuses() {
    for wrong in [
        "prun: {}",
        "palettize: {nbits: 4}",
        "palettize: {global_config: {n_bit: 4}}",
        "palettize: {global_config: {n_bits: 5}}",
        "palettize: {module_type_configs: {linear: null}}",
        "palettize: {module_name_configs: {'a.*': {n_bits: '4'}}}",
        "palettize: {weight_threshold: -1}",
        "prune: {layers: []}",
        "prune: {layers: mid_block}",
        "prune: {global_config: {target_sparsity: 1}}",
        "prune: {global_config: {n_m_ratio: [2]}}",
        "model: {device: gpu}",
        "calibration: {steps: 0}",
        "calibration: {prompts: ['']}",
        "solver: both",
        "joint: {sweep: 3}",
        "joint: {turns: 1001}",
        "budget: {target_bits: 17}",
        "budget: {target_size: 933MB}",
        "budget: {target_error: 0.5}",
        "budget: {target_psnr: 100}",
        "- a",
    ] {
        refused(wrong);
        assert!(!by_schema(wrong).is_empty(), "{wrong}");
    }
    for right in [
        "palettize: {}\ngranularity: stage",
        "palettize: null\nprune: {global_config: null, module_name_configs: {a: null}}",
        "prune: {global_config: {n_m_ratio: '2:4'}}",
        "palettize: {}\nmodel: {device: 'cuda:0, cuda:1', dtype: fp16}\nbudget: {target_size: 933MiB}",
        "palettize: {}\nbudget: {target_size: 1000000}\ncalibration: {prompts: [a cat]}",
        "palettize: {}\nbudget: {target_error: 0.5%, target_prompts: [a cat], target_solves: 3}",
        "palettize: {}\nbudget: {target_psnr: 35.5, target_prompts: p.txt, target_calls: 9}",
    ] {
        parsed(right);
        assert_eq!(by_schema(right), [""; 0], "{right}");
    }
}

/// A key that is declared but never read would be accepted and have no effect.
#[test]
fn every_declared_key_is_read() {
    fn walk(schema: &Value, inside: &[&str], count: &mut usize) {
        let schema = schema.get("anyOf").map_or(schema, |options| &options[0]);
        let Some(properties) = schema.get("properties").and_then(Value::as_object) else { return };
        for (key, property) in properties {
            let path = [inside, &[key]].concat();
            if property["anyOf"][0]["properties"].is_object() || property["properties"].is_object() {
                walk(property, &path, count);
                continue;
            }
            if property["type"].is_array() {
                continue;
            }
            // A mapping is a wrong value for every key.
            let yaml = path.iter().rev().fold("{}".to_owned(), |value, key| format!("{{{key}: {value}}}"));
            let mistakes = refused(&yaml);
            assert!(mistakes.iter().any(|(.., problem)| problem.contains(&format!("`{key}` must be"))), "{yaml}: {mistakes:?}");
            *count += 1;
        }
    }
    let mut count = 0;
    walk(&reference::schema(), &[], &mut count);
    assert!(count > 50, "{count}");
}

#[test]
fn the_former_name_of_a_config_leads_to_the_present_one() {
    let error = RunConfig::read(&repo("configs/joint-s40-4bit-gs16.yaml")).unwrap_err();
    assert!(error.is_bad_input());
    let text = error.to_string();
    assert!(text.contains("joint-s40-4bit-gs16.yaml has been renamed: it is"), "{text}");
    assert!(text.contains("configs/tutorial-s40-4bit-gs16.yaml now"), "{text}");
    let error = RunConfig::read(Path::new("configs/joint-zebra.yaml")).unwrap_err().to_string();
    assert!(error.contains("cannot read configs/joint-zebra.yaml"), "{error}");
}
