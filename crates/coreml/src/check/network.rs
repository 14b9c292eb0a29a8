//! Compares a program with the UNet in its metadata.

use std::collections::BTreeMap;
use std::path::Path;

use sdxl_model::checkpoint::ConfigFile;
use sdxl_model::unet::{UnetChain, UnetConfig};
use serde_json::Value;

use super::model::ModelFile;
use super::program::Checked;
use crate::package::UNET_CONFIG;
use crate::program::identifier;

/// Whether every tensor of the UNet is there in its shape and used where it belongs; `false` if the
/// model does not say what UNet it is.
pub(super) fn check(model: &ModelFile, program: &Checked) -> Result<bool, String> {
    let Some(config) = model.entry(UNET_CONFIG) else { return Ok(false) };
    let Ok(Value::Object(config)) = serde_json::from_str(config) else { return Err(format!("`{UNET_CONFIG}` is not JSON")) };
    let config = UnetConfig::parse(ConfigFile::from_entries(Path::new(UNET_CONFIG), config)).map_err(|why| why.to_string())?;
    let tensors = UnetChain::new(config).tensors().map_err(|why| why.to_string())?;

    let mut users: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (operation, weights) in &program.weights {
        weights.iter().for_each(|weight| users.entry(weight).or_default().push(operation));
    }
    for tensor in &tensors {
        let name = identifier(&tensor.name);
        let value = program.values.get(&name).ok_or_else(|| format!("there is no `{name}`"))?;
        // A Linear's weight can have two more dimensions, of 1.
        let shape: Vec<i64> = value.array.shape.iter().map(|n| *n as i64).collect();
        let rest = shape.strip_prefix(&tensor.shape[..]);
        if !value.constant || !matches!(rest, Some([] | [1, 1])) {
            return Err(format!("`{name}` is {}, not a constant of {:?}", value.array, tensor.shape));
        }
        let owner = tensor.name.rsplit_once('.').expect("a tensor is named after its layer, a dot and its part").0;
        if users.remove(name.as_str()).as_deref() != Some(&[identifier(owner).as_str()]) {
            return Err(format!("`{name}` is not used by `{}` alone", identifier(owner)));
        }
    }
    // Layers without a bias share zeros.
    match users.keys().find(|name| !name.starts_with("zeros_")) {
        Some(strange) => Err(format!("the weight `{strange}` is not of this UNet")),
        None => Ok(true),
    }
}
