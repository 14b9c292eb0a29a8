//! The run that `compress` is asked for: by a config, or by a size alone.

use std::path::{Path, PathBuf};

use sdxl_squeeze::compare::Shipped;
use sdxl_squeeze::config::{Edit, RunConfig};
use sdxl_squeeze::memory::parse_file_size;
use sdxl_squeeze::pipeline::DenseUnet;
use sdxl_squeeze::recipe::layers_of;
use sdxl_squeeze::{Error, Result, number, shipped};

use super::edits::Edits;
use super::opened::Opened;

/// A run, and its model.
pub(super) struct Wanted {
    /// The path of the config, which names it in messages.
    pub path: PathBuf,
    pub config: RunConfig,
    pub model: Opened,
    /// The most bytes of the container, if a size was asked for.
    pub size: Option<u64>,
}

/// The flags that set a size or a closeness.
const TARGETS: [&str; 4] = ["target-bits", "target-size", "target-error", "target-psnr"];

impl Wanted {
    /// The run of a config.
    pub(super) fn by_config(path: &Path, edits: &Edits) -> Result<Self> {
        let config = edits.config(path)?;
        Ok(Wanted { path: path.to_owned(), model: Opened::of(&config)?, config, size: None })
    }

    /// The run of the program's own config for all means of compression, with a budget that makes a
    /// container of at most `size`.
    pub(super) fn by_size(size: &str, edits: &Edits) -> Result<Self> {
        let most = parse_file_size(size).map_err(|why| Error::Argument(format!("--size: {why}")))?;
        if let Some(flag) = edits.first_of(&TARGETS) {
            return Err(Error::Argument(format!("--size and --{flag} both set the size; give one")));
        }
        let base = Shipped::BASE.config();
        // Only the model tells how large the header will be.
        let model = Opened::of(&edits.shipped_with(base, None)?)?;
        let header = header_bytes(model.unet())?;
        let Some(tensors) = most.checked_sub(header).filter(|bytes| *bytes > 0) else {
            return Err(Error::Argument(format!(
                "--size {size} is too little: the names and the report of the file's tensors take about {} bytes alone",
                number::count(header)
            )));
        };
        let config = edits.shipped_with(base, Some(Edit::new("target-size", format!("{tensors} B"))?))?;
        Ok(Wanted { path: base.path.into(), config, model, size: Some(most) })
    }
}

/// The most bytes of a container's header, by estimate: tensors with their names and places, and
/// for each layer a row of the report and a rule of the recipe. The header of the bundled model,
/// with 264 layers, has 277 kB.
fn header_bytes(unet: DenseUnet<'_>) -> Result<u64> {
    const WHOLE: u64 = 16 << 10;
    const LAYER: u64 = 1300;
    const TENSOR: u64 = 160;
    let (layers, tensors) = (layers_of(unet.chain())?.len() as u64, unet.chain().tensors()?.len() as u64);
    Ok(WHOLE + LAYER * layers + TENSOR * tensors.saturating_sub(layers))
}

/// The error about a command that names neither a config nor a size.
pub(super) fn nothing() -> Error {
    let names: Vec<&str> = shipped::configs().map(|config| config.name).collect();
    Error::Argument(format!(
        "what to compress to? give --size SIZE, such as 1GB, for the best file of that size, or --config, a YAML file or one of the \
         program's own configs: {}; `sdxl-squeeze configs` says what they do",
        names.join(", ")
    ))
}

#[cfg(test)]
mod tests {
    use clap::{Args as _, Command, FromArgMatches};
    use sdxl_squeeze::config::BudgetTarget;

    use super::*;

    fn edits(flags: &[&str]) -> Edits {
        let command = Edits::augment_args(Command::new("compress"));
        let model = ["compress", "--model", concat!(env!("CARGO_MANIFEST_DIR"), "/models/emoji-sdxl")];
        Edits::from_arg_matches(&command.get_matches_from(model.iter().chain(flags))).unwrap()
    }

    #[test]
    fn a_size_is_that_of_the_tensors_and_of_the_header() {
        let wanted = Wanted::by_size("3.5MB", &edits(&[])).unwrap();
        let header = header_bytes(wanted.model.unet()).unwrap();
        // A container of the bundled model with a rule for each layer, whose header has 277,424
        // bytes: squeeze-as-s50, with output probes.
        assert!((277_424 * 11 / 10..277_424 * 2).contains(&header), "{header}");
        assert_eq!(wanted.size, Some(3_500_000));
        let budget = wanted.config.budget.unwrap();
        assert_eq!(budget.target, BudgetTarget::Size(3_500_000 - header));
        assert_eq!(wanted.path, Path::new("configs/squeeze-3bits.yaml"));
        for (size, flags) in [("1MB", &["--target-psnr", "30"][..]), ("100kB", &[]), ("1 GXB", &[])] {
            let refused = Wanted::by_size(size, &edits(flags)).err().unwrap();
            assert!(refused.is_bad_input() && refused.to_string().contains("--size"), "{refused}");
        }
    }
}
