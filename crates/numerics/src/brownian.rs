//! Brownian motion whose increments depend on a seed alone, not on the order of the questions.

use squeeze_base::error::{Error, Result};
use tch::{Kind, Tensor};

use super::random::noise;
use super::seed_sequence::state;

/// Brownian motion in a tensor's every element, between two times: torchsde's `BrownianInterval`
/// with `halfway_tree=True`, `tol=1e-6` and `pool_size=24`, the noise of k-diffusion and diffusers.
///
/// The interval is halved again and again down to the six decimals of the times; each halving draws
/// where the motion is at the middle (a Brownian bridge), from a seed that numpy's `SeedSequence`
/// derives from the tree's seed and the place in the tree. torchsde keeps what it has drawn; here
/// it is drawn again, with equal results.
#[derive(Debug)]
pub struct BrownianTree {
    seed: u64,
    shape: Vec<i64>,
    root: Node,
    /// The increment over the whole interval.
    whole: Tensor,
}

/// A part of the interval.
#[derive(Debug, Clone, Copy)]
struct Node {
    start: f64,
    end: f64,
    /// The way from the root: a bit for each halving, 1 for the right half.
    path: u128,
    depth: u32,
}

/// More halvings than the times of models need, which is about 25; a path of as many fits its type.
const DEEPEST: u32 = 120;

impl BrownianTree {
    /// The motion of a tensor [..shape] of `kind` on the CPU, from time `start` to `end`.
    ///
    /// # Errors
    /// If `start` is not at most `end`, or libtorch refuses the shape.
    pub fn new(start: f64, end: f64, shape: &[i64], kind: Kind, seed: u64) -> Result<Self> {
        if !(start <= end && end.is_finite() && start.is_finite()) {
            return Err(Error::Argument(format!("there is no Brownian motion from time {start} to {end}")));
        }
        let [first, ..] = state::<3>(seed, &[]);
        let whole = noise(shape, u64::from(first), kind)?.f_mul_scalar((end - start).sqrt())?;
        let root = Node { start: rounded(start), end: rounded(end), path: 0, depth: 0 };
        Ok(BrownianTree { seed, shape: shape.to_vec(), root, whole })
    }

    /// The increment from time `from` to the later time `to`, which are moved into the interval if
    /// they are outside.
    ///
    /// # Errors
    /// If `from` is not before `to` in the first six decimals, or libtorch fails.
    pub fn increment(&self, from: f64, to: f64) -> Result<Tensor> {
        let [start, end] = [from, to].map(|time| rounded(time.clamp(self.root.start, self.root.end)));
        if start.is_nan() || end.is_nan() || start >= end {
            return Err(Error::Argument(format!("the times {from} and {to} are too close for a Brownian tree of six decimals")));
        }
        let mut sum = None;
        self.collect(self.root, &self.whole, (start, end), &mut sum)?;
        sum.ok_or_else(|| Error::internal("an increment without parts"))
    }

    /// Adds to `sum` the increments of the largest nodes below `node` that make up `span`.
    /// `increment` is that of `node`.
    fn collect(&self, node: Node, increment: &Tensor, span: (f64, f64), sum: &mut Option<Tensor>) -> Result<()> {
        if span == (node.start, node.end) {
            *sum = Some(match sum.take() {
                Some(sum) => sum.f_add(increment)?,
                None => increment.shallow_clone(),
            });
            return Ok(());
        }
        if node.depth >= DEEPEST {
            return Err(Error::Argument(format!("the times {} and {} are too fine for a Brownian tree", span.0, span.1)));
        }
        let middle = rounded(0.5 * (node.end + node.start));
        let (left, right) = self.halves(node, middle, increment)?;
        let child = |is_right: bool| Node {
            start: if is_right { middle } else { node.start },
            end: if is_right { node.end } else { middle },
            path: 2 * node.path + u128::from(is_right),
            depth: node.depth + 1,
        };
        if span.0 < middle {
            self.collect(child(false), &left, (span.0, span.1.min(middle)), sum)?;
        }
        if span.1 > middle {
            self.collect(child(true), &right, (span.0.max(middle), span.1), sum)?;
        }
        Ok(())
    }

    /// The increments over both halves of a node.
    fn halves(&self, node: Node, middle: f64, increment: &Tensor) -> Result<(Tensor, Tensor)> {
        let [seed, ..] = state::<4>(self.seed, &[node.path, u128::from(node.depth)]);
        let noise = noise(&self.shape, u64::from(seed), increment.f_kind()?)?;
        let inverse = 1.0 / (node.end - node.start);
        let (before, after) = (middle - node.start, node.end - middle);
        let mean = increment.f_mul_scalar(before)?.f_mul_scalar(inverse)?;
        let left = mean.f_add(&noise.f_mul_scalar((before * after * inverse).sqrt())?)?;
        let right = increment.f_sub(&left)?;
        Ok((left, right))
    }
}

/// The time to six decimals: Python's `round(time, 6)`.
fn rounded(time: f64) -> f64 {
    // Rust prints and reads decimals exactly, with ties to even, as Python does.
    format!("{time:.6}").parse().unwrap_or(time)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(tree: &BrownianTree, from: f64, to: f64) -> Vec<f32> {
        Vec::try_from(&tree.increment(from, to).unwrap()).unwrap()
    }

    /// The values are those of torchsde 0.2.6 with torch 2.11.
    #[test]
    fn increments_equal_those_of_torchsde() {
        let tree = BrownianTree::new(0.029_167_5, 14.614_642, &[3], Kind::Float, 7).unwrap();
        assert_eq!(values(&tree, 0.029_167_5, 14.614_642), [-7.7218404, 9.414663, -0.2007088]);
        assert_eq!(values(&tree, 3.123_456_78, 9.3), [-6.2101197, 1.9106447, 0.29574615]);
        assert_eq!(values(&tree, 0.03, 0.031), [0.004358376, -0.0015240656, -0.022635467]);
        assert_eq!(values(&tree, 14.0, 20.0), [-0.2202884, 0.52502817, 1.0740993]);
    }

    #[test]
    fn increments_add_up() {
        let tree = BrownianTree::new(0.0, 1.0, &[5], Kind::Double, 1).unwrap();
        let parts = tree.increment(0.1, 0.37).unwrap() + tree.increment(0.37, 0.9).unwrap();
        let apart = (parts - tree.increment(0.1, 0.9).unwrap()).abs().max().double_value(&[]);
        assert!(apart < 1e-12, "{apart}");
    }

    #[test]
    fn times_that_make_no_interval_are_refused() {
        assert!(BrownianTree::new(1.0, 0.5, &[1], Kind::Float, 1).is_err());
        assert!(BrownianTree::new(0.0, f64::INFINITY, &[1], Kind::Float, 1).is_err());
        let tree = BrownianTree::new(0.0, 1.0, &[1], Kind::Float, 1).unwrap();
        for (from, to) in [(0.5, 0.5), (0.6, 0.5), (0.5, 0.500_000_4), (f64::NAN, 0.5), (2.0, 3.0)] {
            assert!(tree.increment(from, to).is_err(), "{from} to {to}");
        }
        let wide = BrownianTree::new(0.0, 1e300, &[1], Kind::Float, 1).unwrap();
        assert!(wide.increment(0.0, 1e-3).unwrap_err().to_string().contains("too fine"));
    }
}
