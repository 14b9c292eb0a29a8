//! Measures of how close two pictures are.

use sdxl_pipeline::picture::Picture;
use squeeze_base::error::{Error, Result};

use super::comparison::Spread;

/// Upper bound of the PSNR, in dB, which is the PSNR of equal pictures.
///
/// Equal pictures have no finite PSNR by definition. With a bound their PSNR can be averaged,
/// sorted and stored like any other. Other pictures exceed the bound only if fewer than one value
/// in 150,000 is off by one.
pub const HIGHEST_PSNR: f64 = 100.0;

/// Standard deviation of SSIM's window, in pixels.
const SIGMA: f64 = 1.5;
/// Radius of SSIM's window, in pixels: 3.5 standard deviations.
const RADIUS: usize = 5;
/// Width of SSIM's window, in pixels.
const TAPS: usize = 2 * RADIUS + 1;
/// Least width and height of pictures for SSIM, in pixels.
pub const LEAST_SIDE: u32 = TAPS as u32;

/// Closeness of a model's pictures to the dense model's.
#[derive(Debug, Clone, PartialEq)]
pub struct Closeness {
    /// Peak signal-to-noise ratio in dB.
    pub psnr: Spread,
    /// Structural similarity, at most 1.
    pub ssim: Spread,
}

/// Measures each picture against the dense one with the same index.
///
/// # Errors
/// [`Error::Argument`] if the numbers of pictures differ, and the errors of [`psnr`] and [`ssim`].
pub fn closeness(dense: &[Picture], pictures: &[Picture]) -> Result<Closeness> {
    if dense.len() != pictures.len() {
        return Err(Error::Argument(format!("{} pictures cannot be compared with {}", pictures.len(), dense.len())));
    }
    let pairs = || dense.iter().zip(pictures);
    Ok(Closeness {
        psnr: Spread::of(pairs().map(|(a, b)| psnr(a, b)).collect::<Result<_>>()?),
        ssim: Spread::of(pairs().map(|(a, b)| ssim(a, b)).collect::<Result<_>>()?),
    })
}

/// Peak signal-to-noise ratio in dB, over all 8-bit values of both pictures: 10 log10(255^2 / MSE),
/// at most [`HIGHEST_PSNR`].
///
/// Follows scikit-image's `peak_signal_noise_ratio(data_range=255)`.
///
/// # Errors
/// [`Error::Argument`] if the pictures' sizes differ, or a picture has no pixels or its bytes do
/// not match its size.
pub fn psnr(a: &Picture, b: &Picture) -> Result<f64> {
    check(a, b)?;
    let squares: u64 = a.rgb.iter().zip(&b.rgb).map(|(a, b)| u64::from(a.abs_diff(*b)).pow(2)).sum();
    let mean = squares as f64 / a.rgb.len() as f64;
    Ok((10.0 * (255.0 * 255.0 / mean).log10()).min(HIGHEST_PSNR))
}

/// Structural similarity (Wang et al. 2004), mean over red, green and blue; 1 for equal pictures.
///
/// Follows scikit-image's `structural_similarity(channel_axis=2, gaussian_weights=True, sigma=1.5,
/// use_sample_covariance=False, data_range=255)`: a Gaussian window of 11 x 11 pixels, population
/// covariance, K1 = 0.01, K2 = 0.03, and the mean over the pixels whose window is inside the
/// picture.
///
/// # Errors
/// The errors of [`psnr`], and [`Error::Argument`] if a side is shorter than [`LEAST_SIDE`].
pub fn ssim(a: &Picture, b: &Picture) -> Result<f64> {
    check(a, b)?;
    if a.width < LEAST_SIDE || a.height < LEAST_SIDE {
        return Err(Error::Argument(format!(
            "SSIM needs pictures of {LEAST_SIDE}x{LEAST_SIDE} or more, not {}x{}",
            a.width, a.height
        )));
    }
    let (width, height) = (a.width as usize, a.height as usize);
    let window = window();
    let channels = (0..3).map(|channel| {
        let (a, b) = (plane(a, channel), plane(b, channel));
        let product = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).collect::<Vec<_>>();
        let mean = |x: &[f64]| blur(x, width, height, &window);
        let (aa, bb, ab) = (mean(&product(&a, &a)), mean(&product(&b, &b)), mean(&product(&a, &b)));
        let (a, b) = (mean(&a), mean(&b));
        let moments = a.iter().zip(&b).zip(aa.iter().zip(&bb)).zip(&ab);
        let sum: f64 = moments.map(|(((a, b), (aa, bb)), ab)| similarity(*a, *b, *aa, *bb, *ab)).sum();
        sum / a.len() as f64
    });
    Ok(channels.sum::<f64>() / 3.0)
}

