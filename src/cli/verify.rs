//! `sdxl-squeeze verify`.

use std::path::{Path, PathBuf};

use sdxl_squeeze::container::Network;
use sdxl_squeeze::coreml::VerifiedFunction;
use sdxl_squeeze::pipeline::verify;
use sdxl_squeeze::{Error, Result, coreml, number};

use super::export::vectors_need;
use super::stdout;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// A container, or a Core ML package
    #[arg(value_name = "FILE.safetensors|X.mlpackage")]
    path: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: Args) -> Result<()> {
    if args.path.is_dir() && !args.path.join("Manifest.json").exists() {
        let problem =
            "is a folder, but no Core ML package, which has a Manifest.json; a container is a file; `inspect` shows models";
        return Err(Error::Argument(format!("{} {problem}", args.path.display())));
    }
    if args.path.is_dir() {
        return package(&args.path, args.json);
    }
    let checked = verify(&args.path)?;
    if args.json {
        return stdout::print_json(&checked);
    }
    stdout::print(&format!(
        "{}: whole, every hash holds\n{}{} compressed weights of {} elements, {:.3} bits each, {:.2} % zero; {} tensors in fp16; {}\n",
        args.path.display(),
        if checked.network == Network::Unet { String::new() } else { format!("{}: ", checked.network) },
        checked.weights,
        number::count(checked.weight_elements),
        checked.bits_per_weight,
        100.0 * checked.sparsity,
        checked.tensors,
        number::size(checked.bytes),
    ))
}

/// Verifies a Core ML package.
fn package(path: &Path, json: bool) -> Result<()> {
    let checked = coreml::verify(path)?;
    if json {
        return stdout::print_json(&checked);
    }
    let share = checked.pruned as f64 / (checked.compressed_elements.max(1)) as f64;
    let hashes = if checked.hashed { "every hash holds" } else { "it has no hashes, so only its structure is known to be whole" };
    stdout::print(&format!(
        "{}: whole, {hashes}\n{} operations; {} compressed weights of {} elements, {:.2} % zero; {} records; {}\n{}{}",
        path.display(),
        number::count(checked.operations as u64),
        number::count(checked.compressed as u64),
        number::count(checked.compressed_elements),
        100.0 * share,
        number::count(checked.blobs as u64),
        number::size(checked.bytes),
        vectors_need(checked.vectors),
        match &checked.functions[..] {
            [] => ends(&checked.inputs, &checked.outputs),
            functions => functions.iter().enumerate().map(|(i, function)| of_function(i, function)).collect(),
        },
    ))
}

/// Lines about a function of a package with several; the first is the default.
fn of_function(index: usize, function: &VerifiedFunction) -> String {
    let default = if index == 0 { ", the default" } else { "" };
    format!("function {}{default}\n{}", function.name, ends(&function.inputs, &function.outputs))
}

/// A line for each input and output.
fn ends(inputs: &[String], outputs: &[String]) -> String {
    let inputs = inputs.iter().map(|input| format!("in  {input}\n"));
    inputs.chain(outputs.iter().map(|output| format!("out {output}\n"))).collect()
}
