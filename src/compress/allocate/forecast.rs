//! What allocations at other sizes are expected to be like.

use super::super::mean_bits::MeanBits;
use super::choose::{Choice, choose};
use super::prices::{Prices, Shapes};
use super::room::Room;
use crate::plan::Plan;
use crate::recipe::Recipe;

/// What the settings of a budget cost, from which each size's error can be told before it is
/// solved. The error leaves out that the solver corrects errors of earlier layers, so that errors
/// of neighbouring sizes are off by about the same factor.
#[derive(Debug)]
pub struct Forecast {
    choices: Vec<Vec<Choice>>,
    room: Room,
}

/// What a size is expected to be like.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Expected {
    /// Bytes of the result's tensors.
    pub payload_bytes: u64,
    /// The error of the UNet's output, as a share of its squared norm.
    pub error: f64,
}

impl Forecast {
    /// The forecast at these `prices`; `plan` is that of `recipe` as it is.
    pub(in super::super) fn new(prices: &Prices, shapes: &Shapes, recipe: &Recipe, plan: &Plan) -> Self {
        let choices = prices.values().map(|priced| priced.iter().map(|priced| priced.choice).collect());
        Forecast { choices: choices.collect(), room: Room::beside(prices.keys(), shapes, recipe, plan) }
    }

    /// What an allocation of `bits` is expected to be like; `None` if these are too few.
    #[must_use]
    pub fn at(&self, bits: MeanBits) -> Option<Expected> {
        let bytes = ((bits.bits() / 8.0 * self.room.elements as f64) as u64).checked_sub(self.room.compressed_bytes)?;
        let chosen = choose(&self.choices, bytes)?;
        let chosen = || chosen.iter().zip(&self.choices).map(|(index, choices)| choices[*index]);
        Some(Expected {
            payload_bytes: self.room.fixed_bytes + chosen().map(|choice| choice.bytes).sum::<u64>(),
            error: chosen().map(|choice| choice.cost).sum(),
        })
    }

    /// The fewest bits that an allocation can have.
    #[must_use]
    pub fn least_bits(&self) -> MeanBits {
        self.bits_of(|choices| choices.iter().map(|choice| choice.bytes).min())
    }

    /// The bits at which every layer has the setting of its least error; at most 16.
    #[must_use]
    pub fn most_bits(&self) -> MeanBits {
        let best = |a: &&Choice, b: &&Choice| a.cost.total_cmp(&b.cost).then(a.bytes.cmp(&b.bytes));
        let most = self.bits_of(|choices| choices.iter().min_by(best).map(|choice| choice.bytes));
        most.clamp(self.least_bits(), MeanBits::of_thousandths(16_000).max(self.least_bits()))
    }

    /// Bytes of a result for each thousandth of a bit.
    #[must_use]
    pub fn bytes_of_thousandth(&self) -> f64 {
        self.room.elements as f64 / 8000.0
    }

    /// The bits with which each layer can have the setting whose bytes `pick` gives.
    fn bits_of(&self, pick: impl Fn(&[Choice]) -> Option<u64>) -> MeanBits {
        let bytes: u64 = self.choices.iter().filter_map(|choices| pick(choices)).sum();
        let thousandths = (bytes + self.room.compressed_bytes) as f64 / self.bytes_of_thousandth();
        // One more in the place of all doubts about rounding.
        MeanBits::of_thousandths(thousandths.ceil() as u32 + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_bits_take_more_bytes_and_have_less_error_up_to_the_best() {
        // A hundred layers of 1,000 weights with 2, 4 or 16 bits, beside 500 bytes of others.
        let layer = |index: u64| {
            let scale = 1.0 + (index % 7) as f64;
            [(250, 0.04), (500, 0.0025), (2000, 0.0)].map(|(bytes, cost)| Choice { bytes, cost: scale * cost }).to_vec()
        };
        let room = Room { fixed_bytes: 500, compressed_bytes: 0, elements: 100_000 };
        let forecast = Forecast { choices: (0..100).map(layer).collect(), room };
        let (least, most) = (forecast.least_bits(), forecast.most_bits());
        assert_eq!((least.to_string(), most.to_string()), ("2.001".to_owned(), "16.0".to_owned()));
        assert_eq!(forecast.at(MeanBits::of_thousandths(1_990)), None);
        let sizes = [2_001, 2_500, 3_000, 4_000, 8_000, 16_000].map(MeanBits::of_thousandths);
        let expected: Vec<Expected> = sizes.into_iter().map(|bits| forecast.at(bits).unwrap()).collect();
        assert!(expected.windows(2).all(|pair| pair[0].payload_bytes < pair[1].payload_bytes && pair[0].error > pair[1].error));
        assert_eq!(expected[0].payload_bytes, 25_500);
        assert_eq!(expected[5], Expected { payload_bytes: 200_500, error: 0.0 });
        // At 3 bits the mean of the settings fits, within one layer's step.
        let bytes = forecast.bytes_of_thousandth() * 3_000.0;
        assert!((expected[2].payload_bytes as f64 - 500.0 - bytes).abs() <= 250.0, "{:?}", expected[2]);
    }
}