/// SSIM of one window from its weighted means of a, b, a^2, b^2 and a b.
fn similarity(a: f64, b: f64, aa: f64, bb: f64, ab: f64) -> f64 {
    const C1: f64 = (0.01 * 255.0) * (0.01 * 255.0);
    const C2: f64 = (0.03 * 255.0) * (0.03 * 255.0);
    let luminance = (2.0 * a * b + C1) / (a * a + b * b + C1);
    let structure = (2.0 * (ab - a * b) + C2) / ((aa - a * a) + (bb - b * b) + C2);
    luminance * structure
}

/// Checks that both pictures have pixels, bytes that match their sizes, and equal sizes.
fn check(a: &Picture, b: &Picture) -> Result<()> {
    if (a.width, a.height) != (b.width, b.height) {
        let sizes = format!("{}x{} and {}x{}", a.width, a.height, b.width, b.height);
        return Err(Error::Argument(format!("pictures of {sizes} cannot be compared")));
    }
    a.check()?;
    b.check()
}

/// One channel of a picture, row by row.
fn plane(picture: &Picture, channel: usize) -> Vec<f64> {
    picture.rgb.iter().skip(channel).step_by(3).map(|value| f64::from(*value)).collect()
}

/// The Gaussian over the window, with sum 1.
fn window() -> [f64; TAPS] {
    let at = |tap: usize| (-0.5 * (tap as f64 - RADIUS as f64).powi(2) / (SIGMA * SIGMA)).exp();
    let weights: [f64; TAPS] = std::array::from_fn(at);
    let sum: f64 = weights.iter().sum();
    weights.map(|weight| weight / sum)
}

