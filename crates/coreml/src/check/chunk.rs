//! Compares the inputs and outputs of a chunk with the parts that its metadata names.

use sdxl_model::unet::UnetChain;

use super::model::ModelFile;
use super::program::Checked;
use crate::chunk::{CHUNK, read_chunk};
use crate::element::{ArrayType, Element};
use crate::options::{BoundarySizes, Layout, check_latents};
use crate::package::{LAYOUT, OUTPUT_TYPE};
use crate::portion::Portion;

/// The output of a UNet's program.
const PREDICTION: &str = "noise_pred";

/// The portion of the UNet that the package computes. If it is a chunk, its own inputs are those
/// that its parts read, and what it is passed and passes on has the names and types that the other
/// chunk's have.
///
/// # Errors
/// What is wrong, if the package is not such a chunk.
pub(super) fn check(model: &ModelFile, chain: &UnetChain, program: &Checked) -> Result<Portion, String> {
    let Some(entry) = model.entry(CHUNK) else { return Ok(Portion::whole(chain)) };
    let portion = read_chunk(entry, chain)?;
    let sizes = sizes(model, chain, program)?;
    let converts = model.entry(OUTPUT_TYPE).is_some();
    let own = portion.inputs(chain, converts);
    let (given, passed) = program.inputs.split_at(own.len().min(program.inputs.len()));
    if !given.iter().map(|(name, _)| name.as_str()).eq(own.iter().copied()) {
        return Err(format!("the inputs do not begin with those that this chunk reads of the UNet's: {}", own.join(", ")));
    }
    same("inputs", "is passed", &portion.passed_in(chain, sizes), passed)?;
    if portion.ends() {
        let BoundarySizes { batch, latents: [height, width], .. } = sizes;
        let shape = [batch, chain.config().out_channels, height, width].map(|n| n as u64);
        same("outputs", "makes", &[(PREDICTION.to_owned(), ArrayType::new(Element::F32, shape))], &program.outputs)?;
    } else {
        same("outputs", "passes on", &portion.passed_on(chain, sizes), &program.outputs)?;
    }
    Ok(portion)
}

/// The sizes by the chunk's latents, or by its output in a chunk that is not given them.
fn sizes(model: &ModelFile, chain: &UnetChain, program: &Checked) -> Result<BoundarySizes, String> {
    let images = program.inputs.iter().filter(|(name, _)| name == "sample");
    let images = images.chain(program.outputs.iter().filter(|(name, _)| name == PREDICTION));
    let shape = images.map(|(_, array)| &array.shape[..]).next();
    let Some([batch, _, height, width]) = shape else { return Err("the chunk has neither latents nor a prediction".into()) };
    let [batch, height, width] = [batch, height, width].map(|n| i64::try_from(*n).unwrap_or(i64::MAX));
    check_latents([height, width], chain.config()).map_err(|why| why.to_string())?;
    let layout = model.entry(LAYOUT).and_then(Layout::of_name);
    let layout = layout.ok_or_else(|| format!("the metadata is damaged: `{LAYOUT}` names no layout"))?;
    Ok(BoundarySizes { batch, latents: [height, width], layout })
}

fn same(which: &str, verb: &str, expected: &[(String, ArrayType)], found: &[(String, ArrayType)]) -> Result<(), String> {
    if expected == found {
        return Ok(());
    }
    let expected: Vec<String> = expected.iter().map(|(name, array)| format!("{name}: {array}")).collect();
    Err(format!("the {which} are not what this chunk {verb}: {}", expected.join(", ")))
}
