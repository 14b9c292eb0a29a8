//! Checks every function of a program, and that they share the weights.

use super::blobs::Blobs;
use super::model::ModelFile;
use super::network;
use super::program::{self, Checked};

/// Checks the functions and returns them by their names, the default one first, and whether each is
/// exactly the network in the metadata. The functions of a package of this library must share every
/// weight.
pub(super) fn check(model: &ModelFile, blobs: &Blobs, ours: bool) -> Result<(Vec<(String, Checked)>, bool), String> {
    let names = model.functions()?;
    let several = names.len() > 1;
    let mut functions: Vec<(String, Checked)> = Vec::new();
    let mut named = true;
    for name in names {
        let check = || -> Result<(Checked, bool), String> {
            let function = program::check(model.program(), &name, blobs)?;
            model.check_description(&name, &function)?;
            let is_named = network::check(model, &function)?;
            if let (true, Some((first, shared))) = (ours, functions.first()) {
                check_shared(first, shared, &function)?;
            }
            Ok((function, is_named))
        };
        let place = |problem: String| if several { format!("function `{name}`: {problem}") } else { problem };
        let (function, is_named) = check().map_err(place)?;
        named &= is_named;
        functions.push((name, function));
    }
    Ok((functions, named))
}

/// Checks that constants of one name and one type are the same records as in the default function
/// `first`: a weight that is stored twice takes twice the place, and may be another.
fn check_shared(first: &str, shared: &Checked, function: &Checked) -> Result<(), String> {
    let array = |of: &Checked, name: &str| of.values.get(name).map(|value| value.array.clone());
    for (name, records) in &function.records {
        let same_type = array(shared, name) == array(function, name);
        if same_type && shared.records.get(name) != Some(records) {
            return Err(format!("`{name}` is not the record that it is in the function `{first}`"));
        }
    }
    Ok(())
}
