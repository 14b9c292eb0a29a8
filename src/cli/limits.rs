//! The flags for the limits of a run.

use sdxl_squeeze::Result;
use sdxl_squeeze::config::RunConfig;
use sdxl_squeeze::memory::parse_size;
use sdxl_squeeze::recipe::RunOptions;

use super::device_limit;

/// The limits of a run.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct LimitArgs {
    /// Memory that the run may take, e.g. 8GiB [default: nine tenths of the device's free memory]
    #[arg(long, value_name = "SIZE")]
    memory_budget: Option<String>,
}

impl LimitArgs {
    /// The budget in bytes, if one is given.
    pub(super) fn budget(&self) -> Result<Option<u64>> {
        self.memory_budget.as_deref().map(parse_size).transpose()
    }

    /// The devices, dtype and limits that config and flags give. A budget for a GPU is enforced
    /// from here on.
    pub(super) fn options(&self, config: &RunConfig) -> Result<RunOptions> {
        let mut options = RunOptions { budget: self.budget()?, ..RunOptions::of(config)? };
        let device = options.placement().device;
        if device.is_cuda() {
            match options.budget {
                Some(budget) => device_limit::set(device, budget),
                // Once libtorch keeps freed blocks, less seems to be free.
                None => options.budget = Some(options.memory_budget()?),
            }
        }
        Ok(options)
    }
}
