//! The closeness that a result has to reach.

use serde::{Deserialize, Serialize};
use squeeze_base::error::{Error, Result};

use crate::config::BudgetTarget;
use crate::report::or_nan;

/// A closeness to the dense model.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(tag = "measure", content = "target", rename_all = "snake_case")]
pub enum Goal {
    /// The error of the UNet's output is at most this share.
    UnetError(f64),
    /// The mean PSNR of pictures is at least this, in dB.
    Psnr(f64),
}

/// How close a result is to the dense model, as [`compare`](super::super::compare) measures it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Closeness {
    /// The error of the UNet's output on held-out calls, as a share.
    #[serde(deserialize_with = "or_nan")]
    pub unet_error: f64,
    /// The mean PSNR of pictures in dB; `None` if none were drawn.
    pub psnr: Option<f64>,
}

impl Goal {
    /// The goal of a budget.
    ///
    /// # Errors
    /// [`Error::Argument`] if its target is a size.
    pub(super) fn of(target: BudgetTarget) -> Result<Self> {
        match target {
            BudgetTarget::Error(percent) => Ok(Goal::UnetError(percent / 100.0)),
            BudgetTarget::Psnr(decibels) => Ok(Goal::Psnr(decibels)),
            BudgetTarget::Size(_) | BudgetTarget::Bits(_) => Err(Error::Argument(
                "the budget's target is a size already; a search needs `target_error` or `target_psnr`".into(),
            )),
        }
    }

    /// Whether pictures have to be drawn to tell.
    pub(super) fn needs_pictures(self) -> bool {
        match self {
            Goal::Psnr(_) => true,
            Goal::UnetError(_) => false,
        }
    }

    /// Whether a result of this closeness reaches the goal; not if it was not measured or is NaN.
    pub(super) fn is_reached(self, Closeness { unet_error, psnr }: Closeness) -> bool {
        match self {
            Goal::UnetError(most) => unet_error <= most,
            Goal::Psnr(least) => psnr.is_some_and(|psnr| psnr >= least),
        }
    }

    /// The logarithm of the squared error over the one that is asked for: above 0 where the goal is
    /// not reached. It is rounded, so that the order in which a sum was made cannot change where a
    /// search goes on.
    pub(super) fn excess(self, Closeness { unet_error, psnr }: Closeness) -> f64 {
        /// Beyond this, differences tell nothing.
        const MOST: f64 = 20.0;
        let excess = match self {
            Goal::UnetError(most) => (unet_error / most).ln(),
            Goal::Psnr(least) => psnr.map_or(f64::NAN, |psnr| (least - psnr) * std::f64::consts::LN_10 / 10.0),
        };
        if excess.is_nan() { MOST } else { (excess.clamp(-MOST, MOST) * 1e4).round() / 1e4 }
    }

    /// The error of the UNet's output at which the goal is expected to be reached, before anything
    /// is known of the model's pictures.
    pub(super) fn expected_error(self) -> f64 {
        /// On the bundled model, PSNR plus ten times the decimal logarithm of the UNet error is
        /// 11.5 to 14 dB (README.md, "Results").
        const SUM: f64 = 13.0;
        match self {
            Goal::UnetError(most) => most,
            Goal::Psnr(least) => 10_f64.powf((SUM - least) / 10.0),
        }
    }

    /// The goal in words.
    pub(super) fn text(self) -> String {
        match self {
            Goal::UnetError(most) => format!("a UNet error of at most {} %", 100.0 * most),
            Goal::Psnr(least) => format!("a mean PSNR of at least {least} dB"),
        }
    }
}

impl Closeness {
    /// The closeness in words.
    pub(super) fn text(self) -> String {
        let error = format!("a UNet error of {} %", percent(self.unet_error));
        match self.psnr {
            Some(psnr) => format!("a mean PSNR of {psnr:.2} dB and {error}"),
            None => error,
        }
    }
}

/// A share in per cent with three significant digits.
fn percent(share: f64) -> String {
    let percent = 100.0 * share;
    let digits = if percent > 0.0 { (2.0 - percent.log10().floor()).clamp(0.0, 12.0) } else { 2.0 };
    format!("{percent:.*}", digits as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_goal_is_reached_where_its_excess_is_not_above_zero() {
        let error = |unet_error| Closeness { unet_error, psnr: None };
        let goal = Goal::of(BudgetTarget::Error(0.5)).unwrap();
        assert!(goal.is_reached(error(0.005)) && goal.excess(error(0.005)) == 0.0);
        assert!(!goal.is_reached(error(0.01)) && (goal.excess(error(0.01)) - 2_f64.ln()).abs() < 1e-4);
        assert!(goal.is_reached(error(0.0)) && goal.excess(error(0.0)) == -20.0);
        assert!(!goal.is_reached(error(f64::NAN)) && goal.excess(error(f64::NAN)) == 20.0);
        let goal = Goal::of(BudgetTarget::Psnr(35.0)).unwrap();
        let psnr = |psnr| Closeness { unet_error: 0.1, psnr };
        assert!(goal.is_reached(psnr(Some(35.0))) && !goal.is_reached(psnr(Some(34.9))) && !goal.is_reached(psnr(None)));
        // 10 dB are ten times the error.
        assert!((goal.excess(psnr(Some(25.0))) - std::f64::consts::LN_10).abs() < 1e-4);
        assert!(Goal::of(BudgetTarget::Bits(3.0)).unwrap_err().is_bad_input());
    }

    #[test]
    fn closeness_in_words_has_three_digits() {
        let words = |unet_error, psnr| Closeness { unet_error, psnr }.text();
        assert_eq!(words(0.004_816, None), "a UNet error of 0.482 %");
        assert_eq!(words(0.114_4, Some(20.87)), "a mean PSNR of 20.87 dB and a UNet error of 11.4 %");
        assert_eq!(words(0.0, None), "a UNet error of 0.00 %");
        assert_eq!(words(3.21e-9, None), "a UNet error of 0.000000321 %");
        assert_eq!(Goal::UnetError(0.005).text(), "a UNet error of at most 0.5 %");
    }
}
