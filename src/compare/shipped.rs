//! Configs that are in the program, for sweeps that name none.

/// A config of `configs/`.
#[derive(Debug, Clone, Copy)]
pub struct Shipped {
    /// Its name in a report.
    pub name: &'static str,
    /// Its path in the repository, which names it in messages.
    pub path: &'static str,
    /// Its content.
    pub yaml: &'static str,
}

macro_rules! shipped {
    ($name:literal, $file:literal) => {
        Shipped { name: $name, path: concat!("configs/", $file), yaml: include_str!(concat!("../../configs/", $file)) }
    };
}

impl Shipped {
    /// The base of a sweep: all means of this project, whose budget the sweep replaces.
    pub const BASE: Shipped = shipped!("squeeze", "squeeze-3bits.yaml");

    /// The tutorial's recipes of pruned and palettized weights.
    pub const TUTORIAL: [Shipped; 5] = [
        shipped!("tutorial-s40-4bit-gs4", "tutorial-s40-4bit-gs4.yaml"),
        shipped!("tutorial-s40-4bit-gs16", "tutorial-s40-4bit-gs16.yaml"),
        shipped!("tutorial-s50-4bit-gs4", "tutorial-s50-4bit-gs4.yaml"),
        shipped!("tutorial-s50-4bit-gs16", "tutorial-s50-4bit-gs16.yaml"),
        shipped!("tutorial-2of4-4bit-gs16", "tutorial-2of4-4bit-gs16.yaml"),
    ];
}
