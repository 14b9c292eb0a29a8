//! The reference of config keys, made from their declarations: a JSON schema, and the tables of
//! `docs/config.md`.

use serde_json::{Map, Value as Json, json};
use squeeze_codebook::LayerKind;

use super::key::{Declared, Preset, RULES, Section};
use super::keys::root;
use super::tree::Value;

/// The JSON schema of a config, for editors: names, types, ranges, defaults and docs of all keys.
/// Rules about several keys at once are not in it.
#[must_use]
pub fn schema() -> Json {
    let mut schema = json!({
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "A run of sdxl-squeeze",
    });
    merge(&mut schema, mapping(&root::SECTION));
    schema
}

/// The schema of a section.
fn mapping(section: &Section) -> Json {
    let mut properties = Map::new();
    for key in section.keys {
        properties.insert(key.name().to_owned(), property(*key));
        if let Some(old) = key.formerly() {
            let mut former = or_null(key.schema());
            merge(&mut former, json!({ "description": format!("The former name of `{}`.", key.name()), "deprecated": true }));
            properties.insert(old.to_owned(), former);
        }
    }
    if let Some(settings) = section.settings {
        let settings = or_null(mapping(settings));
        for ((name, doc), mut schema) in RULES.into_iter().zip(rules(&settings)) {
            merge(&mut schema, json!({ "description": doc }));
            properties.insert(name.to_owned(), schema);
        }
    }
    for nested in section.sections {
        let mut schema = or_null(mapping(nested));
        merge(&mut schema, json!({ "description": nested.doc.trim() }));
        properties.insert(nested.name.to_owned(), schema);
    }
    json!({ "type": "object", "additionalProperties": false, "properties": properties })
}

/// The schemas of the three keys of [`RULES`], given that of a rule's settings.
fn rules(settings: &Json) -> [Json; 3] {
    let types: Map<String, Json> = LayerKind::ALL.iter().map(|kind| (kind.name().to_owned(), settings.clone())).collect();
    [
        settings.clone(),
        json!({ "type": ["object", "null"], "additionalProperties": false, "properties": types }),
        json!({ "type": ["object", "null"], "additionalProperties": settings }),
    ]
}

fn property(key: &dyn Declared) -> Json {
    let mut schema = or_null(key.schema());
    merge(&mut schema, json!({ "description": key.doc() }));
    if let Some(default) = key.default().value() {
        merge(&mut schema, json!({ "default": as_json(&default) }));
    }
    schema
}

/// The schema with `null` allowed, which is the same as leaving the key out.
fn or_null(schema: Json) -> Json {
    json!({ "anyOf": [schema, { "type": "null" }] })
}

fn merge(schema: &mut Json, more: Json) {
    let (Json::Object(schema), Json::Object(more)) = (schema, more) else { unreachable!("schemas are objects") };
    schema.extend(more);
}

fn as_json(value: &Value) -> Json {
    match value {
        Value::Null => Json::Null,
        Value::Boolean(value) => json!(value),
        Value::Integer(value) => json!(value),
        Value::Number(value) => json!(value),
        Value::Text(value) => json!(value),
        Value::List(values) => values.iter().map(|node| as_json(&node.value)).collect(),
        Value::Mapping(_) => unreachable!("no key has a mapping as its default"),
    }
}

/// The text with the tables of keys between its markers, `<!-- keys: SECTION -->` and `<!-- end
/// -->`, written anew. The section at the top of a config is called `the config`.
///
/// # Errors
/// The marker that names no section, or has no end.
pub fn with_tables(text: &str) -> Result<String, String> {
    const BEGIN: &str = "<!-- keys: ";
    const END: &str = "<!-- end -->";
    let mut written = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once(BEGIN) {
        let (name, after) = after.split_once(" -->").ok_or("a marker is not closed")?;
        let (_, after) = after.split_once(END).ok_or(format!("the table `{name}` has no end"))?;
        let section = sections().into_iter().find(|section| section.name == name);
        let section = section.ok_or(format!("there is no section `{name}`"))?;
        written += &format!("{before}{BEGIN}{name} -->\n\n{}\n{END}", table(section));
        rest = after;
    }
    Ok(written + rest)
}

/// Every section, those with the settings of rules included.
fn sections() -> Vec<&'static Section> {
    let nested = root::SECTION.sections.iter().flat_map(|section| [Some(*section), section.settings]);
    std::iter::once(&root::SECTION).chain(nested.flatten()).collect()
}

fn table(section: &Section) -> String {
    let mut table = "| key | values | default | |\n|---|---|---|---|\n".to_owned();
    for key in section.keys {
        let flag = key.flag().map_or(String::new(), |flag| format!(", `--{}`", flag.name));
        let default = match key.default() {
            Preset::Absent(text) => (*text).to_owned(),
            Preset::Texts(texts) => texts.iter().map(|text| format!("`{text}`")).collect::<Vec<_>>().join(", "),
            Preset::Text(text) => format!("`{text}`"),
            Preset::Boolean(_) | Preset::Integer(_) | Preset::Number(_) | Preset::Of(_) => {
                format!("`{}`", as_json(&key.default().value().expect("only an absent preset has no value")))
            }
        };
        let former = key.formerly().map_or(String::new(), |old| format!(" Its former name `{old}` is accepted with a warning."));
        table += &format!("| `{}`{flag} | {} | {default} | {}{former} |\n", key.name(), key.values(), key.doc());
    }
    if section.settings.is_some() {
        for (name, doc) in RULES {
            table += &format!("| `{name}` | settings, or `null` | | {doc} |\n");
        }
    }
    table
}
