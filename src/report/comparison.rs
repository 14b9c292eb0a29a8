//! The result of a comparison: plain data, no models.

use sdxl_pipeline::picture::Picture;
use serde::{Deserialize, Deserializer, Serialize};

/// Compressed models beside the dense one.
///
/// JSON has the fields in this order, without the pictures. A number that is not finite is written
/// as `null` and read back as NaN.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Comparison {
    /// Title of the report.
    pub title: String,
    /// The model's folder, as the user named it.
    pub model: String,
    /// Version of the program.
    pub version: String,
    /// The program or command that made the comparison.
    pub created_by: String,
    /// The device that ran the models: `cpu, 2 threads`, `cuda:0`.
    pub device: String,
    /// Prompts of the calibration.
    pub calibration: Vec<String>,
    /// Prompt and seed of every picture, in the order of each row's pictures and values.
    pub judged: Vec<Judged>,
    /// The uncompressed model, which is the reference.
    pub dense: Dense,
    /// The uncompressed model in another dtype, measured as the rows are: how far pictures differ
    /// by rounding alone. Its size and its cost are empty.
    #[serde(default)]
    pub noise_floor: Option<Row>,
    /// Name of the row that every other row is compared with; empty if there are no differences.
    #[serde(default)]
    pub baseline: String,
    /// The compressed models, in the order of the report.
    pub rows: Vec<Row>,
    /// Warnings about the comparison as a whole.
    pub warnings: Vec<String>,
    /// Explanations of the measurements, a sentence or two each.
    pub how: Vec<String>,
}

/// A picture that every model generates.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Judged {
    /// The prompt.
    pub prompt: String,
    /// Seed of the initial noise.
    pub seed: u64,
}

/// The uncompressed model.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Dense {
    /// Name in the report, for example `dense fp16`.
    pub name: String,
    /// Bytes of the UNet's files.
    pub bytes: u64,
    /// Stored bits per weight.
    #[serde(deserialize_with = "or_nan")]
    pub bits_per_weight: f64,
    /// The pictures of the first of [`Comparison::judged`].
    #[serde(skip)]
    pub pictures: Vec<Picture>,
}

/// A compressed model.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Row {
    /// Name in the report, for example `40% + 4-bit gs16`.
    pub name: String,
    /// The curve that this is a size of, in a sweep over sizes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub curve: Option<String>,
    /// The config as resolved.
    pub config_yaml: String,
    /// Sparsity that the config asks for, 0 to 1; none if it prunes nothing.
    pub sparsity_asked: Option<f64>,
    /// Fraction of zeros among the compressed weights as stored, 0 to 1.
    #[serde(deserialize_with = "or_nan")]
    pub sparsity_stored: f64,
    /// Stored bits per compressed weight, including masks, palettes and scales.
    #[serde(deserialize_with = "or_nan")]
    pub bits_per_weight: f64,
    /// Bytes of the UNet's container.
    pub bytes: u64,
    /// Bytes of the container's compressed weights, including masks, palettes and scales.
    pub compressed_weight_bytes: u64,
    /// ‖compressed - dense‖² / ‖dense‖² of the UNet's outputs, on calls outside of the calibration.
    #[serde(deserialize_with = "or_nan")]
    pub unet_error: f64,
    /// The same of each prompt's calls, in the order of the prompts; NaN where a prompt has none.
    #[serde(default, deserialize_with = "or_nans")]
    pub unet_error_by_prompt: Vec<f64>,
    /// ‖compressed - dense‖² / ‖dense‖² of the latents after each denoising step, mean over the
    /// judged pictures.
    #[serde(deserialize_with = "or_nans")]
    pub latent_error_by_step: Vec<f64>,
    /// The same after the last step.
    #[serde(default)]
    pub latent_error: Spread,
    /// Peak signal-to-noise ratio to the dense pictures, in dB, at most
    /// [`super::metrics::HIGHEST_PSNR`].
    pub psnr: Spread,
    /// Structural similarity to the dense pictures, at most 1.
    pub ssim: Spread,
    /// LPIPS distance to the dense pictures, if its weights were given.
    #[serde(default)]
    pub lpips: Option<Spread>,
    /// The means with their confidence intervals; none of a single prompt.
    #[serde(default)]
    pub intervals: Option<Measures>,
    /// The differences to the means of the baseline; none of the baseline itself.
    #[serde(default)]
    pub differences: Option<Measures>,
    /// Seconds that compressing took.
    #[serde(deserialize_with = "or_nan")]
    pub seconds: f64,
    /// The most memory held while compressing, in bytes, where it could be measured.
    pub peak_bytes: Option<u64>,
    /// The stages' output errors, in execution order.
    pub stages: Vec<StageError>,
    /// The compressed layers, in execution order.
    pub layers: Vec<LayerRow>,
    /// The pictures of the first of [`Comparison::judged`].
    #[serde(skip)]
    pub pictures: Vec<Picture>,
    /// Warnings about this model.
    pub warnings: Vec<String>,
}

