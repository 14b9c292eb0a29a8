//! The schedule of a run: every stop that the samples make on their way through the network.
//!
//! A stop gathers Hessians, solves layers, stores them, and lets the samples advance, each of the
//! four only where it has something to do. Planning prices the stops and compression executes them.

use sdxl_model::LayerInput;
use sdxl_model::unet::{Part, PartName, Scope};

use super::need::Need;
use super::work::Work;

/// The stops of a run, in order.
#[derive(Debug, Clone, Default)]
pub struct Schedule {
    /// The stops. Those of one part follow each other, and the parts are in the order of the chain.
    pub stops: Vec<Stop>,
    /// Whether layers are fitted to the outputs of the dense network, which runs beside the
    /// compressed one.
    pub has_dense_target: bool,
    /// Whether samples are held out of the Hessians, to validate the joint solver on.
    pub holds_out: bool,
}

/// One stop of the samples.
#[derive(Debug, Clone)]
pub struct Stop {
    /// The part of the network.
    pub part: PartName,
    /// The portion of the part that the samples are sent through.
    pub scope: Scope,
    /// The inputs whose Hessians are needed.
    pub gather: Gather,
    /// The names of the layers that are solved, in execution order.
    pub layers: Vec<String>,
    /// Whether the part leaves the device before the layers are solved, because there is no memory
    /// for both.
    pub unloads: bool,
    /// The step that follows once the layers are stored.
    pub then: Then,
    /// The most bytes in use at once, by estimate.
    pub bytes: u64,
    /// Bytes of the Hessians that are gathered.
    pub hessian_bytes: u64,
    /// Multiply-adds, by estimate.
    pub work: Work,
}

/// Where the Hessians of a stop come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Gather {
    /// None are needed.
    Nothing,
    /// One pass of the samples through the stop's scope, which sums all of these inputs.
    Samples(Vec<LayerInput>),
    /// An input of text or time, which is summed once for the whole network.
    Shared(LayerInput),
}

/// The step that follows once the layers of a stop are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    /// The part stays dense, because the next stop gathers behind its dense layers too.
    Stay,
    /// The stop's layers get their stored weights.
    Install,
    /// All layers of the scope get their stored weights, and the samples advance past it.
    Advance,
}

impl Gather {
    /// The inputs whose Hessians are needed.
    #[must_use]
    pub fn inputs(&self) -> &[LayerInput] {
        match self {
            Gather::Nothing => &[],
            Gather::Samples(inputs) => inputs,
            Gather::Shared(input) => std::slice::from_ref(input),
        }
    }
}

impl Schedule {
    /// The most bytes in use at once, by estimate.
    #[must_use]
    pub fn peak_bytes(&self) -> u64 {
        self.stops.iter().map(|stop| stop.bytes).max().unwrap_or(0)
    }

    /// Whether the samples have to advance past the stop `index`, because a later stop needs them:
    /// one of those for which `gathers` says that a Hessian is still missing.
    pub fn advances(&self, index: usize, gathers: &dyn Fn(&Stop) -> bool) -> bool {
        let stop = &self.stops[index];
        let needs_samples = |later: &Stop| match later.gather {
            Gather::Nothing => false,
            // Text and time are summed while the input block makes the first carries.
            Gather::Shared(_) => stop.part == PartName::InputBlock,
            Gather::Samples(_) => true,
        };
        stop.then == Then::Advance && self.stops[index + 1..].iter().any(|later| needs_samples(later) && gathers(later))
    }
}

/// The stops of a stage whose Hessians all come from its dense layers. `wave_fits` says whether the
/// Hessians of some inputs can be gathered in one pass. `rest` are the names of the layers that
/// need no Hessian.
pub(super) fn by_stage(
    name: PartName,
    needs: &[Need<'_>],
    rest: Vec<String>,
    wave_fits: &dyn Fn(&[&Need<'_>]) -> bool,
) -> Vec<Stop> {
    let mut waves: Vec<Vec<&Need>> = Vec::new();
    for need in needs.iter().filter(|need| need.is_gathered()) {
        match waves.last_mut() {
            Some(wave) if wave_fits(&[&wave[..], &[need]].concat()) => wave.push(need),
            Some(_) | None => waves.push(vec![need]),
        }
    }
    let stop = |gather, layers, then| Stop::new(name, Scope::Whole, gather, layers, then);
    let wave_stop = |wave: &Vec<&Need>| {
        let layers = wave.iter().flat_map(|need| need.names()).collect();
        stop(Gather::Samples(wave.iter().map(|need| need.input.clone()).collect()), layers, Then::Stay)
    };
    let shared = needs.iter().filter(|need| !need.is_gathered());
    let shared = shared.map(|need| stop(Gather::Shared(need.input.clone()), need.names().collect(), Then::Stay));
    let last = stop(Gather::Nothing, rest, Then::Advance);
    waves.iter().map(wave_stop).chain(shared).chain([last]).collect()
}

/// The stops of a part, block by block and in each block input by input, so that every Hessian
/// comes from samples that have passed the stored layers before it. `rest` are the names of the
/// layers that need no Hessian.
pub(super) fn by_block(name: PartName, part: &Part, needs: &[Need<'_>], rest: &[String]) -> Vec<Stop> {
    let mut stops = Vec::new();
    for block in 0..part.blocks() {
        let scope = Scope::Block(block);
        let in_block = |name: &str| part.scope_has(scope, name);
        let begin = stops.len();
        // Text and time do not depend on other layers of the block.
        for is_gathered in [false, true] {
            for need in needs.iter().filter(|need| need.is_gathered() == is_gathered) {
                let layers: Vec<String> = need.names().filter(|name| in_block(name)).collect();
                if !layers.is_empty() {
                    stops.push(Stop::new(name, scope, gather_alone(need), layers, Then::Install));
                }
            }
        }
        let rest = rest.iter().filter(|name| in_block(name)).cloned();
        match stops[begin..].last_mut() {
            Some(last) => {
                last.layers.extend(rest);
                last.then = Then::Advance;
            }
            None => stops.push(Stop::new(name, scope, Gather::Nothing, rest.collect(), Then::Advance)),
        }
    }
    stops
}

/// The request for the input of `need` alone.
fn gather_alone(need: &Need<'_>) -> Gather {
    match need.input {
        LayerInput::Features(_) => Gather::Samples(vec![need.input.clone()]),
        LayerInput::Text | LayerInput::Time => Gather::Shared(need.input.clone()),
    }
}

impl Stop {
    fn new(part: PartName, scope: Scope, gather: Gather, layers: Vec<String>, then: Then) -> Self {
        Stop { part, scope, gather, layers, unloads: false, then, bytes: 0, hessian_bytes: 0, work: Work::default() }
    }
}
