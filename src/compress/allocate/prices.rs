//! What the settings of each layer cost, and the file that keeps it for runs of other sizes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use squeeze_base::error::{Error, Result};
use squeeze_base::output::parent;

use super::super::kept::{self, Kept};
use super::choose::Choice;
use crate::recipe::{LayerRecipe, stored_bytes};

/// The settings that each layer may get, by its name.
pub(in super::super) type Settings = BTreeMap<String, Vec<LayerRecipe>>;

/// Every setting of each layer with its size and its cost, by the layer's name.
pub(in super::super) type Prices = BTreeMap<String, Vec<Priced>>;

/// The shapes of weights, by the names of their layers.
pub(in super::super) type Shapes = BTreeMap<String, Vec<i64>>;

/// A setting with its size and its cost.
#[derive(Debug, Clone, PartialEq)]
pub(in super::super) struct Priced {
    pub recipe: LayerRecipe,
    pub choice: Choice,
}

/// The file's content: for each layer the index of a setting and its cost, in the order of
/// [`Prices`]. Sizes follow from settings.
type Stored = BTreeMap<String, Vec<(usize, f64)>>;

/// A file of prices with a seal: runs that differ in nothing but their size need not measure again.
#[derive(Debug)]
pub(in super::super) struct PriceFile {
    path: PathBuf,
    /// A hash of everything that the prices depend on.
    identity: String,
}

impl PriceFile {
    /// The file `path` for prices that depend on what `identity` is a hash of.
    pub(in super::super) fn new(path: &Path, identity: String) -> Self {
        PriceFile { path: path.to_owned(), identity }
    }

    /// The path.
    pub(in super::super) fn path(&self) -> &Path {
        &self.path
    }

    /// The prices of `settings`. A file of other prices counts as damaged.
    pub(in super::super) fn read(&self, settings: &Settings, shapes: &Shapes) -> Kept<Prices> {
        let Some(name) = self.name() else { return Kept::Absent };
        match kept::read(parent(&self.path), &self.identity, name) {
            Kept::Whole(content) => restored(&content, settings, shapes).map_or(Kept::Damaged, Kept::Whole),
            Kept::Absent => Kept::Absent,
            Kept::Damaged => Kept::Damaged,
        }
    }

    /// Writes the prices of `settings`.
    ///
    /// # Errors
    /// [`Error::Write`]; [`Error::Internal`] if there is a price of a setting that is not among
    /// `settings`.
    pub(in super::super) fn write(&self, prices: &Prices, settings: &Settings) -> Result<()> {
        let Some(name) = self.name() else {
            return Err(Error::Argument(format!("{} is no name of a file", self.path.display())));
        };
        let unknown = |layer: &str| Error::internal(format!("`{layer}` has a price for no setting of it"));
        let mut stored = Stored::new();
        for (layer, priced) in prices {
            let settings = settings.get(layer).ok_or_else(|| unknown(layer))?;
            let each = priced.iter().map(|Priced { recipe, choice }| {
                let index = settings.iter().position(|setting| setting == recipe).ok_or_else(|| unknown(layer))?;
                Ok((index, choice.cost))
            });
            stored.insert(layer.clone(), each.collect::<Result<_>>()?);
        }
        let content = serde_json::to_vec(&stored).map_err(|why| Error::internal(format!("prices cannot be written: {why}")))?;
        kept::write(parent(&self.path), &self.identity, name, &content)
    }

    fn name(&self) -> Option<&str> {
        self.path.file_name()?.to_str()
    }
}

/// The prices in `content`; `None` if they are not of every one of the settings, once each.
fn restored(content: &[u8], settings: &Settings, shapes: &Shapes) -> Option<Prices> {
    let stored: Stored = serde_json::from_slice(content).ok()?;
    let of_layer = |(layer, costs): (String, Vec<(usize, f64)>)| {
        let (settings, shape) = (settings.get(&layer)?, shapes.get(&layer)?);
        let mut indices: Vec<usize> = costs.iter().map(|(index, _)| *index).collect();
        indices.sort_unstable();
        if !indices.iter().copied().eq(0..settings.len()) {
            return None;
        }
        let priced = costs.into_iter().map(|(index, cost)| {
            let recipe = settings[index].clone();
            Priced { choice: Choice { bytes: stored_bytes(shape, &recipe), cost }, recipe }
        });
        Some((layer, priced.collect()))
    };
    stored.into_iter().map(of_layer).collect()
}

#[cfg(test)]
mod tests {
    use squeeze_codebook::{BitWidth, Effort, PaletteOptions, PruneMethod};

    use super::*;

    fn setting(bits: BitWidth) -> LayerRecipe {
        let palettize = Some(PaletteOptions { bits, ..PaletteOptions::default() });
        LayerRecipe { prune: None, method: PruneMethod::SparseGpt, palettize, joint: Some(Effort::default()) }
    }

    #[test]
    fn prices_come_back_in_their_order_and_bit_for_bit_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("base.prices.json");
        let all: Vec<LayerRecipe> = [BitWidth::Two, BitWidth::Four, BitWidth::Six].map(setting).into();
        let settings = Settings::from([("a".to_owned(), all.clone()), ("b".to_owned(), all.clone())]);
        let shapes = Shapes::from([("a".to_owned(), vec![8, 16]), ("b".to_owned(), vec![32, 16, 3, 3])]);
        let price = |layer: &str, index: usize, cost: f64| {
            let recipe = all[index].clone();
            Priced { choice: Choice { bytes: stored_bytes(&shapes[layer], &recipe), cost }, recipe }
        };
        // `b` has no sensitivity; the order is not that of the settings.
        let prices = Prices::from([("a".to_owned(), vec![price("a", 1, 0.1 + 0.2), price("a", 0, 1e-300), price("a", 2, 0.0)])]);
        let file = PriceFile::new(&path, "these".into());
        assert_eq!(file.read(&settings, &shapes), Kept::Absent);
        file.write(&prices, &settings).unwrap();
        assert_eq!(file.read(&settings, &shapes), Kept::Whole(prices.clone()));

        assert_eq!(PriceFile::new(&path, "others".into()).read(&settings, &shapes), Kept::Damaged);
        let fewer = Settings::from([("a".to_owned(), all[..2].to_vec())]);
        assert_eq!(file.read(&fewer, &shapes), Kept::Damaged);
        assert!(file.write(&prices, &fewer).is_err());
        let whole = std::fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 4;
            std::fs::write(&path, damaged).unwrap();
            assert_eq!(file.read(&settings, &shapes), Kept::Damaged, "byte {at}");
        }
    }
}