/// Weighted means around each pixel whose window is inside the picture: columns first, then rows.
fn blur(plane: &[f64], width: usize, height: usize, window: &[f64; TAPS]) -> Vec<f64> {
    let mut down = vec![0.0; width * (height - 2 * RADIUS)];
    for (y, row) in down.chunks_exact_mut(width).enumerate() {
        for (tap, weight) in window.iter().enumerate() {
            let source = plane.iter().skip((y + tap) * width);
            row.iter_mut().zip(source).for_each(|(sum, value)| *sum += weight * value);
        }
    }
    let mean = |values: &[f64]| values.iter().zip(window).map(|(value, weight)| value * weight).sum();
    down.chunks_exact(width).flat_map(|row| row.windows(TAPS).map(mean)).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn picture(width: u32, height: u32, rgb: Vec<u8>) -> Picture {
        Picture { width, height, rgb }
    }

    /// The definition, window by window, without any factoring.
    fn ssim_by_definition(a: &Picture, b: &Picture) -> f64 {
        let (width, height) = (a.width as usize, a.height as usize);
        let mut kernel = [[0.0; TAPS]; TAPS];
        for (y, row) in kernel.iter_mut().enumerate() {
            for (x, weight) in row.iter_mut().enumerate() {
                *weight = (-((y as f64 - 5.0).powi(2) + (x as f64 - 5.0).powi(2)) / 4.5).exp();
            }
        }
        let total: f64 = kernel.iter().flatten().sum();
        let (mut sum, mut windows) = (0.0, 0.0);
        for channel in 0..3 {
            for top in 0..=height - TAPS {
                for left in 0..=width - TAPS {
                    let weighted = |f: &dyn Fn(f64, f64) -> f64| -> f64 {
                        let mut sum = 0.0;
                        for (y, row) in kernel.iter().enumerate() {
                            for (x, weight) in row.iter().enumerate() {
                                let i = 3 * ((top + y) * width + left + x) + channel;
                                sum += weight / total * f(f64::from(a.rgb[i]), f64::from(b.rgb[i]));
                            }
                        }
                        sum
                    };
                    let (ma, mb) = (weighted(&|a, _| a), weighted(&|_, b| b));
                    let va = weighted(&|a, _| (a - ma).powi(2));
                    let vb = weighted(&|_, b| (b - mb).powi(2));
                    let cov = weighted(&|a, b| (a - ma) * (b - mb));
                    let (c1, c2) = (6.5025, 58.5225);
                    sum += (2.0 * ma * mb + c1) * (2.0 * cov + c2) / ((ma * ma + mb * mb + c1) * (va + vb + c2));
                    windows += 1.0;
                }
            }
        }
        sum / windows
    }

    fn pair() -> impl Strategy<Value = (Picture, Picture)> {
        (11u32..16, 11u32..16).prop_flat_map(|(width, height)| {
            let bytes = || proptest::collection::vec(any::<u8>(), (3 * width * height) as usize);
            (bytes(), bytes()).prop_map(move |(a, b)| (picture(width, height, a), picture(width, height, b)))
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn ssim_is_its_definition_and_symmetric((a, b) in pair()) {
            let similarity = ssim(&a, &b).unwrap();
            prop_assert!((similarity - ssim_by_definition(&a, &b)).abs() < 1e-9);
            prop_assert!((similarity - ssim(&b, &a).unwrap()).abs() < 1e-12);
            prop_assert!((ssim(&a, &a).unwrap() - 1.0).abs() < 1e-12);
        }

        #[test]
        fn psnr_falls_with_every_change((a, b) in pair(), at in any::<prop::sample::Index>()) {
            let at = at.index(b.rgb.len());
            let mut worse = b.clone();
            worse.rgb[at] = if a.rgb[at] < 128 { 255 } else { 0 };
            prop_assert!(psnr(&a, &worse).unwrap() <= psnr(&a, &b).unwrap());
        }
    }

    #[test]
    fn psnr_by_hand() {
        let a = picture(2, 1, vec![10, 20, 30, 40, 50, 60]);
        let mut b = a.clone();
        assert_eq!(psnr(&a, &b).unwrap(), HIGHEST_PSNR);
        b.rgb[3] = 46;
        // MSE 6, so 10 log10(65025 / 6).
        assert!((psnr(&a, &b).unwrap() - 40.349_291_1).abs() < 1e-6);
        let (black, white) = (picture(1, 1, vec![0; 3]), picture(1, 1, vec![255; 3]));
        assert!(psnr(&black, &white).unwrap().abs() < 1e-12);
    }

    #[test]
    fn what_cannot_be_compared_is_an_error() {
        let good = picture(11, 11, vec![0; 363]);
        for bad in [picture(11, 12, vec![0; 396]), picture(11, 11, vec![0; 362]), picture(11, 11, Vec::new())] {
            assert!(psnr(&good, &bad).unwrap_err().is_bad_input());
            assert!(ssim(&bad, &good).unwrap_err().is_bad_input());
        }
        let empty = picture(0, 0, Vec::new());
        assert!(psnr(&empty, &empty).is_err());
        let huge = picture(u32::MAX, u32::MAX, vec![0; 3]);
        assert!(psnr(&huge, &huge).is_err() && ssim(&huge, &huge).is_err());
        let flat = picture(64, 10, vec![0; 1920]);
        assert!(ssim(&flat, &flat).unwrap_err().to_string().contains("11x11"));
        let one = [good];
        assert!(closeness(&one, &[]).is_err());
        assert_eq!(closeness(&one, &one).unwrap().psnr.worst, HIGHEST_PSNR);
    }
}
