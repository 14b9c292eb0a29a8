//! What a run will do, before it does anything: sizes, memory, passes over the samples, work.

mod disk;
mod memory;
mod size;
mod stage;
mod work;

use serde::Serialize;

pub use disk::Disk;
pub(crate) use disk::{check as check_disk, of_samples, taken};
pub(crate) use memory::of_batch;
pub use memory::{Memory, WAITING};
pub use size::{kept, stored_bytes};
pub use stage::StagePlan;
pub use work::{Work, measured_rate};

use crate::calibration::Calls;
use crate::checkpoint::Blueprint;
use crate::error::{Error, Result};
use crate::model::unet::{CarryShape, UnetChain};
use crate::model::{Layer, LayerInput};
use crate::number;
use crate::recipe::{LayerRecipes, Sequencing};
use crate::solver::Hessian;
use stage::Outline;

/// Where recorded carries wait between the stages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CarriesIn {
    /// There are none: no layer needs a Hessian.
    Nowhere,
    /// The device's memory.
    Memory,
    /// Files beside the result.
    Files,
}

/// What a run will do.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    /// The stages, in the order in which they run.
    pub stages: Vec<StagePlan>,
    /// Bytes of the result's tensors.
    pub payload_bytes: u64,
    /// Bytes of the compressed weights among them.
    pub compressed_bytes: u64,
    /// Elements of the compressed weights.
    pub compressed_elements: u64,
    /// The share of them that is pruned.
    pub sparsity: f64,
    /// What calibration runs on; none if no layer needs it.
    pub calls: Option<Calls>,
    /// Where carries wait.
    pub carries: CarriesIn,
    /// Bytes for layers of one shape to be pruned in one batch; 0: one by one.
    pub batch_bytes: u64,
    /// Bytes of all carries at their largest.
    pub carry_bytes: u64,
    /// The most bytes at once, by estimate. Calibration runs are not in it.
    pub peak_bytes: u64,
    /// What it takes on the disk.
    pub disk: Disk,
    /// What it computes, calibration runs not counted.
    pub work: Work,
}

impl Plan {
    /// Plans the recipe of a UNet. `bytes_of` says how many bytes an element of a tensor takes in memory, by its name; `calls` are
    /// needed if a recipe needs Hessians.
    ///
    /// # Errors
    /// [`Error::Argument`] if the memory does not do, naming the least that would.
    pub fn new(
        chain: &UnetChain,
        recipes: &LayerRecipes,
        sequencing: Sequencing,
        calls: Option<Calls>,
        memory: Memory,
        bytes_of: &dyn Fn(&str) -> usize,
    ) -> Result<Self> {
        let calls = calls.filter(|_| recipes.values().any(|recipe| recipe.needs_hessian()));
        let attempt = |memory, carries| Plan::with_carries(chain, recipes, sequencing, calls, memory, bytes_of, carries);
        if calls.is_none() {
            let plan = attempt(memory, CarriesIn::Nowhere)?;
            let (least, budget) = (plan.peak_bytes, memory.budget);
            let few = || {
                Error::Argument(format!("{} of memory are too little; {} would do", number::size(budget), number::size(least)))
            };
            return if least > budget { Err(few()) } else { Ok(plan) };
        }
        let in_files = attempt(memory, CarriesIn::Files);
        let in_memory = attempt(memory, CarriesIn::Memory);
        let passes = |plan: &Plan| plan.stages.iter().map(|stage| stage.passes).sum::<usize>();
        match (in_memory, in_files) {
            (Ok(in_memory), Ok(in_files)) if passes(&in_files) < passes(&in_memory) => Ok(in_files),
            (Ok(in_memory), _) => Ok(in_memory),
            (Err(_), Ok(in_files)) => Ok(in_files),
            (Err(_), Err(why)) => {
                // The least that works, to a MiB.
                let enough = |budget: u64| attempt(Memory { budget, ..memory }, CarriesIn::Files).is_ok();
                let (mut low, mut high) = (memory.budget >> 20, 1 << 26);
                while low + 1 < high {
                    let middle = (low + high) / 2;
                    if enough(middle << 20) { high = middle } else { low = middle }
                }
                Err(Error::Argument(format!("{why}; {} would do", number::size(high << 20))))
            }
        }
    }

