//! Compresses a UNet along its chain.
//!
//! The samples walk through the network by the stops of a [`Schedule`](crate::plan::Schedule): at
//! each stop Hessians are gathered on the output of the parts that are compressed already, layers
//! are solved, their weights are stored, and the samples advance. The loop is in `walk`;
//! compression (`solve`) and the error curves of a budget (`allocate`) are its visitors.
//!
//! Finished layers are in the [`Workspace`]; nothing of a finished stage stays in memory.

mod allocate;
mod batch;
mod beside;
mod captions;
mod carries;
mod container;
mod dense_outputs;
mod device_layer;
mod device_pack;
mod each_device;
mod forward;
mod gather;
mod identity;
mod input_block;
mod job;
mod kept;
mod layer;
mod lessons;
mod mean_bits;
mod networks;
mod one_layer;
mod output_gradients;
mod output_metrics;
mod overflows;
mod owners;
mod part;
mod prepare;
mod problem;
mod propagate;
mod report;
mod run;
mod samples;
mod shard;
mod solve;
mod statistics;
mod stored;
mod teacher;
mod team;
mod tries;
mod tuning;
mod walk;
mod watcher;
mod workspace;

pub use allocate::{Allocation, Choice, Expected, Forecast, choose};
pub use gather::Gatherer;
pub use identity::BUILD;
pub use job::{Calibration, Job, Machine, Model};
pub use layer::{CompressedLayer, Evidence, LayerErrors};
pub use mean_bits::MeanBits;
pub use networks::{NetworkPlan, NetworkReport, PreparedNetwork, check_disk_of};
pub use one_layer::compress_layer;
pub use prepare::{Prepared, plan_of_run};
pub use report::{JobReport, LayerReport};
pub use run::{compress, run};
pub use statistics::{PartStatistics, Statistics};
pub use tries::{Solved, Tries};
pub use workspace::{Workspace, is_unfinished, workspace_folder};
