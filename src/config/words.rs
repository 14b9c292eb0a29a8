//! Enums whose values are words in a config.

use sdxl_model::scheduler::SpacingKind;
use serde::{Serialize, Serializer};
use squeeze_codebook::{Grid, OnMisfit, PruneMethod};

/// The names of an enum's values in a config.
pub(super) trait Words: Copy + 'static {
    fn words() -> Vec<(&'static str, Self)>;
}

/// How mask, weights and palette of a layer are found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum SolverKind {
    /// `sequential`: a layer is pruned, then palettized without a look at its inputs, as
    /// coremltools does.
    Sequential,
    /// `joint`: mask, weights and palettes together, for the least error of the layer's output; see
    /// [`joint`](squeeze_solver::joint()). Palettes are calibrated too.
    #[default]
    Joint,
}

/// Which inputs a layer is compressed for (the key `sequencing`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum SequencingWord {
    /// `stage`: the inputs that the dense layers of its stage produce. The default of the
    /// sequential solver.
    Stage,
    /// `sublayer`: the inputs that the already compressed layers before it produce, which takes
    /// more passes over the samples. The default of the joint solver.
    #[default]
    Sublayer,
}

/// Which outputs a compressed layer is fitted to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Target {
    /// `current`: those of its own dense weights on the inputs that it is compressed for.
    Current,
    /// `dense`: those of the dense network, so that errors of earlier layers are corrected too.
    /// Needs the joint solver and `sequencing: sublayer`, whose default it is.
    #[default]
    Dense,
}

/// Weight of each sample in the Hessians, by its timestep.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum TimestepWeighting {
    /// `uniform`: equal weights.
    #[default]
    Uniform,
    /// `early`: sigma, the noise to signal ratio, which is large in the early steps that decide the
    /// content of a picture.
    Early,
    /// `log`: ln(1 + sigma).
    Log,
}

/// How much the error of a call counts where the UNet is tuned.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum TuneWeighting {
    /// `effect`: by how far it reaches the final latents, which is measured.
    #[default]
    Effect,
    /// `uniform`: all calls alike.
    Uniform,
}

/// What the UNet is given beside the noisy latents, and by which sampler it is run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Feed {
    /// `diffusers`: as diffusers' pipeline and this program's `generate`.
    #[default]
    Diffusers,
    /// `swift`: as `ml-stable-diffusion`, Apple's pipeline for packages. The empty negative prompt
    /// is encoded, the time ids are those of 1,024 x 1,024 pixels at every size, both halves of
    /// guidance are always computed, and the sampler is PLMS or DPM++ 2M.
    Swift,
}

impl Feed {
    /// Both feeds.
    pub const ALL: [Feed; 2] = [Feed::Diffusers, Feed::Swift];
}

/// The values of the key `granularity`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum GranularityWord {
    /// `per_tensor`: one palette for the whole weight.
    PerTensor,
    /// `per_grouped_channel`: one palette for each group of channels.
    PerGroupedChannel,
}

/// The values of the key `values`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ValuesWord {
    /// `kmeans`: palettes that fit the weights.
    Kmeans,
    /// `int`: whole numbers.
    Int,
    /// `nf4`: NF4.
    Nf4,
}

impl ValuesWord {
    /// The fixed values that the word names, if it names any.
    pub(super) fn grid(self) -> Option<Grid> {
        match self {
            ValuesWord::Kmeans => None,
            ValuesWord::Int => Some(Grid::Int),
            ValuesWord::Nf4 => Some(Grid::Nf4),
        }
    }

    /// The word for fixed values.
    pub(super) fn of(grid: Grid) -> Self {
        match grid {
            Grid::Int => ValuesWord::Int,
            Grid::Nf4 => ValuesWord::Nf4,
        }
    }
}

/// Gives an enum the names of its values.
macro_rules! words {
    ($kind:ident, $($word:literal => $value:ident),+) => {
        impl Words for $kind {
            fn words() -> Vec<(&'static str, Self)> {
                vec![$(($word, $kind::$value)),+]
            }
        }

        impl $kind {
            /// The name in a config.
            #[allow(unreachable_pub, reason = "some of the enums are private, others public")]
            pub fn name(self) -> &'static str {
                match self {
                    $($kind::$value => $word),+
                }
            }
        }

        impl Serialize for $kind {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.name())
            }
        }
    };
}

words!(SolverKind, "sequential" => Sequential, "joint" => Joint);
words!(SequencingWord, "stage" => Stage, "sublayer" => Sublayer);
words!(Target, "current" => Current, "dense" => Dense);
words!(TimestepWeighting, "uniform" => Uniform, "early" => Early, "log" => Log);
words!(TuneWeighting, "effect" => Effect, "uniform" => Uniform);
words!(Feed, "diffusers" => Diffusers, "swift" => Swift);
words!(ValuesWord, "kmeans" => Kmeans, "int" => Int, "nf4" => Nf4);
words!(GranularityWord, "per_tensor" => PerTensor, "per_grouped_channel" => PerGroupedChannel);

impl Words for PruneMethod {
    fn words() -> Vec<(&'static str, Self)> {
        PruneMethod::ALL.map(|method| (method.name(), method)).into()
    }
}

impl Words for SpacingKind {
    fn words() -> Vec<(&'static str, Self)> {
        [SpacingKind::Leading, SpacingKind::Trailing, SpacingKind::Linspace].map(|kind| (kind.name(), kind)).into()
    }
}

impl Words for OnMisfit {
    fn words() -> Vec<(&'static str, Self)> {
        OnMisfit::ALL.map(|policy| (policy.name(), policy)).into()
    }
}

impl SolverKind {
    /// The default: joint, unless weights are pruned by magnitude or get fixed values.
    pub(super) fn that_can(prune: Option<PruneMethod>, fixed: Option<Grid>) -> Self {
        match (prune, fixed) {
            (Some(PruneMethod::Magnitude), _) | (_, Some(_)) => SolverKind::Sequential,
            (Some(PruneMethod::SparseGpt) | None, None) => SolverKind::Joint,
        }
    }
}

impl SequencingWord {
    /// The default of a solver.
    pub(super) fn of(solver: SolverKind) -> Self {
        match solver {
            SolverKind::Sequential => SequencingWord::Stage,
            SolverKind::Joint => SequencingWord::Sublayer,
        }
    }
}

impl Target {
    /// The default of a solver and its sequencing.
    pub(super) fn of(solver: SolverKind, sequencing: SequencingWord) -> Self {
        match (solver, sequencing) {
            (SolverKind::Joint, SequencingWord::Sublayer) => Target::Dense,
            (SolverKind::Joint, SequencingWord::Stage)
            | (SolverKind::Sequential, SequencingWord::Stage | SequencingWord::Sublayer) => Target::Current,
        }
    }
}
