//! Compares a program with the network in its metadata.

use std::collections::BTreeMap;
use std::path::Path;

use sdxl_model::checkpoint::{ConfigFile, TensorSpec};
use sdxl_model::text::{ClipText, TextConfig};
use sdxl_model::unet::{UnetChain, UnetConfig};
use sdxl_model::vae::{VaeConfig, VaeDecoder, VaeEncoder};
use serde_json::Value;
use squeeze_base::error::Error;

use super::chunk;
use super::model::ModelFile;
use super::program::Checked;
use crate::element::{ArrayType, Element};
use crate::lower::{CAUSAL_MASK, compute_element, noise_tables};
use crate::package::{CONFIGS, OUTPUT_TYPE, TEXT_ENCODER_CONFIG, VAE_DECODER_CONFIG, VAE_ENCODER_CONFIG};
use crate::program::identifier;

/// The facts about a network that its program must have.
struct Network {
    /// Its name in messages.
    what: &'static str,
    tensors: Vec<TensorSpec>,
    /// Inputs and outputs, where the config tells them.
    ends: Option<Ends>,
    /// A layer whose operation has the name of the program's output.
    last: Option<&'static str>,
    /// The tables with which the program can make noise.
    tables: &'static [&'static str],
}

/// Inputs and outputs, in order.
struct Ends {
    inputs: Vec<(&'static str, ArrayType)>,
    outputs: Vec<(&'static str, ArrayType)>,
}

/// Whether every tensor of the network is there in its shape and used where it belongs, and inputs
/// and outputs are the network's; `false` if the model does not say what network it is.
pub(super) fn check(model: &ModelFile, program: &Checked) -> Result<bool, String> {
    let mut configs = CONFIGS.iter().filter_map(|key| Some((*key, model.entry(key)?)));
    let Some((key, config)) = configs.next() else { return Ok(false) };
    if let Some((other, _)) = configs.next() {
        return Err(format!("the metadata has both `{key}` and `{other}`"));
    }
    let Ok(Value::Object(config)) = serde_json::from_str(config) else { return Err(format!("`{key}` is not JSON")) };
    let network = network(model, key, ConfigFile::from_entries(Path::new(key), config), program)?;
    if let Some(ends) = &network.ends {
        check_ends("inputs", network.what, &ends.inputs, &program.inputs)?;
        check_ends("outputs", network.what, &ends.outputs, &program.outputs)?;
    }
    let makes_noise = model.entry(OUTPUT_TYPE).is_some();
    if makes_noise && !network.tables.iter().any(|table| program.values.contains_key(*table)) {
        return Err(format!(
            "`{OUTPUT_TYPE}` says that the program makes noise of what it predicts, but it has no tables for that"
        ));
    }
    check_tensors(&network, if makes_noise { network.tables } else { &[] }, program)?;
    Ok(true)
}

/// The network whose config has the metadata's `key`.
fn network(model: &ModelFile, key: &str, config: ConfigFile, program: &Checked) -> Result<Network, String> {
    let say = |why: Error| why.to_string();
    /// The sizes of a program's picture-like input; zeros if it is not one.
    fn pixels(program: &Checked) -> [u64; 2] {
        match program.inputs.first().map(|(_, array)| &array.shape[..]) {
            Some([_, _, height, width]) => [*height, *width],
            _ => [0; 2],
        }
    }
    let floats = |shape: &[u64]| ArrayType::new(Element::F32, shape);
    Ok(match key {
        TEXT_ENCODER_CONFIG => {
            let config = TextConfig::parse(config).map_err(say)?;
            let [length, width] = [config.max_position_embeddings, config.hidden_size].map(|n| n as u64);
            let pooled = config.projection_dim.unwrap_or(config.hidden_size) as u64;
            let inputs = vec![("input_ids", floats(&[1, length]))];
            let outputs = vec![("hidden_embeds", floats(&[1, length, width])), ("pooled_outputs", floats(&[1, pooled]))];
            let ends = Some(Ends { inputs, outputs });
            Network { what: "text encoder", tensors: ClipText::tensors(&config).map_err(say)?, ends, last: None, tables: &[] }
        }
        VAE_DECODER_CONFIG => {
            let config = VaeConfig::parse(config).map_err(say)?;
            let [height, width] = pixels(program);
            let [larger_height, larger_width] = [height, width].map(|n| n.saturating_mul(config.scale() as u64));
            let compute = compute_element(&config);
            let z = ArrayType::new(compute, [1, config.latent_channels as u64, height, width]);
            let image = floats(&[1, config.out_channels as u64, larger_height, larger_width]);
            let ends = Some(Ends { inputs: vec![("z", z)], outputs: vec![("image", image)] });
            let last = (compute == Element::F32).then_some("decoder.conv_out");
            Network { what: "VAE decoder", tensors: VaeDecoder::tensors(&config).map_err(say)?, ends, last, tables: &[] }
        }
        VAE_ENCODER_CONFIG => {
            let config = VaeConfig::parse(config).map_err(say)?;
            let [height, width] = pixels(program);
            let [smaller_height, smaller_width] = [height, width].map(|n| n / config.scale() as u64);
            let x = floats(&[1, config.out_channels as u64, height, width]);
            let latent = floats(&[1, 2 * config.latent_channels as u64, smaller_height, smaller_width]);
            let ends = Some(Ends { inputs: vec![("x", x)], outputs: vec![("latent", latent)] });
            let layer = if config.use_quant_conv { "quant_conv" } else { "encoder.conv_out" };
            let last = (compute_element(&config) == Element::F32).then_some(layer);
            Network { what: "VAE encoder", tensors: VaeEncoder::tensors(&config).map_err(say)?, ends, last, tables: &[] }
        }
        _ => {
            let chain = UnetChain::new(UnetConfig::parse(config).map_err(say)?);
            let portion = chunk::check(model, &chain, program)?;
            let tensors = portion.tensors(&chain).map_err(say)?;
            Network { what: "UNet", tensors, ends: None, last: None, tables: noise_tables(portion.begins(), portion.ends()) }
        }
    })
}

fn check_ends(
    which: &str,
    what: &str,
    expected: &[(&'static str, ArrayType)],
    found: &[(String, ArrayType)],
) -> Result<(), String> {
    let same = |((name, array), (found, other)): (&(&str, ArrayType), &(String, ArrayType))| name == found && array == other;
    if expected.len() == found.len() && expected.iter().zip(found).all(same) {
        return Ok(());
    }
    let expected: Vec<String> = expected.iter().map(|(name, array)| format!("{name}: {array}")).collect();
    Err(format!("the program's {which} are not those of this {what}: {}", expected.join(", ")))
}

/// Whether the program's constants are the network's tensors and `tables`, each used once, the
/// tensors by their layers.
fn check_tensors(network: &Network, tables: &[&str], program: &Checked) -> Result<(), String> {
    let Network { what, tensors, last, .. } = network;
    let mut users: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (operation, weights) in &program.weights {
        weights.iter().for_each(|weight| users.entry(weight).or_default().push(operation));
    }
    for tensor in tensors {
        let name = identifier(&tensor.name);
        let value = program.values.get(&name).ok_or_else(|| format!("there is no `{name}`"))?;
        // A Linear's weight can have two more dimensions, of 1.
        let shape: Vec<i64> = value.array.shape.iter().map(|n| *n as i64).collect();
        let rest = shape.strip_prefix(&tensor.shape[..]);
        if !value.constant || !matches!(rest, Some([] | [1, 1])) {
            return Err(format!("`{name}` is {}, not a constant of {:?}", value.array, tensor.shape));
        }
        let owner = tensor.name.rsplit_once('.').expect("a tensor is named after its layer, a dot and its part").0;
        let operation = match program.outputs.first() {
            Some((output, _)) if *last == Some(owner) => output.clone(),
            _ => identifier(owner),
        };
        if users.remove(name.as_str()).as_deref() != Some(&[operation.as_str()]) {
            return Err(format!("`{name}` is not used by `{operation}` alone"));
        }
    }
    for table in tables {
        if users.remove(table).is_some_and(|users| users.len() != 1) {
            return Err(format!("`{table}` is used more than once"));
        }
    }
    // Layers without a bias share zeros, and the layers of a text encoder the mask.
    match users.keys().find(|name| !name.starts_with("zeros_") && **name != CAUSAL_MASK) {
        Some(strange) => Err(format!("the weight `{strange}` is not of this {what}")),
        None => Ok(()),
    }
}
