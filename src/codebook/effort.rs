//! How much work the joint solver does.

/// How much work the [joint solver](crate::solver::joint()) does on a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Effort {
    /// Conjugate gradient steps in which the kept weights are refitted.
    pub refit_steps: usize,
    /// Rounds in which pruned and kept weights are swapped.
    pub exchange_turns: usize,
    /// Conjugate gradient steps in which weights are refitted after each of these rounds.
    pub exchange_steps: usize,
    /// Whether weights are rounded to the palette with error feedback, rather than each to its
    /// nearest entry.
    pub sweep: bool,
    /// Conjugate gradient steps of each refit of the palettes; 0 leaves palettes as they are.
    pub palette_steps: usize,
    /// Whether each weight in turn moves to the entry that is best while all others stay.
    pub polish: bool,
    /// Rounds of palette refit and polish at most.
    pub turns: usize,
}

impl Default for Effort {
    /// All steps that pay.
    fn default() -> Self {
        Effort { refit_steps: 8, exchange_turns: 3, exchange_steps: 4, sweep: true, palette_steps: 0, polish: true, turns: 2 }
    }
}

impl Effort {
    /// Nothing beyond the mask and weighted palettes.
    pub const LEAST: Effort =
        Effort { refit_steps: 0, exchange_turns: 0, exchange_steps: 0, sweep: false, palette_steps: 0, polish: false, turns: 0 };

    /// About how many products of the weight with its Hessian this takes.
    pub fn products(&self) -> f64 {
        let turn = if self.palette_steps > 0 { self.palette_steps + 3 } else { 1 };
        let exchange = self.exchange_turns * (1 + self.exchange_steps);
        let refits = if self.exchange_turns > 0 { 2 } else { 1 };
        (5 + refits * self.refit_steps + exchange + self.turns * turn) as f64
    }
}
