//! The units of the network whose activations were beyond fp16.

use std::cell::RefCell;
use std::collections::BTreeSet;

use sdxl_model::Layer;
use sdxl_model::unet::{Part, Scope, beyond_half_note};
use tch::Kind;

/// Sentences about the units that were run again in a wider dtype, each said in the log once.
#[derive(Debug, Default)]
pub(super) struct Overflows(RefCell<BTreeSet<String>>);

impl Overflows {
    /// Adds the unit `scope` of `part`, which was run again in `kind`.
    pub(super) fn add(&self, part: &Part, scope: Scope, kind: Kind) {
        let note = beyond_half_note(&unit(part, scope), kind);
        if self.0.borrow_mut().insert(note.clone()) {
            tracing::warn!("{note}");
        }
    }

    /// The sentences so far.
    pub(super) fn notes(&self) -> BTreeSet<String> {
        self.0.borrow().clone()
    }
}

/// The names of a unit's layers up to where they differ: that of a stage, a resnet, a sublayer
/// of a transformer's block or a single layer. The output block's layer has a name of its own.
fn unit(part: &Part, scope: Scope) -> String {
    let mut names = part.layers().iter().map(Layer::name).filter(|name| part.scope_has(scope, name));
    let first = names.next().unwrap_or_default().to_owned();
    names.fold(first, |common, name| {
        let parts = common.split('.').zip(name.split('.')).take_while(|(a, b)| a == b);
        parts.map(|(part, _)| part).collect::<Vec<_>>().join(".")
    })
}