/// A measure of several pictures.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Spread {
    /// The mean.
    #[serde(deserialize_with = "or_nan")]
    pub mean: f64,
    /// The median.
    #[serde(default = "nan", deserialize_with = "or_nan")]
    pub median: f64,
    /// The worst: the lowest where higher is better, else the highest.
    #[serde(deserialize_with = "or_nan")]
    pub worst: f64,
    /// The value of each picture, in the order of [`Comparison::judged`].
    #[serde(deserialize_with = "or_nans")]
    pub each: Vec<f64>,
}

impl Spread {
    /// Mean, median and lowest of `each`, of which higher is better; NaN if `each` is empty or has
    /// a NaN.
    #[must_use]
    pub fn of(each: Vec<f64>) -> Self {
        let worst = each.iter().copied().reduce(|a, b| if a.is_nan() || a < b { a } else { b }).unwrap_or(f64::NAN);
        Self::with_worst(each, worst)
    }

    /// Mean, median and highest of `each`, of which lower is better; NaN if `each` is empty or has
    /// a NaN.
    #[must_use]
    pub fn of_errors(each: Vec<f64>) -> Self {
        let worst = each.iter().copied().reduce(|a, b| if a.is_nan() || a > b { a } else { b }).unwrap_or(f64::NAN);
        Self::with_worst(each, worst)
    }

    fn with_worst(each: Vec<f64>, worst: f64) -> Self {
        let mean = each.iter().sum::<f64>() / each.len() as f64;
        let mut sorted = each.clone();
        sorted.sort_by(f64::total_cmp);
        let median = match sorted.len() {
            0 => f64::NAN,
            _ if mean.is_nan() => f64::NAN,
            count => (sorted[(count - 1) / 2] + sorted[count / 2]) / 2.0,
        };
        Spread { mean, median, worst, each }
    }
}

/// A number with its 95 % confidence interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The number, of all judged pictures.
    #[serde(deserialize_with = "or_nan")]
    pub value: f64,
    /// Lower end of the interval.
    #[serde(deserialize_with = "or_nan")]
    pub low: f64,
    /// Upper end of the interval.
    #[serde(deserialize_with = "or_nan")]
    pub high: f64,
}

/// An estimate for each measure of a row.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Measures {
    /// Of [`Row::unet_error`].
    pub unet_error: Estimate,
    /// Of the mean of [`Row::latent_error`].
    pub latent_error: Estimate,
    /// Of the mean PSNR, in dB.
    pub psnr: Estimate,
    /// Of the mean SSIM.
    pub ssim: Estimate,
    /// Of the mean LPIPS, if it was measured.
    pub lpips: Option<Estimate>,
}

/// Output error of a stage.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct StageError {
    /// Name of the stage, for example `down_blocks.0`.
    pub name: String,
    /// ‖compressed - dense‖² / ‖dense‖² of the stage's output.
    #[serde(deserialize_with = "or_nan")]
    pub error: f64,
}

/// A compressed layer.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct LayerRow {
    /// Checkpoint name, without `.weight`.
    pub name: String,
    /// Name of the layer's stage.
    pub stage: String,
    /// `Linear`, or `Conv2d` with its geometry.
    pub kind: String,
    /// Shape of the weight.
    pub shape: Vec<i64>,
    /// Stored bits per weight, including mask, palettes and scales.
    #[serde(deserialize_with = "or_nan")]
    pub bits_per_weight: f64,
    /// Fraction of zeros in the weight as stored, 0 to 1.
    #[serde(deserialize_with = "or_nan")]
    pub sparsity: f64,
    /// Stored bytes.
    pub bytes: u64,
    /// Number of calibration vectors in the layer's Hessian; none if it needed no Hessian.
    pub vectors: Option<u64>,
    /// ‖W - W'‖² / ‖W‖² of the weight W and the stored weight W'.
    #[serde(deserialize_with = "or_nan")]
    pub weight_error: f64,
    /// ‖X W - X P‖² / ‖X W‖² on the calibration inputs X, with P the pruned weight before
    /// palettization; none if the layer was not pruned.
    pub pruned_error: Option<f64>,
    /// ‖X W - X W'‖² / ‖X W‖² on the calibration inputs X; none if the layer has no calibration
    /// inputs.
    pub output_error: Option<f64>,
}

