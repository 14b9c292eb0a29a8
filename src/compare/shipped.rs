//! Configs that are in the program, for sweeps that name none, and for runs that give a size alone.

use std::path::Path;

use crate::shipped::{self, ShippedConfig};

/// A config of `configs/`, and its row's name.
#[derive(Debug, Clone, Copy)]
pub struct Shipped {
    /// Its name in a report.
    pub name: &'static str,
    /// Its path in the repository, which names it in messages.
    pub path: &'static str,
}

impl Shipped {
    /// The base of a sweep and of a run of a given size: all means of this project, with a budget
    /// whose target is replaced.
    pub const BASE: Shipped = Shipped { name: "squeeze", path: "configs/squeeze-3bits.yaml" };

    /// The tutorial's recipes of pruned and palettized weights.
    pub const TUTORIAL: [Shipped; 5] = [
        Shipped { name: "tutorial-s40-4bit-gs4", path: "configs/tutorial-s40-4bit-gs4.yaml" },
        Shipped { name: "tutorial-s40-4bit-gs16", path: "configs/tutorial-s40-4bit-gs16.yaml" },
        Shipped { name: "tutorial-s50-4bit-gs4", path: "configs/tutorial-s50-4bit-gs4.yaml" },
        Shipped { name: "tutorial-s50-4bit-gs16", path: "configs/tutorial-s50-4bit-gs16.yaml" },
        Shipped { name: "tutorial-2of4-4bit-gs16", path: "configs/tutorial-2of4-4bit-gs16.yaml" },
    ];

    /// The config.
    ///
    /// # Panics
    /// If the repository has no config at the path, which a test rules out.
    #[must_use]
    pub fn config(&self) -> ShippedConfig {
        shipped::config(Path::new(self.path)).expect("the test below finds each of them")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_of_them_are_in_the_program() {
        for shipped in Shipped::TUTORIAL.into_iter().chain([Shipped::BASE]) {
            assert_eq!(shipped.config().path, shipped.path);
        }
    }
}
