//! Random tensors that depend on a seed alone.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use squeeze_base::error::Result;
use tch::{Device, Kind, Tensor};

/// tch offers only libtorch's default generator, so no other draw may come between seeding and
/// drawing.
static DEFAULT_GENERATOR: Mutex<()> = Mutex::new(());

/// The noise that `torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=kind)`
/// gives on a CPU.
///
/// # Errors
/// If libtorch refuses the shape.
pub fn noise(shape: &[i64], seed: u64, kind: Kind) -> Result<Tensor> {
    Generator::new(seed).draw(shape, kind)
}

/// A CPU generator with a state of its own, `torch.Generator().manual_seed(seed)`: each draw goes
/// on where the last one ended, whatever other threads draw in between.
///
/// The state is the list of the draws so far. To go on, libtorch's default generator is seeded
/// again and repeats them. Draws are made ahead in growing numbers, so that a hundred equal draws
/// repeat few.
#[derive(Debug)]
pub struct Generator {
    seed: u64,
    drawn: Vec<Draw>,
    /// Draws that continue `drawn`.
    ahead: VecDeque<(Draw, Tensor)>,
}

/// Shape and kind of a draw.
type Draw = (Vec<i64>, Kind);

impl Generator {
    /// A generator with nothing drawn yet.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Generator { seed, drawn: Vec::new(), ahead: VecDeque::new() }
    }

    /// The seed.
    #[must_use]
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Unit Gaussian noise on the CPU, as `torch.randn(shape, generator=self, dtype=kind)`.
    ///
    /// # Errors
    /// If libtorch refuses the shape.
    pub fn draw(&mut self, shape: &[i64], kind: Kind) -> Result<Tensor> {
        let draw = (shape.to_vec(), kind);
        if self.ahead.front().is_none_or(|(next, _)| *next != draw) {
            self.look_ahead(&draw)?;
        }
        let (draw, noise) = self.ahead.pop_front().expect("`look_ahead` has drawn at least one");
        self.drawn.push(draw);
        Ok(noise)
    }

    /// Draws as many equal tensors as have been drawn before, from 1 to 32.
    fn look_ahead(&mut self, draw: &Draw) -> Result<()> {
        let randn = |(shape, kind): &Draw| Tensor::f_randn(shape, (*kind, Device::Cpu));
        let _alone = DEFAULT_GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
        // torch takes negative seeds as their two's complement.
        tch::manual_seed(self.seed as i64);
        for draw in &self.drawn {
            let _repeated = randn(draw)?;
        }
        self.ahead.clear();
        for _ in 0..self.drawn.len().clamp(1, 32) {
            self.ahead.push_back((draw.clone(), randn(draw)?));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The draws of a generator that nobody interrupts.
    fn in_a_row(seed: i64, draws: &[(&[i64], Kind)]) -> Vec<Tensor> {
        let _alone = DEFAULT_GENERATOR.lock().unwrap();
        tch::manual_seed(seed);
        draws.iter().map(|(shape, kind)| Tensor::randn(*shape, (*kind, Device::Cpu))).collect()
    }

    #[test]
    fn interleaved_generators_draw_as_if_each_were_alone() {
        // Sizes with a remainder of 16, below 16, and of other kinds take libtorch's other paths.
        let draws: [(&[i64], Kind); 9] = [
            (&[1, 4, 3, 5], Kind::Float),
            (&[1, 4, 3, 5], Kind::Float),
            (&[7], Kind::Float),
            (&[7], Kind::Float),
            (&[5, 5], Kind::Double),
            (&[60], Kind::Half),
            (&[60], Kind::BFloat16),
            (&[16, 16], Kind::Float),
            (&[16, 16], Kind::Float),
        ];
        let (mut one, mut other) = (Generator::new(3), Generator::new(u64::MAX));
        let drawn: Vec<_> =
            draws.iter().map(|(shape, kind)| [one.draw(shape, *kind).unwrap(), other.draw(shape, *kind).unwrap()]).collect();
        let expected = in_a_row(3, &draws).into_iter().zip(in_a_row(-1, &draws));
        for ([one, other], (expected, expected_other)) in drawn.into_iter().zip(expected) {
            assert_eq!((one, other), (expected, expected_other));
        }
    }

    #[test]
    fn a_long_row_of_equal_draws_is_that_of_one_generator() {
        let draws: Vec<(&[i64], Kind)> = vec![(&[3, 11], Kind::Float); 150];
        let mut generator = Generator::new(8);
        let drawn: Vec<_> = draws.iter().map(|(shape, kind)| generator.draw(shape, *kind).unwrap()).collect();
        assert_eq!(drawn, in_a_row(8, &draws));
    }
}