impl LayerRow {
    /// The output error, or the weight error if there is no output error.
    #[must_use]
    pub fn error(&self) -> f64 {
        self.output_error.unwrap_or(self.weight_error)
    }
}

impl Comparison {
    /// The comparison as indented JSON. Equal comparisons give equal bytes.
    #[must_use]
    pub fn to_json(&self) -> String {
        let mut text = serde_json::to_string_pretty(self).expect("JSON fails only for maps with odd keys, and there are no maps");
        text.push('\n');
        text
    }

    /// Reads the JSON of [`to_json`](Self::to_json). The result has no pictures.
    ///
    /// # Errors
    /// If the text is not JSON, or not of a comparison.
    pub fn from_json(text: &str) -> serde_json::Result<Self> {
        serde_json::from_str(text)
    }
}

fn nan() -> f64 {
    f64::NAN
}

pub(crate) fn or_nan<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

pub(crate) fn or_nans<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<f64>, D::Error> {
    let values = Vec::<Option<f64>>::deserialize(deserializer)?;
    Ok(values.into_iter().map(|value| value.unwrap_or(f64::NAN)).collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_spread_has_the_mean_and_the_lowest() {
        let spread = Spread::of(vec![30.0, 20.0, 40.0]);
        assert_eq!((spread.mean, spread.median, spread.worst), (30.0, 30.0, 20.0));
        assert!(Spread::of(Vec::new()).mean.is_nan());
        for each in [vec![f64::NAN, 1.0], vec![1.0, f64::NAN], vec![2.0, f64::NAN, 1.0]] {
            assert!(Spread::of(each.clone()).worst.is_nan());
            let errors = Spread::of_errors(each);
            assert!(errors.worst.is_nan() && errors.median.is_nan());
        }
        assert_eq!(Spread::of_errors(vec![3.0, 1.0, 2.0, 8.0]).median, 2.5);
        assert_eq!(Spread::of_errors(vec![3.0, 1.0, 2.0]).worst, 3.0);
    }

    #[test]
    fn fields_keep_their_order_and_odd_numbers_are_null() {
        let row = Row { unet_error: f64::NAN, latent_error_by_step: vec![0.5, f64::INFINITY], ..Row::default() };
        let text = Comparison { title: "t".into(), rows: vec![row], ..Comparison::default() }.to_json();
        let places: Vec<_> =
            ["\"title\"", "\"model\"", "\"judged\"", "\"dense\"", "\"rows\"", "\"unet_error\"", "\"psnr\"", "\"how\""]
                .map(|key| text.find(key).unwrap())
                .into();
        assert!(places.is_sorted());
        assert!(text.contains("\"unet_error\": null"));
        let back = Comparison::from_json(&text).unwrap();
        assert!(back.rows[0].unet_error.is_nan() && back.rows[0].latent_error_by_step[1].is_nan());
        assert_eq!(back.to_json(), text);
    }

    #[test]
    fn what_is_missing_is_an_error() {
        assert!(Comparison::from_json("{}").is_err());
        assert!(Comparison::from_json("").is_err());
    }

    proptest! {
        #[test]
        fn json_gives_back_every_number(
            numbers in proptest::collection::vec(any::<f64>().prop_filter("finite", |x| x.is_finite()), 5),
            bytes in any::<u64>(),
            name in any::<String>(),
            pruned in proptest::option::of(-1e300f64..1e300),
        ) {
            let layer = LayerRow { name: name.clone(), pruned_error: pruned, weight_error: numbers[0], ..LayerRow::default() };
            let row = Row {
                name,
                bytes,
                peak_bytes: Some(bytes),
                unet_error: numbers[1],
                latent_error_by_step: numbers.clone(),
                psnr: Spread::of(numbers),
                layers: vec![layer],
                ..Row::default()
            };
            let comparison = Comparison { rows: vec![row], ..Comparison::default() };
            prop_assume!(comparison.rows[0].psnr.mean.is_finite());
            prop_assert_eq!(&Comparison::from_json(&comparison.to_json()).unwrap(), &comparison);
        }
    }
}
