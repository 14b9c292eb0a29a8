//! How much work the joint solver does.

/// The amount of work that the joint solver does on a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Effort {
    /// The number of conjugate gradient steps in which the kept weights are refitted.
    pub refit_steps: usize,
    /// The number of rounds in which pruned and kept weights are swapped.
    pub exchange_turns: usize,
    /// The number of conjugate gradient steps of the refit after each of these rounds.
    pub exchange_steps: usize,
    /// Whether weights are rounded to the palette with error feedback, rather than each to its
    /// nearest entry.
    pub sweep: bool,
    /// The number of conjugate gradient steps of each refit of the palettes; 0 disables it.
    pub palette_steps: usize,
    /// Whether coordinate descent moves each weight to its best entry, all other weights fixed.
    pub polish: bool,
    /// The largest number of rounds of palette refit and coordinate descent.
    pub turns: usize,
    /// The number of samples on which the effect of errors in each layer's outputs is measured, by
    /// which indices are polished at last; 0 disables it.
    pub output_probes: usize,
}

impl Default for Effort {
    /// The steps that lower the error enough for their cost.
    fn default() -> Self {
        Effort {
            refit_steps: 8,
            exchange_turns: 3,
            exchange_steps: 4,
            sweep: true,
            palette_steps: 0,
            polish: true,
            turns: 2,
            output_probes: 0,
        }
    }
}

impl Effort {
    /// The mask and weighted palettes only, without any refinement.
    pub const LEAST: Effort = Effort {
        refit_steps: 0,
        exchange_turns: 0,
        exchange_steps: 0,
        sweep: false,
        palette_steps: 0,
        polish: false,
        turns: 0,
        output_probes: 0,
    };

    /// The approximate number of products of the weight with its Hessian, which is most of the
    /// cost.
    #[must_use]
    pub fn products(&self) -> f64 {
        let turn = if self.palette_steps > 0 { self.palette_steps + 3 } else { 1 };
        let exchange = self.exchange_turns * (1 + self.exchange_steps);
        let refits = if self.exchange_turns > 0 { 2 } else { 1 };
        let outputs = if self.output_probes > 0 { 6 } else { 0 };
        (5 + refits * self.refit_steps + exchange + self.turns * turn + outputs) as f64
    }
}
