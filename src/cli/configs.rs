//! `sdxl-squeeze configs`.

use std::path::PathBuf;

use sdxl_squeeze::checkpoint::ConfigFile;
use sdxl_squeeze::config::{BudgetTarget, LayerInfo, RunConfig};
use sdxl_squeeze::model::unet::{UnetChain, UnetConfig};
use sdxl_squeeze::recipe::{Recipe, layers_of, stored_bytes};
use sdxl_squeeze::shipped::{self, ShippedConfig};
use sdxl_squeeze::synth::Preset;
use sdxl_squeeze::{Error, Result, number};
use serde::Serialize;
use tracing::subscriber::NoSubscriber;

use super::{stdout, table};

#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(subcommand)]
    action: Option<Action>,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// Print a config as it is, to be changed and used as a file
    Show {
        /// The config, as it is listed
        #[arg(value_name = "NAME")]
        name: PathBuf,
    },
}

/// A config in the list.
#[derive(Debug, Serialize)]
struct Row {
    name: &'static str,
    /// Mean bits of a compressed weight; absent if the UNet is left as it is.
    bits_per_weight: Option<f64>,
    /// Bytes of the UNet's tensors.
    bytes: Option<u64>,
    summary: &'static str,
}

/// A UNet that configs are for, and its layers.
struct Network {
    chain: UnetChain,
    layers: Vec<LayerInfo>,
}

pub(super) fn run(args: Args) -> Result<()> {
    if let Some(Action::Show { name }) = &args.action {
        let Some(config) = shipped::config(name) else {
            // Reading it makes the error that names what was probably meant.
            RunConfig::read(name)?;
            return Err(Error::Argument(format!("{} is a file on the disk, and no config of the program", name.display())));
        };
        return stdout::print(config.yaml);
    }
    let (sdxl, bundled) = (Network::new(Preset::SdxlBase.unet_config())?, Network::new(shipped::bundled_unet()?)?);
    let of = |config: &ShippedConfig| if config.is_for_bundled() { &bundled } else { &sdxl };
    let rows = || shipped::configs().map(|config| Row::new(config, of(&config))).collect::<Result<Vec<_>>>();
    // What is said of a run, such as which layers stay in fp16, is of no use in a list.
    let rows = tracing::subscriber::with_default(NoSubscriber::default(), rows)?;
    if args.json {
        return stdout::print_json(&rows);
    }
    let mut table = table::new(&["config", "bits/weight", "size", ""]);
    for row in &rows {
        table.add_row([
            row.name.to_owned(),
            row.bits_per_weight.map_or(String::new(), |bits| number::fixed(bits, 2)),
            row.bytes.map_or(String::new(), number::size),
            row.summary.to_owned(),
        ]);
    }
    stdout::print(&format!(
        "{}\n\nsizes: the UNet of SDXL base, or for emoji/ that of the bundled model\n\
         use one by --config NAME; `sdxl-squeeze configs show NAME` prints one\n",
        table.trim_fmt()
    ))
}

impl Network {
    fn new(config: ConfigFile) -> Result<Self> {
        let chain = UnetChain::new(UnetConfig::parse(config)?);
        Ok(Network { layers: layers_of(&chain)?, chain })
    }
}

impl Row {
    fn new(shipped: ShippedConfig, network: &Network) -> Result<Self> {
        let config = RunConfig::parse(shipped.path.as_ref(), shipped.yaml.as_bytes())?;
        let (mut bits_per_weight, mut bytes) = (None, None);
        if config.compresses_unet() {
            let recipe = Recipe::new(&config, &network.chain)?;
            let (mut compressed, mut elements) = (0, 0);
            for layer in &network.layers {
                if let Some(recipe) = recipe.layers.get(&layer.name) {
                    compressed += stored_bytes(&layer.shape, recipe);
                    elements += layer.shape.iter().product::<i64>().unsigned_abs();
                }
            }
            let all: u64 = network.chain.tensors()?.iter().map(|tensor| tensor.numel()).sum();
            // The others are stored in fp16.
            let others = 2 * (all - elements);
            let compressed = match config.budget.map(|budget| budget.target) {
                None | Some(BudgetTarget::Error(_) | BudgetTarget::Psnr(_)) => compressed,
                Some(BudgetTarget::Bits(bits)) => (bits / 8.0 * elements as f64) as u64,
                Some(BudgetTarget::Size(bytes)) => bytes.saturating_sub(others),
            };
            (bits_per_weight, bytes) = (Some(8.0 * compressed as f64 / elements.max(1) as f64), Some(others + compressed));
        }
        Ok(Row { name: shipped.name, bits_per_weight, bytes, summary: shipped.summary() })
    }
}