    fn with_carries(
        chain: &UnetChain,
        recipes: &LayerRecipes,
        sequencing: Sequencing,
        calls: Option<Calls>,
        memory: Memory,
        bytes_of: &dyn Fn(&str) -> usize,
        carries: CarriesIn,
    ) -> Result<Self> {
        let mut memory = memory;
        if !recipes.values().any(|recipe| recipe.batch_options().is_some()) {
            memory.batch = 0;
        }
        let (mut pruned, mut elements, mut compressed_bytes) = (0, 0, 0);
        let mut count = |layers: &[Layer]| {
            for layer in layers {
                let Some(recipe) = recipes.get(layer.name()) else { continue };
                let size = layer.weight().size();
                let (o, d) = (size[0].unsigned_abs(), size.iter().skip(1).product::<i64>().unsigned_abs());
                pruned += o * d - kept(o, d, recipe);
                elements += o * d;
                compressed_bytes += stored_bytes(&size, recipe);
            }
        };
        let blueprint = Blueprint::default();
        count(chain.load_head(&blueprint)?.layers());
        count(chain.load_tail(&blueprint)?.layers());
        let mut built = Vec::new();
        for spec in chain.stages() {
            let own = Blueprint::default();
            let stage = spec.load(&own)?;
            count(stage.layers());
            built.push((stage, own.into_tensors()));
        }
        if calls.is_some() {
            for shared in [LayerInput::Text, LayerInput::Time] {
                let layers = built.iter().flat_map(|(stage, _)| stage.layers());
                let found = layers.filter(|layer| *layer.input() == shared).map(|layer| {
                    let size = layer.weight().size();
                    Hessian::bytes(layer.kind(), &size) + Hessian::factor_bytes(layer.kind(), &size)
                });
                memory.shared += found.max().unwrap_or(0);
            }
        }

        let mut carry = calls.map_or(CarryShape { hidden_states: [0; 3], down_block_res_samples: Vec::new() }, |calls| {
            chain.first_carry(calls.height, calls.width)
        });
        let mut plan = Plan {
            stages: Vec::new(),
            payload_bytes: 0,
            compressed_bytes,
            compressed_elements: elements,
            sparsity: pruned as f64 / f64::max(elements as f64, 1.0),
            calls,
            carries,
            batch_bytes: memory.batch,
            carry_bytes: 0,
            peak_bytes: 0,
            disk: Disk {
                samples: calls.map_or(0, |calls| of_samples(&calls, chain.config())),
                carries: 0,
                carries_left: 0,
                parts: compressed_bytes,
                result: 0,
            },
            work: Work::default(),
        };
        let runs = if sequencing.has_dense_target() { 2 } else { 1 };
        let of_carries = |numbers: i64| {
            calls.map_or(0, |calls| runs * memory.element_bytes * (calls.count as i64 * calls.batch * numbers).unsigned_abs())
        };
        // Of the parts of a transformer a carry has tokens too, as many as its features; their files stay until there are others.
        let features = |carry: &CarryShape| carry.hidden_states.iter().product::<i64>();
        let mut tokens = features(&carry);
        for (spec, (stage, tensors)) in chain.stages().iter().zip(&built) {
            let after = spec.after(&carry);
            let resident_bytes = tensors.iter().map(|tensor| tensor.numel() * bytes_of(&tensor.name) as u64).sum();
            let bytes = of_carries(carry.numel().max(after.numel()));
            tokens = tokens.max(features(&after));
            plan.carry_bytes = plan.carry_bytes.max(bytes);
            let held = if carries == CarriesIn::Memory { bytes } else { 0 };
            let (layers, before) = (stage.layers(), carry);
            let joined = calls.map_or(1, |calls| calls.joined(chain.first_carry(calls.height, calls.width).numel()) as i64);
            let name = spec.name();
            let outline = Outline { name, stage, layers, sequencing, joined, resident_bytes, before, after: after.clone() };
            let stage = outline.plan(recipes, calls.as_ref(), &memory, held)?;
            plan.peak_bytes = plan.peak_bytes.max(stage.peak_bytes);
            plan.work += stage.work;
            plan.stages.push(stage);
            carry = after;
        }
        let plain = chain
            .tensors()?
            .into_iter()
            .filter(|tensor| tensor.name.strip_suffix(".weight").is_none_or(|layer| !recipes.contains_key(layer)));
        plan.payload_bytes = compressed_bytes + plain.map(|tensor| 2 * tensor.numel()).sum::<u64>();
        plan.disk.result = plan.payload_bytes;
        if carries == CarriesIn::Files {
            plan.disk.carries = plan.carry_bytes + of_carries(tokens);
            plan.disk.carries_left = of_carries(carry.numel() + tokens);
        }
        Ok(plan)
    }
}
