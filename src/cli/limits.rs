//! The flags for the limits of a run.

use sdxl_squeeze::Result;
use sdxl_squeeze::config::RunConfig;
use sdxl_squeeze::memory::parse_size;
use sdxl_squeeze::recipe::RunOptions;

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

    /// The devices, dtype and limits that config and flags give.
    pub(super) fn options(&self, config: &RunConfig) -> Result<RunOptions> {
        Ok(RunOptions { budget: self.budget()?, ..RunOptions::of(config)? })
    }
}
